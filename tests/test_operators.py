"""Every row of the operator table, on a toy network: what is free and what is locked, and trim equals mask."""

import pytest
import torch

import torchtrim
from torchtrim.testing import random_plan
from toys import TOYS, assert_trim_equals_mask, randomised


@pytest.mark.parametrize("name", TOYS)
def test_row(name: str) -> None:
    toy = TOYS[name]
    torch.manual_seed(0)
    model = randomised(toy.build())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.5)
    example = torch.randn(toy.shape, dtype=torch.float64)
    batches = (toy.shape[0] + 1, *toy.shape[1:]) if len(toy.shape) > 1 else toy.shape
    other = torch.randn(batches, dtype=torch.float64)
    graph = torchtrim.trace(model, example)
    assert {layer.name for layer in graph.layers.values() if not layer.locked} == toy.free
    assert graph.locked.keys() == toy.locked.keys()
    for layer, reason in toy.locked.items():
        assert reason in graph.locked[layer]
    tried: set[str] = set()
    for seed in range(3 if toy.free else 0):
        plan = random_plan(graph, seed)
        tried |= plan.removed.keys()
        assert_trim_equals_mask(model, plan, example, other)
    assert tried == toy.free
