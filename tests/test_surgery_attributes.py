"""The attributes of modules after a trim say what their tensors are."""

import pytest
import torch
from torch import nn

import torchtrim
from torchtrim.testing import random_plan
from toys import TOYS

LINEAR = {"out_features": 0, "in_features": 1}
# toy, module, and for each attribute the axis of its weight that it describes
DESCRIBED = [
    ("linear through addmm", "b", LINEAR),
    ("conv1d", "b", {"out_channels": 0, "in_channels": 1}),
    ("conv3d", "b", {"out_channels": 0, "in_channels": 1}),
    ("transposed conv", "b", {"in_channels": 0, "out_channels": 1}),
    ("batch norm 1d", "norm", {"num_features": 0}),
    ("instance norm", "norm2", {"num_features": 0}),
    ("prelu with one slope for each neuron", "prelu", {"num_parameters": 0}),
    ("embedding", "table", {"num_embeddings": 0, "embedding_dim": 1}),
    ("bilinear", "b", {"out_features": 0, "in1_features": 1}),
    ("group norm: whole groups go", "norm1", {"num_channels": 0}),
    ("weight_norm", "b", {"out_channels": 0, "in_channels": 1}),
]


def trimmed(name: str) -> tuple[nn.Module, nn.Module]:
    toy = TOYS[name]
    model, example = toy.build().eval(), torch.zeros(toy.shape)
    return model, torchtrim.trim(model, random_plan(torchtrim.trace(model, example)), example)


@pytest.mark.parametrize(("name", "module", "attributes"), DESCRIBED)
def test_described_by_the_weight(name: str, module: str, attributes: dict[str, int]) -> None:
    before, after = (model.get_submodule(module) for model in trimmed(name))
    assert after.weight.shape != before.weight.shape
    assert {key: getattr(after, key) for key in attributes} == {k: after.weight.shape[a] for k, a in attributes.items()}
    assert {key: getattr(before, key) for key in attributes} == {
        key: before.weight.shape[axis] for key, axis in attributes.items()
    }


@pytest.mark.parametrize(
    ("name", "groups", "channels"),
    [
        ("grouped conv, few groups: the same positions of every group go", 2, (6, 10)),
        ("grouped conv, many groups: whole groups go", 6, (12, 18)),
        ("depthwise conv with multiplier", 6, (6, 12)),
        ("transposed depthwise conv", 6, (6, 6)),
    ],
)
def test_groups(name: str, groups: int, channels: tuple[int, int]) -> None:
    layer = trimmed(name)[1].b
    assert (layer.groups, layer.in_channels, layer.out_channels) == (groups, *channels)


def test_groups_of_a_norm() -> None:
    norm = trimmed("group norm: whole groups go")[1].norm1
    assert (norm.num_groups, norm.num_channels) == (3, 9)


@pytest.mark.parametrize("name", ["attention heads", "attention heads that share keys and values"])
def test_heads(name: str) -> None:
    before, after = (model.attention for model in trimmed(name))
    assert after.num_heads < before.num_heads
    assert (after.head_dim, after.attn_dim) == (3, after.num_heads * 3)
    assert after.q.out_features == after.attn_dim
    assert after.k.out_features == after.key_heads * 3


def test_an_attribute_of_the_same_value_with_another_name_is_left() -> None:
    pieces = trimmed("pieces of a size that an attribute holds")[1].pieces
    assert (pieces.width, pieces.batches) == (6, 8)
