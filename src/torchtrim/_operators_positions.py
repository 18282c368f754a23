"""Rows of the operators that read positions, or pick some: pooling, padding, indices, channels made of positions."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from torchtrim._labels import Factor, Labels
from torchtrim._operators import Call, Flags, Operand, Table, merge, tensors, unknown, with_indices

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


# ------------------------------------------------------------------ positions that the data or the code picks


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
