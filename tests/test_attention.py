"""Multi-head attention of any number of heads computes what PyTorch's does, and loses whole heads."""

import copy
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchtrim
from torchtrim._attention import MultiheadAttention, generalise

BATCH, QUERIES, KEYS, WIDTH, HEADS = 3, 5, 4, 8, 2


def attention(**options: object) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(WIDTH, HEADS, **options).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def agree(module: nn.MultiheadAttention, inputs: tuple[Tensor, ...], **how: object) -> None:
    other = generalise(copy.deepcopy(module))
    assert type(other) is MultiheadAttention
    results = []
    for one in (module, other):
        torch.manual_seed(1)  # dropout
        results.append(one(*inputs, **how))
    (mixed, weights), (other_mixed, other_weights) = results
    torch.testing.assert_close(other_mixed, mixed)
    assert (weights is None) == (other_weights is None)
    if weights is not None:
        torch.testing.assert_close(other_weights, weights)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True},
                                     {"kdim": 6, "vdim": 7}, {"dropout": 0.3}])  # fmt: skip
def test_it_computes_what_pytorchs_does(batch_first: bool, options: dict[str, object]) -> None:
    module = attention(batch_first=batch_first, **options)
    sizes = ((QUERIES, WIDTH), (KEYS, module.kdim), (KEYS, module.vdim))
    for batched in (True, False):
        shapes = [((BATCH, *size) if batch_first else (size[0], BATCH, size[1])) if batched else size for size in sizes]
        inputs = tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)
        for need_weights, average in product((True, False), repeat=2):
            agree(module, inputs, need_weights=need_weights, average_attn_weights=average)


@pytest.mark.parametrize("mask", [torch.rand(QUERIES, KEYS) < 0.3, torch.randn(QUERIES, KEYS).double(),
                                  torch.randn(BATCH * HEADS, QUERIES, KEYS).double(), None])  # fmt: skip
@pytest.mark.parametrize("padding", [torch.arange(KEYS).expand(BATCH, -1) >= 3, None])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
def test_masks(mask: Tensor | None, padding: Tensor | None, options: dict[str, object]) -> None:
    module = attention(batch_first=True, **options)
    mask = mask.logical_and(torch.arange(KEYS) > 0) if mask is not None and mask.dtype == torch.bool else mask
    if padding is not None and mask is not None and mask.dtype != torch.bool:
        padding = torch.zeros(padding.shape, dtype=mask.dtype).masked_fill(padding, -torch.inf)
    inputs = tuple(torch.randn(BATCH, size, WIDTH, dtype=torch.float64) for size in (QUERIES, KEYS, KEYS))
    for need_weights in (True, False):
        agree(module, inputs, attn_mask=mask, key_padding_mask=padding, need_weights=need_weights)


def test_causal() -> None:
    module = attention(batch_first=True)
    inputs = (torch.randn(BATCH, QUERIES, WIDTH, dtype=torch.float64),) * 3
    mask = nn.Transformer.generate_square_subsequent_mask(QUERIES, dtype=torch.float64)
    for need_weights in (True, False):
        agree(module, inputs, attn_mask=mask, is_causal=True, need_weights=need_weights)


def encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(12, 4, 24, batch_first=True)
    return nn.TransformerEncoder(layer, 2).double().eval()


def test_heads_go_whole_also_from_fused_layers(tmp_path: Path) -> None:
    model, example = encoder(), torch.randn(2, 5, 12, dtype=torch.float64)
    heads = torchtrim.trace(model, example).layers["layers.0.self_attn.in_proj_weight"]
    assert len(set(heads.roots.tolist())) == 4
    gone = torch.arange(36).view(3, 4, 3)[:, 1].flatten().tolist()
    plan = torchtrim.Plan({"layers.0.self_attn.in_proj_weight": torchtrim.LayerPlan(36, tuple(gone))})
    small, masked = torchtrim.trim(model, plan, example), torchtrim.mask(model, plan, example)
    trimmed, whole = small.layers[0].self_attn, small.layers[1].self_attn
    assert (trimmed.num_heads, trimmed.embed_dim, trimmed.in_proj_weight.shape) == (3, 12, (27, 12))
    assert (type(trimmed), type(whole)) == (MultiheadAttention, nn.MultiheadAttention)
    with torch.no_grad():  # where PyTorch would fuse whole layers
        torch.testing.assert_close(small(example), masked(example))
        torchtrim.save(small, tmp_path / "model.safetensors")
        loaded = torchtrim.load(encoder(), tmp_path / "model.safetensors").eval()
        assert torch.equal(loaded(example), small(example))
    again = torchtrim.trim(small, torchtrim.Plan({"layers.0.linear1": torchtrim.LayerPlan(24, (0,))}), example)
    assert again.layers[0].self_attn.num_heads == 3
