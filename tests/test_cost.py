"""Costs against written arithmetic."""

import pytest
import torch
from torch import nn

from torchtrim import measure
from torchtrim._cost import measure_beside
from torchtrim._lenet import LeNet
from torchtrim.errors import TraceError


def test_lenet_by_hand() -> None:
    cost = measure(LeNet(), torch.zeros(2, 1, 28, 28))
    products = 20 * 24 * 24 * 25 + 50 * 8 * 8 * 20 * 25 + 500 * 800 + 10 * 500
    assert cost.parameters == (20 * 25 + 20) + (50 * 20 * 25 + 50) + (500 * 800 + 500) + (10 * 500 + 10) == 431_080
    assert cost.flops == 2 * 2 * products
    assert cost.bytes == 4 * 431_080
    assert cost.latency > 0


def test_shared_parameters_count_once_and_buffers_weigh() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.two.weight = self.one.weight
            self.norm = nn.BatchNorm1d(4, affine=False)

        def forward(self, inputs):
            return self.norm(self.two(self.one(inputs)))

    cost = measure(Tied().half(), torch.zeros(1, 4, dtype=torch.half))
    assert cost.parameters == 16
    assert cost.bytes == 2 * 16 + 2 * 8 + 8  # weights, running statistics, an int64 count of batches


def test_control_flow_that_needs_data() -> None:
    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 5)

        def forward(self, inputs):
            return self.linear(inputs) if inputs.sum() > 0 else inputs

    assert measure(Choosing(), torch.ones(4, 3)).flops == 2 * 4 * 3 * 5
    assert measure(Choosing(), -torch.ones(4, 3)).flops == 0


def test_keyword_inputs_and_state() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.BatchNorm1d(3)).train()
    example = {"input": torch.randn(4, 3)}
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    cost = measure(model, example)
    assert cost.flops == 2 * 4 * 9
    assert all(module.training for module in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_several_models_beside_each_other() -> None:
    small, large = measure_beside([nn.Linear(4, 2), nn.Linear(4, 20)], torch.zeros(3, 4), seconds=0.01)
    assert (small.parameters, large.parameters) == (10, 100)
    assert large.flops == 10 * small.flops


def test_an_example_that_does_not_fit() -> None:
    with pytest.raises(TraceError, match="Linear cannot run on the example"):
        measure(nn.Linear(4, 2), torch.zeros(3, 5))
