"""A proof that cannot fail proves nothing: wrongly cut models, each of which must be found out."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchtrim
import torchtrim._graph
from torchtrim import _trial
from torchtrim._copies import named_tensors, rebuild
from torchtrim._lenet import LeNet
from torchtrim._neurons import Kept, NeuronGraph, cut, silence
from torchtrim._proof import prove
from torchtrim._surgery_attributes import set_attributes
from torchtrim._trial import trial
from toys import TOYS, Net

EXAMPLE = torch.randn(2, 1, 28, 28)


def trimmed(model: nn.Module, graph: NeuronGraph, kept: Kept, **replaced: Tensor) -> nn.Module:
    small = rebuild(model, cut(graph, named_tensors(model), kept) | replaced)
    set_attributes(model, small, graph, kept)
    return small


def failure(model: nn.Module, graph: NeuronGraph, small: nn.Module, kept: Kept) -> tuple[set[int], str]:
    found = prove(model, graph, small, kept)
    assert found is not None
    return found.blamed, found.reason


def test_a_right_cut_is_proved() -> None:
    model = LeNet()
    graph = torchtrim.trace(model, EXAMPLE)
    kept = trial(graph)
    assert not kept.all()
    assert prove(model, graph, trimmed(model, graph, kept), kept) is None


WRONG: dict[str, Callable[[nn.Module], Tensor]] = {
    "fc1.weight": lambda model: model.fc1.weight,  # a consumer that was not cut
    "conv2.bias": lambda model: model.conv2.bias,  # a bias that was not
    "conv2.weight": lambda model: model.conv2.weight[1:],  # another neuron
    "fc1.bias": lambda model: model.fc1.bias.flip(0),  # not in order
}


@pytest.mark.parametrize("name", WRONG)
def test_a_tensor_that_is_cut_wrongly(name: str) -> None:
    model = LeNet()
    graph = torchtrim.trace(model, EXAMPLE)
    kept = graph.bodies({"conv2": [3], "fc1": [0]})
    wrong = WRONG[name](model).detach()
    small = trimmed(model, graph, kept)
    if wrong.shape == small.get_parameter("fc1.bias").shape:
        wrong = wrong[:499]
    blamed, reason = failure(model, graph, trimmed(model, graph, kept, **{name: wrong}), kept)
    assert name in reason
    assert set(graph.layers[name.split(".", maxsplit=1)[0]].roots.tolist()) <= blamed


def test_two_columns_that_are_swapped() -> None:
    """Sizes are right everywhere; only the values tell."""
    model = LeNet()
    graph = torchtrim.trace(model, EXAMPLE)
    kept = graph.bodies({"fc1": [7]})
    small = trimmed(model, graph, kept)
    small.fc2.weight.data = small.fc2.weight.data[:, [1, 0, *range(2, 499)]]
    assert failure(model, graph, small, kept)[1] == "fc2.weight is not the original without the removed neurons"


@pytest.mark.parametrize("permuted", ["conv2.weight", "conv2.bias"])
def test_permuted_rows(permuted: str) -> None:
    """Rows in another order than the consumer reads them: the labels that the tensors carry say so."""
    model = LeNet()
    graph = torchtrim.trace(model, EXAMPLE)
    kept = graph.bodies({"conv2": [0]})
    axes = {**graph.axes, permuted: (graph.axes[permuted][0][::-1].copy(), *graph.axes[permuted][1:])}
    wrong = replace(graph, axes=axes)
    blamed, _ = failure(model, wrong, trimmed(model, wrong, kept), kept)
    assert blamed == set(graph.layers["conv2"].roots.tolist())


def test_pieces_that_were_not_tied() -> None:
    """Gates whose halves lost different neurons have the right shapes and the wrong values."""
    toy = TOYS["gated unit"]
    model = toy.build()
    graph = torchtrim.trace(model, torch.randn(toy.shape))
    separate = np.arange(len(graph.root), len(graph.root) + 16)
    root = np.concatenate([graph.root, separate])
    axes = {**graph.axes, "a.weight": (separate, graph.axes["a.weight"][1]), "a.bias": (separate,)}
    wrong = replace(graph, axes=axes, root=root)
    kept = np.ones(len(root), bool)
    kept[separate[[1, 10]]] = False
    kept[graph.layers["a"].roots[1]] = False
    assert prove(model, wrong, trimmed(model, wrong, kept), kept) is not None


def test_another_path_through_the_code() -> None:
    """Code that looks at its own width and does something else."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        return net.out(x.relu() if x.shape[1] == 8 else x.tanh())

    model = Net(forward, {"a": nn.Linear(3, 8), "out": nn.Linear(8, 2)})
    assert "another operator runs" in torchtrim.trace(model, torch.zeros(2, 3)).locked["a"]


@pytest.mark.parametrize("number", [lambda x: x.shape[1], lambda x: x.shape[1] ** -0.5, lambda x: float(x.shape[1])])
def test_a_number_made_of_a_width(number: Callable[[Tensor], float]) -> None:
    modules = {"a": nn.Linear(3, 8), "out": nn.Linear(8, 2)}
    model = Net(lambda net, x: net.out(net.a(x).relu() * number(net.a(x))), modules)
    assert "a number depends on the width" in torchtrim.trace(model, torch.zeros(2, 3)).locked["a"]


@pytest.mark.parametrize("tensor", [lambda n: torch.tensor(float(n)).sqrt(), lambda n: torch.full((), n)])
def test_a_tensor_made_of_a_width(tensor: Callable[[int], Tensor]) -> None:
    modules = {"a": nn.Linear(3, 8), "out": nn.Linear(8, 2)}
    model = Net(lambda net, x: net.out(net.a(x).relu() / tensor(net.a(x).shape[1])), modules)
    assert "a number depends on the width" in torchtrim.trace(model, torch.zeros(2, 3)).locked["a"]


SIZED: dict[str, Callable[[Tensor], Tensor]] = {
    "a tensor": lambda h: torch.tensor(h.shape[1], device=h.device),
    "a list": lambda h: torch.tensor([h.shape[1]]),
    "a list that is moved": lambda h: torch.tensor([h.shape[1]]).to(h.device),
    "a tensor like another": lambda h: h.new_tensor(h.shape[1]),
    "an array": lambda h: torch.from_numpy(np.array([h.shape[1]])).to(h.device),
    "ones that are summed": lambda h: torch.ones_like(h).sum(1, keepdim=True),
    "ones that are multiplied": lambda h: torch.ones_like(h).mul(2).prod(1, keepdim=True),
    "a norm of ones": lambda h: torch.ones_like(h).norm(),
    "ones times ones": lambda h: (torch.ones_like(h) @ torch.ones_like(h).T)[:1, :1],
    "softmax of ones": lambda h: torch.ones_like(h).softmax(1)[:, :1],
}


@pytest.mark.parametrize("name", SIZED)
def test_a_size_that_enters_in_a_tensor(name: str) -> None:
    modules = {"a": nn.Linear(3, 8), "out": nn.Linear(1, 2)}

    def forward(net: Net, x: Tensor) -> Tensor:
        h = net.a(x).relu()
        return net.out(h.sum(1, keepdim=True) / SIZED[name](h))

    assert "a" in torchtrim.trace(Net(forward, modules), torch.randn(4, 3)).locked


INDICES: dict[str, Callable[[Tensor], Tensor]] = {
    "argsort": lambda h: h.argsort(0),
    "sort": lambda h: h.sort(0)[1],
    "topk": lambda h: h.topk(2, 0)[1],
    "max": lambda h: h.max(0, keepdim=True)[1],
}


@pytest.mark.parametrize("name", INDICES)
def test_indices_of_a_silent_neuron_are_not_zero(name: str) -> None:
    modules = {"a": nn.Linear(3, 8), "out": nn.Linear(1, 2)}
    model = Net(lambda net, x: net.out(INDICES[name](net.a(x).relu()).float().sum(1, keepdim=True)), modules)
    assert "not zero" in torchtrim.trace(model, torch.randn(4, 3)).locked["a"]


def halves(x: Tensor) -> Tensor:
    return x.view(len(x), -1, 2).transpose(1, 2).flatten(1)


def interleaved(x: Tensor) -> Tensor:
    return x.view(len(x), 2, -1).transpose(1, 2).flatten(1)


REORDERED: dict[str, Callable[[Tensor], Tensor]] = {
    "even and odd": halves,
    "shuffled": interleaved,
    "shuffled twice": lambda x: interleaved(interleaved(x)),
    "shuffled, even and odd": lambda x: halves(interleaved(x)),
    "rolled": lambda x: x.roll(4, 1) + x,
    "halves rolled": lambda x: x.roll(1, 1) + x,
    "swapped halves": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
}


@pytest.mark.parametrize("name", REORDERED)
def test_positions_of_one_body_have_an_order(name: str) -> None:
    """Several copies of a neuron that change places: right, or found out, but never wrong."""
    modules = {"a": nn.Linear(3, 8), "out": nn.Linear(8, 2)}
    model = Net(lambda net, x: net.out(REORDERED[name](net.a(x).relu())), modules).double()
    example = torch.randn(4, 3, dtype=torch.float64)
    graph = torchtrim.trace(model, example)
    if graph.layers["a"].locked:
        return
    units = np.unique(graph.layers["a"].roots)
    for left in range(1, 2 ** len(units) - 1):
        kept = np.ones(len(graph.root), bool)
        kept[[unit for index, unit in enumerate(units.tolist()) if not left >> index & 1]] = False
        small = trimmed(model, graph, kept)
        if prove(model, graph, small, kept) is None:
            torch.testing.assert_close(small(example), silence(model, graph, kept)(example), rtol=1e-9, atol=1e-12)


def test_many_faults_are_found_in_one_pass() -> None:
    """Each failed proof blames all that it can see, and nothing else."""

    def forward(net: Net, x: Tensor) -> Tensor:
        for layer in (net.a, net.b, net.c):
            x = layer(x).relu()
            x = x / x.shape[1]
        return net.out(net.d(x).relu())

    model = Net(forward, {"a": nn.Linear(3, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8), "d": nn.Linear(8, 8),
                          "out": nn.Linear(8, 2)})  # fmt: skip
    tries: list[object] = []
    original = _trial._try
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_trial, "_try", lambda *a: (tries.append(a), original(*a))[1])
        graph = torchtrim.trace(model, torch.zeros(2, 3))
    assert set(graph.locked) == {"a", "b", "c", "out"}
    assert len(tries) == 2


def test_data_that_decides_what_is_tied() -> None:
    """The branch that the masked model takes joins what the traced one did not: it stays."""

    def forward(net: Net, x: Tensor) -> Tensor:
        a, b = net.a(x).relu(), net.b(x).relu()
        return net.out(torch.cat([a, b], 1)) + (0 if a.sum() > 4.5 else net.other(a + b))

    model = Net(forward, {"a": nn.Linear(3, 4), "b": nn.Linear(3, 4), "out": nn.Linear(8, 2), "other": nn.Linear(4, 2)})
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    example = torch.full((1, 3), 0.5)
    graph = torchtrim.trace(model, example)
    assert graph.device == "cpu"
    assert not any("other" in layer for layer in graph.layers)  # the trace took the first branch
    assert "data decides" in graph.locked["a"]


def test_data_that_decides_nothing_that_matters() -> None:
    toy = TOYS["control flow that depends on data"]
    graph = torchtrim.trace(toy.build(), torch.randn(toy.shape))
    assert graph.device == "cpu"
    assert set(graph.locked) == {"out"}


def width(net: Net, x: Tensor) -> int:
    return net.a(x).shape[1]


READS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "a slice": lambda net, x: net.out(net.a(x).relu()) + x[:, width(net, x) - 5 : width(net, x) - 2],
    "a position": lambda net, x: net.out(net.a(x).relu()) * x[0, width(net, x) % 6],
    "a shape": lambda net, x: net.out(net.a(x).relu()) + x.view(-1, 2 if width(net, x) == 8 else 3)[:4, :1],
    "an order": lambda net, x: net.out(net.a(x)) + x[:, :4].permute([(1, 0), (0, 1)][width(net, x) == 8])[:, :3],
    "one of two tensors": lambda net, x: net.out(net.a(x).relu()) + (x * 1, x * 2)[width(net, x) < 8][:, :3],
    "one of two results": lambda net, x: x.split(3, 1)[width(net, x) < 8] + net.out(net.a(x).relu()),
    "one of two outputs": lambda net, x: (net.out(net.a(x)), net.out(net.a(x) * 2))[width(net, x) < 8],
    "one of two copies": lambda net, x: net.out(torch.cat([net.a(x), net.a(x)], 1).chunk(2, 1)[width(net, x) < 8]),
    "a number by a little": lambda net, x: net.out(net.a(x).relu()) * (1 + 1e-7 * width(net, x)),
}  # fmt: skip


@pytest.mark.parametrize("name", READS)
def test_what_is_read_depends_on_a_width(name: str) -> None:
    """Shapes are right everywhere, and no labelled tensor is read differently."""
    model = Net(READS[name], {"a": nn.Linear(6, 8), "out": nn.Linear(8, 3)})
    assert "depends on the width" in torchtrim.trace(model, torch.zeros(4, 6)).locked["a"]


def overwritten(x: Tensor, write: Callable[[Tensor], object]) -> Tensor:
    write(x)
    return x


WRITES: dict[str, Callable[[Tensor], object]] = {
    "data": lambda h: h.data.sigmoid_(),
    "detach": lambda h: h.detach().sigmoid_(),
    "out": lambda h: torch.sigmoid(h, out=h.detach()),
    "a part of data": lambda h: h.data[:, :4].add_(1),
    "another name": lambda h: h.view(-1).detach().view(4, -1).add_(1),
}


@pytest.mark.parametrize("name", WRITES)
def test_memory_that_is_written_to_under_another_name(name: str) -> None:
    modules = {"a": nn.Linear(6, 8), "b": nn.Linear(1, 8), "out": nn.Linear(8, 3)}
    model = Net(lambda net, x: net.out(net.b(overwritten(net.a(x), WRITES[name]).sum(1, True))), modules)
    graph = torchtrim.trace(model, torch.zeros(4, 6))
    assert {"a": "its memory is written to under another name"}.items() <= graph.locked.items()
    assert "b" not in graph.locked


def test_a_fault_that_blames_nobody_locks_what_fails_alone() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        picked = x[:, width(net, x) - 3 : width(net, x)] * 2
        return net.out(net.b(net.a(x).relu()).relu()) + picked

    modules = {"a": nn.Linear(6, 6), "b": nn.Linear(6, 8), "out": nn.Linear(8, 3)}
    graph = torchtrim.trace(Net(forward, modules), torch.zeros(4, 6))
    assert set(graph.locked) == {"a", "out"}
