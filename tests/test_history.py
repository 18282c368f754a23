"""What a trimmed model knows of how it came about."""

import copy
import json

import torch
from torch import nn

from torchtrim import LayerPlan, Plan, trim
from torchtrim._history import History, history, set_history

EXAMPLE = torch.zeros(2, 3, 4, 4)


class Convolutions(nn.Module):
    """Grouped and plain; attributes that are no widths."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.b = nn.Conv2d(8, 8, 1, groups=8)
        self.out = nn.Conv2d(8, 2, 1)
        self.tables = (torch.arange(3), object())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.out(self.b(self.a(images).relu()).relu())


def plan(width: int, *removed: int) -> Plan:
    return Plan({"a": LayerPlan(width, removed)})


def test_none_without_a_trim() -> None:
    model = Convolutions()
    assert history(model) == History((), {name: tuple(p.shape) for name, p in model.named_parameters()}, {})


def test_plans_add_up_and_attributes_are_the_last_ones() -> None:
    model = Convolutions()
    small = trim(trim(model, plan(8, 1, 5), EXAMPLE), plan(6, 0), EXAMPLE)
    found = history(small)
    assert [one.layers["a"] for one in found.plans] == [LayerPlan(8, (1, 5)), LayerPlan(6, (0,))]
    assert found.shapes == history(model).shapes
    assert found.attributes == {
        "a": {"out_channels": 5},
        "b": {"in_channels": 5, "out_channels": 5, "groups": 5},
        "out": {"in_channels": 5},
    }
    assert not history(model).plans


def test_only_widths_are_attributes() -> None:
    """A tuple of tensors compares with nothing, and is no width."""
    attributes = history(trim(Convolutions(), plan(8, 0), EXAMPLE)).attributes
    assert "" not in attributes
    assert json.loads(json.dumps(attributes)) == attributes


def test_copies_carry_it() -> None:
    small = trim(Convolutions(), plan(8, 1), EXAMPLE)
    assert history(copy.deepcopy(small)) == history(small)
    again = Convolutions()
    set_history(again, history(small))
    assert history(again) == history(small)
