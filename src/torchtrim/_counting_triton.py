"""Zeros and moments on a GPU: one kernel for each tensor and one for each batch, for which nobody waits."""

# pyright: basic, reportCallIssue=false, reportOperatorIssue=false, reportArgumentType=false
# ruff: noqa: N803
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchtrim._counting import Counts
from torchtrim._layout import arranged, columns
from torchtrim._tally import Place, Totals

DTYPES = frozenset([torch.float16, torch.bfloat16, torch.float32, torch.float64])
_TILE = 1024  # elements that a program reads at a time
_NEURONS = 128  # of these at most, where neurons lie side by side
_PROGRAMS = 1024  # enough to keep every multiprocessor busy
_ENTRIES = _PARTS = 32  # neurons that a program of `_commit` adds up, and how many parts of each at a time


@triton.jit(do_not_specialize=["examples", "kept", "inner"])
def _count(
    values, nonzero, total, square, nonzero_square, nonzero_positions, examples, kept, inner,
    per_example, per_kept, per_inner, tolerance,
    WIDE: tl.constexpr, DTYPE: tl.constexpr, NEURONS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Add what a tensor [examples, kept, inner] holds of some neurons in some examples to the sums of this part.

    Each lane sums one example in DTYPE, and in double precision from there on; with WIDE each inner element is an
    example, they are divided among the parts, and all sums are in double precision.
    """
    part, parts = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    neuron = tl.program_id(0).to(tl.int64) * NEURONS + tl.arange(0, NEURONS)
    lane = tl.arange(0, INNER).to(tl.int64)
    known = neuron < kept
    if WIDE:
        first, last = part * 0, part * 0 + 1
        start, stop = inner * part // parts, inner * (part + 1) // parts
    else:
        first, last = examples * part // parts, examples * (part + 1) // parts
        start, stop = part * 0, part * 0 + inner
    count = tl.zeros([NEURONS, INNER], tl.int32)
    totals = tl.zeros([NEURONS, INNER], tl.float64)
    squares = tl.zeros([NEURONS, INNER], tl.float64)
    seen = tl.zeros([NEURONS, INNER], tl.int64)
    for example in range(first, last):
        own = tl.zeros([NEURONS, INNER], tl.int32)
        one = tl.zeros([NEURONS, INNER], DTYPE)
        two = tl.zeros([NEURONS, INNER], DTYPE)
        for index in range(start, stop, INNER):
            place = index + lane
            here = known[:, None] & (place < stop)[None, :]
            where = values + example * per_example + neuron[:, None] * per_kept + place[None, :] * per_inner
            value = tl.load(where, mask=here, other=0.0).to(DTYPE)
            own += (tl.abs(value) > tolerance).to(tl.int32)
            one += value
            two += value * value
        count += own
        if not WIDE:
            # Not the square of the sum: of a sum that is used twice in a loop, Triton 3.6 makes nothing.
            seen += own.to(tl.int64) * tl.sum(own, 1)[:, None].to(tl.int64)
        totals += one.to(tl.float64)
        squares += two.to(tl.float64)
    found = tl.sum(squares, 1)
    lost = tl.max((~(found < float("inf"))).to(tl.int32), 0)
    if lost > 0:  # NaN and infinity, or squares that single precision cannot hold
        squares = tl.zeros([NEURONS, INNER], tl.float64)
        totals = tl.zeros([NEURONS, INNER], tl.float64)
        for example in range(first, last):
            for index in range(start, stop, INNER):
                place = index + lane
                here = known[:, None] & (place < stop)[None, :]
                where = values + example * per_example + neuron[:, None] * per_kept + place[None, :] * per_inner
                value = tl.load(where, mask=here, other=0.0).to(tl.float64)
                totals += value
                squares += value * value
        found = tl.sum(squares, 1)
    into = part * kept + neuron
    counted = tl.sum(count.to(tl.int64), 1)
    pairs = counted if WIDE else tl.sum(seen, 1)
    _add(nonzero + into, counted, known)
    _add(total + into, tl.sum(totals, 1), known)
    _add(square + into, found, known)
    _add(nonzero_square + into, pairs.to(tl.float64), known)
    _add(nonzero_positions + into, (counted if WIDE else counted * inner).to(tl.float64), known)


@triton.jit
def _add(place, value, known):
    tl.store(place, tl.load(place, mask=known) + value, mask=known)


@triton.jit(do_not_specialize=["entries", "batch"])
def _commit(
    nonzero, total, square, nonzero_square, nonzero_positions, starts, steps, counts,
    all_nonzero, all_total, all_square, all_nonzero_square, all_nonzero_positions, bad, entries, batch,
    ENTRIES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Move the sums of a batch to those of all batches, and note in which batch they were first not finite."""
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    known = entry < entries
    start = tl.load(starts + entry, mask=known, other=0)
    step = tl.load(steps + entry, mask=known, other=0)
    count = tl.load(counts + entry, mask=known, other=0)
    _move(nonzero, all_nonzero + entry, start, step, count, known, tl.int64, ENTRIES, PARTS)
    _move(total, all_total + entry, start, step, count, known, tl.float64, ENTRIES, PARTS)
    two = _move(square, all_square + entry, start, step, count, known, tl.float64, ENTRIES, PARTS)
    _move(nonzero_square, all_nonzero_square + entry, start, step, count, known, tl.float64, ENTRIES, PARTS)
    _move(nonzero_positions, all_nonzero_positions + entry, start, step, count, known, tl.float64, ENTRIES, PARTS)
    before = tl.load(bad + entry, mask=known, other=0)
    lost = (before == 0) & ~(two < float("inf"))
    tl.store(bad + entry, tl.where(lost, batch, before), mask=known)


@triton.jit
def _move(sums, into, start, step, count, known, KIND: tl.constexpr, ENTRIES: tl.constexpr, PARTS: tl.constexpr):
    """Add up the parts of some entries, leave zeros in their place, and give the sum."""
    found = tl.zeros([ENTRIES, PARTS], KIND)
    for first in range(0, tl.max(count, 0), PARTS):
        part = first + tl.arange(0, PARTS)
        here = part[None, :] < count[:, None]
        place = sums + start[:, None] + part[None, :] * step[:, None]
        found += tl.load(place, mask=here, other=0)
        tl.store(place, tl.zeros([ENTRIES, PARTS], KIND), mask=here)
    summed = tl.sum(found, 1)  # outside of the loop: of a sum in it that is used twice, Triton 3.6 makes nothing
    _add(into, summed, known)
    return summed


@dataclass(slots=True)
class _Slot:
    """Where the sums of a place lie: its parts of the batch in progress, and its neurons among those of all places."""

    shape: list[int]
    kept: int
    start: int
    parts: int
    first: int
    pending: tuple[int, int, int] = (0, 0, 0)  # positions, their squares' sum over examples, examples
    counted: tuple[int, int, int] = (0, 0, 0)


class DeviceTally:
    """Counts by place that stay on a GPU. See `Tally` for what its methods do."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._slots: dict[Place, _Slot] = {}
        kinds = (torch.int64, *[torch.float64] * 4)
        self._sums = [
            torch.zeros(0, dtype=kind, device=device) for kind in kinds
        ]  # of the batch, [slots × parts × kept]
        self._all = [torch.zeros(0, dtype=kind, device=device) for kind in kinds]  # of all batches, [slots × kept]
        self._bad = torch.zeros(0, dtype=torch.int32, device=device)
        self._tables: list[Tensor] | None = None  # for each neuron of each place: first sum, step to the next, parts

    def add(
        self, place: Place, values: Tensor, kept: Sequence[int], examples: int | None = None, tolerance: float = 0.0
    ) -> None:
        view = arranged(values, kept, examples or (1 if values.ndim else None))
        rows, width, inner = view.shape
        strides = view.stride()
        if not view.numel():
            return
        wide = inner == 1  # each element is an example
        if wide:
            rows, inner, strides = 1, rows, (0, strides[1], strides[0])
        side_by_side = columns(view)
        neurons = min(triton.next_power_of_2(width), _NEURONS if side_by_side else _TILE)
        along = min(triton.next_power_of_2(inner), _TILE)
        if side_by_side:
            along = min(along, _TILE // neurons)
        else:
            neurons = min(neurons, _TILE // along)
        tiles = triton.cdiv(width, neurons)
        slot = self._slots.get(place) or self._allocate(place, values, kept, width, triton.cdiv(_PROGRAMS, tiles))
        parts = min(slot.parts, triton.cdiv(inner, along) if wide else rows)
        with self._here():
            _count[tiles, parts](
                view, *(sums[slot.start :] for sums in self._sums), rows, width, inner, *strides, tolerance,
                WIDE=wide, DTYPE=tl.float64 if wide or values.dtype == torch.float64 else tl.float32,
                NEURONS=neurons, INNER=along,
            )  # fmt: skip
        rows, _, each = view.shape
        positions, squares, seen = slot.pending
        slot.pending = (positions + rows * each, squares + rows * each**2, seen + rows)

    def drop(self) -> None:
        if any(slot.pending[0] for slot in self._slots.values()):
            for sums in self._sums:
                sums.zero_()
            for slot in self._slots.values():
                slot.pending = (0, 0, 0)

    def commit(self, batch: int) -> None:
        if not self._slots:
            return
        if self._tables is None:
            slots = self._slots.values()
            table = [[slot.start + neuron, slot.kept, slot.parts] for slot in slots for neuron in range(slot.kept)]
            self._tables = [column.contiguous() for column in torch.tensor(table, device=self._device).T]
        entries = len(self._bad)
        with self._here():
            _commit[(triton.cdiv(entries, _ENTRIES),)](
                *self._sums, *self._tables, *self._all, self._bad, entries, batch, ENTRIES=_ENTRIES, PARTS=_PARTS
            )
        for slot in self._slots.values():
            first, second, third = (here + new for here, new in zip(slot.counted, slot.pending, strict=True))
            slot.counted, slot.pending = (first, second, third), (0, 0, 0)

    def bad(self) -> tuple[int, Place] | None:
        flags = self._bad.cpu()
        found: list[tuple[int, int, Place]] = []
        for place, slot in self._slots.items():
            of_slot = flags[slot.first : slot.first + slot.kept]
            if of_slot.any():
                found.append((int(of_slot[of_slot > 0].min()), place[0].index, place))
        if not found:
            return None
        batch, _, place = min(found, key=lambda one: one[:2])
        return batch, place

    def totals(self) -> Totals:
        found: Totals = {}
        for place, slot in self._slots.items():
            nonzero, *others = (
                sums[slot.first : slot.first + slot.kept].clone().view(slot.shape) for sums in self._all
            )
            positions, squares, examples = slot.counted
            found[place] = Counts(positions - nonzero, positions, *others, squares, examples)
        return found

    def _allocate(self, place: Place, values: Tensor, kept: Sequence[int], width: int, parts: int) -> _Slot:
        shape = [size if axis in kept else 1 for axis, size in enumerate(values.shape)]
        slot = self._slots[place] = _Slot(shape, width, len(self._sums[0]), parts, len(self._bad))
        room = (
            triton.cdiv(parts * width, 2) * 2
        )  # slots begin at multiples of 16 bytes, for which one kernel is compiled
        self._sums = [torch.cat([sums, sums.new_zeros(room)]) for sums in self._sums]
        self._all = [torch.cat([sums, sums.new_zeros(width)]) for sums in self._all]
        self._bad = torch.cat([self._bad, self._bad.new_zeros(width)])
        self._tables = None
        return slot

    def _here(self) -> Any:
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()
