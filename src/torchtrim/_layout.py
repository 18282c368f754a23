"""A tensor of activations seen as examples × kept × inner, without a copy where its memory allows."""

from collections.abc import Sequence
from math import prod

from torch import Tensor


def arranged(values: Tensor, kept: Sequence[int], examples: int | None = None) -> Tensor:
    """`values` as [examples, kept, inner], of which counting sums over the first and the last axis.

    The first axis of `values` is the examples, unless it is kept; then there is one. Where it holds more rows than
    there are examples (windows, tokens), those of an example follow each other, and are inner. The order of the inner
    elements is that of the memory. Either `kept` or `inner` lies contiguously in memory: `columns` says which. A tensor
    whose memory has another form is copied.
    """
    if examples and values.shape[0] != examples:
        values, kept = values.unflatten(0, (examples, -1)), [axis + 1 for axis in kept]
    first = [0] if values.ndim and 0 not in kept else []
    rest = [axis for axis in range(len(first), values.ndim) if axis not in kept]
    rest.sort(key=values.stride, reverse=True)
    shape = [prod(values.shape[axis] for axis in axes) for axes in (first, kept, rest)]
    view = values.permute([*first, *kept, *rest]).reshape(shape)
    return view if view.stride(2) == 1 or view.stride(1) == 1 or view.numel() < 2 else view.contiguous()


def columns(view: Tensor) -> bool:
    """Whether the kept axis, not the inner one, is to be read contiguously."""
    return view.stride(1) == 1 and (view.stride(2) != 1 or view.shape[2] == 1)
