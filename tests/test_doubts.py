"""A trial is left out only where the model's code cannot know its widths."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import torchtrim
from torchtrim._graph import untried
from torchtrim._trial import tried
from torchtrim.errors import TorchtrimWarning
from toys import Net


def network(forward: Callable[..., Tensor], **modules: nn.Module) -> nn.Module:
    return Net(forward, {"a": nn.Linear(3, 8), "out": nn.Linear(8, 2), **modules})


def width_of(layer: nn.Linear) -> int:
    return layer.out_features


READERS = {"width": lambda layer: layer.out_features}


class Wide(nn.Linear):
    """A layer of somebody's own, with a method that looks at its width."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale()

    def scale(self) -> float:
        return 1 / self.in_features


KNOWING: dict[str, Callable[[], nn.Module]] = {
    "a shape": lambda: network(lambda net, x: net.out(net.a(x) * net.a(x).shape[1])),
    "a size": lambda: network(lambda net, x: net.out(net.a(x) / net.a(x).size(-1))),
    "a length": lambda: network(lambda net, x: net.out(net.a(x) + len(net.a.bias))),
    "the shape of a parameter": lambda: network(lambda net, x: net.out(net.a(x)) / net.a.weight.shape[0]),
    "a view": lambda: network(lambda net, x: net.out(net.a(x).view(-1, 8))),
    "a tensor of its own": lambda: network(lambda net, x: net.out(net.a(x) + torch.zeros(8))),
    "a piece": lambda: network(lambda net, x: net.out(F.pad(net.a(x)[:, :6], (0, 2)))),
    "an attribute": lambda: network(lambda net, x: net.out(net.a(x)) / net.a.out_features),
    "an attribute that a function reads": lambda: network(lambda net, x: net.out(net.a(x)) / width_of(net.a)),
    "an attribute that a method reads": lambda: network(lambda net, x: net.out(net.a(x)), out=Wide(8, 2)),
    "an attribute that one of several functions reads": lambda: network(
        lambda net, x: net.out(net.a(x)) / READERS["width"](net.a)
    ),
    "a function that is not to be seen": lambda: network(partial(lambda net, x: net.out(net.a(x)))),
    "a hook": lambda: hooked(network(lambda net, x: net.out(net.a(x)))),
    "groups of several channels": lambda: nn.Sequential(nn.Conv1d(3, 8, 1), nn.Conv1d(8, 8, 1, groups=2), nn.Flatten()),
}


def hooked(model: nn.Module) -> nn.Module:
    model.register_forward_hook(lambda module, args, output: output / module.a.out_features)
    return model


@pytest.mark.parametrize("name", KNOWING)
def test_code_that_may_know_a_width(name: str) -> None:
    shape = (2, 3, 4) if name.startswith("groups") else (2, 3)
    assert not untried(KNOWING[name](), torch.zeros(shape)).certain


IGNORANT: dict[str, Callable[[], nn.Module]] = {
    "mobilenet_v3_small": torchvision.models.mobilenet_v3_small,
    "densenet121": torchvision.models.densenet121,
    "resnet18": torchvision.models.resnet18,
}


@pytest.mark.parametrize("name", IGNORANT)
def test_code_that_knows_no_width_needs_no_trial(name: str) -> None:
    model = IGNORANT[name]().eval()
    graph = untried(model, torch.zeros(1, 3, 64, 64))
    assert graph.certain
    other = tried(model, graph)
    assert graph.locked == other.locked
    assert all(np.array_equal(one.removable, other.layers[name].removable) for name, one in graph.layers.items())


def test_through_norms_is_always_tried() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    assert untried(model, torch.zeros(2, 3)).certain
    assert not untried(model, torch.zeros(2, 3), through_norms=True).certain


def test_what_is_certain_by_mistake_is_left_whole_by_the_proof() -> None:
    """Code may be too clever to be seen: `trim` proves all the same, and carries out what is right."""

    def forward(net: Net, x: Tensor) -> Tensor:
        return net.out(net.a(x).relu() / getattr(net.a, "out_" + "features"))

    model = network(forward)
    graph = torchtrim.trace(model, torch.zeros(2, 3))
    assert graph.certain
    plan = torchtrim.Plan({"a": torchtrim.LayerPlan(8, (1,))})
    with pytest.warns(TorchtrimWarning, match="left untrimmed: a: "):
        trimmed = torchtrim.trim(model, plan, graph)
    assert trimmed.a.out_features == 8
    x = torch.randn(2, 3)
    assert torch.equal(trimmed(x), model(x))
