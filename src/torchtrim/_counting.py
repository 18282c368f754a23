"""Count the zeros and add up the moments of one tensor of activations, per neuron, in one pass.

Integers are exact whatever the batch size; nothing of the tensor is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Counts:
    """What was counted; every tensor has the shape that `kept` axes leave, with size 1 along the others.

    zeros: int64. positions: how many elements each entry stands for. total, square: float64, the sums of the values
    and of their squares.
    """

    zeros: Tensor
    positions: int
    total: Tensor
    square: Tensor

    def __add__(self, other: Self) -> "Counts":
        return Counts(
            self.zeros + other.zeros,
            self.positions + other.positions,
            self.total + other.total,
            self.square + other.square,
        )

    @property
    def finite(self) -> bool:
        """False if any counted value was NaN or infinite."""
        return bool(torch.isfinite(self.square).all())


def count(values: Tensor, kept: Sequence[int]) -> Counts:
    """Count over all axes of `values` other than `kept`.

    The sums run over one example in single precision and from there on in double precision, so that they do not
    depend on how examples are batched.
    """
    summed = [axis for axis in range(values.ndim) if axis not in kept]
    inner = [axis for axis in summed if axis > 0]
    wide = values if values.dtype == torch.float64 else values.float()
    total = _sum(wide, inner).double()
    square = _sum(wide.square(), inner).double()
    if not torch.isfinite(square).all():  # NaN and infinity, or squares that single precision cannot hold
        total, square = _sum(wide.double(), inner), _sum(wide.double().square(), inner)
    outer = [axis for axis in summed if axis == 0]
    zeros = values == 0
    return Counts(
        zeros.sum(summed, keepdim=True) if summed else zeros.long(),
        prod(values.shape[axis] for axis in summed),
        _sum(total, outer),
        _sum(square, outer),
    )


def _sum(values: Tensor, axes: Sequence[int]) -> Tensor:
    # `sum` over no axes would be a sum over all.
    return values.sum(list(axes), keepdim=True) if axes else values
