"""The sizes in the tables of Hu et al., "Network Trimming", 2016, follow from our surgery."""

import pytest
import torch
import torchvision

import torchtrim
from torchtrim import LayerPlan, Plan
from torchtrim._lenet import LeNet


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("conv2", "fc1", "compression"),
    [(41, 426, 1.41), (31, 349, 2.23), (26, 293, 3.11), (24, 252, 3.85)],  # the paper prints 2.24 for the second
)
def test_lenet(conv2: int, fc1: int, compression: float) -> None:
    plan = Plan({"conv2": LayerPlan(50, tuple(range(conv2, 50))), "fc1": LayerPlan(500, tuple(range(fc1, 500)))})
    small = torchtrim.trim(LeNet(), plan, torch.zeros(1, 1, 28, 28))
    assert parameters(LeNet()) == 431_080
    assert parameters(small) == 20 * 26 + conv2 * 501 + fc1 * (16 * conv2 + 1) + 10 * (fc1 + 1)
    assert round(431_080 / parameters(small), 2) == compression


@pytest.mark.parametrize(
    ("conv5_3", "fc6", "compression"),
    [(488, 3477, 1.19), (451, 2937, 1.45), (430, 2479, 1.71), (420, 2121, 1.96), (400, 1787, 2.28), (390, 1513, 2.59)],
)
def test_vgg16(conv5_3: int, fc6: int, compression: float) -> None:
    with torch.device("meta"):
        model = torchvision.models.vgg16()
    layers = {
        "features.28": LayerPlan(512, tuple(range(conv5_3, 512))),
        "classifier.0": LayerPlan(4096, tuple(range(fc6, 4096))),
    }
    small = torchtrim.trim(model, Plan(layers), torch.zeros(1, 3, 224, 224))
    assert parameters(model) == 138_357_544
    assert round(parameters(model) / parameters(small), 2) == compression
    assert (small.features[28].out_channels, small.classifier[0].in_features) == (conv5_3, 49 * conv5_3)
    assert (small.classifier[0].out_features, small.classifier[3].in_features) == (fc6, fc6)
