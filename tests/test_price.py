"""What is left is priced as it is counted of the model that was really trimmed."""

import numpy as np
import pytest
import torch
from torch import nn

import torchtrim
from torchtrim._lenet import LeNet
from torchtrim._price import Prices
from torchtrim.testing import random_plan


def encoder() -> nn.Module:
    return nn.Sequential(*(nn.TransformerEncoderLayer(24, 4, 40, batch_first=True) for _ in range(2)))


def torchvision_model(name: str) -> nn.Module:
    return getattr(pytest.importorskip("torchvision.models"), name)()


class Tied(nn.Module):
    """The same weight twice, a buffer, a transposed and two grouped convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.one, self.two = nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 8, 1, bias=False)
        self.two.weight = self.one.weight
        self.depthwise, self.grouped = nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(16, 12, 3, groups=4)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.out = nn.Linear(6, 5)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        x = self.grouped(self.depthwise(self.two(self.one(x).relu()).relu()).relu()).relu()
        return self.out(self.up(x).relu().mean((2, 3)))


MODELS = {
    "LeNet": (LeNet, (2, 1, 28, 28)),
    "tied, grouped, transposed": (Tied, (2, 3, 12, 12)),
    "attention": (encoder, (2, 7, 24)),
    "ResNet-18": (lambda: torchvision_model("resnet18"), (2, 3, 32, 32)),
    "MobileNet V3": (lambda: torchvision_model("mobilenet_v3_small"), (2, 3, 32, 32)),
}


@pytest.mark.parametrize(("build", "shape"), MODELS.values(), ids=MODELS)
def test_prices_are_what_the_trimmed_model_costs(build, shape) -> None:
    model, example = build().half().float(), torch.zeros(shape)
    graph = torchtrim.trace(model, example)
    prices = Prices(model, graph)
    for plan in (torchtrim.Plan({}), random_plan(graph, 0, 0.4)):
        kept = graph.bodies(plan.removed)
        cost = torchtrim.measure(torchtrim.trim(model, plan, graph), example)
        assert prices.parameters(kept) == cost.parameters
        assert prices.bytes(kept) == cost.bytes
        assert prices.flops(kept) == cost.flops


def test_lenet_by_hand() -> None:
    model = LeNet()
    graph = torchtrim.trace(model, torch.zeros(2, 1, 28, 28))
    kept = graph.bodies({"conv1": range(5), "conv2": range(20), "fc1": range(100)})
    prices = Prices(model, graph)
    assert prices.parameters(kept) == (15 * 25 + 15) + (30 * 15 * 25 + 30) + (400 * 480 + 400) + (10 * 400 + 10)
    assert prices.flops(kept) == 2 * 2 * (15 * 24 * 24 * 25 + 30 * 8 * 8 * 15 * 25 + 400 * 480 + 10 * 400)
    assert prices.bytes(np.ones_like(kept)) == 4 * 431_080
