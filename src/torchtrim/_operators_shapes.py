"""Rows of the operators that move elements: views, pieces, joins. They are applied to the labels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from torchtrim._labels import Atoms, Factor, Labels, fit, reshape, segments
from torchtrim._operators import Call, Operand, Table, all_zero, merge, pointwise, unknown

ROWS = Table()


@ROWS.of("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten", "squeeze", "unsqueeze")
def _reshape(call: Call) -> Labels:
    labels = call.labels_of(call.args[0])
    if not labels.factors:
        return labels
    old, new = tuple(call.args[0].shape), tuple(call.result.shape)
    factors = [f.map(reshape(f.atoms, old, new)) for f in labels.factors]
    cuts = [cut for cut in segments(old, new) if any(old[axis] > 1 for axis in cut[0])]
    for before, after in zip(labels.factors, factors, strict=True):
        if len(after.axes()) > max(1, len(before.axes())):
            call.ledger.keep_rectangular(after.atoms, call.reason("cut into two axes"))
        for old_axes, new_axes in cuts:  # what is cut from a labelled axis, or joined to one
            if any(before.varies(axis) for axis in old_axes):
                for axis in new_axes:
                    call.ledger.note_size(call.where, axis, new[axis], after.atoms)
    return labels.with_factors(factors)


@ROWS.of("t", "transpose", "permute", "numpy_T", "mT", "swapaxes")
def _permute(call: Call) -> Labels:
    inputs = call.args[0]
    labels = call.labels_of(inputs)
    if not labels.factors:
        return labels
    order = order_of(call)
    return labels.with_factors(f.map(f.atoms.transpose(order)) for f in labels.factors)


def order_of(call: Call) -> list[int]:
    """Which axis of the operand each axis of the result of a permutation is."""
    ndim = call.args[0].ndim
    order = list(range(ndim))
    if call.name == "permute":
        order = [axis % ndim for axis in call.args[1]]
    elif ndim >= 2:
        a, b = (0, 1) if call.name in ("t", "numpy_T") else (-2, -1) if call.name == "mT" else call.args[1:3]
        order[a], order[b] = order[b], order[a]
    return order


@ROWS.of("expand")
def _expand(call: Call) -> Labels:
    labels = call.labels_of(call.args[0])
    if not labels.factors:
        return labels
    return labels.with_factors(fit(f, call.result.ndim) for f in labels.factors)


@ROWS.of("repeat", "tile")
def _repeat(call: Call) -> Labels:
    labels = call.labels_of(call.args[0])
    repeats = [1] * (call.result.ndim - len(call.args[1])) + list(call.args[1])
    factors = [fit(f, call.result.ndim) for f in labels.factors]
    return labels.with_factors(
        f.map(np.tile(f.atoms, [n if f.varies(i) else 1 for i, n in enumerate(repeats)])) for f in factors
    )


@ROWS.of("flip")
def _flip(call: Call) -> Labels:
    labels = call.labels_of(call.args[0])
    return labels.with_factors(f.map(np.flip(f.atoms, call.args[1])) for f in labels.factors)


@ROWS.of("roll")
def _roll(call: Call) -> Labels:
    """Without axes it rolls the flattened tensor."""
    labels = call.labels_of(call.args[0])
    shifts, axes = call.args[1], call.argument(2, "dims", [])
    if not axes:
        return unknown(call)
    return labels.with_factors(f.map(np.roll(f.atoms, shifts, axes)) for f in labels.factors)


def _piece(call: Call, axis: int, start: int, size: int, step: int = 1) -> Labels:
    """Part of an axis. Parts that tile it are tied position by position, since code cuts by proportion."""
    inputs = call.args[0]
    labels = call.labels_of(inputs)
    length = inputs.shape[axis]
    if size == length or not labels.factors:
        return labels
    pieces: list[Factor] = []
    for factor in labels.factors:
        current: Factor | None = factor
        if factor.varies(axis) and not _tiled(call, factor.atoms, axis, start, size, step):
            current = call.fix(factor, axis, "cut into unequal parts")
        if current and current.varies(axis):
            current = current.map(current.atoms.take(range(start, start + size * step, step), axis))
        if current:
            pieces.append(current)
    return labels.with_factors(pieces)


def _tiled(call: Call, atoms: Atoms, axis: int, start: int, size: int, step: int) -> bool:
    """Tie the positions of equal parts, contiguous or interleaved; False where the part is none of equal ones."""
    length = atoms.shape[axis]
    lines = np.moveaxis(atoms, axis, 0)
    if step == 1 and size and length % size == 0 and start % size == 0:
        call.ledger.tie(lines.reshape(length // size, size, -1), 0, call.reason("cut into equal parts"))
        return True
    if step > 1 and length % step == 0 and size == length // step:
        call.ledger.tie(lines.reshape(size, step, -1), 1, call.reason("cut into equal parts"))
        return True
    return False


@ROWS.of("slice")
def _slice(call: Call) -> Labels:
    inputs = call.args[0]
    axis = call.argument(1, "dim", 0) % inputs.ndim
    return _piece(call, axis, start_of(call, axis), call.result.shape[axis], call.argument(4, "step", 1))


def start_of(call: Call, axis: int) -> int:
    """Where a slice starts."""
    start, length = call.argument(2, "start") or 0, call.args[0].shape[axis]
    return min(max(start + length if start < 0 else start, 0), length)


@ROWS.of("narrow")
def _narrow(call: Call) -> Labels:
    return _piece(call, call.args[1] % call.args[0].ndim, call.args[2], call.args[3])


@ROWS.of("split", "unsafe_split", "split_with_sizes", "unsafe_split_with_sizes", "chunk")
def _split_row(call: Call) -> Sequence[Labels]:
    axis = call.argument(2, "dim", 0) % call.args[0].ndim
    sizes = tuple(piece.shape[axis] for piece in call.result)
    held = _holds(call, sizes)
    for factor in call.labels_of(call.args[0]).factors:
        if factor.varies(axis):
            call.ledger.note_size(call.where, axis, factor.atoms.shape[axis], factor.atoms)
    pieces: list[Labels] = []
    for index, size in enumerate(sizes):
        start = sum(sizes[:index])
        pieces.append(_part(call, axis, range(start, start + size)) if held else _piece(call, axis, start, size))
        for factor in pieces[-1].factors:
            if factor.varies(axis):
                call.ledger.note_size(call.where, axis, size, factor.atoms, sizes, index)
    return pieces


def _holds(call: Call, sizes: Sequence[int]) -> bool:
    """Whether the module keeps these sizes in an attribute, which can follow what each piece loses."""
    values = vars(call.module).values() if call.module else ()
    return any(is_sizes(value, sizes) for value in values)


def is_sizes(value: Any, sizes: Sequence[int]) -> bool:
    """Whether a value is a list of just these sizes."""
    return isinstance(value, (list, tuple)) and all(type(one) is int for one in value) and list(value) == list(sizes)


def _part(call: Call, axis: int, positions: range) -> Labels:
    labels = call.labels_of(call.args[0])
    return labels.with_factors(f.map(f.atoms.take(positions, axis)) if f.varies(axis) else f for f in labels.factors)


@ROWS.of("glu")
def _glu(call: Call) -> Labels:
    """a · sigmoid(b) of two halves: both halves of a neuron go together."""
    inputs = call.args[0]
    axis = call.argument(1, "dim", -1) % inputs.ndim
    return _piece(call, axis, 0, inputs.shape[axis] // 2)


def _without(call: Call, axis: int) -> Labels:
    labels = call.labels_of(call.args[0])
    if not labels.factors:
        return labels
    factors = call.fix_axes(labels.factors, [axis], "one position is picked")
    return labels.with_factors(f.map(f.atoms.squeeze(axis)) for f in factors)


@ROWS.of("select")
def _select(call: Call) -> Labels:
    return _without(call, call.args[1] % call.args[0].ndim)


@ROWS.of("unbind")
def _unbind(call: Call) -> Sequence[Labels]:
    axis = call.argument(1, "dim", 0) % call.args[0].ndim
    labels = _without(call, axis)
    return [labels] * len(call.result)


@ROWS.of("cat")
def _cat(call: Call) -> Labels:
    """Labels along the joined axis are joined as the tensors are; those across it are combined."""
    parts: list[Tensor] = [t for t in call.args[0] if t.numel() or t.ndim == call.result.ndim]
    axis = call.argument(1, "dim", 0) % call.result.ndim
    labels = [call.labels_of(part) for part in parts]
    across: list[Operand] = []
    for part, one in zip(parts, labels, strict=True):
        shape = tuple(1 if i == axis else size for i, size in enumerate(part.shape))
        across.append(([f for f in one.factors if not f.varies(axis)], shape, one.uniform))
    factors = merge(call, across, all_zero)
    along = [[f for f in one.factors if f.varies(axis)] for one in labels]
    for index in range(max((len(some) for some in along), default=0)):
        some = [factors[index] if index < len(factors) else None for factors in along]
        factors.append(_joined(some, [part.shape[axis] for part in parts], axis, call.result.ndim))
    return Labels(tuple(factors), all(one.static for one in labels))


def _joined(parts: Sequence[Factor | None], sizes: Sequence[int], axis: int, ndim: int) -> Factor:
    """One factor for all parts; where a part has none, its positions can never go."""
    atoms = [part.atoms if part else np.zeros((1,) * ndim, np.int64) for part in parts]
    shape = list(np.broadcast_shapes(*([1 if i == axis else n for i, n in enumerate(a.shape)] for a in atoms)))
    wide: list[Atoms] = []
    for one, size in zip(atoms, sizes, strict=True):
        shape[axis] = size
        wide.append(np.broadcast_to(one, shape))
    return Factor(np.concatenate(wide, axis), all(part is None or part.zero for part in parts))


@ROWS.of("stack")
def _stack(call: Call) -> Labels:
    axis = call.argument(1, "dim", 0) % call.result.ndim
    merged = pointwise(call)
    return merged.with_factors(f.map(np.expand_dims(f.atoms, axis)) for f in merged.factors)
