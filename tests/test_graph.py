"""What a trace finds: layers in order, groups, names, and reasons."""

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import prune

import torchtrim
from torchtrim._lenet import LeNet
from torchtrim._trial import trial
from torchtrim.errors import TraceError
from toys import TOYS, Net

LENET = torch.zeros(2, 1, 28, 28)


def test_layers_in_the_order_of_execution() -> None:
    graph = torchtrim.trace(LeNet(), LENET)
    assert list(graph.layers) == ["conv1", "conv2", "fc1", "fc2"]
    assert [layer.width for layer in graph.layers.values()] == [20, 50, 500, 10]
    assert [layer.parameter for layer in graph.layers.values()] == [f"{name}.weight" for name in graph.layers]


def test_a_flattened_channel_is_one_body() -> None:
    graph = torchtrim.trace(LeNet(), LENET)
    roots = graph.layers["conv2"].roots
    assert np.array_equal(graph.axes["fc1.weight"][1], np.repeat(roots, 16))
    assert np.array_equal(graph.axes["conv2.bias"][0], roots)


def test_residual_layers_share_a_group() -> None:
    graph = torchtrim.trace(torchvision.models.resnet18(), torch.zeros(1, 3, 64, 64))
    groups = {name: layer.group for name, layer in graph.layers.items()}
    assert groups["layer1.0.conv2"] == groups["layer1.1.conv2"] == groups["conv1"] == "conv1"
    assert groups["layer1.0.conv1"] == "layer1.0.conv1"
    assert np.array_equal(graph.layers["conv1"].roots, graph.layers["layer1.1.conv2"].roots)


def test_neurons_along_other_axes_and_without_a_module() -> None:
    toy = TOYS["parameters and matmul"]
    layers = torchtrim.trace(toy.build(), torch.zeros(toy.shape)).layers
    assert [(layer.name, layer.parameter, layer.axis, layer.width) for layer in layers.values()] == [
        ("a", "a", 1, 8), ("b", "b", 1, 10), ("out", "out", 1, 3)]  # fmt: skip
    transposed = torchtrim.trace(TOYS["transposed conv"].build(), torch.zeros(2, 3, 8, 8)).layers["b"]
    assert (transposed.axis, transposed.width) == (1, 8)


def test_weight_norm_is_named_by_its_module() -> None:
    layer = torchtrim.trace(TOYS["weight_norm"].build(), torch.zeros(2, 3, 8, 8)).layers["a"]
    assert layer.parameter.startswith("a.parametrizations.weight.")
    assert layer.width == 6


def test_parts_that_only_training_reaches() -> None:
    class Auxiliary(LeNet):
        def __init__(self) -> None:
            super().__init__()
            self.side = nn.Linear(500, 7)
            self.side_out = nn.Linear(7, 10)

        def forward(self, images):
            hidden = nn.functional.max_pool2d(self.conv1(images).relu(), 2)
            hidden = nn.functional.max_pool2d(self.conv2(hidden).relu(), 2).flatten(1)
            hidden = self.fc1(hidden).relu()
            if self.training:
                return self.fc2(hidden), self.side_out(self.side(hidden).relu())
            return self.fc2(hidden)

    graph = torchtrim.trace(Auxiliary(), LENET)
    assert set(graph.locked) == {"fc2", "side_out"}
    assert np.array_equal(graph.axes["side.weight"][1], graph.layers["fc1"].roots)
    assert [training for training, _ in graph.recordings] == [False, True]


def test_a_trial_takes_from_every_group_and_leaves_every_axis_some() -> None:
    graph = torchtrim.trace(torchvision.models.squeezenet1_1(), torch.zeros(1, 3, 64, 64))
    kept = trial(graph)
    for layer in graph.layers.values():
        lost = layer.width - int(kept[layer.roots].sum())
        assert 0 < lost < layer.width if not layer.locked else lost == 0


def test_widths_of_one_are_no_layers() -> None:
    graph = torchtrim.trace(Net(lambda net, x: net.a(x).relu(), {"a": nn.Linear(3, 1)}), torch.zeros(2, 3))
    assert not graph.layers


def test_bodies_of_a_choice() -> None:
    graph = torchtrim.trace(LeNet(), LENET)
    kept = graph.bodies({"conv1": [0, 3]})
    assert np.flatnonzero(~kept[graph.layers["conv1"].roots]).tolist() == [0, 3]
    assert kept.sum() == len(kept) - 2


def test_layers_whose_weight_is_computed_in_an_unknown_way_are_named() -> None:
    modules = {"a": nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), "out": nn.Linear(4, 2)}
    graph = torchtrim.trace(Net(lambda net, x: net.out(net.a(x).relu()), modules), torch.zeros(2, 3))
    assert set(graph.locked) == {"a", "out"}
    assert "aten::" in graph.locked["a"]


def test_a_lazy_layer_must_run_first() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    with pytest.raises(TraceError, match=r"0\.weight has no shape yet.*call it once first"):
        torchtrim.trace(model, torch.zeros(2, 3))
    model(torch.zeros(2, 3))
    assert set(torchtrim.trace(model, torch.zeros(2, 3)).layers) == {"0", "1"}


def test_a_pruned_layer_goes_by_its_own_name() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    prune.random_unstructured(model[0], "weight", amount=0.3)
    example = torch.randn(4, 6, dtype=torch.float64)
    assert list(torchtrim.trace(model, example).layers) == ["0", "2"]
    measured = torchtrim.profile(model, [example])
    assert measured["0"].incoming_l1 == pytest.approx(model[0].weight.abs().sum(1).tolist())
    plan = torchtrim.Plan({"0": torchtrim.LayerPlan(8, (1, 2))})
    small = torchtrim.trim(model, plan, example)
    assert (small[0].out_features, small[2].in_features) == (6, 6)
    torch.testing.assert_close(small(example), torchtrim.mask(model, plan, example)(example))


class Auxiliary(nn.Module):
    """A second classifier that training alone reaches, and whose norm wants more than one value."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
        self.aux, self.norm, self.aux_out = nn.Linear(8, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor):
        x = self.a(x).relu()
        return (self.out(x), self.aux_out(self.norm(self.aux(x)).relu())) if self.training else self.out(x)


def test_what_training_alone_reaches_is_found_with_a_batch_of_one() -> None:
    model = Auxiliary()
    graph = torchtrim.trace(model, torch.randn(1, 6))
    assert set(graph.layers) == {"a", "out", "aux", "aux_out"}
    assert set(graph.locked) == {"out", "aux_out"}
    plan = torchtrim.Plan({"a": torchtrim.LayerPlan(8, (1,)), "aux": torchtrim.LayerPlan(5, (0, 2))})
    small = torchtrim.trim(model, plan, torch.randn(1, 6))
    assert small.norm.num_features == 3
