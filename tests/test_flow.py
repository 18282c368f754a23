"""One run of a copied model under labels: sites, places, and the copy itself."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchtrim
from torchtrim._copies import call_arguments, named_tensors, rebuild
from torchtrim._flow import row_of
from torchtrim._lenet import LeNet
from torchtrim._operators import pointwise, unknown
from torchtrim.errors import TraceError
from toys import Net


def test_sites_are_activation_calls_in_order() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.act(net.a(x))
        x = F.gelu(net.b(x))
        return net.out(net.act(net.c(x).clamp(0, 1)))

    modules = {"a": nn.Linear(3, 4), "b": nn.Linear(4, 5), "c": nn.Linear(5, 6), "out": nn.Linear(6, 2)}
    graph = torchtrim.trace(Net(forward, {**modules, "act": nn.ReLU(inplace=True)}), torch.zeros(2, 3))
    found = [(site.index, site.name, site.module, site.kind, site.shape) for site in graph.sites]
    assert found == [
        (0, "relu", "act", "rectifier", (2, 4)),
        (1, "gelu", "", "smooth", (2, 5)),
        (2, "clamp", "", "rectifier", (2, 6)),
        (3, "relu", "act", "rectifier", (2, 6)),
    ]
    for site, layer in zip(graph.sites, ["a", "b", "c", "c"], strict=True):
        (factor,) = site.labels.factors
        assert graph.root[factor.atoms].ravel().tolist() == graph.layers[layer].roots.tolist()


def test_named_tensors_are_distinct() -> None:
    model = LeNet()
    model.again = model.fc1
    model.register_buffer("mean", torch.zeros(1))
    assert set(named_tensors(model)) == {name for name, _ in LeNet().named_parameters()} | {"mean"}


def test_rebuild_replaces_and_copies() -> None:
    model = LeNet()
    model.again = model.fc1
    model.fc1.bias.mark = "kept"
    other = rebuild(model, {name: torch.zeros(tensor.shape) for name, tensor in named_tensors(model).items()})
    assert other.again is other.fc1 is not model.fc1
    assert isinstance(other.fc1.weight, nn.Parameter)
    assert other.fc1.weight.abs().sum() == 0 != model.fc1.weight.abs().sum()
    assert other.fc1.bias.mark == "kept"


def test_rebuild_copies_what_deepcopy_refuses() -> None:
    model = LeNet()
    model.cached = model.fc1.weight * 2
    other = rebuild(model, named_tensors(model))
    assert torch.equal(other.cached, model.cached)
    assert other.cached is not model.cached


def test_call_arguments() -> None:
    one, two = torch.zeros(1), torch.ones(1)
    assert call_arguments(one) == ((one,), {})
    assert call_arguments((one, two)) == ((one, two), {})
    assert call_arguments({"x": one}) == ((), {"x": one})


def test_outputs_of_any_kind_are_pinned() -> None:
    class Answer:
        def __init__(self, hidden: Tensor, parts: dict[str, list[Tensor]]) -> None:
            self.hidden, self.parts = hidden, parts

    class Model(LeNet):
        def forward(self, images):
            first = F.relu(self.conv1(images))
            second = F.relu(self.conv2(F.max_pool2d(first, 2)))
            return Answer(first, {"logits": [second]})

    graph = torchtrim.trace(Model(), torch.zeros(1, 1, 28, 28))
    assert graph.locked == dict.fromkeys(("conv1", "conv2"), "it is an output of the model")


class Slots:
    __slots__ = ("hidden", "itself")

    def __init__(self, hidden: Tensor) -> None:
        self.hidden, self.itself = hidden, self


@pytest.mark.parametrize("answer", [Slots, lambda hidden: {hidden}, lambda hidden: {"a": [(hidden,)]}])
def test_outputs_in_objects_without_a_dictionary(answer: Callable[[Tensor], object]) -> None:
    model = Net(lambda net, x: answer(net.a(x)), {"a": nn.Linear(3, 4)})
    assert torchtrim.trace(model, torch.zeros(2, 3)).locked == {"a": "it is an output of the model"}


def test_an_iterator_is_no_output() -> None:
    model = Net(lambda net, x: iter([net.a(x)]), {"a": nn.Linear(3, 4)})
    with pytest.raises(TraceError, match=r"returns an iterator.*return a list"):
        torchtrim.trace(model, torch.zeros(2, 3))


@pytest.mark.parametrize("read", [lambda x: torch.from_numpy(x.numpy() * 2)[0, 0], lambda x: x.tolist()[0][0]])
def test_data_that_leave_pytorch(read: Callable[[Tensor], float]) -> None:
    model = Net(lambda net, x: net.out(net.a(x) * read(net.a(x))), {"a": nn.Linear(3, 4), "out": nn.Linear(4, 2)})
    assert torchtrim.trace(model, torch.ones(2, 3)).locked["a"] == "its data leave PyTorch"


def test_an_operator_without_a_row_is_not_guessed() -> None:
    assert row_of("cdist", torch.ops.aten._cdist_forward.default) is unknown
    assert row_of("erfinv", torch.ops.aten.erfinv.default) is pointwise
    assert row_of("torchvision::nms", torch.ops.aten._cdist_forward.default) is unknown


@pytest.mark.parametrize("enabled", [True, False])
def test_the_fused_path_of_transformers_is_put_back(enabled: bool) -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        torchtrim.trace(LeNet(), torch.zeros(1, 1, 28, 28))
        assert torch.backends.mha.get_fastpath_enabled() == enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_code_that_looks_at_its_inputs_or_at_constants_needs_no_data() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[0], x.shape[0], dtype=torch.bool, device=x.device).tril()
        mixed = net.a(x).relu() if (x[:, 0] >= 0).all() and mask.any(-1).all() else x * torch.nan
        return net.out(mixed)[mask[-1].nonzero()[:, 0]]

    model = Net(forward, {"a": nn.Linear(3, 4), "out": nn.Linear(4, 2)})
    graph = torchtrim.trace(model, torch.ones(2, 3))
    assert graph.device == "meta"
    assert set(graph.locked) == {"out"}
    with torch.device("meta"):
        hollow = Net(forward, {"a": nn.Linear(3, 4), "out": nn.Linear(4, 2)})
    assert set(torchtrim.trace(hollow, torch.ones(2, 3)).locked) == {"out"}


def test_random_state_is_put_back_when_real_tensors_are_needed() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.out(F.dropout(net.a(x), 0.5, True) if net.a(x).sum() < 9e9 else x)

    model = Net(forward, {"a": nn.Linear(3, 4), "out": nn.Linear(4, 2)})
    state = torch.random.get_rng_state()
    assert torchtrim.trace(model, torch.zeros(2, 3)).device == "cpu"
    assert torch.equal(torch.random.get_rng_state(), state)
