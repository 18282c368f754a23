import pytest
import torch
import torch.nn.functional as F

from torchtrim._lenet import LeNet


def test_layers_and_parameters_are_those_of_caffe() -> None:
    model = LeNet()
    assert [name for name, _ in model.named_children()] == ["conv1", "conv2", "fc1", "fc2"]
    conv1, conv2 = 20 * 1 * 5 * 5 + 20, 50 * 20 * 5 * 5 + 50
    fc1, fc2 = 500 * 800 + 500, 10 * 500 + 10
    assert conv1 + conv2 + fc1 + fc2 == 431_080
    assert sum(parameter.numel() for parameter in model.parameters()) == 431_080


def test_forward_is_the_plain_composition_of_its_layers() -> None:
    torch.manual_seed(0)
    model = LeNet((3, 4, 5), classes=7).double()
    images = torch.randn(2, 1, 28, 28, dtype=torch.float64)
    first = F.max_pool2d(F.conv2d(images, model.conv1.weight, model.conv1.bias).clamp(min=0), 2)
    second = F.max_pool2d(F.conv2d(first, model.conv2.weight, model.conv2.bias).clamp(min=0), 2)
    hidden = (second.reshape(2, -1) @ model.fc1.weight.T + model.fc1.bias).clamp(min=0)
    logits = hidden @ model.fc2.weight.T + model.fc2.bias
    torch.testing.assert_close(model(images), logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("widths", [(1, 1, 1), (20, 50, 500), (7, 3, 11)])
def test_widths_and_classes(widths: tuple[int, int, int]) -> None:
    model = LeNet(widths, classes=3)
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 3)
    assert (model.conv1.out_channels, model.conv2.out_channels, model.fc1.out_features) == widths
