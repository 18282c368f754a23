"""The oracle: a trimmed model computes what the masked original does, in float64; and what trimming leaves alone."""

import copy
import warnings

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import torchtrim
from torchtrim import LayerPlan, Plan, _surgery
from torchtrim._lenet import LeNet
from torchtrim._neurons import NeuronGraph
from torchtrim._proof import Failure
from torchtrim.errors import PlanError, TorchtrimWarning, TraceError
from torchtrim.testing import random_plan
from toys import Net, assert_trim_equals_mask, randomised

OUTPUT = "it is an output of the model"
# model, an image size, another image size (the same where the model takes only one), layers that are locked
MODELS = [
    ("alexnet", 64, 96, {"classifier.6"}),
    ("densenet121", 64, 80, {"classifier"}),
    ("efficientnet_b0", 64, 96, {"classifier.1"}),
    ("googlenet", 64, 96, {"fc", "aux1.fc2", "aux2.fc2"}),
    ("inception_v3", 299, 299, {"fc", "AuxLogits.fc"}),
    ("mnasnet0_5", 64, 96, {"classifier.1"}),
    ("mobilenet_v2", 64, 96, {"classifier.1"}),
    ("mobilenet_v3_large", 64, 96, {"classifier.3"}),
    ("mobilenet_v3_small", 64, 96, {"classifier.3"}),
    ("regnet_y_400mf", 64, 96, {"fc"}),
    ("resnet18", 64, 96, {"fc"}),
    ("resnet50", 64, 96, {"fc"}),
    ("resnext50_32x4d", 64, 96, {"fc"}),
    ("squeezenet1_1", 64, 96, {"classifier.1"}),
    ("vgg11", 64, 96, {"classifier.6"}),
    ("vgg11_bn", 64, 96, {"classifier.6"}),
    ("vgg16", 64, 64, {"classifier.6"}),
    ("vgg16_bn", 64, 64, {"classifier.6"}),
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Threads that wait for each other on a busy machine take far longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def built(name: str) -> nn.Module:
    options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    torch.manual_seed(0)
    return randomised(torchvision.models.get_model(name, num_classes=10, **options))


def images(count: int, size: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(count, channels, size, size, dtype=torch.float64)


# a gigabyte of weights each: the normal run has one of the four
LARGE = {"vgg11", "vgg11_bn", "vgg16"}


@pytest.mark.parametrize(
    ("name", "size", "other", "locked"),
    [pytest.param(*row, id=row[0], marks=pytest.mark.slow if row[0] in LARGE else ()) for row in MODELS],
)
def test_models_of_torchvision(name: str, size: int, other: int, locked: set[str]) -> None:
    model = built(name)
    graph = torchtrim.trace(model, images(2, size))
    assert graph.locked == dict.fromkeys(locked, OUTPUT)
    assert all(layer.removable.all() for layer in graph.layers.values() if not layer.locked)
    assert_trim_equals_mask(model, random_plan(graph), images(2, size), images(1, other))


def test_shufflenet_keeps_its_pieces_in_proportion() -> None:
    """Half of what leaves a block passes through the next one as it is, so that halves of halves must lose alike.

    In the third stage, seven times in a row, all its 48 channels.
    """
    model = built("shufflenet_v2_x0_5")
    graph = torchtrim.trace(model, images(2, 64))
    stream = {"fc", "stage3.0.branch1.2", "stage4.0.branch1.0", *(f"stage3.{block}.branch2.5" for block in range(8))}
    assert graph.locked.keys() == stream
    assert_trim_equals_mask(model, random_plan(graph), images(2, 64), images(1, 96))


def test_auxiliary_classifiers_are_trimmed_too() -> None:
    """In training mode, where they run; dropout off, so that both models draw nothing."""
    model = built("googlenet").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    example = images(2, 64)
    plan = random_plan(torchtrim.trace(model, example))
    assert {"aux1.fc1", "aux2.fc1"} <= plan.removed.keys()
    small, silent = torchtrim.trim(model, plan, example), torchtrim.mask(model, plan, example)
    for found, expected in zip(small(example), silent(example), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_lenet() -> None:
    model = randomised(LeNet())
    graph = torchtrim.trace(model, images(2, 28, 1))
    assert graph.locked == {"fc2": OUTPUT}
    small = assert_trim_equals_mask(model, random_plan(graph), images(2, 28, 1), images(5, 28, 1))
    assert (small.conv2.out_channels, small.fc1.in_features) == (35, 35 * 16)


def test_lenet_widths_follow() -> None:
    small = torchtrim.trim(LeNet(), Plan({"conv2": LayerPlan(50, tuple(range(9)))}), torch.zeros(2, 1, 28, 28))
    assert (small.conv2.out_channels, small.fc1.in_features) == (41, 41 * 16)
    assert small.fc1.weight.shape == (500, 656)


# ------------------------------------------------------------------ what cannot be asked for


def test_refuses_the_outputs_of_the_model() -> None:
    with pytest.raises(PlanError, match=r"fc2.*output of the model"):
        torchtrim.trim(LeNet(), Plan({"fc2": LayerPlan(10, (0,))}), torch.zeros(2, 1, 28, 28))


def test_refuses_the_last_neuron_of_a_layer_that_is_tied_to_another() -> None:
    """Each layer's own plan leaves it some neurons; together they leave `b` none."""
    modules = {"a": nn.Linear(3, 4), "b": nn.Linear(3, 4), "out": nn.Linear(4, 2)}
    model = Net(lambda net, x: net.out(net.a(x) + net.b(x)), modules)
    plan = Plan({"a": LayerPlan(4, (0, 1)), "b": LayerPlan(4, (2, 3))})
    with pytest.raises(PlanError, match="would lose all its 4 neurons"):
        torchtrim.trim(model, plan, torch.zeros(2, 3))


def test_inputs_of_the_model_stay() -> None:
    model = Net(lambda net, x: net.out(x + net.a(x)), {"a": nn.Linear(3, 3), "out": nn.Linear(3, 2)})
    with pytest.raises(PlanError, match="combined with a tensor of fixed size"):
        torchtrim.trim(model, Plan({"a": LayerPlan(3, (0,))}), torch.zeros(2, 3))


def test_an_example_that_the_model_cannot_take_names_the_place() -> None:
    with pytest.raises(TraceError, match=r"LeNet cannot run on the example: RuntimeError.*\(in conv1\)"):
        torchtrim.trace(LeNet(), torch.zeros(2, 3, 28, 28))


def test_a_norm_of_weights_keeps_what_it_reads() -> None:
    """Without a dead neuron's columns the others would be longer."""
    consumers = {"new": nn.utils.parametrizations.weight_norm(nn.Linear(8, 3)), "old": _old_weight_norm(0),
                 "transposed": _old_weight_norm(1)}  # fmt: skip
    locked = {
        name: torchtrim.trace(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), one), torch.zeros(2, 3)).locked.get("0")
        for name, one in consumers.items()
    }
    assert "weights are normed" in (locked["new"] or "")
    assert "weights are normed" in (locked["old"] or "")
    assert locked["transposed"] is None  # there every column has a length of its own


def test_mask_of_a_weight_norm_along_the_columns() -> None:
    model = randomised(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), _old_weight_norm(1)))
    assert_trim_equals_mask(model, Plan({"0": LayerPlan(8, (1, 5))}), torch.randn(4, 3, dtype=torch.float64))


def test_mask_tells_weight_norm_by_its_module() -> None:
    """A parameter that is only called like a direction is zeroed as any other."""
    modules = {"weight_v": nn.Parameter(torch.randn(8, 3)), "out": nn.Linear(8, 2)}
    model = Net(lambda net, x: net.out(x @ net.weight_v.T), modules).double()
    silent = torchtrim.mask(model, Plan({"weight_v": LayerPlan(8, (1,))}), torch.zeros(2, 3, dtype=torch.float64))
    assert not silent.weight_v[1].any()


def _old_weight_norm(axis: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(8, 3), dim=axis)


# ------------------------------------------------------------------ what survives


class Everything(nn.Module):
    """One of each thing that a trim could lose."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Conv2d(8, 8, 1, bias=False)
        self.third = nn.Conv2d(8, 8, 1, bias=False)
        self.out = nn.Linear(8, 4)
        self.third.weight = self.second.weight
        self.register_buffer("scale", torch.rand(8, 1, 1))
        self.register_buffer("unsaved", torch.ones(8, 1, 1), persistent=False)
        self.note = {"epoch": 3}

    def forward(self, x):
        x = self.drop(self.norm(self.first(x)).relu())
        return self.out((self.third(self.second(x).relu()) * self.scale + self.unsaved).mean((2, 3)))


EXAMPLE = torch.randn(2, 3, 8, 8)
PLAN = Plan({"first": LayerPlan(8, (1, 5)), "second": LayerPlan(8, (1, 5))})


@pytest.fixture
def everything() -> Everything:
    torch.manual_seed(0)
    return Everything().eval()


def test_trim_equals_mask_with_one_of_each(everything: Everything) -> None:
    assert_trim_equals_mask(everything.double(), PLAN, EXAMPLE.double())


def test_gradient_flags_and_marks_of_parameters(everything: Everything) -> None:
    everything.first.weight.requires_grad_(False)
    everything.first.bias.no_weight_decay = True
    everything(EXAMPLE).sum().backward()
    small = torchtrim.trim(everything, PLAN, EXAMPLE)
    flags = {name: parameter.requires_grad for name, parameter in everything.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in small.named_parameters()} == flags
    assert small.first.bias.no_weight_decay is True
    assert everything.out.weight.grad is not None
    assert all(parameter.grad is None and parameter.is_leaf for parameter in small.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types(everything: Everything, dtype: torch.dtype) -> None:
    small = torchtrim.trim(everything.to(dtype), PLAN, EXAMPLE.to(dtype))
    assert {tensor.dtype for tensor in small.state_dict().values()} == {dtype, torch.int64}
    assert small(EXAMPLE.to(dtype)).dtype == dtype


def test_memory_format(everything: Everything) -> None:
    small = torchtrim.trim(everything.to(memory_format=torch.channels_last), PLAN, EXAMPLE)
    assert small.first.weight.is_contiguous(memory_format=torch.channels_last)
    assert not small.first.weight.is_contiguous()


def test_tied_parameters_stay_one(everything: Everything) -> None:
    small = torchtrim.trim(everything, PLAN, EXAMPLE)
    assert small.third.weight is small.second.weight
    assert small.third.weight.shape == (6, 6, 1, 1)


@pytest.mark.parametrize("removed", [(), (1,)])
def test_parameters_that_share_memory_still_do(removed: tuple[int, ...]) -> None:
    modules = {"first": nn.Linear(3, 4), "a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "out": nn.Linear(4, 2)}
    model = Net(lambda net, x: net.out(net.b(net.a(net.first(x)).relu()).relu()), modules)
    model.b.weight = nn.Parameter(model.a.weight.detach())
    assert model.b.weight is not model.a.weight
    small = torchtrim.trim(model, Plan({"first": LayerPlan(4, removed)}), torch.zeros(2, 3))
    assert small.b.weight.shape == (4 - len(removed), 4 - len(removed))
    assert small.b.weight.data_ptr() == small.a.weight.data_ptr()
    assert small.b.weight.data_ptr() != model.a.weight.data_ptr()


def test_buffers_are_cut_and_keep_what_they_are(everything: Everything) -> None:
    small = torchtrim.trim(everything, PLAN, EXAMPLE)
    assert torch.equal(small.scale, everything.scale[[0, 2, 3, 4, 6, 7]])
    assert small.unsaved.shape == (6, 1, 1)
    assert "unsaved" not in small.state_dict()
    assert small.norm.running_mean.shape == (6,)
    assert small.note == {"epoch": 3}


def test_modes_of_every_module(everything: Everything) -> None:
    everything.train()
    everything.norm.eval()
    modes = {name: module.training for name, module in everything.named_modules()}
    small = torchtrim.trim(everything, PLAN, EXAMPLE)
    assert {name: module.training for name, module in small.named_modules()} == modes
    assert {name: module.training for name, module in everything.named_modules()} == modes


def test_hooks_of_the_user(everything: Everything) -> None:
    seen: list[tuple[int, ...]] = []
    everything.first.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    small = torchtrim.trim(everything, PLAN, EXAMPLE)
    seen.clear()
    small(EXAMPLE)
    assert seen == [(2, 6, 6, 6)]
    assert len(everything.first._forward_hooks) == len(small.first._forward_hooks) == 1
    assert not everything.first._forward_pre_hooks
    assert not small.norm._forward_hooks


def test_the_model_is_left_as_it_was(everything: Everything) -> None:
    before = copy.deepcopy(everything.state_dict())
    identities = {name: id(tensor) for name, tensor in everything.named_parameters()}
    versions = [tensor._version for tensor in everything.state_dict().values()]
    random = torch.random.get_rng_state()
    torchtrim.mask(everything, PLAN, EXAMPLE)
    torchtrim.trim(everything, PLAN, EXAMPLE)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert {name: id(tensor) for name, tensor in everything.named_parameters()} == identities
    assert [tensor._version for tensor in everything.state_dict().values()] == versions
    assert all(torch.equal(tensor, before[name]) for name, tensor in everything.state_dict().items())
    assert not any(hasattr(tensor, "_torchtrim_labels") for tensor in everything.parameters())


def test_a_model_that_raises_is_left_as_it_was() -> None:
    def forward(net: Net, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no such thing")

    model = Net(forward, {"a": nn.Linear(3, 3)})
    fused = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(TraceError, match="ValueError: no such thing"):
        torchtrim.trace(model, torch.zeros(2, 3))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled() == fused


def test_a_trimmed_model_shares_no_memory_with_its_original(everything: Everything) -> None:
    small = torchtrim.trim(everything, PLAN, EXAMPLE)
    theirs = {tensor.data_ptr() for tensor in everything.state_dict().values()}
    assert theirs.isdisjoint(tensor.data_ptr() for tensor in small.state_dict().values())


def test_a_trimmed_model_is_an_ordinary_one(everything: Everything) -> None:
    small = torchtrim.trim(everything, PLAN, EXAMPLE)
    again = copy.deepcopy(small)
    for tensor in again.state_dict().values():
        tensor.zero_()
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(EXAMPLE), small(EXAMPLE))
    exported = torch.export.export(small, (EXAMPLE,)).module()
    torch.testing.assert_close(exported(EXAMPLE), small(EXAMPLE))


def test_a_trimmed_model_trains(everything: Everything) -> None:
    small = torchtrim.trim(everything, PLAN, EXAMPLE).train()
    before = copy.deepcopy(small.state_dict())
    optimizer = torch.optim.SGD(small.parameters(), 0.1, momentum=0.9)
    small(EXAMPLE).square().mean().backward()
    optimizer.step()
    changed = {name for name, tensor in small.state_dict().items() if not torch.equal(tensor, before[name])}
    changed.discard("first.bias")  # batch norm takes it away, so that its gradient is zero, or what rounding left of it
    assert changed == set(before) - {"scale", "first.bias"}
    assert small.third.weight is small.second.weight


def test_trims_of_trims(everything: Everything) -> None:
    """A plan in two steps is the plan in one."""
    everything.double()
    example = EXAMPLE.double()
    once = torchtrim.trim(everything, PLAN, example)
    half = torchtrim.trim(everything, Plan({"first": LayerPlan(8, (5,)), "second": LayerPlan(8, (5,))}), example)
    twice = torchtrim.trim(half, Plan({"first": LayerPlan(7, (1,)), "second": LayerPlan(7, (1,))}), example)
    assert all(torch.equal(tensor, once.state_dict()[name]) for name, tensor in twice.state_dict().items())


def test_inputs_may_be_tuples_or_keywords() -> None:
    model = Net(lambda net, x, y: net.out(net.a(x).relu() * net.b(y)), {
        "a": nn.Linear(3, 4), "b": nn.Linear(2, 4), "out": nn.Linear(4, 2)})  # fmt: skip
    graph: NeuronGraph = torchtrim.trace(model, (torch.zeros(2, 3), torch.zeros(2, 2)))
    assert np.array_equal(graph.layers["a"].roots, graph.layers["b"].roots)

    class Keywords(LeNet):
        def forward(self, *, pictures):
            return super().forward(pictures)

    assert set(torchtrim.trace(Keywords(), {"pictures": torch.zeros(2, 1, 28, 28)}).layers) == set(LeNet()._modules)


def test_what_a_trace_found_serves_in_place_of_the_example() -> None:
    model, example = LeNet().double(), torch.randn(2, 1, 28, 28, dtype=torch.float64)
    graph = torchtrim.trace(model, example)
    plan = random_plan(graph)
    for carry_out in (torchtrim.trim, torchtrim.mask):
        assert torch.equal(carry_out(model, plan, graph)(example), carry_out(model, plan, example)(example))


def test_what_was_found_of_another_model_does_not_serve() -> None:
    model, example = LeNet(), torch.randn(2, 1, 28, 28)
    plan = random_plan(torchtrim.trace(model, example))
    small = torchtrim.trim(model, plan, example)
    with pytest.raises(PlanError, match=r"of another model: conv1\.bias differs; trace this one"):
        torchtrim.trim(model, plan, torchtrim.trace(small, example))
    through = Plan(plan.layers, through_norms=True)
    with pytest.raises(PlanError, match="trace with through_norms=True"):
        torchtrim.trim(model, through, torchtrim.trace(model, example))


def test_a_proof_that_never_holds_leaves_all_and_ends(monkeypatch) -> None:
    attempt = _surgery.attempt
    monkeypatch.setattr(_surgery, "attempt", lambda *given: (attempt(*given)[0], Failure(set(), "it never holds")))
    model, x = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 3)
    with pytest.warns(TorchtrimWarning, match="left untrimmed: everything: it never holds"):
        trimmed = torchtrim.trim(model, Plan({"0": LayerPlan(8, (1, 2))}), x)
    assert torch.equal(trimmed(x), model(x))
