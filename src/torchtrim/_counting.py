"""Count the zeros and add up the moments of one tensor of activations, per neuron, in one pass.

Integers are exact whatever the batch size; nothing of the tensor is kept.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from itertools import product
from typing import Any, Self

import torch
from torch import Tensor

from torchtrim._layout import arranged, columns
from torchtrim.errors import ProfileError

_BLOCK = 2**20  # elements that a cache holds, with a buffer of the same size, and few enough calls of operators
_SHARE = 2**16  # elements that are worth a thread
_EXACT = 2**24  # up to here single precision counts by ones


@dataclass(frozen=True, slots=True)
class Counts:
    """What was counted; every tensor has the shape that `kept` axes leave, with size 1 along the others.

    zeros: int64. positions: how many elements each entry stands for. total, square: float64, the sums of the values
    and of their squares. How an entry varies from example to example follows from three sums over examples, of its
    elements that are not zero and its positions there: `nonzero_square` and `nonzero_positions`, float64, are the sums
    of the first squared and of their product; `positions_square`, of the second squared. examples: how many they were.
    """

    zeros: Tensor
    positions: int
    total: Tensor
    square: Tensor
    nonzero_square: Tensor
    nonzero_positions: Tensor
    positions_square: int
    examples: int

    def __add__(self, other: Self) -> "Counts":
        return Counts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __sub__(self, other: Self) -> "Counts":
        return Counts(*(getattr(self, field.name) - getattr(other, field.name) for field in fields(self)))

    def each(self, function: Callable[[Tensor], Tensor]) -> "Counts":
        """The same, with what the function makes of every tensor."""
        found: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        found |= {key: function(one) for key, one in found.items() if isinstance(one, Tensor)}
        return Counts(**found)

    @property
    def finite(self) -> bool:
        """False if any counted value was NaN or infinite."""
        return bool(torch.isfinite(self.square).all())


def count(values: Tensor, kept: Sequence[int], *, examples: int | None = None, tolerance: float = 0.0) -> Counts:
    """Count over all axes of `values` other than `kept`.

    examples: how many the first axis holds, each of as many rows; None where it holds something else, so that the
    tensor is one example. tolerance: up to which size a value counts as zero; a number in single precision.

    The sums run over one example in single precision and from there on in double precision, so that they do not
    depend on how examples are batched.
    """
    view = arranged(values, kept, examples)
    native = native_room(values.device.type) if values.device.type == "cpu" else None
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    if native is not None and values.dtype in native.DTYPES and values.numel():
        found = torch.from_numpy(native.sums(view, tolerance))
    else:
        found = _sums(view, dtype, tolerance)
    if not torch.isfinite(found[2]).all():  # NaN and infinity, or squares that single precision cannot hold
        found = _sums(view, torch.float64, tolerance)
    nonzero, total, square, nonzero_square = found
    rows, each = (1, view.shape[0] * view.shape[2]) if examples is None else (view.shape[0], view.shape[2])
    if examples is None:
        nonzero_square = nonzero.square()
    shape = [size if axis in kept else 1 for axis, size in enumerate(values.shape)]
    return Counts(
        (rows * each - nonzero.long()).view(shape),
        rows * each,
        total.view(shape),
        square.view(shape),
        nonzero_square.view(shape),
        (nonzero * each).view(shape),
        rows * each**2,
        rows,
    )


def native_room(device: str) -> Any | None:
    """The compiled way to count on "cpu" or "cuda", if it is installed and TORCHTRIM_COUNTING is not "plain".

    Raises ProfileError: TORCHTRIM_COUNTING is "native" and there is none, or is another word.
    """
    choice = os.environ.get("TORCHTRIM_COUNTING") or "auto"
    if choice not in ("auto", "plain", "native"):
        raise ProfileError(f"TORCHTRIM_COUNTING: expected 'plain' or 'native', found {choice!r}")
    if choice == "plain" or device not in _ROOMS:
        return None
    found = _imported(device)
    if not isinstance(found, Exception):
        return found
    if choice == "native":
        package, install = _PACKAGES[device]
        raise ProfileError(f"TORCHTRIM_COUNTING=native needs {package} ({found}); {install}, or unset the variable")
    return None


_ROOMS = {"cpu": "_counting_native", "cuda": "_counting_triton"}
_PACKAGES = {
    "cpu": ("Numba", "pip install 'torchtrim[fast]'"),
    "cuda": ("Triton", "pip install triton"),
}


@cache
def _imported(device: str) -> Any:
    """A room that needs an optional package, or the error why there is none."""
    try:
        return import_module(f"torchtrim.{_ROOMS[device]}")
    except (ImportError, OSError) as error:
        return error


def _sums(view: Tensor, dtype: torch.dtype, tolerance: float) -> Tensor:
    """How many elements of each neuron are not zero, their sum, and the sum of their squares: float64 [4, kept].

    The last are the sums over examples of the first, squared.

    view: [examples, kept, inner]. It is read from memory once, in blocks that stay in the cache while they are read
    again. Sums are in `dtype` up to one example.
    """
    single = view.shape[2] == 1
    if single:  # each element is an example
        view, dtype = view.transpose(0, 2), torch.float64
    along = 1 if columns(view) else 2
    view = view.transpose(1, 2) if along == 1 else view
    block = min(max(_BLOCK, _SHARE * torch.get_num_threads()), _EXACT) if view.device.type == "cpu" else _EXACT
    width = min(view.shape[2], block)
    rows = min(view.shape[1], block // max(width, 1))
    examples = max(block // max(rows * width, 1), 1) if (rows, width) == view.shape[1:] else 1
    starts = [range(0, size, step or 1) for size, step in zip(view.shape, (examples, rows, width), strict=True)]
    parts = view.new_empty([3, *view.shape[:along], len(starts[along]), *view.shape[along + 1 :]], dtype=dtype)
    buffer = view.new_empty(min(block, view.numel()), dtype=dtype)
    wide = buffer if view.dtype == dtype else torch.empty_like(buffer)
    for example, row, column in product(*starts):
        one = view[example : example + examples, row : row + rows, column : column + width]
        scratch = buffer[: one.numel()].view(one.shape)
        if one.dtype != dtype:
            one = wide[: one.numel()].view(one.shape).copy_(one)
        place: list[Any] = [slice(example, example + examples), slice(row, row + rows), slice(column, column + width)]
        place[along] = row // rows if along == 1 else column // width
        found = parts[:, *place]
        if tolerance:
            torch.gt(torch.abs(one, out=scratch), tolerance, out=scratch)
        else:
            torch.ne(one, 0, out=scratch)
        torch.sum(scratch, along, out=found[0])
        torch.sum(one, along, out=found[1])
        torch.sum(torch.mul(one, one, out=scratch), along, out=found[2])
    by_example = parts[0].sum(along, dtype=torch.float64)
    sums = parts.sum((1, along + 1), dtype=torch.float64)
    return torch.cat([sums, sums[:1] if single else by_example.square().sum(0)[None]])
