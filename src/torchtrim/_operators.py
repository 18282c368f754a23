"""What an operator does to neuron labels: the table, and the rows of element-wise operators.

A row is a function of a `Call`. It returns the labels of the result (one for each tensor where there are several).
An operator without a row, and without the `pointwise` tag, pins every label that reaches it: nothing is guessed.
The rows of products, statistics and shapes are in rooms of their own.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchtrim._labels import UNIFORM, ZEROS, Atoms, Factor, Labels, Ledger, Shape, fit

FACTORIES = frozenset(["empty", "zeros", "ones", "full", "rand", "randn", "empty_strided", "scalar_tensor"])


@dataclass(slots=True)
class Call:
    """One operator at work: its arguments, its result, and the ledger to write demands into."""

    name: str
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    labels_of: Callable[[Tensor], Labels]
    ledger: Ledger
    where: str
    module: nn.Module | None = None
    produced: list[Atoms] = field(default_factory=list)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def reason(self, what: str) -> str:
        return f"{what} by aten::{self.name} in {self.where or 'the model itself'}"

    def fix(self, factor: Factor, axis: int, why: str = "an axis of fixed size is read") -> Factor | None:
        """Keep an axis at its size: tie along it what varies elsewhere too, pin what does not."""
        if not factor.varies(axis):
            return factor
        if factor.axes() == (axis,):
            self.ledger.pin(factor.atoms.ravel(), self.reason(why))
            return None
        return factor.map(self.ledger.tie(factor.atoms, axis, self.reason(why)))

    def fix_axes(self, factors: Sequence[Factor], axes: Iterable[int], why: str) -> list[Factor]:
        kept: list[Factor] = []
        axes = tuple(axes)
        for factor in factors:
            current: Factor | None = factor
            for axis in axes:
                if current and current.varies(axis):
                    current = self.fix(current, axis, why)
            if current:
                kept.append(current)
        return kept


Row = Callable[[Call], Labels | Sequence[Labels]]


class Table(dict[str, Row]):
    """Rows by the names of their operators."""

    def of(self, *names: str) -> Callable[[Row], Row]:
        """Decorate the row of these operators."""

        def register(function: Row) -> Row:
            for name in names:
                assert name not in self, name
                self[name] = function
            return function

        return register


ROWS = Table()


Flags = list[bool | None]  # for each operand: is it 0 where its neuron is silent? None where it knows no such neuron
Operand = tuple[Sequence[Factor], Shape, bool]  # factors, shape, uniform


def tensors(values: Iterable[Any]) -> list[Tensor]:
    """All tensors in the arguments of an operator, in order."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


def operand(call: Call, tensor: Tensor) -> Operand:
    labels = call.labels_of(tensor)
    return labels.factors, distinct_shape(tensor), labels.uniform


def distinct_shape(tensor: Tensor) -> Shape:
    """The shape without what `expand` added: there all elements are one and the same, so that any size will do."""
    strides = tensor.stride()
    if 0 not in strides:
        return tensor.shape
    return tuple(1 if stride == 0 else size for size, stride in zip(tensor.shape, strides, strict=True))


def merge(call: Call, operands: Sequence[Operand], zero: Callable[[Flags], bool]) -> list[Factor]:
    """Unite the labels of broadcast operands; `zero` says from the operands' flags whether the result is zero."""
    ndim = max((len(shape) for _, shape, _ in operands), default=0)
    found: list[tuple[Factor, Flags]] = []
    fixed: set[int] = set()  # axes along which some operand has a size but no neurons, so that it cannot follow
    fitted = [[fit(raw, ndim) for raw in factors] for factors, _, _ in operands]
    crossing = _crossing(call, fitted, [(1,) * (ndim - len(shape)) + tuple(shape) for _, shape, _ in operands])
    for index, (own, (_, shape, uniform)) in enumerate(zip(fitted, operands, strict=True)):
        for factor in own:
            flags = _united(call, [one for one in found if (id(one[0]), id(factor)) not in crossing], factor)
            if flags is None:
                flags = Flags([None] * len(operands))
                found.append((factor, flags))
            flags[index] = factor.zero
        if not uniform:
            covered = {axis for factor in own for axis in factor.axes()}
            fixed.update(i for i, size in enumerate(shape, ndim - len(shape)) if size > 1 and i not in covered)
    merged: list[Factor] = []
    for factor, flags in found:
        current: Factor | None = factor
        for axis in fixed.intersection(factor.axes()) if fixed else ():
            current = call.fix(current, axis, "combined with a tensor of fixed size") if current else None
        if current:
            merged.append(Factor(current.atoms, zero(flags)))
    return merged


def _crossing(call: Call, operands: Sequence[Sequence[Factor]], shapes: Sequence[Shape]) -> set[tuple[int, int]]:
    """The pairs of labels that lie across each other along an axis that was joined of two, such as experts and units.

    In other operands each meets its own kind, if they have the axis; one of which there is no such kind stays.
    """
    if not any(set(one.axes()) & set(other.axes()) for some in operands for one, other in combinations(some, 2)):
        return set()
    every = [(place, factor, _pattern(factor)) for place, factors in enumerate(operands) for factor in factors]
    kinds = {(place, pattern) for place, _, pattern in every}
    pairs: set[tuple[int, int]] = set()
    for (place, one, pattern), (there, other, pattern_there) in combinations(every, 2):
        if one.axes() != other.axes() or _tells(pattern, pattern_there) or _tells(pattern_there, pattern):
            continue
        met = any((elsewhere, pattern) in kinds for elsewhere in range(len(operands)) if elsewhere != place)
        met_there = any((elsewhere, pattern_there) in kinds for elsewhere in range(len(operands)) if elsewhere != there)
        others = [shape for elsewhere, shape in enumerate(shapes) if elsewhere not in (place, there)]
        alone = place == there and all(shape[axis] == 1 for shape in others for axis in one.axes())
        if met or met_there or alone:
            pairs.add((id(one), id(other)))
        if place != there and met != met_there:
            call.ledger.pin((other if met else one).atoms.ravel(), call.reason("combined"))
    return pairs


_Pattern = tuple[Shape, bytes]  # of each position, the first that has the same label


def _pattern(factor: Factor) -> _Pattern:
    _, first, inverse = np.unique(factor.atoms, return_index=True, return_inverse=True)
    return factor.atoms.shape, first[inverse.ravel()].tobytes()


def _tells(one: _Pattern, other: _Pattern) -> bool:
    """Whether what is alike by one pattern is alike by the other."""
    mine, theirs = (np.frombuffer(content, np.int64) for _, content in (one, other))
    return mine.size == theirs.size and np.array_equal(theirs[mine], theirs)


def _united(call: Call, found: Sequence[tuple[Factor, Flags]], factor: Factor) -> Flags | None:
    """Unite a factor with those that share an axis with it; returns the flags of the one of its own shape."""
    axes = set(factor.axes())
    same: Flags | None = None
    for other, flags in found:
        others = set(other.axes())
        if axes < others and axes:
            call.ledger.unite_or_fix(other.atoms, factor.atoms, call.reason("combined"))
        elif others < axes and others:
            call.ledger.unite_or_fix(factor.atoms, other.atoms, call.reason("combined"))
        elif not axes.isdisjoint(others):
            call.ledger.unite(other.atoms, factor.atoms, call.reason("combined"))
            if other.atoms.shape == factor.atoms.shape and call.ledger.agree(other.atoms, factor.atoms):
                same = flags
    return same


def all_zero(flags: Flags) -> bool:
    return all(flags)


def any_zero(flags: Flags) -> bool:
    return any(flags)


def never_zero(_: Flags) -> bool:
    return False


def first_zero(flags: Flags) -> bool:
    return bool(flags[0])


# When the result of an element-wise operator of several tensors is zero for a silent neuron; not listed: never.
_ZERO: dict[str, Callable[[Flags], bool]] = {
    "add": all_zero,
    "sub": all_zero,
    "maximum": all_zero,
    "minimum": all_zero,
    "max": all_zero,
    "min": all_zero,
    "lerp": lambda flags: bool(flags[0] and flags[1]),
    "where": lambda flags: bool(flags[1] and flags[2]),
    "mul": any_zero,
    "logical_and": any_zero,
    "bitwise_and": any_zero,
    "div": lambda flags: bool(flags[0]) and not flags[1],
    "prelu": first_zero,
    "_prelu_kernel": first_zero,
    "copy": lambda flags: bool(flags[1]),
    "addcmul": lambda flags: bool(flags[0] and (flags[1] or flags[2])),
    "stack": all_zero,
}


def pointwise(call: Call) -> Labels:
    """Every element of the result depends on the operands' elements at its own position."""
    operands = tensors([*call.args, *call.kwargs.values()])
    labels = [call.labels_of(one) for one in operands]
    if all(one.uniform for one in labels):
        return UNIFORM
    if len(operands) == 1 and not labels[0].factors:
        return labels[0]
    if len(operands) == 1:
        zero = all_zero if _keeps_zero(call) else never_zero
        if len(labels[0].factors) == 1:
            (factor,) = labels[0].factors
            zeros = factor.zero and zero is all_zero
            return labels[0] if zeros == factor.zero else labels[0].with_factors([Factor(factor.atoms, False)])
    elif call.name == "masked_fill":
        zero = first_zero if call.args[2] == 0 else never_zero
    else:
        zero = _ZERO.get(call.name, never_zero)
    factors = merge(call, [operand(call, tensor) for tensor in operands], zero)
    return Labels(tuple(factors), all(one.static for one in labels))


@dataclass(frozen=True)
class _Zero:
    """Stands for a tensor of which only the type matters."""

    dtype: torch.dtype


def _keeps_zero(call: Call) -> bool:
    """Whether a function of one tensor maps zero to zero: it is asked."""
    names = tuple(name for name in call.kwargs if name not in ("device", "out", "memory_format"))
    values = (*call.args, *(call.kwargs[name] for name in names))
    return _maps_zero_to_zero(call.function, names, *map(_without_tensors, values))


def _without_tensors(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_without_tensors, value))
    return _Zero(value.dtype) if isinstance(value, Tensor) else value


def _with_zeros(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_with_zeros, value))
    return torch.zeros((), dtype=value.dtype) if isinstance(value, _Zero) else value


@lru_cache(maxsize=None, typed=True)  # 1 and 1.0 are not the same to an operator
def _maps_zero_to_zero(function: Any, names: tuple[str, ...], *values: Any) -> bool:
    args = [_with_zeros(value) for value in values]
    count = len(args) - len(names)
    try:
        found = function(*args[:count], **dict(zip(names, args[count:], strict=True)))
    except Exception:  # an operator of a user's, which may not take a number
        return False
    first = found[0] if isinstance(found, (tuple, list)) else found
    return isinstance(first, Tensor) and first.device.type == "cpu" and bool(first == 0)


def with_indices(call: Call, labels: Labels) -> Labels | Sequence[Labels]:
    """The labels of values, and of the indices beside them, which are not zero where the values are."""
    if isinstance(call.result, Tensor):
        return labels
    indices = labels.with_factors(Factor(factor.atoms, False) for factor in labels.factors)
    return [labels, *(indices for _ in call.result[1:])]


def unknown(call: Call) -> Labels:
    """No row: pin everything that reaches the operator."""
    operands = tensors([*call.args, *call.kwargs.values()])
    for tensor in operands:
        for factor in call.labels_of(tensor).factors:
            call.ledger.pin(factor.atoms.ravel(), call.reason("no rule is known, so it is left alone: read"))
    if operands or call.name not in FACTORIES:
        return Labels(static=not operands)
    return ZEROS if call.name == "zeros" else UNIFORM


@ROWS.of("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "new_zeros", "new_ones",
     "new_full", "new_empty", "new_empty_strided")  # fmt: skip
def _uniform(call: Call) -> Labels:
    return ZEROS if "zeros" in call.name else UNIFORM


@ROWS.of("bernoulli", "uniform", "normal", "fill", "zero")
def _filled(call: Call) -> Labels:
    """In place: what was there before is gone. Bernoulli draws with probabilities depend on them."""
    written = call.function._schema.is_mutable
    return UNIFORM if written or call.name == "zero" else pointwise(call)


@ROWS.of("native_dropout", "_fused_dropout", "dropout")
def _dropout(call: Call) -> Labels:
    return call.labels_of(call.args[0])


@ROWS.of("copy")
def _copy(call: Call) -> Labels:
    target, source = call.args[0], call.args[1]
    labels = call.labels_of(source)
    if call.labels_of(target).factors:
        return pointwise(call)
    return labels.with_factors(fit(factor, target.ndim) for factor in labels.factors)


@ROWS.of("clone", "_to_copy", "detach", "alias", "lift_fresh", "contiguous")
def _same(call: Call) -> Labels:
    return call.labels_of(call.args[0])
