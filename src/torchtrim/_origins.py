"""Where the values of a tensor come from: what computed them, and which of them views have picked since.

Views are no computation, and which of them run may depend on strides. What they pick along labelled axes shows in the
labels; along others only here: code that picks by a width (`x[:, h.shape[1] - 1]`) picks elsewhere once it is trimmed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from torchtrim._labels import Labels, Shape
from torchtrim._operators import Call
from torchtrim._operators_shapes import order_of, start_of

# Operators that only look at a tensor in another way: no step of its own, but a part of the origin.
VIEWS = frozenset(["view", "_unsafe_view", "reshape", "_reshape_alias", "t", "transpose", "permute", "squeeze",
                   "unsqueeze", "expand", "clone", "detach", "alias", "lift_fresh", "slice", "split", "unsafe_split",
                   "split_with_sizes", "unsafe_split_with_sizes", "select", "unbind", "_to_copy"])  # fmt: skip
_RESHAPES = frozenset(["view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze"])
_PERMUTATIONS = frozenset(["t", "transpose", "permute"])
_SPLITS = frozenset(["split", "unsafe_split", "split_with_sizes", "unsafe_split_with_sizes"])


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """One view. `numbers`: what it was given; None for the size of a labelled axis, which the labels tell."""

    kind: str
    numbers: tuple[int | None, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A view of some positions along an axis of a tensor, which had `length` and these labels there.

    axis: counted from the end.
    """

    axis: int
    length: int
    positions: range
    labels: Labels


@dataclass(frozen=True, slots=True, eq=False)
class Origin:
    """`source`: a name, or the number of a step with which of its results; then the views in their order."""

    source: tuple[str | int, int]
    looks: tuple[Look | Piece, ...] = ()


NOWHERE = Origin(("", 0))


def seen_through(call: Call, operand: Origin, found: Sequence[Labels]) -> list[Origin]:
    """The origins of a view's results, whose labels are `found`."""
    inputs: Tensor = call.args[0]
    before = call.labels_of(inputs)
    looks: list[Look | Piece | None]
    if call.name in _RESHAPES:
        shape = tuple(call.result.shape)
        sizes = (*_sizes(inputs, before, tuple(inputs.shape)), -1, *_sizes(call.result, found[0], shape))
        looks = [Look("reshape", sizes)]
    elif call.name in _PERMUTATIONS:
        looks = [Look("permute", tuple(order_of(call)))]
    elif call.name == "slice":
        axis = call.argument(1, "dim", 0) % inputs.ndim
        size, step = call.result.shape[axis], call.argument(4, "step", 1)
        looks = [_piece(before, inputs, axis, start_of(call, axis), size, step)]
    elif call.name in _SPLITS:
        axis = call.argument(2, "dim", 0) % inputs.ndim
        parts = [part.shape[axis] for part in call.result]
        looks = [_piece(before, inputs, axis, sum(parts[:i]), size, 1) for i, size in enumerate(parts)]
    elif call.name == "select":
        axis = call.args[1] % inputs.ndim
        looks = [Look("select", (axis, call.args[2] % inputs.shape[axis]))]
    elif call.name == "unbind":
        axis = call.argument(1, "dim", 0) % inputs.ndim
        looks = [Look("select", (axis, index)) for index in range(len(call.result))]
    else:
        looks = [None]
    return [Origin(operand.source, (*operand.looks, look)) if look else operand for look in looks]


def _sizes(tensor: Tensor, labels: Labels, shape: Shape) -> tuple[int | None, ...]:
    """Sizes that must stay: not those of labelled axes, nor of those that `expand` made, where any will do."""
    if labels.uniform:
        return (None,) * len(shape)
    return tuple(
        None if labels.varies(axis) or stride == 0 else size
        for axis, (size, stride) in enumerate(zip(shape, tensor.stride(), strict=True))
    )


def _piece(labels: Labels, inputs: Tensor, axis: int, start: int, size: int, step: int) -> Piece | None:
    """None for the whole axis, which PyTorch may not even cut."""
    length = inputs.shape[axis]
    if size == length or (inputs.stride()[axis] == 0 and size) or labels.uniform:
        return None
    return Piece(axis - inputs.ndim, length, range(start, start + size * step, step), labels)
