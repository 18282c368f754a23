"""Networks at random, as data: a tree of blocks that hypothesis draws, that can be printed, and built again from that.

A drawn network knows its shape at every block, so that blocks are nested freely: `Trunk` draws one block after another.
Tensors are laid out in one of two ways: channels first with up to three axes of positions, or tokens [batch, length,
features]. All functions are continuous, so that rounding stays small.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from torchtrim import LayerPlan, Plan
from torchtrim._neurons import Kept, NeuronGraph


@dataclass(frozen=True)
class Block:
    """A part of a network. `repr` is an expression that makes it again."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple["Block", ...] = ()

    def build(self) -> nn.Module:
        return MODULES[self.name](*(part.build() for part in self.parts), **self.options)

    def __repr__(self) -> str:
        given = [repr(self.name)]
        if self.options or self.parts:
            given.append(repr(dict(self.options)))
        if self.parts:
            given.append(f"({', '.join(map(repr, self.parts))},)")
        return f"Block({', '.join(given)})"


@dataclass(frozen=True)
class Network:
    """A tree and the shape of its input, with a batch of two."""

    shape: tuple[int, ...]
    trunk: Block

    def build(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return with_random_values(self.trunk.build())

    def example(self, seed: int = 0, batch: int = 2) -> Tensor:
        generator = torch.Generator().manual_seed(seed + batch)
        return torch.randn(batch, *self.shape[1:], dtype=torch.float64, generator=generator)


def with_random_values(model: nn.Module) -> nn.Module:
    """In float64 and evaluation mode. No parameter or statistic has a value that is like another's, or zero."""
    model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.2 / math.sqrt(parameter[0].numel()))
            else:
                parameter.uniform_(0.4, 1.4)
        for module in model.modules():
            if isinstance(getattr(module, "running_mean", None), Tensor):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
            if isinstance(getattr(module, "bias", None), Tensor):
                module.bias.normal_(0.1, 0.3)
    return model


# ------------------------------------------------------------------ what blocks are built of

POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "in place": lambda x: (x * 1).relu_(),
    "relu6": F.relu6,
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "elu": F.elu,
    "celu": F.celu,
    "selu": F.selu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "hardtanh": F.hardtanh,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "logsigmoid": F.logsigmoid,
    "tanhshrink": F.tanhshrink,
    "softshrink": F.softshrink,
    "abs": torch.abs,
    "square": torch.square,
    "sin": torch.sin,
    "cos": torch.cos,
    "erf": torch.erf,
    "expm1": lambda x: torch.expm1(x.clamp(max=2)),
    "exp": lambda x: torch.exp(x.clamp(max=2)),
    "log1p": lambda x: torch.log1p(x.abs()),
    "clamp": lambda x: x.clamp(-1, 1),
    "clamp above zero": lambda x: x.clamp(min=0.2),
    "plus one": lambda x: x + 1,
    "one minus": lambda x: 1 - x,
    "times": lambda x: 2 * x,
    "divided": lambda x: x / 3,
    "negated": lambda x: -x,
    "threshold": lambda x: F.threshold(x, 0.0, 0.0),
    "rsub": lambda x: torch.rsub(x, 1),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "masked": lambda x: x.masked_fill(x < 0, 0.0),
    "plus ones": lambda x: x + torch.ones_like(x),
    "times ones": lambda x: x * x.new_ones(x.shape[1:]),
    "lerp": lambda x: torch.lerp(x, x.tanh(), 0.3),
    "addcmul": lambda x: torch.addcmul(x, x.tanh(), x.sigmoid(), value=0.5),
    "maximum": lambda x: torch.maximum(x, x.new_zeros(())),
    "minimum": lambda x: torch.minimum(x, x.new_ones(())),
    "hypot": lambda x: torch.hypot(x, x.tanh()),
    "gated by itself": lambda x: x * x.sigmoid(),
    "dropout": lambda x: F.dropout(x, 0.5, False),
    "data": lambda x: x.data * 2,
    "written": lambda x: torch.zeros_like(x).copy_(x),
    "added in place": lambda x: x.clone().add_(0.5),
    "through a view": lambda x: _relu_of_view(x * 1),
    "logit of sigmoid": lambda x: x.tanh().mul(0.5).atanh(),
}


def _relu_of_view(x: Tensor) -> Tensor:
    x.flatten(1).relu_()
    return x


POSITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "max pool": lambda x: _pool("max", x, 3, 1, 1),
    "avg pool": lambda x: _pool("avg", x, 3, 1, 1),
    "avg pool, without borders": lambda x: _pool("avg", x, 3, 1, 1, count_include_pad=False),
    "flipped": lambda x: x.flip(-1),
    "rolled": lambda x: x.roll(1, -1),
    "softmax": lambda x: x.softmax(-1),
    "centred": lambda x: x - x.mean(-1, keepdim=True),
    "standardised": lambda x: (x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + 1),
    "sorted": lambda x: x.sort(-1)[0],
    "summed up": lambda x: x.cumsum(-1),
    "reversed": lambda x: x[..., torch.arange(x.shape[-1] - 1, -1, -1)],
    "transposed twice": lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
    "normalised": lambda x: F.normalize(x, dim=-1, eps=0.1),
    "joined and halved": lambda x: torch.cat([x, x], -1)[..., ::2],
}

RESIZED: dict[str, Callable[[Tensor], Tensor]] = {
    "max pool": lambda x: _pool("max", x, 2),
    "avg pool": lambda x: _pool("avg", x, 2, ceil_mode=True),
    "adaptive avg": lambda x: _pool("adaptive_avg", x, 2),
    "adaptive max": lambda x: _pool("adaptive_max", x, 2),
    "padded": lambda x: F.pad(x, (1, 0)),
    "padded with ones": lambda x: F.pad(x, (0, 1), value=1.0),
    "reflected": lambda x: F.pad(x, (1, 1) * (x.ndim - 2), "reflect"),
    "replicated": lambda x: F.pad(x, (1, 0) * (x.ndim - 2), "replicate"),
    "cropped": lambda x: F.pad(x, (-1, 0)),
    "upsampled": lambda x: F.interpolate(x, scale_factor=2),
    "interpolated": lambda x: F.interpolate(
        x, size=(3,) * (x.ndim - 2), mode=("linear", "bilinear", "trilinear")[x.ndim - 3]
    ),
    "sliced": lambda x: x[..., 1:],
    "strided": lambda x: x[..., ::2],
    "windows": lambda x: x.unfold(-1, 2, 2).mean(-1),
    "subtracted": lambda x: x[..., 1:] - x[..., :-1],
}


def _pool(kind: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return getattr(F, f"{kind}_pool{x.ndim - 2}d")(x, *args, **kwargs)


def _two(axis: int) -> tuple[int, int]:
    return (axis, axis + 1) if axis > 0 else (axis - 1, axis)


def _half(x: Tensor, axis: int, which: int) -> Tensor:
    size = x.shape[axis] // 2
    return x.narrow(axis, which * size, size)


def _every(x: Tensor, axis: int, start: int) -> Tensor:
    return x.transpose(axis, 0)[start::2].transpose(axis, 0)


def _shuffled(x: Tensor, axis: int, groups: int) -> Tensor:
    cut = x.unflatten(axis, (groups, -1))
    return cut.transpose(*_two(axis)).flatten(*_two(axis))


def _overwritten(x: Tensor, axis: int) -> Tensor:
    x = x.clone()
    x.narrow(axis, 0, x.shape[axis] // 2).mul_(0.5)
    return x


# of channels, along axis 1 for images and the last for tokens
CHANNELS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "flipped": lambda x, axis: x.flip(axis),
    "repeated": lambda x, axis: torch.cat([x, x], axis),
    "repeated one by one": lambda x, axis: x.repeat_interleave(2, axis),
    "flipped beside": lambda x, axis: torch.cat([x, x.flip(axis)], axis),
    "padded": lambda x, axis: F.pad(x.transpose(axis, -1), (1, 2)).transpose(axis, -1),
    "beside ones": lambda x, axis: torch.cat([x, torch.ones_like(x.narrow(axis, 0, 1))], axis),
    "halves swapped": lambda x, axis: torch.cat(x.chunk(2, axis)[::-1], axis),
    "halves added": lambda x, axis: sum(x.chunk(2, axis)),
    "halves gated": F.glu,
    "halves, one of them gates": lambda x, axis: x.chunk(2, axis)[0] * x.chunk(2, axis)[1].tanh(),
    "thirds": lambda x, axis: torch.stack(x.tensor_split(3, axis)).sum(0),
    "even minus odd": lambda x, axis: _every(x, axis, 0) - _every(x, axis, 1),
    "halves, by a slice": lambda x, axis: _half(x, axis, 0) + _half(x, axis, 1),
    "shuffled": lambda x, axis: _shuffled(x, axis, 2),
    "shuffled twice": lambda x, axis: _shuffled(_shuffled(x, axis, 2), axis, 2),
    "pairs": lambda x, axis: x.unflatten(axis, (-1, 2)).sum(_two(axis)[1]),
    "maxima of pairs": lambda x, axis: x.unflatten(axis, (-1, 2)).amax(_two(axis)[1]),
    "pairs exchanged": lambda x, axis: x.unflatten(axis, (-1, 2)).flip(_two(axis)[1]).flatten(*_two(axis)),
    "normalised": lambda x, axis: F.normalize(x, dim=axis, eps=0.1),
    "centred": lambda x, axis: x - x.mean(axis, keepdim=True),
    "softmax": lambda x, axis: x.softmax(axis),
    "rolled": lambda x, axis: x.roll(1, axis),
    "rolled by half": lambda x, axis: x.roll(x.shape[axis] // 2, axis),
    "scaled by the sum": lambda x, axis: x * x.sum(axis, keepdim=True).tanh(),
    "scaled by the norm": lambda x, axis: x / (1 + x.norm(dim=axis, keepdim=True)),
    "scaled by the product": lambda x, axis: x * (x * x.tanh()).sum(axis, keepdim=True).tanh(),
    "one is added to all": lambda x, axis: x + x.narrow(axis, 0, 1),
    "a part is overwritten": _overwritten,
}  # fmt: skip


JOINS: dict[str, Callable[..., Tensor]] = {
    "add": lambda a, b: a + b,
    "add with alpha": lambda a, b: torch.add(a, b, alpha=0.5),
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "gate": lambda a, b: a * b.sigmoid(),
    "div": lambda a, b: a / (1 + b.abs()),
    "maximum": torch.maximum,
    "where": lambda a, b: torch.where(a > b, a, b),
    "stack": lambda a, b: torch.stack([a, b]).sum(0),
    "stack, maxima": lambda a, b: torch.stack([a, b], -1).amax(-1),
    "lerp": lambda a, b: torch.lerp(a, b, b.sigmoid()),
    "addcmul": lambda a, b: torch.addcmul(a, a, b),
    "hypot": torch.hypot,
    "in place": lambda a, b: a.clone().add_(b),
    "copied": lambda a, b: a.clone().copy_(b) + a,
}


class Function(nn.Module):
    """One of the functions above, by name."""

    def __init__(self, table: str, name: str, axis: int | None = None) -> None:
        super().__init__()
        self.table, self.name, self.along = table, name, axis

    def forward(self, *inputs: Tensor) -> Tensor:
        function = TABLES[self.table][self.name]
        return function(*inputs) if self.along is None else function(*inputs, self.along)

    def extra_repr(self) -> str:
        return f"{self.table}, {self.name}"


TABLES: dict[str, dict[str, Callable[..., Tensor]]] = {
    "pointwise": POINTWISE,
    "positions": POSITIONS,
    "resized": RESIZED,
    "channels": CHANNELS,
    "join": JOINS,
}


class Joined(nn.Module):
    """Branches of one input, combined two by two; `None` among the parts is the input itself."""

    def __init__(self, *branches: nn.Module, join: str, axis: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.join, self.along = join, axis

    def forward(self, x: Tensor) -> Tensor:
        results = [branch(x) for branch in self.branches]
        if self.join == "cat":
            return torch.cat(results, self.along)
        total = results[0]
        for other in results[1:]:
            total = JOINS[self.join](total, other)
        return total


class Parted(nn.Module):
    """A branch for each part of the channels, joined again. `sizes`: None for equal parts."""

    def __init__(self, *branches: nn.Module, axis: int, sizes: Sequence[int] | None) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.along, self.sizes = axis, sizes

    def forward(self, x: Tensor) -> Tensor:
        parts = x.chunk(len(self.branches), self.along) if self.sizes is None else x.split(list(self.sizes), self.along)
        return torch.cat([branch(part) for branch, part in zip(self.branches, parts, strict=True)], self.along)


class Twice(nn.Module):
    """One block, run two times."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


class Excited(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width: int, middle: int, dims: int) -> None:
        super().__init__()
        self.dims = dims
        self.a, self.b = nn.Linear(width, middle), nn.Linear(middle, width)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.b(self.a(x.mean(tuple(range(2, 2 + self.dims)))).relu()).sigmoid()
        return x * gate.reshape(*gate.shape, *(1,) * self.dims)


class Gated(nn.Module):
    """silu(a x) · b x, then c."""

    def __init__(self, ins: int, middle: int, outs: int) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(ins, middle), nn.Linear(ins, middle), nn.Linear(middle, outs)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.silu(self.a(x)) * self.b(x))


class ChannelsLast(nn.Module):
    """A block that works on the last axis, on channels at axis 1."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.movedim(1, -1)).movedim(-1, 1)


class ToTokens(nn.Module):
    """[batch, channels, ...] -> [batch, positions, channels]."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "flatten":
            return x.flatten(2).transpose(1, 2)
        if self.how == "permute":
            return x.movedim(1, -1).flatten(1, -2)
        return x.movedim(1, -1).reshape(x.shape[0], -1, x.shape[1])


class ToImage(nn.Module):
    """[batch, positions, channels] -> [batch, channels, height, width]."""

    def __init__(self, size: Sequence[int], how: str) -> None:
        super().__init__()
        self.size, self.how = tuple(size), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "unflatten":
            return x.unflatten(1, self.size).movedim(-1, 1)
        if self.how == "reshape":
            return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *self.size)
        return x.transpose(-2, -1).contiguous().view(len(x), -1, *self.size)


class Flat(nn.Module):
    """Flattened, then a linear layer."""

    def __init__(self, ins: int, outs: int, how: str, bias: bool) -> None:
        super().__init__()
        self.how = how
        self.a = nn.Linear(ins, outs, bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "last":
            x = x.movedim(1, -1)
        return self.a(x.reshape(x.shape[0], -1) if self.how == "reshape" else x.flatten(1))


class Collapsed(nn.Module):
    """A sum over channels, which asks whether a silent neuron is zero, then a layer that reads it."""

    def __init__(self, outs: int, axis: int, how: str) -> None:
        super().__init__()
        self.along, self.how = axis, how
        self.a = nn.Linear(1, outs)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "sum":
            x = x.sum(self.along, keepdim=True)
        elif self.how == "norm":
            x = x.norm(dim=self.along, keepdim=True)
        else:
            x = x.square().sum(self.along).unsqueeze(self.along)
        return self.a(x.movedim(self.along, -1)).movedim(-1, self.along)


class Pooled(nn.Module):
    """All positions in one."""

    def __init__(self, how: str, tokens: bool) -> None:
        super().__init__()
        self.how, self.tokens = how, tokens

    def forward(self, x: Tensor) -> Tensor:
        axes = (1,) if self.tokens else tuple(range(2, x.ndim))
        if self.how == "mean":
            return x.mean(axes)
        if self.how == "sum":
            return x.sum(axes)
        if self.how == "max":
            return x.amax(axes)
        return x[:, 0] if self.tokens else x.flatten(2)[..., 0]


class Attention(nn.Module):
    """Own code for heads: a layer for each of queries, keys and values, or one for all; keys may be shared by heads."""

    def __init__(
        self, ins: int, outs: int, heads: int, key_heads: int, head_dim: int, joined: bool, kernel: str, view: str
    ) -> None:
        super().__init__()
        self.num_heads, self.key_heads, self.head_dim, self.attn_dim = heads, key_heads, head_dim, heads * head_dim
        self.joined, self.kernel, self.view = joined, kernel, view
        if joined:
            self.qkv = nn.Linear(ins, 3 * self.attn_dim)
        else:
            self.q = nn.Linear(ins, self.attn_dim)
            self.k, self.v = nn.Linear(ins, key_heads * head_dim), nn.Linear(ins, key_heads * head_dim)
        self.out = nn.Linear(self.attn_dim, outs)

    def heads(self, x: Tensor, count: int) -> Tensor:
        n, length, _ = x.shape
        if self.view == "counted":
            return x.view(n, length, count, self.head_dim).transpose(1, 2)
        if self.view == "width of a head":
            return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return x.reshape(n, length, -1, self.head_dim).permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        if self.joined and self.view == "counted":
            q, k, v = self.qkv(x).reshape(n, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = self.qkv(x).chunk(3, -1) if self.joined else (self.q(x), self.k(x), self.v(x))
            q, k, v = self.heads(q, self.num_heads), self.heads(k, self.key_heads), self.heads(v, self.key_heads)
        repeats = self.num_heads // self.key_heads
        if repeats > 1 and self.kernel != "gqa":
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        if self.kernel == "softmax":
            x = ((q * self.head_dim**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        elif self.kernel == "causal":
            x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            x = F.scaled_dot_product_attention(q, k, v, enable_gqa=repeats > 1)
        if self.view == "counted":
            return self.out(x.transpose(1, 2).reshape(n, length, self.attn_dim))
        return self.out(x.transpose(1, 2).flatten(2))


class SelfAttention(nn.Module):
    """PyTorch's own, alone or between a norm and a residual."""

    def __init__(self, width: int, heads: int, weights: bool, residual: bool) -> None:
        super().__init__()
        self.weights = weights
        self.norm = nn.LayerNorm(width) if residual else None
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.norm is None else self.norm(x)
        # how it lies in memory depends on the mode, and so would what is written through a view of it
        mixed = self.attention(y, y, y, need_weights=self.weights)[0].contiguous()
        return mixed if self.norm is None else x + mixed


class Recurrent(nn.Module):
    """The outputs of an LSTM or a GRU."""

    def __init__(self, kind: str, ins: int, outs: int) -> None:
        super().__init__()
        self.recurrent = getattr(nn, kind)(ins, outs, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.recurrent(x)[0]


class Mixed(nn.Module):
    """Layers across positions."""

    def __init__(self, length: int, middle: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(length, middle), nn.Linear(middle, length)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.transpose(1, 2)).relu()).transpose(1, 2)


class Marked(nn.Module):
    """A token and places that are learnt."""

    def __init__(self, length: int, width: int, token: bool) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.zeros(1, length, width))
        self.token = nn.Parameter(torch.zeros(1, 1, width)) if token else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.places
        return x if self.token is None else torch.cat([self.token.expand(len(x), -1, -1), x], 1)


class Scaled(nn.Module):
    """A scale and a shift for each channel, parameters or a buffer."""

    def __init__(self, width: int, dims: int, buffer: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width, *(1,) * dims))
        if buffer:
            self.register_buffer("shift", torch.linspace(-0.5, 0.7, width).reshape(width, *(1,) * dims))
        else:
            self.shift = nn.Parameter(torch.zeros(width, *(1,) * dims))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class OwnNorm(nn.Module):
    """A norm over channels as models write it themselves."""

    def __init__(self, width: int, dims: int, axis: int, how: str) -> None:
        super().__init__()
        self.along, self.how = axis, how
        self.scale = nn.Parameter(torch.ones(width, *(1,) * dims))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(self.along, keepdim=True)
        if self.how == "root mean square":
            x = x * torch.rsqrt(x.pow(2).mean(self.along, keepdim=True) + 0.1)
        elif self.how == "variance":
            x = (x - mean) / torch.sqrt(x.var(self.along, unbiased=False, keepdim=True) + 0.1)
        elif self.how == "deviation":
            x = (x - mean) / (x.std(self.along, keepdim=True) + 0.3)
        else:
            square = x.square().mean(self.along, keepdim=True)
            x = (x - mean) / torch.sqrt((square - mean.square()).abs() + 0.1)
        return x * self.scale


class Computed(nn.Module):
    """A weight that is computed of parameters."""

    def __init__(self, ins: int, outs: int, how: str) -> None:
        super().__init__()
        self.how = how
        if how == "low rank":
            self.a, self.b = nn.Parameter(torch.zeros(outs, 2)), nn.Parameter(torch.zeros(2, ins))
        else:
            self.a = nn.Parameter(torch.zeros((ins, outs) if how == "matmul" else (outs, ins)))
        self.b = self.b if how == "low rank" else nn.Parameter(torch.zeros(outs))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "low rank":
            return F.linear(x, self.a @ self.b)
        if self.how == "matmul":
            return x @ self.a + self.b
        if self.how == "einsum":
            return torch.einsum("...i,oi->...o", x, self.a) + self.b
        if self.how == "normed":
            return F.linear(x, F.normalize(self.a, dim=1), self.b)
        return F.linear(x, self.a * self.b[:, None], self.b)


def _conv(dims: int, transposed: bool = False, **options: Any) -> nn.Module:
    return getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")(**options)


def _norm(kind: str, dims: int, **options: Any) -> nn.Module:
    return getattr(nn, f"{kind}{max(dims, 1)}d")(**options)


MODULES: dict[str, Callable[..., nn.Module]] = {
    "conv": _conv,
    "linear": nn.Linear,
    "norm": _norm,
    "group norm": nn.GroupNorm,
    "layer norm": nn.LayerNorm,
    "rms norm": nn.RMSNorm,
    "own norm": OwnNorm,
    "prelu": nn.PReLU,
    "function": Function,
    "all": nn.Sequential,
    "same": nn.Identity,
    "joined": Joined,
    "parted": Parted,
    "twice": Twice,
    "excited": Excited,
    "gated": Gated,
    "channels last": ChannelsLast,
    "to tokens": ToTokens,
    "to image": ToImage,
    "flat": Flat,
    "collapsed": Collapsed,
    "pooled": Pooled,
    "attention": Attention,
    "self attention": SelfAttention,
    "recurrent": Recurrent,
    "mixed": Mixed,
    "marked": Marked,
    "scaled": Scaled,
    "computed": Computed,
    "pixel shuffle": nn.PixelShuffle,
    "pixel unshuffle": nn.PixelUnshuffle,
    "channel shuffle": nn.ChannelShuffle,
}

# ------------------------------------------------------------------ drawing

WIDTHS = (4, 6, 8, 3, 2, 12)
WIDEST = 24
LARGEST = 64  # positions


class Trunk:
    """Blocks drawn one after another. `shape`: of what the last one gives; `tokens`: how that is laid out.

    `averaging`: norms are many, and average over channels.
    """

    def __init__(self, draw: st.DrawFn, shape: tuple[int, ...], tokens: bool, averaging: bool = False) -> None:
        self.draw, self.shape, self.tokens, self.averaging = draw, shape, tokens, averaging
        self.blocks: list[Block] = []

    @property
    def axis(self) -> int:
        return -1 if self.tokens else 1

    @property
    def width(self) -> int:
        return self.shape[self.axis]

    @property
    def dims(self) -> int:
        return 0 if self.tokens else len(self.shape) - 2

    @property
    def block(self) -> Block:
        return (
            self.blocks[0] if len(self.blocks) == 1 else Block("all" if self.blocks else "same", {}, tuple(self.blocks))
        )

    def pick(self, values: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(list(values)))

    def flag(self) -> bool:
        return self.draw(st.booleans())

    def divisor(self, *numbers: int) -> int:
        common = math.gcd(*numbers)
        return self.pick([n for n in range(1, common + 1) if common % n == 0])

    def put(self, name: str, options: Mapping[str, Any] | None = None, parts: Sequence[Block] = ()) -> None:
        """Append a block; its shape is what it does to a tensor of zeros. One that cannot run there is left out."""
        block = Block(name, options or {}, tuple(parts))
        try:
            with torch.no_grad():
                shape = tuple(block.build().eval()(torch.zeros(self.shape)).shape)
        except (RuntimeError, ValueError):  # such as windows that are larger than what there is
            return
        if math.prod(shape[2:]) <= 2 * LARGEST:
            self.blocks.append(block)
            self.shape = shape

    def branch(self, depth: int, width: int | None = None) -> Block:
        """Blocks that keep the positions, and the width where one is asked for."""
        branch = Trunk(self.draw, self.shape, self.tokens, self.averaging)
        for _ in range(self.draw(st.integers(1, 2))):
            branch.step(depth, keep=True)
        if width is not None and (branch.width != width or self.flag()):
            branch.dense(width)
        return branch.block

    def step(self, depth: int, keep: bool) -> None:
        """One block. `keep`: positions and layout stay. `depth`: how deep blocks may still be nested."""
        choices = [self.dense, self.dense, self.dense, self.normed, self.normed, self.pointwise, self.pointwise,
                   self.channels, self.channels, self.other]  # fmt: skip
        if self.dims or self.tokens:
            choices.append(self.positions)
        if self.tokens:
            choices += [self.attended, self.attended, self.sequential]
        if self.averaging:
            choices += [self.normed] * 4
        if depth:
            choices += [lambda: self.nested(depth - 1)] * 4
        if not keep:
            choices += [self.moved] * 2
        self.pick(choices)()

    def dense(self, width: int | None = None) -> None:
        """A layer with weights."""
        outs = width or self.pick(WIDTHS)
        bias = self.flag()
        if self.dims == 0:
            kind = self.pick(["linear", "linear", "gated", "computed"])
            if kind == "gated":
                self.put(kind, {"ins": self.width, "middle": self.pick(WIDTHS), "outs": outs})
            elif kind == "computed":
                how = self.pick(["low rank", "matmul", "einsum", "normed", "scaled"])
                self.put(kind, {"ins": self.width, "outs": outs, "how": how})
            else:
                self.put("linear", {"in_features": self.width, "out_features": outs, "bias": bias})
            return
        kernel = self.pick([1, 3])
        options = {"dims": self.dims, "in_channels": self.width, "kernel_size": kernel, "padding": kernel // 2,
                   "bias": bias}  # fmt: skip
        kind = self.pick(["conv", "conv", "grouped", "depthwise", "transposed", "last"])
        if kind == "grouped":
            options["groups"] = self.divisor(self.width, outs)
        elif kind == "depthwise" and width is None:
            options["groups"] = self.width
            outs = self.width * (self.pick([1, 2]) if self.width <= WIDEST // 2 else 1)
        elif kind == "transposed":
            options |= {"transposed": True, "groups": self.divisor(self.width, outs)}
        elif kind == "last":
            layer = Block("linear", {"in_features": self.width, "out_features": outs, "bias": bias})
            self.put("channels last", {}, [layer])
            return
        self.put("conv", {**options, "out_channels": outs})

    def normed(self) -> None:
        """A normalisation, over channels, positions or neither."""
        kinds = ["layer", "rms", "group", "own"]
        if not self.averaging:
            kinds += ["batch", "batch"]
        if not self.averaging and self.dims and math.prod(self.shape[2:]) > 1:
            kinds += ["instance", "positions"]
        kind = self.pick(kinds)
        if kind in ("layer", "rms"):
            norm = Block(f"{kind} norm", {"normalized_shape": self.width, "elementwise_affine": self.flag()})
            self.put(*((norm.name, norm.options) if self.dims == 0 else ("channels last", {}, [norm])))
        elif kind == "positions":
            self.put("layer norm", {"normalized_shape": self.shape[self.pick([2, -1]) :]})
        elif kind == "own":
            hows = ["root mean square", "variance", "difference of squares"]
            how = self.pick([*hows, "deviation"] if self.width > 1 else hows)  # of one value there is none
            self.put("own norm", {"width": self.width, "dims": self.dims, "axis": self.axis, "how": how})
        elif self.tokens:
            self.put("layer norm", {"normalized_shape": self.width})
        elif kind == "group":
            groups = 1 if self.averaging else self.divisor(self.width)
            if self.width // groups * math.prod(self.shape[2:]) > 1:
                self.put("group norm", {"num_groups": groups, "num_channels": self.width, "affine": self.flag()})
        elif kind == "instance":
            self.put("norm", {"kind": "InstanceNorm", "dims": self.dims, "num_features": self.width,
                              "affine": self.flag(), "track_running_stats": self.flag()})  # fmt: skip
        else:
            self.put("norm", {"kind": "BatchNorm", "dims": self.dims, "num_features": self.width,
                              "affine": self.flag()})  # fmt: skip

    def pointwise(self) -> None:
        name = self.pick(["relu", "relu", *POINTWISE])
        self.put("function", {"table": "pointwise", "name": name})

    def positions(self) -> None:
        names = [name for name in POSITIONS if not self.tokens or "pool" not in name]
        block = Block("function", {"table": "positions", "name": self.pick(names)})
        if self.tokens:  # positions come last
            self.put("channels last", {}, [block])
        else:
            self.put(block.name, block.options)

    def channels(self) -> None:
        """Something among the channels that needs no weights."""
        names = list(CHANNELS)
        if self.width % 2 or self.width < 4:
            names = [
                name
                for name in names
                if not any(word in name for word in ("half", "halves", "even", "shuffled", "pairs"))
            ]
        if self.width % 3 or self.width < 6:
            names.remove("thirds")
        if self.width > WIDEST // 2:
            names = [name for name in names if not any(word in name for word in ("repeated", "beside", "padded"))]
        self.put("function", {"table": "channels", "name": self.pick(names), "axis": self.axis})

    def other(self) -> None:
        kinds = ["scaled", "collapsed"]
        if self.dims:
            kinds += ["excited", "channel shuffle", "prelu"]
        kind = self.pick(kinds)
        if kind == "scaled":
            self.put(kind, {"width": self.width, "dims": self.dims, "buffer": self.flag()})
        elif kind == "collapsed":
            self.put(kind, {"outs": self.pick(WIDTHS), "axis": self.axis, "how": self.pick(["sum", "norm", "square"])})
        elif kind == "excited":
            self.put(kind, {"width": self.width, "middle": self.pick(WIDTHS), "dims": self.dims})
        elif kind == "prelu":
            self.put(kind, {"num_parameters": self.pick([1, self.width])})
        else:
            self.put(kind, {"groups": self.divisor(self.width)})

    def attended(self) -> None:
        kind = self.pick(["own", "own", "PyTorch's"])
        if kind == "PyTorch's":
            self.put("self attention", {"width": self.width, "heads": self.divisor(self.width), "weights": self.flag(),
                                        "residual": self.flag()})  # fmt: skip
            return
        heads = self.pick([2, 3, 4])
        joined = self.flag()
        key_heads = heads if joined else self.divisor(heads)
        self.put("attention", {"ins": self.width, "outs": self.pick(WIDTHS), "heads": heads, "key_heads": key_heads,
                               "head_dim": self.pick([2, 3]), "joined": joined,
                               "kernel": self.pick(["softmax", "kernel", "causal", "gqa"]),
                               "view": self.pick(["counted", "width of a head", "permuted"])})  # fmt: skip

    def sequential(self) -> None:
        kind = self.pick(["recurrent", "mixed", "marked"])
        if kind == "recurrent":
            self.put(kind, {"kind": self.pick(["LSTM", "GRU", "RNN"]), "ins": self.width, "outs": self.pick(WIDTHS)})
        elif kind == "mixed":
            self.put(kind, {"length": self.shape[1], "middle": self.pick(WIDTHS)})
        else:
            self.put(kind, {"length": self.shape[1], "width": self.width, "token": False})

    def nested(self, depth: int) -> None:
        kind = self.pick(["residual", "residual", "branches", "dense", "joined", "parted", "twice"])
        if kind == "residual":
            parts = [Block("same"), self.branch(depth, self.width)]
            self.put("joined", {"join": self.pick(["add", "add", *JOINS]), "axis": self.axis}, parts)
        elif kind == "branches":
            width = self.pick(WIDTHS)
            parts = [self.branch(depth, width) for _ in range(2)]
            self.put("joined", {"join": self.pick([*JOINS]), "axis": self.axis}, parts)
        elif kind == "twice":
            self.put(kind, {}, [self.branch(depth, self.width)])
        elif kind == "parted":
            self.parted(depth)
        else:
            parts = [Block("same")] if kind == "dense" else [self.branch(depth)]
            parts += [self.branch(depth) for _ in range(self.draw(st.integers(1, 2)))]
            self.put("joined", {"join": "cat", "axis": self.axis}, parts)
            if self.width > WIDEST:
                self.dense()

    def parted(self, depth: int) -> None:
        """Parts of the channels, each on its own way."""
        if self.width < 4:
            return
        equal = self.width % 2 == 0 and self.flag()
        first = self.width // 2 if equal else self.draw(st.integers(2, self.width - 2))
        parts: list[Block] = []
        for size in (first, self.width - first):
            shape = list(self.shape)
            shape[self.axis] = size
            part = Trunk(self.draw, tuple(shape), self.tokens, self.averaging)
            parts.append(part.branch(depth) if self.flag() else Block("same"))
        self.put("parted", {"axis": self.axis, "sizes": None if equal else [first, self.width - first]}, parts)

    def moved(self) -> None:
        """Positions change, or the layout does."""
        if self.tokens:
            self.moved_tokens()
        elif self.dims:
            self.moved_channels(math.prod(self.shape[2:]))

    def moved_tokens(self) -> None:
        length = self.shape[1]
        kind = self.pick(["image", "image", "pooled", "token"])
        if kind == "image":
            height = self.divisor(length)
            size = self.pick([(length,), (height, length // height)])
            self.put("to image", {"size": size, "how": self.pick(["unflatten", "reshape", "view"])})
            self.tokens = False
        elif kind == "token":
            self.put("marked", {"length": length, "width": self.width, "token": True})
        else:
            self.put("pooled", {"how": self.pick(["mean", "sum", "max", "first"]), "tokens": True})
            self.tokens = False

    def moved_channels(self, positions: int) -> None:
        kinds = ["resized", "resized", "tokens", "flat", "pooled"]
        if self.dims == 2 and self.width % 4 == 0 and positions <= LARGEST // 4:
            kinds.append("pixel shuffle")
        if self.dims == 2 and self.width <= 6 and all(size % 2 == 0 for size in self.shape[2:]):
            kinds.append("pixel unshuffle")
        kind = self.pick(kinds)
        if kind == "tokens":
            self.put("to tokens", {"how": self.pick(["flatten", "permute", "reshape"])})
            self.tokens = True
        elif kind == "flat":
            options = {"ins": self.width * positions, "outs": self.pick(WIDTHS), "bias": self.flag()}
            self.put("flat", {**options, "how": self.pick(["flatten", "reshape", "last"])})
        elif kind == "pooled":
            self.put("pooled", {"how": self.pick(["mean", "sum", "max", "first"]), "tokens": False})
        elif kind == "resized":
            self.resized(positions)
        else:
            self.put(kind, {"upscale_factor" if kind == "pixel shuffle" else "downscale_factor": 2})

    def resized(self, positions: int) -> None:
        small = min(self.shape[2:]) < 3
        names = [name for name in RESIZED if not (name == "upsampled" and positions > LARGEST // 2**self.dims)]
        if small:
            names = ["padded", "padded with ones", "replicated", "interpolated", "adaptive avg"]
        elif positions > LARGEST // 2:
            names = [name for name in names if name not in ("reflected", "replicated")]
        if self.flag() and not small:
            kernel = {"kernel_size": 3, "stride": 2, "padding": 1}
            self.put(
                "conv", {"dims": self.dims, "in_channels": self.width, "out_channels": self.pick(WIDTHS), **kernel}
            )
        else:
            self.put("function", {"table": "resized", "name": self.pick(names)})


INPUTS = (
    ((2, 3), False),
    ((2, 3, 6), False),
    ((2, 3, 4, 4), False),
    ((2, 2, 3, 2, 4), False),
    ((2, 4, 6), True),
    ((2, 6, 3), True),
)


@st.composite
def networks(draw: st.DrawFn, blocks: int = 7, depth: int = 2, averaging: bool = False) -> Network:
    """A first layer, so that there are neurons, blocks, and a last layer whose outputs stay."""
    shape, tokens = draw(st.sampled_from(INPUTS))
    trunk = Trunk(draw, shape, tokens, averaging)
    trunk.dense()
    for _ in range(draw(st.integers(1, blocks))):
        trunk.step(depth, keep=False)
    trunk.dense(3)
    return Network(shape, trunk.block)


# ------------------------------------------------------------------ plans


def random_plan(graph: NeuronGraph, seed: int, fraction: float, stay: int = 1) -> tuple[Plan, Kept]:
    """A plan over all groups that can be trimmed. Each keeps `stay` of its neurons, and so does every axis."""
    random = np.random.default_rng(seed)
    removable: set[int] = set()
    for layer in graph.layers.values():
        if not layer.locked:
            removable |= set(layer.roots[layer.removable].tolist())
    kept = np.ones(len(graph.root), bool)
    gone = [value for value in sorted(removable) if random.random() < fraction]
    kept[gone] = False
    axes = [roots for per_axis in graph.axes.values() for roots in per_axis if roots.size > 1]
    for roots in [*(layer.roots for layer in graph.layers.values()), *axes]:
        bodies = random.permutation(np.unique(roots))
        missing = min(stay, bodies.size) - int(kept[bodies].sum())
        if missing > 0:
            kept[bodies[~kept[bodies]][:missing]] = True
    removed = {name: np.flatnonzero(~kept[layer.roots]) for name, layer in graph.layers.items()}
    layers = {name: LayerPlan(graph.layers[name].width, tuple(r.tolist())) for name, r in removed.items() if r.size}
    return Plan(layers, through_norms=graph.through_norms), kept
