"""What each ATen operator does to neuron labels: one small table.

A row is a function of a `Call`. It returns the labels of the result (one for each tensor where there are several).
An operator without a row, and without the `pointwise` tag, pins every label that reaches it: nothing is guessed.
Contractions are read as what they are, a product in an index space that holds all axes, summed over some of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchtrim._labels import UNIFORM, UNKNOWN, Atoms, Factor, Labels, Ledger, Shape, compress, fit, reshape

Row = Callable[["Call"], "Labels | Sequence[Labels]"]
ROWS: dict[str, Row] = {}

RECTIFIERS = frozenset(
    [
        "relu",
        "relu6",
        "hardtanh",
        "threshold",
        "clamp_min",
        "clamp",
        "hardswish",
        "hardsigmoid",
        "hardshrink",
        "softshrink",
    ]
)
SMOOTH = frozenset(
    [
        "leaky_relu",
        "prelu",
        "_prelu_kernel",
        "rrelu",
        "elu",
        "selu",
        "celu",
        "gelu",
        "silu",
        "mish",
        "softplus",
        "sigmoid",
        "log_sigmoid",
        "log_sigmoid_forward",
        "tanh",
    ]
)
_KEEP_ZERO = (
    RECTIFIERS - {"hardsigmoid", "threshold", "clamp", "clamp_min"}
    | SMOOTH - {"softplus", "sigmoid", "log_sigmoid", "log_sigmoid_forward"}
    | {"abs", "neg", "sign", "sin", "sqrt", "square", "clone", "_to_copy", "detach"}
)
_PRODUCTS = frozenset(["mul", "div"])


@dataclass(slots=True)
class Call:
    """One operator at work: its arguments, its result, and the ledger to write demands into."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    labels_of: Callable[[Tensor], Labels]
    ledger: Ledger
    where: str
    produced: list[Atoms] = field(default_factory=list)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def reason(self, what: str) -> str:
        return f"{what} by aten::{self.name} in {self.where or 'the model itself'}"

    def fix(self, factor: Factor, axis: int, why: str = "an axis of fixed size is read") -> Factor | None:
        """Keep an axis at its size: tie along it what varies elsewhere too, pin what does not."""
        if not factor.varies(axis):
            return factor
        if factor.axes() == (axis,):
            self.ledger.pin(factor.atoms.ravel(), self.reason(why))
            return None
        return factor.map(self.ledger.tie(factor.atoms, axis, self.reason(why)))

    def fix_axes(self, factors: Sequence[Factor], axes: Sequence[int], why: str) -> list[Factor]:
        kept: list[Factor] = []
        for factor in factors:
            current: Factor | None = factor
            for axis in axes:
                current = self.fix(current, axis, why) if current else None
            if current:
                kept.append(current)
        return kept


Operand = tuple[Sequence[Factor], Shape, bool]  # factors, shape, uniform


def merge(call: Call, operands: Sequence[Operand], zero: Callable[[list[bool | None]], bool]) -> list[Factor]:
    """Unite the labels of broadcast operands. `zero` sees each operand's flag, None where it lacks the factor."""
    ndim = max((len(shape) for _, shape, _ in operands), default=0)
    found: list[tuple[Factor, list[bool | None]]] = []
    for index, (factors, _, _) in enumerate(operands):
        for raw in factors:
            factor = fit(raw, ndim)
            axes = set(factor.axes())
            same: list[bool | None] | None = None
            for other, flags in found:
                if axes & set(other.axes()):
                    call.ledger.unite(other.atoms, factor.atoms, call.reason("combined"))
                    if other.atoms.shape == factor.atoms.shape:
                        same = flags
            if same is None:
                same = list[bool | None]([None] * len(operands))
                found.append((factor, same))
            same[index] = factor.zero
    merged: list[Factor] = []
    for factor, flags in found:
        current: Factor | None = factor
        for factors, shape, uniform in operands:
            if uniform:
                continue
            covered = {axis for one in factors for axis in fit(one, ndim).axes()}
            for axis in factor.axes():
                size = shape[axis - ndim + len(shape)] if axis - ndim + len(shape) >= 0 else 1
                if current and size > 1 and axis not in covered:
                    current = call.fix(current, axis, "combined with a tensor of fixed size")
        if current:
            merged.append(Factor(current.atoms, zero(flags)))
    return merged


def _all(flags: list[bool | None]) -> bool:
    return all(flags)


def _any(flags: list[bool | None]) -> bool:
    return any(flags)


def _never(_: list[bool | None]) -> bool:
    return False


def tensors(values: Any) -> list[Tensor]:
    """All tensors in the arguments of an operator, in order."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


def row(*names: str) -> Callable[[Row], Row]:
    def register(function: Row) -> Row:
        for name in names:
            assert name not in ROWS, name
            ROWS[name] = function
        return function

    return register


def pointwise(call: Call) -> Labels:
    operands = tensors([*call.args, *call.kwargs.values()])
    labels = [call.labels_of(operand) for operand in operands]
    static = all(one.static for one in labels)
    if all(one.uniform for one in labels):
        return UNIFORM
    if len(operands) == 1 and (not labels[0].factors or call.name in _KEEP_ZERO):
        return labels[0]
    if call.name in ("add", "sub"):
        zero = _all if len(operands) > 1 else _never
    elif call.name in _PRODUCTS:
        zero = _any if call.name == "mul" or len(operands) == 1 else lambda flags: bool(flags[0])
    elif call.name in _KEEP_ZERO and call.name in ("prelu", "_prelu_kernel"):
        zero = lambda flags: bool(flags[0])  # noqa: E731
    else:
        zero = _never
    factors = merge(
        call,
        [(one.factors, tuple(t.shape), one.uniform) for one, t in zip(labels, operands, strict=True)],
        zero,
    )
    return Labels(tuple(factors), static)


def unknown(call: Call) -> Labels:
    """No row: pin everything that reaches the operator."""
    operands = tensors([*call.args, *call.kwargs.values()])
    for operand in operands:
        for factor in call.labels_of(operand).factors:
            call.ledger.pin(factor.atoms.ravel(), call.reason("no rule is known, so it is left alone: read"))
    return UNIFORM if not operands and call.name in _UNIFORM else Labels(static=not operands)


_UNIFORM = frozenset(["empty", "zeros", "ones", "full", "rand", "randn", "empty_strided", "scalar_tensor"])


@row("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "new_zeros", "new_ones",
     "new_full", "new_empty", "new_empty_strided")  # fmt: skip
def _uniform(call: Call) -> Labels:
    return UNIFORM


@row("bernoulli", "uniform", "normal", "fill", "zero")
def _filled(call: Call) -> Labels:
    return call.labels_of(call.args[0]) if call.labels_of(call.args[0]).factors else UNIFORM


@row("native_dropout", "_fused_dropout", "dropout")
def _dropout(call: Call) -> Labels:
    return call.labels_of(call.args[0])


@row("copy")
def _copy(call: Call) -> Labels:
    target, source = call.args[0], call.args[1]
    labels = call.labels_of(source)
    if call.labels_of(target).factors:
        return pointwise(call)
    return labels.with_factors(fit(factor, target.ndim) for factor in labels.factors)


@row("clone", "_to_copy", "detach", "alias", "lift_fresh", "contiguous", "_unsafe_view_identity")
def _same(call: Call) -> Labels:
    return call.labels_of(call.args[0])


# ------------------------------------------------------------------ contractions


def _contract(call: Call, left: Operand, right: Operand, axis: int, static: tuple[bool, bool]) -> list[Factor]:
    """The product of two operands in one index space, summed over `axis`, which stays with size 1."""
    factors = merge(call, [left, right], _any)
    if all(static):
        return call.fix_axes(factors, [axis], "a weight is computed")
    return _summed(call, factors, [axis])


def _summed(call: Call, factors: Sequence[Factor], axes: Sequence[int]) -> list[Factor]:
    """A sum drops an axis: silent neurons add nothing, if silent means zero."""
    kept: list[Factor] = []
    for factor in factors:
        current: Factor | None = factor
        for axis in axes:
            if current is None or not current.varies(axis):
                continue
            if not current.zero:
                current = call.fix(current, axis, "summed over although a silent neuron is not zero here")
            elif current.axes() == (axis,):
                current = None
            else:
                tied = call.ledger.tie(current.atoms, axis, call.reason("summed"))
                current = current.map(tied)
        if current:
            kept.append(current)
    return kept


def _moved(labels: Labels, order: Sequence[int | None]) -> list[Factor]:
    """Factors in a new index space: `order` names the old axis for each new one, None for an axis of size 1."""
    moved: list[Factor] = []
    for factor in labels.factors:
        axes = [axis for axis in order if axis is not None]
        atoms = factor.atoms.transpose(axes)
        moved.append(factor.map(np.expand_dims(atoms, [i for i, axis in enumerate(order) if axis is None])))
    return moved


def _squeezed(factors: Sequence[Factor], axes: Sequence[int]) -> list[Factor]:
    return [factor.map(factor.atoms.squeeze(tuple(axes))) for factor in factors]


def _sizes(tensor: Tensor, order: Sequence[int | None]) -> Shape:
    return tuple(1 if axis is None else tensor.shape[axis] for axis in order)


def _product(call: Call, left: Tensor, right: Tensor, out: Sequence[tuple[int | None, int | None]]) -> Labels:
    """A matrix product. `out` names, for each axis of the index space, the axes of both; the last one is summed."""
    one, other = call.labels_of(left), call.labels_of(right)
    orders = [a for a, _ in out], [b for _, b in out]
    last = len(out) - 1
    factors = _contract(
        call,
        (_moved(one, orders[0]), _sizes(left, orders[0]), one.uniform),
        (_moved(other, orders[1]), _sizes(right, orders[1]), other.uniform),
        last,
        (one.static, other.static),
    )
    if one.static != other.static:
        weight = one if one.static else other
        order = orders[0] if one.static else orders[1]
        call.produced += [f.atoms for f in _moved(weight, order) if not f.varies(last)]
    return Labels(tuple(_squeezed(factors, [last])), one.static and other.static)


@row("mm")
def _mm(call: Call) -> Labels:
    return _product(call, call.args[0], call.args[1], [(0, None), (None, 1), (1, 0)])


@row("bmm")
def _bmm(call: Call) -> Labels:
    return _product(call, call.args[0], call.args[1], [(0, 0), (1, None), (None, 2), (2, 1)])


@row("mv")
def _mv(call: Call) -> Labels:
    return _product(call, call.args[0], call.args[1], [(0, None), (1, 0)])


@row("dot")
def _dot(call: Call) -> Labels:
    return _product(call, call.args[0], call.args[1], [(0, 0)])


def _plus(call: Call, product: Labels, bias: Tensor, axis: int | None = None) -> Labels:
    """Add a bias, which lies along `axis` of the product, or broadcasts against it."""
    labels = call.labels_of(bias)
    ndim = call.result.ndim
    shape = tuple(bias.shape)
    factors: Sequence[Factor] = labels.factors
    if axis is not None:
        shape = (1,) * axis + shape + (1,) * (ndim - axis - 1)
        factors = [f.map(f.atoms.reshape((1,) * axis + f.atoms.shape + (1,) * (ndim - axis - 1))) for f in factors]
    merged = merge(
        call,
        [(product.factors, tuple(call.result.shape), False), (factors, shape, labels.uniform)],
        _all,
    )
    return Labels(tuple(merged), product.static and labels.static)


@row("addmm")
def _addmm(call: Call) -> Labels:
    return _plus(call, _product(call, call.args[1], call.args[2], [(0, None), (None, 1), (1, 0)]), call.args[0])


@row("baddbmm")
def _baddbmm(call: Call) -> Labels:
    product = _product(call, call.args[1], call.args[2], [(0, 0), (1, None), (None, 2), (2, 1)])
    return _plus(call, product, call.args[0])


@row("convolution")
def _convolution(call: Call) -> Labels:
    inputs, weight, bias, *_ = call.args
    transposed, groups = call.args[6], call.args[8]
    x, w = call.labels_of(inputs), call.labels_of(weight)
    spatial = range(2, inputs.ndim)
    data = call.fix_axes(x.factors, spatial, "the positions of a convolution are read")
    kernel = call.fix_axes(w.factors, spatial, "a kernel's own axes are kept")
    # index space: batch, groups, outputs of a group, inputs of a group
    ins, outs = inputs.shape[1] // groups, call.result.shape[1] // groups
    data = [f.map(compress(_split(f.atoms, 1, groups, ins))) for f in _flat(data)]
    weights: list[Factor] = []
    for factor in _flat(kernel):
        atoms = factor.atoms
        if transposed:  # [groups · ins, outs]
            atoms = _split(atoms, 0, groups, ins)
            atoms = atoms.reshape(*atoms.shape[:2], -1).transpose(0, 2, 1)
        else:  # [groups · outs, ins]
            atoms = _split(atoms, 0, groups, outs)
            atoms = atoms.reshape(*atoms.shape[:2], -1)
        weights.append(factor.map(atoms[None]))
    data = [f.map(f.atoms[:, :, None, :]) for f in data]
    if groups > 1:
        rows = _whole_groups_go(data, groups, ins, outs)
        why = "the groups of a convolution stay whole"
        if rows:
            data = [f.map(call.ledger.tie(f.atoms, 3, call.reason(why))) for f in data]
            tied = [_tie_rows(call, f, why) for f in weights]
            weights = [f for f in tied if f]
        else:
            data = [f.map(call.ledger.tie(f.atoms, 1, call.reason(why))) for f in data]
            weights = [f.map(call.ledger.tie(f.atoms, 1, call.reason(why))) for f in weights]
    produced = [f for f in weights if not f.varies(3)]
    factors = _contract(
        call,
        (data, (inputs.shape[0], groups, 1, ins), x.uniform),
        (weights, (1, groups, outs, ins), w.uniform),
        3,
        (x.static, w.static),
    )
    if w.static:
        call.produced += [f.atoms for f in produced]
    shape = (inputs.shape[0], groups, outs)
    joined = [f.map(reshape(f.atoms[:, :, :, 0], shape, (shape[0], groups * outs))) for f in factors]
    joined = [f.map(f.atoms.reshape(*f.atoms.shape, *(1 for _ in spatial))) for f in joined]
    labels = Labels(tuple(joined), x.static and w.static)
    return labels if bias is None else _plus(call, labels, bias, 1)


def _whole_groups_go(data: Sequence[Factor], groups: int, ins: int, outs: int) -> bool:
    """Whether whole groups of a convolution go, or the same positions of every group: as tied so far, else the finer.

    What is tied already decides first, so that a trimmed model is read as its original was.
    """
    if data and not any(f.varies(3) for f in data):
        return True
    if data and not any(f.varies(1) for f in data):
        return False
    return groups >= max(ins, outs)


def _flat(factors: Sequence[Factor]) -> list[Factor]:
    """Factors of the first two axes, the others being constant."""
    return [f.map(f.atoms.reshape(f.atoms.shape[:2])) for f in factors]


def _split(atoms: Atoms, axis: int, groups: int, size: int) -> Atoms:
    """Cut an axis into (groups, size); a constant one into (1, 1)."""
    cut = (groups, size) if atoms.shape[axis] > 1 else (1, 1)
    return atoms.reshape(*atoms.shape[:axis], *cut, *atoms.shape[axis + 1 :])


def _tie_rows(call: Call, factor: Factor, why: str) -> Factor | None:
    """A grouped weight [1, groups, outs, ins] whose whole groups go: outputs tied, inputs kept."""
    current = call.fix(factor, 3, why)
    return current and current.map(call.ledger.tie(current.atoms, 2, call.reason(why)))


# ------------------------------------------------------------------ normalisation


def _along(labels: Labels, axis: int, ndim: int) -> list[Factor]:
    """The factors of a vector, laid along one axis of a tensor."""
    shape = [1] * ndim
    shape[axis] = -1
    return [f.map(f.atoms.reshape(shape)) for f in labels.factors]


@row("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "batch_norm",
     "_native_batch_norm_legit", "_native_batch_norm_legit_no_training")  # fmt: skip
def _batch_norm(call: Call) -> Sequence[Labels]:
    inputs = call.args[0]
    x = call.labels_of(inputs)
    operands: list[Operand] = [(x.factors, tuple(inputs.shape), x.uniform)]
    affine = 0
    for index, vector in enumerate(call.args[1:5]):
        if isinstance(vector, Tensor):
            labels = call.labels_of(vector)
            shape = tuple(vector.numel() if axis == 1 else 1 for axis in range(inputs.ndim))
            operands.append((_along(labels, 1, inputs.ndim), shape, labels.uniform))
            affine += index < 2
    silent = affine == 2
    factors = merge(call, operands, lambda flags: silent and bool(flags[1]) and bool(flags[2]))
    saved = [f.map(f.atoms.reshape(-1)) for f in factors if f.axes() == (1,)]
    return [
        Labels(tuple(factors), x.static),
        *(Labels(tuple(saved)) if t.numel() == inputs.shape[1] else UNKNOWN for t in call.result[1:]),
    ]


@row("native_layer_norm")
def _layer_norm(call: Call) -> Sequence[Labels]:
    inputs, shape = call.args[0], call.args[1]
    factors = _affine(call, inputs, [t for t in call.args[2:4] if t is not None])
    axes = range(inputs.ndim - len(shape), inputs.ndim)
    factors = call.fix_axes(factors, axes, "normalised over")
    return [call.labels_of(inputs).with_factors(Factor(f.atoms, False) for f in factors), UNKNOWN, UNKNOWN]


def _affine(call: Call, inputs: Tensor, vectors: Sequence[Tensor]) -> list[Factor]:
    everything = [inputs, *vectors]
    labels = [call.labels_of(tensor) for tensor in everything]
    return merge(
        call,
        [(one.factors, tuple(t.shape), one.uniform) for one, t in zip(labels, everything, strict=True)],
        _never,
    )


@row("native_group_norm")
def _group_norm(call: Call) -> Sequence[Labels]:
    inputs, weight, bias = call.args[:3]
    groups = call.args[6]
    x = call.labels_of(inputs)
    operands: list[Operand] = [(x.factors, tuple(inputs.shape), x.uniform)]
    for vector in (weight, bias):
        if vector is not None:
            labels = call.labels_of(vector)
            shape = tuple(vector.numel() if axis == 1 else 1 for axis in range(inputs.ndim))
            operands.append((_along(labels, 1, inputs.ndim), shape, labels.uniform))
    affine = len(operands) == 3
    factors = merge(call, operands, lambda flags: affine and bool(flags[1]) and bool(flags[2]))
    factors = call.fix_axes(factors, range(2, inputs.ndim), "normalised over")
    for factor in factors:
        if factor.varies(1):
            cut = factor.atoms.reshape(factor.atoms.shape[0], groups, -1)
            call.ledger.tie(cut, 2, call.reason("normalised together"))
    return [x.with_factors(factors), UNKNOWN, UNKNOWN]


@row("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax", "cumsum", "logcumsumexp")
def _softmax(call: Call) -> Labels:
    inputs, axis = call.args[0], call.args[1] % max(call.args[0].ndim, 1)
    labels = call.labels_of(inputs)
    factors = call.fix_axes(labels.factors, [axis], "compared with each other")
    return labels.with_factors(Factor(f.atoms, False) for f in factors)


# ------------------------------------------------------------------ reductions


def _reduced(call: Call, summing: bool) -> Labels:
    inputs = call.args[0]
    labels = call.labels_of(inputs)
    axes = call.argument(1, "dim")
    axes = range(inputs.ndim) if axes is None or axes == [] else [axes] if isinstance(axes, int) else axes
    axes = [axis % max(inputs.ndim, 1) for axis in axes]
    if summing and not labels.static:
        factors = _summed(call, labels.factors, axes)
    else:
        factors = call.fix_axes(labels.factors, axes, "reduced over all its values")
        factors = factors if summing or call.name == "mean" else [Factor(f.atoms, False) for f in factors]
    first = call.result[0] if isinstance(call.result, (tuple, list)) else call.result
    if first.ndim < inputs.ndim:
        factors = _squeezed(factors, axes)
    return Labels(tuple(f for f in factors if f.atoms.size > 1), labels.static)


@row("sum")
def _sum(call: Call) -> Labels:
    return _reduced(call, True)


@row("mean", "amax", "amin", "max", "min", "argmax", "argmin", "prod", "std", "var", "var_mean", "std_mean",
     "logsumexp", "any", "all")  # fmt: skip
def _reduce(call: Call) -> Labels:
    if len(tensors(call.args)) == 2:  # max(x, y)
        return pointwise(call)
    return _reduced(call, False)


# ------------------------------------------------------------------ pooling, padding, interpolation


@row(*(f"{kind}_pool{n}d{suffix}" for kind in ("max", "avg", "_adaptive_avg", "adaptive_avg", "adaptive_max")
       for n in (1, 2, 3) for suffix in ("", "_with_indices")),
     *(f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "_nearest_exact1d", "linear1d",
       "bilinear2d", "trilinear3d", "bicubic2d", "_bilinear2d_aa", "_bicubic2d_aa")),
     "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa",
     *(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)))  # fmt: skip
def _spatial(call: Call) -> Labels:
    inputs = call.args[0]
    count = next((int(n) for n in "123" if f"{n}d" in call.name), 2)
    labels = call.labels_of(inputs)
    axes = range(inputs.ndim - count, inputs.ndim)
    return labels.with_factors(call.fix_axes(labels.factors, axes, "positions are read"))


@row("constant_pad_nd")
def _pad(call: Call) -> Labels:
    inputs, padding = call.args[0], call.args[1]
    value = call.argument(2, "value", 0)
    labels = call.labels_of(inputs)
    padded: list[Factor] = []
    for factor in labels.factors:
        atoms = factor.atoms
        for index in range(len(padding) // 2):
            axis = inputs.ndim - 1 - index
            before, after = padding[2 * index : 2 * index + 2]
            if not factor.varies(axis) or (before == after == 0):
                continue
            atoms = atoms.take(range(max(-before, 0), atoms.shape[axis] - max(-after, 0)), axis)
            pads = [(0, 0)] * atoms.ndim
            pads[axis] = max(before, 0), max(after, 0)
            atoms = np.pad(atoms, pads)
        padded.append(Factor(atoms, factor.zero and value == 0))
    return labels.with_factors(padded)


# ------------------------------------------------------------------ shapes: simply applied to the labels


@row("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten", "squeeze", "unsqueeze")
def _reshape(call: Call) -> Labels:
    labels = call.labels_of(call.args[0])
    if not labels.factors:
        return labels
    old, new = tuple(call.args[0].shape), tuple(call.result.shape)
    factors = [f.map(reshape(f.atoms, old, new)) for f in labels.factors]
    for before, after in zip(labels.factors, factors, strict=True):
        if len(after.axes()) > max(1, len(before.axes())):
            call.ledger.keep_rectangular(after.atoms, call.reason("cut into two axes"))
    return labels.with_factors(factors)


@row("t", "transpose", "permute", "numpy_T", "mT", "swapaxes")
def _permute(call: Call) -> Labels:
    inputs = call.args[0]
    labels = call.labels_of(inputs)
    order = list(range(inputs.ndim))
    if call.name == "permute":
        order = [axis % inputs.ndim for axis in call.args[1]]
    elif inputs.ndim >= 2:
        a, b = (0, 1) if call.name == "t" else (call.args[1], call.args[2])
        order[a], order[b] = order[b], order[a]
    return labels.with_factors(f.map(f.atoms.transpose(order)) for f in labels.factors)


@row("expand")
def _expand(call: Call) -> Labels:
    labels = call.labels_of(call.args[0])
    if not labels.factors:
        return labels
    return labels.with_factors(fit(f, call.result.ndim) for f in labels.factors)


@row("repeat", "tile")
def _repeat(call: Call) -> Labels:
    labels = call.labels_of(call.args[0])
    repeats = [1] * (call.result.ndim - len(call.args[1])) + list(call.args[1])
    factors = [fit(f, call.result.ndim) for f in labels.factors]
    return labels.with_factors(
        f.map(np.tile(f.atoms, [n if f.varies(i) else 1 for i, n in enumerate(repeats)])) for f in factors
    )


@row("flip")
def _flip(call: Call) -> Labels:
    labels = call.labels_of(call.args[0])
    return labels.with_factors(f.map(np.flip(f.atoms, call.args[1])) for f in labels.factors)


def _piece(call: Call, axis: int, start: int, size: int, step: int = 1) -> Labels:
    """Part of an axis. Parts that tile it are tied position by position, since code cuts by proportion."""
    inputs = call.args[0]
    labels = call.labels_of(inputs)
    length = inputs.shape[axis]
    if size == length:
        return labels
    pieces: list[Factor] = []
    for factor in labels.factors:
        current: Factor | None = factor
        if factor.varies(axis):
            atoms = np.moveaxis(factor.atoms, axis, 0)
            rest = atoms.shape[1:]
            if step == 1 and size and length % size == 0 and start % size == 0:
                call.ledger.tie(atoms.reshape(length // size, size, *rest), 0, call.reason("cut into equal parts"))
            elif step > 1 and length % step == 0 and size == length // step:
                call.ledger.tie(atoms.reshape(size, step, *rest), 1, call.reason("cut into equal parts"))
            else:
                current = call.fix(factor, axis, "cut into unequal parts")
                if current and not current.varies(axis):
                    pieces.append(current)
                    continue
        if current:
            part = range(start, start + size * step, step)
            pieces.append(current.map(current.atoms.take(part, axis)) if current.varies(axis) else current)
    return labels.with_factors(pieces)


@row("slice")
def _slice(call: Call) -> Labels:
    inputs = call.args[0]
    axis = call.argument(1, "dim", 0) % inputs.ndim
    start = call.argument(2, "start") or 0
    start = min(max(start + inputs.shape[axis] if start < 0 else start, 0), inputs.shape[axis])
    return _piece(call, axis, start, call.result.shape[axis], call.argument(4, "step", 1))


@row("narrow")
def _narrow(call: Call) -> Labels:
    return _piece(call, call.args[1] % call.args[0].ndim, call.args[2], call.args[3])


@row("split", "split_with_sizes", "chunk")
def _split_row(call: Call) -> Sequence[Labels]:
    axis = call.argument(2, "dim", 0) % call.args[0].ndim
    pieces: list[Labels] = []
    start = 0
    for piece in call.result:
        pieces.append(_piece(call, axis, start, piece.shape[axis]))
        start += piece.shape[axis]
    return pieces


def _without(call: Call, axis: int, index: int) -> Labels:
    labels = call.labels_of(call.args[0])
    factors = call.fix_axes(labels.factors, [axis], "one position is picked")
    return labels.with_factors(f.map(f.atoms.squeeze(axis)) for f in factors)


@row("select")
def _select(call: Call) -> Labels:
    return _without(call, call.args[1] % call.args[0].ndim, call.args[2])


@row("unbind")
def _unbind(call: Call) -> Sequence[Labels]:
    axis = call.argument(1, "dim", 0) % call.args[0].ndim
    labels = _without(call, axis, 0)
    return [labels] * len(call.result)


@row("cat")
def _cat(call: Call) -> Labels:
    parts: list[Tensor] = [t for t in call.args[0] if t.numel() or t.ndim == call.result.ndim]
    axis = call.argument(1, "dim", 0) % call.result.ndim
    labels = [call.labels_of(part) for part in parts]
    across: list[Operand] = []
    along: list[list[Factor]] = []
    for part, one in zip(parts, labels, strict=True):
        shape = tuple(1 if i == axis else size for i, size in enumerate(part.shape))
        across.append(([f for f in one.factors if not f.varies(axis)], shape, one.uniform))
        along.append([f for f in one.factors if f.varies(axis)])
    factors = merge(call, across, _all)
    for index in range(max((len(some) for some in along), default=0)):
        pieces: list[Atoms] = []
        zero = True
        for part, some in zip(parts, along, strict=True):
            fill = np.zeros([1] * call.result.ndim, np.int64)
            atoms = some[index].atoms if index < len(some) else fill
            zero = zero and (index >= len(some) or some[index].zero)
            pieces.append(np.broadcast_to(atoms, [part.shape[axis] if i == axis else n
                                                  for i, n in enumerate(atoms.shape)]))  # fmt: skip
        shape = np.broadcast_shapes(*(tuple(1 if i == axis else n for i, n in enumerate(p.shape)) for p in pieces))
        wide = [np.broadcast_to(p, [p.shape[i] if i == axis else shape[i] for i in range(p.ndim)]) for p in pieces]
        factors.append(Factor(np.concatenate(wide, axis), zero))
    return Labels(tuple(factors), all(one.static for one in labels))


@row("stack")
def _stack(call: Call) -> Labels:
    axis = call.argument(1, "dim", 0) % call.result.ndim
    merged = pointwise(call)
    return merged.with_factors(f.map(np.expand_dims(f.atoms, axis)) for f in merged.factors)


def is_pointwise(function: Any) -> bool:
    return torch.Tag.pointwise in function.tags
