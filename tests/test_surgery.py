"""The oracle: a trimmed model computes what the masked original computes, in float64."""

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import torchtrim
from torchtrim import LayerPlan, Plan, PlanError
from torchtrim._lenet import LeNet


def random_plan(graph: torchtrim.NeuronGraph, seed: int = 0) -> Plan:
    """30 % of the free neurons of every group's first layer."""
    random = np.random.default_rng(seed)
    layers: dict[str, LayerPlan] = {}
    for name, layer in graph.layers.items():
        free = np.flatnonzero(layer.removable)
        if name == layer.group and not layer.locked:
            units = np.unique(layer.roots[free])
            gone = random.choice(units, len(units) * 3 // 10, replace=False)
            layers[name] = LayerPlan(layer.width, tuple(np.flatnonzero(np.isin(layer.roots, gone)).tolist()))
    return Plan(layers)


def randomise_norms(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
    return model.double().eval()


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (LeNet, (2, 1, 28, 28)),
        (torchvision.models.resnet18, (2, 3, 64, 64)),
        (torchvision.models.squeezenet1_1, (2, 3, 64, 64)),
        (torchvision.models.mobilenet_v3_small, (2, 3, 64, 64)),
    ],
)
def test_trim_equals_mask(model, shape) -> None:
    torch.manual_seed(0)
    network = randomise_norms(model())
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    example = torch.randn(shape, dtype=torch.float64)
    plan = random_plan(torchtrim.trace(network, example))
    small = torchtrim.trim(network, plan, example)
    silent = torchtrim.mask(network, plan, example)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in network.parameters())
    other = torch.randn(3, *shape[1:], dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(small(other), silent(other), rtol=1e-9, atol=1e-10)
        assert not torch.allclose(small(other), network(other))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_lenet_widths_follow() -> None:
    small = torchtrim.trim(LeNet(), Plan({"conv2": LayerPlan(50, tuple(range(9)))}), torch.zeros(2, 1, 28, 28))
    assert (small.conv2.out_channels, small.fc1.in_features) == (41, 41 * 16)
    assert small.fc1.weight.shape == (500, 656)


def test_refuses_the_outputs_of_the_model() -> None:
    with pytest.raises(PlanError, match=r"fc2.*output of the model"):
        torchtrim.trim(LeNet(), Plan({"fc2": LayerPlan(10, (0,))}), torch.zeros(2, 1, 28, 28))


def test_hard_coded_width_is_locked_with_its_reason() -> None:
    class Fixed(LeNet):
        def forward(self, images):
            hidden = nn.functional.relu(self.conv1(images))
            hidden = nn.functional.max_pool2d(nn.functional.relu(self.conv2(hidden)), 4, 5)
            return self.fc2(nn.functional.relu(self.fc1(hidden.view(-1, 50 * 16))))

    graph = torchtrim.trace(Fixed(), torch.zeros(2, 1, 28, 28))
    assert "holds its width" in graph.locked["conv2"]
    assert "fc1" not in graph.locked
