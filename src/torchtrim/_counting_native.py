"""Zeros and moments in one pass at the speed of memory: loops that Numba compiles, so that no compiler is needed.

The machine code is kept on disk, where Numba finds a place for it, and loaded by later processes. The loops run on the
threads of PyTorch's own operators where those come from OpenMP, otherwise on the calling thread.
"""

# pyright: basic, reportCallIssue=false
import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba  # pyright: ignore[reportMissingImports]
import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir  # pyright: ignore[reportMissingImports]
from numba import types  # pyright: ignore[reportMissingImports]
from numba.extending import intrinsic  # pyright: ignore[reportMissingImports]
from torch import Tensor

from torchtrim._layout import columns

# How Numba sees the elements: half precision as the integers of its bits.
_ELEMENTS = {
    torch.float32: types.float32,
    torch.float64: types.float64,
    torch.float16: types.uint16,
    torch.bfloat16: types.int16,
}
DTYPES = frozenset(_ELEMENTS)
# Sums may be taken in any order, as vectors need it; NaN and infinity stay what they are.
_OPTIONS: dict[str, Any] = {"fastmath": {"reassoc", "nsz", "contract"}, "error_model": "numpy"}
_SERIAL = 32768  # elements up to which no other thread is woken; PyTorch has the same bound
_TILE = 512  # neurons whose sums stay in the nearest cache
_BLOCK = 4096  # elements of a row that are summed in single precision
_ROWS = 256  # rows that are summed in single precision


def sums(view: Tensor, tolerance: float) -> npt.NDArray[np.float64]:
    """What a tensor holds for each neuron: float64 [4, kept].

    How many elements are larger than the tolerance, their sum and their squares' sum, and the sum over examples of the
    first, squared.

    view: [examples, kept, inner] as `arranged` gives it, on the CPU, of one of DTYPES.
    """
    examples, kept, inner = view.shape
    threads = 1 if view.numel() <= _SERIAL else torch.get_num_threads()
    pieces = 4 * threads if threads > 1 else 1  # several for each thread, so that none waits long for another
    by_columns = columns(view)
    step = min(kept, _TILE) if by_columns else -(-kept // pieces)
    tiles = -(-kept // step)
    groups = min(examples, -(-pieces // tiles))
    found = np.zeros((groups, 4, kept))
    sizes = (0, groups, tiles, step, examples, kept, inner)
    limit = np.float64(tolerance).view(np.int64)
    task = np.array([*sizes, *view.stride(), view.data_ptr(), found.ctypes.data, limit], np.int64)
    entry = _entry(by_columns, view.dtype)
    team = _team()
    if threads > 1 and team is not None:
        team(entry, task.ctypes.data, min(threads, groups * tiles), 0)
    else:
        entry(task.ctypes.data)
    total = found.sum(0)
    if inner == 1:
        total[3] = total[0]  # each element is an example
    return total


_Entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _team() -> Callable[[Any, int, int, int], None] | None:
    """What runs a function on every OpenMP thread of PyTorch; None where it has none of that kind."""
    # The name is looked up in what PyTorch's library was linked with, so that no second set of threads is started.
    for path in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"):
        found = getattr(ctypes.CDLL(str(path)), "GOMP_parallel", None)
        if found is not None:
            found.argtypes, found.restype = [_Entry, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
            return found
    return None


@cache
def _entry(by_columns: bool, dtype: torch.dtype) -> Any:
    """The compiled loop; it takes the address of a task, and units of the task until none are left."""
    loop, signature = _columns if by_columns else _rows, types.void(types.CPointer(_ELEMENTS[dtype]))
    try:
        compiled = numba.cfunc(signature, cache=True, **_OPTIONS)(loop)
    except RuntimeError:  # no place for the cache
        compiled = numba.cfunc(signature, **_OPTIONS)(loop)
    _compiled.append(compiled)
    address: Any = compiled.address
    return _Entry(address)


_compiled: list[Any] = []  # the machine code lives as long as its function


# ------------------------------------------------------------------ what the loops are written in


def _address(result: Any, signature: Any) -> Any:
    """A call that gives its first argument, an address or a number, as the address that `result` says."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to = context.get_value_type(result)
        whole = isinstance(arguments[0].type, ir.IntType)
        return (builder.inttoptr if whole else builder.bitcast)(arguments[0], to)

    return signature, build


@intrinsic
def _integers(context: Any, task: Any) -> Any:
    return _address(types.CPointer(types.int64), types.CPointer(types.int64)(task))


@intrinsic
def _doubles(context: Any, number: Any) -> Any:
    return _address(types.CPointer(types.float64), types.CPointer(types.float64)(number))


@intrinsic
def _reals(context: Any, task: Any) -> Any:
    return _address(types.CPointer(types.float64), types.CPointer(types.float64)(task))


@intrinsic
def _elements(context: Any, number: Any, task: Any) -> Any:
    return _address(task, task(number, task))


@intrinsic
def _next(context: Any, counter: Any) -> Any:
    """Take a number from a counter that threads share."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", arguments[0], ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), build


def _wide(element: Any) -> Any:
    return types.float64 if element == types.float64 else types.float32


@intrinsic
def _zero(context: Any, task: Any) -> Any:
    """Zero in the precision of the sums."""
    kind = _wide(task.dtype)
    return kind(task), lambda context, builder, signature, arguments: context.get_constant(kind, 0)


@intrinsic
def _limit(context: Any, number: Any, task: Any) -> Any:
    """A number in the precision of the sums."""
    kind = _wide(task.dtype)

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.cast(builder, arguments[0], types.float64, kind)

    return kind(number, task), build


@intrinsic
def _value(context: Any, element: Any) -> Any:
    """An element in the precision of the sums."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if element not in (types.uint16, types.int16):
            return arguments[0]
        whole, single = ir.IntType(32), ir.FloatType()
        bits = builder.zext(arguments[0], whole)
        if element == types.int16:  # bfloat16: the upper half of a number in single precision
            return builder.bitcast(builder.shl(bits, whole(16)), single)
        # float16, without the instruction that not every processor has: shift, and scale by what exponents differ
        size = builder.shl(builder.and_(bits, whole(0x7FFF)), whole(13))
        finite = builder.fmul(builder.bitcast(size, single), single(2.0**112))
        special = builder.bitcast(builder.or_(size, whole(0x7F800000)), single)  # infinity and NaN
        value = builder.select(builder.icmp_unsigned("<", size, whole(0x0F800000)), finite, special)
        sign = builder.shl(builder.and_(bits, whole(0x8000)), whole(16))
        return builder.bitcast(builder.or_(builder.bitcast(value, whole), sign), single)

    return _wide(element)(element), build


# ------------------------------------------------------------------ the loops


def _rows(task):
    """Inner elements lie side by side: each row of them is summed on its own."""
    numbers = _integers(task)
    groups, tiles, step, examples, kept, inner = (
        numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6])  # fmt: skip
    per_example, per_kept = numbers[7], numbers[8]
    values, found, zero = _elements(numbers[10], task), _doubles(numbers[11]), _zero(task)
    limit = _limit(_reals(task)[12], task)
    while True:
        unit = _next(numbers)
        if unit >= groups * tiles:
            break
        group, first = unit // tiles, (unit % tiles) * step
        for example in range(examples * group // groups, examples * (group + 1) // groups):
            for place in range(first, min(first + step, kept)):
                row = example * per_example + place * per_kept
                into = group * 4 * kept + place
                seen = 0.0
                for start in range(row, row + inner, _BLOCK):
                    count, total, square = np.int32(0), zero, zero
                    for index in range(start, min(start + _BLOCK, row + inner)):
                        value = _value(values[index])
                        count = np.int32(count + np.int32(abs(value) > limit))
                        total += value
                        square += value * value
                    seen += count
                    found[into + kept] += total
                    found[into + 2 * kept] += square
                found[into] += seen
                found[into + 3 * kept] += seen * seen


def _columns(task):
    """Neurons lie side by side: a tile of them is summed at a time, row after row of inner elements."""
    numbers = _integers(task)
    groups, tiles, step, examples, kept, inner = (
        numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6])  # fmt: skip
    per_example, per_row = numbers[7], numbers[9]
    values, found, zero = _elements(numbers[10], task), _doubles(numbers[11]), _zero(task)
    limit = _limit(_reals(task)[12], task)
    counts, totals, squares = np.zeros(_TILE, np.int32), np.full(_TILE, zero), np.full(_TILE, zero)
    wide_totals, wide_squares, seen = np.zeros(_TILE), np.zeros(_TILE), np.zeros(_TILE)
    while True:
        unit = _next(numbers)
        if unit >= groups * tiles:
            break
        group, first = unit // tiles, (unit % tiles) * step
        width = min(step, kept - first)
        start, stop = examples * group // groups, examples * (group + 1) // groups
        into = group * 4 * kept + first
        if inner == 1:  # every row is an example
            for row in range(start, stop, _ROWS):
                rows = min(_ROWS, stop - row)
                place = first + row * per_example
                _add(values, place, rows, per_example, width, counts, wide_totals, wide_squares, 0.0, limit)
                _empty(found, into, kept, width, counts, wide_totals, wide_squares, seen)
            continue
        for example in range(start, stop):
            seen[:width] = 0
            for row in range(0, inner, _ROWS):
                rows = min(_ROWS, inner - row)
                place = first + example * per_example + row * per_row
                _add(values, place, rows, per_row, width, counts, totals, squares, zero, limit)
                _empty(found, into, kept, width, counts, totals, squares, seen)
            for index in range(width):
                found[into + 3 * kept + index] += seen[index] * seen[index]


@numba.njit(**_OPTIONS)
def _add(values, start, rows, per_row, width, counts, totals, squares, zero, limit):
    """Add up rows in the precision of `zero`, four at a time, which spares the way to the sums and back."""
    for row in range(0, rows - 3, 4):
        first = start + row * per_row
        second, third, fourth = first + per_row, first + 2 * per_row, first + 3 * per_row
        for index in range(width):
            a = _value(values[first + index]) + zero
            b = _value(values[second + index]) + zero
            c = _value(values[third + index]) + zero
            d = _value(values[fourth + index]) + zero
            count = np.int32(abs(a) > limit) + np.int32(abs(b) > limit)
            count = np.int32(count) + np.int32(abs(c) > limit) + np.int32(abs(d) > limit)
            counts[index] = np.int32(counts[index] + np.int32(count))
            totals[index] += (a + b) + (c + d)
            squares[index] += (a * a + b * b) + (c * c + d * d)
    for row in range(rows - rows % 4, rows):
        for index in range(width):
            a = _value(values[start + row * per_row + index]) + zero
            counts[index] = np.int32(counts[index] + np.int32(abs(a) > limit))
            totals[index] += a
            squares[index] += a * a


@numba.njit(**_OPTIONS)
def _empty(found, into, kept, width, counts, totals, squares, seen):
    """Move the sums of a tile to what was found, and its counts to those of the example."""
    for index in range(width):
        found[into + index] += counts[index]
        found[into + kept + index] += totals[index]
        found[into + 2 * kept + index] += squares[index]
        seen[index] += counts[index]
    counts[:width] = 0
    totals[:width] = 0
    squares[:width] = 0
