"""Rows of the operators that multiply and sum: matrix products, convolutions, attention, embeddings.

All are read as what they are: a product in an index space that holds every axis, summed over some of them.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from torchtrim._labels import UNKNOWN, Atoms, Factor, Labels, Shape, compress, fit, reshape
from torchtrim._operators import Call, Operand, Table, all_zero, any_zero, merge, operand, tensors, unknown

NORM = "weights are normed together, which without some of them would change the others"

Order = Sequence[int | None]  # for each axis of the index space the tensor's own axis, or None

ROWS = Table()


def summed(call: Call, factors: Sequence[Factor], axes: Sequence[int]) -> list[Factor]:
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
                current = current.map(call.ledger.tie(current.atoms, axis, call.reason("summed")))
        if current:
            kept.append(current)
    return kept


def squeezed(factors: Sequence[Factor], axes: Sequence[int]) -> list[Factor]:
    return [factor.map(factor.atoms.squeeze(tuple(axes))) for factor in factors]


def _moved(labels: Labels, order: Order) -> list[Factor]:
    moved: list[Factor] = []
    for factor in labels.factors:
        atoms = factor.atoms.transpose([axis for axis in order if axis is not None])
        moved.append(factor.map(np.expand_dims(atoms, [i for i, axis in enumerate(order) if axis is None])))
    return moved


def _in_space(labels: Labels, tensor: Tensor, order: Order) -> Operand:
    sizes: Shape = tuple(1 if axis is None else tensor.shape[axis] for axis in order)
    return _moved(labels, order), sizes, labels.uniform


def _product(call: Call, left: Tensor, right: Tensor, axes: Sequence[tuple[int | None, int | None]]) -> Labels:
    """A matrix product. `axes` names, for each axis of the index space, the axes of both; the last one is summed."""
    one, other = call.labels_of(left), call.labels_of(right)
    orders = [a for a, _ in axes], [b for _, b in axes]
    last = len(axes) - 1
    factors = merge(call, [_in_space(one, left, orders[0]), _in_space(other, right, orders[1])], any_zero)
    factors = summed(call, factors, [last])
    if one.static != other.static:
        weight, order, others = (one, *orders) if one.static else (other, *reversed(orders))
        free = {axis for axis, across in enumerate(others) if across is None}
        call.produced += [f.atoms for f in _moved(weight, order) if free.issuperset(f.axes())]
    return Labels(tuple(squeezed(factors, [last])), one.static and other.static)


_MATRICES = [(0, None), (None, 1), (1, 0)]
_BATCHES = [(0, 0), (1, None), (None, 2), (2, 1)]
_VECTOR = [(0, None), (1, 0)]


@ROWS.of("mm")
def _mm(call: Call) -> Labels:
    return _product(call, call.args[0], call.args[1], _MATRICES)


@ROWS.of("bmm")
def _bmm(call: Call) -> Labels:
    return _product(call, call.args[0], call.args[1], _BATCHES)


@ROWS.of("mv")
def _mv(call: Call) -> Labels:
    left, right = (call.labels_of(one) for one in call.args[:2])
    if not (left.static and right.static):
        return _product(call, call.args[0], call.args[1], _VECTOR)
    # spectral norm tells the length of a weight so
    call.fix_axes(right.factors, [0], NORM)
    return Labels(tuple(squeezed(call.fix_axes(left.factors, [1], NORM), [1])), static=True)


@ROWS.of("dot", "vdot")
def _dot(call: Call) -> Labels:
    left, right = (call.labels_of(one) for one in call.args[:2])
    if not (left.static and right.static):
        return _product(call, call.args[0], call.args[1], [(0, 0)])
    call.fix_axes([*left.factors, *right.factors], [0], NORM)
    return Labels(static=True)


@ROWS.of("addmm")
def _addmm(call: Call) -> Labels:
    return _plus(call, _product(call, call.args[1], call.args[2], _MATRICES), call.args[0])


@ROWS.of("baddbmm")
def _baddbmm(call: Call) -> Labels:
    return _plus(call, _product(call, call.args[1], call.args[2], _BATCHES), call.args[0])


@ROWS.of("addmv")
def _addmv(call: Call) -> Labels:
    return _plus(call, _product(call, call.args[1], call.args[2], _VECTOR), call.args[0])


@ROWS.of("_trilinear")
def _trilinear(call: Call) -> Labels:
    """The product of three tensors, each with axes of size 1 added, summed over some axes: `nn.Bilinear`."""
    axes = list(call.args[6])
    operands: list[Operand] = []
    for tensor, added in zip(call.args[:3], call.args[3:6], strict=True):
        factors, shape, uniform = operand(call, tensor)
        wide = np.expand_dims(np.empty(shape, bool), tuple(added)).shape
        operands.append(([f.map(np.expand_dims(f.atoms, tuple(added))) for f in factors], wide, uniform))
        if call.labels_of(tensor).static:
            call.produced += [f.atoms for f in operands[-1][0] if not any(map(f.varies, axes))]
    factors = summed(call, merge(call, operands, any_zero), axes)
    return Labels(tuple(squeezed(factors, axes)))


def _plus(call: Call, product: Labels, bias: Tensor, axis: int | None = None) -> Labels:
    """Add a bias, which lies along `axis` of the product, or broadcasts against it."""
    factors, shape, uniform = operand(call, bias)
    if axis is not None:
        ones = (1,) * axis, (1,) * (call.result.ndim - axis - 1)
        shape = (*ones[0], *shape, *ones[1])
        factors = [f.map(f.atoms.reshape(*ones[0], -1, *ones[1])) for f in factors]
    merged = merge(call, [(product.factors, tuple(call.result.shape), False), (factors, shape, uniform)], all_zero)
    return Labels(tuple(merged), product.static and call.labels_of(bias).static)


# ------------------------------------------------------------------ convolutions


@ROWS.of("convolution")
def _convolution(call: Call) -> Labels:
    """In the index space [batch, groups, outputs of a group, inputs of a group]; positions are not neurons."""
    inputs, weight, bias, *_ = call.args
    groups = call.args[8]
    x, w = call.labels_of(inputs), call.labels_of(weight)
    ins, outs = inputs.shape[1] // groups, call.result.shape[1] // groups
    data = _data_of(call, x, inputs.ndim, groups, ins)
    weights = _weights_of(call, w, inputs.ndim, groups, ins, outs)
    if groups > 1:
        data, weights = _tied_groups(call, data, weights, _whole_groups_go(call, data, groups, ins, outs))
    operands: list[Operand] = [
        (data, (inputs.shape[0], groups, 1, ins), x.uniform),
        (weights, (1, groups, outs, ins), w.uniform),
    ]
    factors = summed(call, merge(call, operands, any_zero), [3])
    if w.static:
        call.produced += [f.atoms for f in weights if not f.varies(3)]
    shape = (inputs.shape[0], groups, outs)
    joined = [f.map(reshape(f.atoms[:, :, :, 0], shape, (shape[0], groups * outs))) for f in factors]
    joined = [f.map(np.expand_dims(f.atoms, tuple(range(2, inputs.ndim)))) for f in joined]
    labels = Labels(tuple(joined), x.static and w.static)
    return labels if bias is None else _plus(call, labels, bias, 1)


def _data_of(call: Call, labels: Labels, ndim: int, groups: int, ins: int) -> list[Factor]:
    """The inputs as [batch, groups, 1, ins]."""
    factors = call.fix_axes(labels.factors, range(2, ndim), "the positions of a convolution are read")
    split = [f.map(compress(_split(f.atoms.reshape(f.atoms.shape[:2]), 1, groups, ins))) for f in factors]
    return [f.map(f.atoms[:, :, None, :]) for f in split]


def _weights_of(call: Call, labels: Labels, ndim: int, groups: int, ins: int, outs: int) -> list[Factor]:
    """The weight, [groups · outs, ins] or transposed [groups · ins, outs], as [1, groups, outs, ins]."""
    factors = call.fix_axes(labels.factors, range(2, ndim), "a kernel's own axes are kept")
    flat = [f.map(f.atoms.reshape(f.atoms.shape[:2])) for f in factors]
    if call.args[6]:
        split = [f.map(_split(f.atoms, 0, groups, ins).transpose(0, 2, 1)) for f in flat]
    else:
        split = [f.map(_split(f.atoms, 0, groups, outs)) for f in flat]
    return [f.map(f.atoms[None]) for f in split]


def _split(atoms: Atoms, axis: int, groups: int, size: int) -> Atoms:
    """Cut an axis into (groups, size); a constant one into (1, 1)."""
    cut = (groups, size) if atoms.shape[axis] > 1 else (1, 1)
    return atoms.reshape(*atoms.shape[:axis], *cut, *atoms.shape[axis + 1 :])


def _whole_groups_go(call: Call, data: Sequence[Factor], groups: int, ins: int, outs: int) -> bool:
    """Whether whole groups go, or the same positions of every group: as tied so far, otherwise the finer.

    What is tied already decides first, so that a trimmed model is read as its original was.
    """
    tied = [atoms for f in data if (atoms := call.ledger.tied(f.atoms)).size > 1]
    if tied and all(atoms.shape[3] == 1 for atoms in tied):
        return True
    if tied and all(atoms.shape[1] == 1 for atoms in tied):
        return False
    return groups >= max(ins, outs)


def _tied_groups(
    call: Call, data: Sequence[Factor], weights: Sequence[Factor], whole: bool
) -> tuple[list[Factor], list[Factor]]:
    why = "the groups of a convolution stay whole"

    def tie(factor: Factor, axis: int) -> Factor:
        return factor.map(call.ledger.tie(factor.atoms, axis, call.reason(why)))

    if whole:
        return [tie(f, 3) for f in data], [tie(f, 2) for f in call.fix_axes(weights, [3], why)]
    return [tie(f, 1) for f in data], [tie(f, 1) for f in weights]


# ------------------------------------------------------------------ attention, embeddings, computed weights


@ROWS.of("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
     "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
     "_scaled_dot_product_fused_attention_overrideable")  # fmt: skip
def _attention(call: Call) -> Sequence[Labels]:
    """softmax(q kᵀ) v: the size of q and k is in the scale, the positions are normalised over; v's own axis is free."""
    query, key, value, *others = call.args
    if any(call.labels_of(other).factors for other in tensors([*others, *call.kwargs.values()])):
        return [unknown(call)]
    heads = query.shape[-3]
    ndim = query.ndim
    operands = [
        _attended(call, query, [ndim - 1, ndim - 2], "compared with each other", heads),
        _attended(call, key, [ndim - 1, ndim - 2], "compared with each other", heads),
        _attended(call, value, [ndim - 2], "averaged", heads),
    ]
    factors = merge(call, operands, lambda flags: bool(flags[2]))
    sums = Labels(tuple(Factor(f.atoms[..., 0], False) for f in factors if f.varies(ndim - 3)))
    others = [sums if isinstance(t, Tensor) and t.shape == query.shape[:-1] else UNKNOWN for t in call.result[1:]]
    return [Labels(tuple(factors)), *others]


def _attended(call: Call, tensor: Tensor, axes: Sequence[int], why: str, heads: int) -> Operand:
    factors = call.fix_axes(call.labels_of(tensor).factors, axes, why)
    repeats = heads // tensor.shape[-3]
    repeated = [f.map(f.atoms.repeat(repeats if f.varies(tensor.ndim - 3) else 1, -3)) for f in factors]
    shape = [1 if axis in axes else size for axis, size in enumerate(tensor.shape)]
    shape[-3] = heads if tensor.shape[-3] > 1 else 1
    return repeated, tuple(shape), False


@ROWS.of("embedding")
def _embedding(call: Call) -> Labels:
    """One row of a table for each index; which rows are read is up to the data, so all stay."""
    table, indices = call.args[0], call.args[1]
    labels = call.labels_of(table)
    factors = call.fix_axes(labels.factors, [0], "looked up")
    call.produced += [f.atoms for f in factors]
    return Labels(tuple(fit(f.map(f.atoms.reshape(-1)), indices.ndim + 1) for f in factors))


@ROWS.of("_weight_norm_interface", "_weight_norm")
def _weight_norm(call: Call) -> Sequence[Labels]:
    """g · v / |v|, where |v| is taken over all axes of v but one: what goes along those changes it."""
    direction, length = call.args[0], call.args[1]
    axis = call.argument(2, "dim", 0)
    others = [i for i in range(direction.ndim) if i != axis]
    for factor in call.labels_of(direction).factors:
        if any(map(factor.varies, others)):
            call.ledger.pin(factor.atoms.ravel(), call.reason(NORM))
    # the length has no say along the axes that were summed
    factors = merge(call, [operand(call, direction), operand(call, length)], any_zero)
    static = call.labels_of(direction).static and call.labels_of(length).static
    return [Labels(tuple(factors), static), Labels(tuple(f for f in factors if f.axes() == (axis,)), static)]
