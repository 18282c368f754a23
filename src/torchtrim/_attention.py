"""PyTorch's multi-head attention, for any number of heads.

`nn.MultiheadAttention` wants as many features in its heads as in its inputs, so that it cannot lose a head. A trace
runs this class in its place, and a trimmed model keeps it where heads went.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtrim._copies import modules_of


class MultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose `num_heads` heads of `head_dim` features need not make up `embed_dim`.

    The parameters are the same; the projections have `num_heads * head_dim` rows (for queries, keys and values, one
    below another in `in_proj_weight`), and `out_proj` as many columns.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention`: [batch, length, features] with `batch_first`, else [length, batch, features]."""
        batched = query.ndim == 3
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = (self._heads(projected) for projected in self._projected(query, key, value))
        if self.bias_k is not None and self.bias_v is not None:
            k, v = self._joined(k, self._heads(self.bias_k)), self._joined(v, self._heads(self.bias_v))
        if self.add_zero_attn:
            k, v = (self._joined(one, torch.zeros_like(one[:, :, :1])) for one in (k, v))
        mask = self._mask(attn_mask, key_padding_mask, is_causal and not need_weights, q, k)
        causal = is_causal and mask is None
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            mixed = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        weight, bias = self._parameters["in_proj_weight"], self._parameters["in_proj_bias"]
        separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        weights = separate if weight is None else weight.chunk(3)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return [F.linear(*of_one) for of_one in zip((query, key, value), weights, biases, strict=True)]

    def _heads(self, projected: Tensor) -> Tensor:
        """[batch, length, heads * features] -> [batch, heads, length, features]."""
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    @staticmethod
    def _joined(sequence: Tensor, last: Tensor) -> Tensor:
        return torch.cat([sequence, last.expand(sequence.shape[0], -1, -1, -1)], dim=2)

    def _mask(
        self, attention: Tensor | None, padding: Tensor | None, causal: bool, q: Tensor, k: Tensor
    ) -> Tensor | None:
        """What is added to the scores: broadcasts to [batch, heads, queries, keys]."""
        if causal and padding is None:
            return None  # the kernel is told instead
        masks: list[Tensor] = []
        if attention is not None:
            per_head = attention.ndim == 3  # [batch * heads, queries, keys]
            masks.append(attention.unflatten(0, (q.shape[0], -1)) if per_head else attention)
        if padding is not None:
            masks.append(padding[:, None, None, :])
        total: Tensor | None = None
        for mask in masks:
            extra = k.shape[2] - mask.shape[-1]  # the learnt key and the key of zeros may always be seen
            added = mask
            if mask.dtype == torch.bool:
                added = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))
            added = F.pad(added, (0, extra)) if extra else added
            total = added if total is None else total + added
        return total


def generalise(model: nn.Module) -> nn.Module:
    """Let every `nn.MultiheadAttention` of a model compute with this class, in place; its subclasses are left alone."""
    for module in modules_of(model):
        if type(module) is nn.MultiheadAttention:
            module.__class__ = MultiheadAttention
    return model


def adapt(model: nn.Module) -> nn.Module:
    """Let those compute with this class whose heads do not make up their features any more, in place."""
    for module in modules_of(model):
        if type(module) is nn.MultiheadAttention and not _is_square(module):
            module.__class__ = MultiheadAttention
        if type(module) is MultiheadAttention:
            # PyTorch's fused transformer layers compute with the widths of whole modules, unless this is false
            module._qkv_same_embed_dim = False
    return model


def _is_square(module: nn.MultiheadAttention) -> bool:
    """Whether inputs, heads and outputs have the same number of features, as PyTorch's own class wants it."""
    features = module.embed_dim
    queries = module._parameters["in_proj_weight"]
    shape = module.q_proj_weight.shape if queries is None else (queries.shape[0] // 3, queries.shape[1])
    return tuple(shape) == tuple(module.out_proj.weight.shape) == (features, features)
