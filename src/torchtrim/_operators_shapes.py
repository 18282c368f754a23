"""Rows of the operators that move elements: views, pieces, joins, pooling, padding. They are applied to the labels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchtrim._labels import Atoms, Factor, Labels, fit, reshape, segments
from torchtrim._operators import Call, Flags, Operand, Table, all_zero, merge, pointwise, tensors, unknown, with_indices

ROWS = Table()


@ROWS.of(*(f"{kind}_pool{n}d{suffix}" for kind in ("max", "avg", "_adaptive_avg", "adaptive_avg", "adaptive_max")
       for n in (1, 2, 3) for suffix in ("", "_with_indices")),
     *(f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "_nearest_exact1d", "linear1d",
       "bilinear2d", "trilinear3d", "bicubic2d", "_bilinear2d_aa", "_bicubic2d_aa")),
     "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa",
     *(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)))  # fmt: skip
def _spatial(call: Call) -> Labels | Sequence[Labels]:
    inputs = call.args[0]
    count = next((int(n) for n in "123" if f"{n}d" in call.name), 2)
    labels = call.labels_of(inputs)
    axes = range(inputs.ndim - count, inputs.ndim)
    return with_indices(call, labels.with_factors(call.fix_axes(labels.factors, axes, "positions are read")))


@ROWS.of("constant_pad_nd")
def _pad(call: Call) -> Labels:
    inputs, padding = call.args[0], call.args[1]
    value = call.argument(2, "value", 0)
    labels = call.labels_of(inputs)
    amounts = [(inputs.ndim - 1 - i, *padding[2 * i : 2 * i + 2]) for i in range(len(padding) // 2)]
    padded: list[Factor] = []
    for factor in labels.factors:
        current: Factor | None = factor
        for axis, before, after in amounts:
            if current and current.varies(axis) and (before or after):
                current = _padded(call, current, axis, before, after)
        if current:
            padded.append(Factor(current.atoms, current.zero and value == 0))
    return labels.with_factors(padded)


def _padded(call: Call, factor: Factor, axis: int, before: int, after: int) -> Factor | None:
    """What is added can never go, unless along another axis, where it goes with its line."""
    if len(factor.axes()) > 1:
        return call.fix(factor, axis, "padded")
    atoms = factor.atoms.take(range(max(-before, 0), factor.atoms.shape[axis] - max(-after, 0)), axis)
    pads = [(max(before, 0), max(after, 0)) if i == axis else (0, 0) for i in range(atoms.ndim)]
    return factor.map(np.pad(atoms, pads))


# ------------------------------------------------------------------ shapes: simply applied to the labels


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


# ------------------------------------------------------------------ positions that the data or the code picks


@ROWS.of("roll")
def _roll(call: Call) -> Labels:
    """Without axes it rolls the flattened tensor."""
    labels = call.labels_of(call.args[0])
    shifts, axes = call.args[1], call.argument(2, "dims", [])
    if not axes:
        return unknown(call)
    return labels.with_factors(f.map(np.roll(f.atoms, shifts, axes)) for f in labels.factors)


@ROWS.of("index_select", "gather", "take_along_dim", "sort", "topk")
def _picked(call: Call) -> Labels | Sequence[Labels]:
    """Which positions are read is up to the data or the code: their axis keeps its size."""
    inputs = call.args[0]
    axis = call.argument(2 if call.name == "topk" else 1, "dim", -1) % max(inputs.ndim, 1)
    if _has_labels(call, tensors(call.args[1:])):
        return unknown(call)
    labels = call.labels_of(inputs)
    return with_indices(call, labels.with_factors(call.fix_axes(labels.factors, [axis], "positions are picked")))


@ROWS.of("index")
def _index(call: Call) -> Labels:
    """Adjacent index tensors replace the axes they pick from by axes of their own."""
    inputs, indices = call.args[0], call.args[1]
    picked = [axis for axis, index in enumerate(indices) if index is not None]
    adjacent = picked == list(range(picked[0], picked[0] + len(picked)))
    masks = any(index.dtype in (torch.bool, torch.uint8) and index.ndim > 1 for index in tensors(indices))
    if masks or not adjacent or _has_labels(call, tensors([indices])):
        return unknown(call)
    labels = call.labels_of(inputs)
    factors = call.fix_axes(labels.factors, picked, "positions are picked")
    extra = call.result.ndim - (inputs.ndim - len(picked))
    shapes = [(*f.atoms.shape[: picked[0]], *(1,) * extra, *f.atoms.shape[picked[-1] + 1 :]) for f in factors]
    return labels.with_factors(f.map(f.atoms.reshape(shape)) for f, shape in zip(factors, shapes, strict=True))


@ROWS.of("index_add")
def _index_add(call: Call) -> Labels:
    """Rows are added to those that the data pick: their axis keeps its size."""
    inputs, axis, index, added = call.args[:4]
    if _has_labels(call, [index]):
        return unknown(call)
    operands: list[Operand] = []
    for one in (inputs, added):
        labels = call.labels_of(one)
        factors = call.fix_axes(labels.factors, [axis % inputs.ndim], "positions are picked")
        shape = tuple(1 if i == axis % inputs.ndim else size for i, size in enumerate(one.shape))
        operands.append((factors, shape, labels.uniform))
    empty = call.labels_of(inputs).zeros

    def zero(flags: Flags) -> bool:
        return bool((flags[0] or empty) and (flags[1] or (flags[1] is None and call.labels_of(added).zeros)))

    return Labels(tuple(merge(call, operands, zero)))


def _has_labels(call: Call, indices: Sequence[Tensor]) -> bool:
    """Indices that neurons computed differ from neuron to neuron; those that the model holds stay as they are."""
    for labels in map(call.labels_of, indices):
        for factor in labels.factors if labels.static else ():
            call.ledger.pin(factor.atoms.ravel(), call.reason("positions are picked"))
    return any(labels.factors and not labels.static for labels in map(call.labels_of, indices))


@ROWS.of("torchvision::roi_align", "torchvision::roi_pool", "grid_sampler_2d", "grid_sampler_3d",
     "cudnn_grid_sampler")  # fmt: skip
def _sampled(call: Call) -> Labels | Sequence[Labels]:
    """Values [batch, channels, ...] are read where other tensors say: channels stay apart."""
    inputs = call.args[0]
    if _has_labels(call, tensors(call.args[1:])):
        return unknown(call)
    labels = call.labels_of(inputs)
    axes = (axis for axis in range(inputs.ndim) if axis != 1)
    return with_indices(call, labels.with_factors(call.fix_axes(labels.factors, axes, "positions are read")))


@ROWS.of("unfold")
def _unfold(call: Call) -> Labels:
    """Windows along an axis become an axis of their own."""
    inputs = call.args[0]
    labels = call.labels_of(inputs)
    factors = call.fix_axes(labels.factors, [call.args[1] % inputs.ndim], "cut into windows")
    return labels.with_factors(f.map(np.expand_dims(f.atoms, -1)) for f in factors)


# ------------------------------------------------------------------ channels that become positions, and back


@ROWS.of("glu")
def _glu(call: Call) -> Labels:
    """a · sigmoid(b) of two halves: both halves of a neuron go together."""
    inputs = call.args[0]
    axis = call.argument(1, "dim", -1) % inputs.ndim
    return _piece(call, axis, 0, inputs.shape[axis] // 2)


@ROWS.of("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(call: Call) -> Labels:
    inputs, groups = call.args[0], call.args[1]
    labels = call.labels_of(inputs)
    shuffled: list[Factor] = []
    for factor in labels.factors:
        atoms = factor.atoms
        if factor.varies(1):
            cut = atoms.reshape(atoms.shape[0], groups, -1, *atoms.shape[2:])
            call.ledger.keep_rectangular(cut, call.reason("shuffled"))
            atoms = cut.swapaxes(1, 2).reshape(atoms.shape)
        shuffled.append(factor.map(atoms))
    return labels.with_factors(shuffled)


@ROWS.of("pixel_shuffle", "col2im")
def _channels_to_positions(call: Call) -> Labels:
    """Channels that become positions of one channel go together."""
    inputs = call.args[0]
    labels = call.labels_of(inputs)
    axis = inputs.ndim - (3 if call.name == "pixel_shuffle" else 2)
    positions = [i for i in range(inputs.ndim) if i > axis]
    folded: list[Factor] = []
    for factor in call.fix_axes(labels.factors, positions, "positions are read"):
        atoms = factor.atoms
        if factor.varies(axis):
            channels = call.result.shape[axis]
            cut = atoms.reshape(*atoms.shape[:axis], channels, -1, *atoms.shape[axis + 1 :])
            atoms = call.ledger.tie(cut, axis + 1, call.reason("become positions of one channel")).squeeze(axis + 1)
        folded.append(factor.map(np.expand_dims(atoms, -1) if call.name == "col2im" else atoms))
    return labels.with_factors(folded)


@ROWS.of("pixel_unshuffle", "im2col")
def _positions_to_channels(call: Call) -> Labels:
    """Every position of a channel becomes a channel: they go together."""
    inputs = call.args[0]
    labels = call.labels_of(inputs)
    axis = inputs.ndim - 3
    repeats = call.result.shape[axis] // inputs.shape[axis]
    factors = call.fix_axes(labels.factors, range(axis + 1, inputs.ndim), "positions are read")
    unfolded = [f.map(f.atoms.repeat(repeats if f.varies(axis) else 1, axis)) for f in factors]
    return labels.with_factors(f.map(f.atoms.squeeze(-1)) if call.name == "im2col" else f for f in unfolded)
