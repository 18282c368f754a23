"""Carry labels from operator to operator while a model runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchtrim import (
    _operators,
    _operators_positions,
    _operators_products,
    _operators_shapes,
    _operators_statistics,
)
from torchtrim._activations import ACTIVATIONS, RECURRENT, Kind, kind_of
from torchtrim._labels import UNKNOWN, Atoms, Factor, Labels, Ledger, Shape
from torchtrim._marks import Mark, Memory, labels_of, mark_of, memory_among, origin_of, value_of
from torchtrim._meta import computed
from torchtrim._numbers import constants_of, held_by_code
from torchtrim._operators import (
    FACTORIES,
    Call,
    Row,
    Table,
    distinct_shape,
    pointwise,
    tensors,
    unknown,
)
from torchtrim._origins import VIEWS, Look, Origin, seen_through

TABLE = Table(
    _operators.ROWS
    | _operators_products.ROWS
    | _operators_shapes.ROWS
    | _operators_positions.ROWS
    | _operators_statistics.ROWS
)

# Operators besides the pointwise ones that hand a uniform tensor on whatever its size; and those that sum it with
# weights, which is as good if those have labels.
_ELEMENTWISE = FACTORIES | frozenset([
    "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "new_zeros", "new_ones",
    "new_full", "new_empty", "new_empty_strided", "bernoulli", "uniform", "normal", "fill", "zero", "copy", "cat",
    "index_add",
    "native_dropout", "_fused_dropout", "dropout", "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm",
    "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"])  # fmt: skip
# Their results share memory, but whoever calls them promises to treat each as a tensor of its own.
_UNSAFE = frozenset(["unsafe_split", "unsafe_split_with_sizes"])
IS_OUTPUT = "it is an output of the model"  # why a layer is locked
OUTPUT = "output"  # the step at the end of a run, whose operands are what the model returns
_PRODUCTS = frozenset(["mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addmv", "_trilinear", "convolution"])


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """One call of an activation function: the how-manieth of a forward pass, and whose values it produces."""

    index: int
    name: str
    module: str
    kind: Kind
    shape: Shape
    labels: Labels


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One operator call as a proof compares it. `tensors`: shape and labels of operands, then of results.

    `origins`: where the operands come from. `loose`: what it does to a uniform tensor does not depend on the
    tensor's size. `live`: whether its results, or what it does besides, may reach the outputs.
    """

    name: str
    where: str
    constants: tuple[Any, ...]
    tensors: tuple[tuple[Shape, Labels], ...] = ()
    origins: tuple[Origin, ...] = ()
    loose: bool = False
    live: bool = True


class Flow(TorchDispatchMode):
    """Hands labels from operator to operator while a model runs."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger
        self.steps: list[Step] = []
        self.sites: list[Site] = []
        self.produced: list[Atoms] = []
        self.where: list[str] = [""]
        self.modules: dict[str, nn.Module] = {}
        self.blamed: list[Labels] = []
        self.announced = False  # whether a function that the model's code called is running
        self.knows_widths = False  # whether that code may have learnt of a width
        self._pure: set[int] = set()  # the steps that do nothing but give results
        self._parts = 0
        self._writes: dict[Memory, list[tuple[Factor, ...]]] = {}  # by memory, the labels of what was written

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch would wrap every operator in a function that keeps its compiler out, which does not come here."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.knows_widths = self.knows_widths or not self.announced
        operator = _operator(func)
        name = "alias" if operator.name == "as_strided" and _as_it_is(*args) else operator.name
        is_view = name in VIEWS
        self.ledger.step = None if is_view else len(self.steps)
        operands = tensors([*args, *kwargs.values()])
        self.blamed = [self.read(operand) for operand in operands]
        origins = tuple([origin_of(operand) for operand in operands])
        held = held_by_code(operands)
        value = value_of(name, func, args, kwargs, operands)
        result = computed(name, func, args, kwargs, value)
        where = self.where[-1]
        call = Call(name, func, args, kwargs, result, labels_of, self.ledger, where, self.modules.get(where))
        row = row_of(name, func)
        found = row(call)
        results = tensors(result if isinstance(result, (tuple, list)) else (result,))
        labels = [found] * len(results) if isinstance(found, Labels) else list(found)
        labels = [self._without_constants(one, call) for one in labels]
        labels += [UNKNOWN] * (len(results) - len(labels))
        if is_view:
            sources = seen_through(call, origins[0], labels)
            if held:
                self.steps.append(Step("data", where, held))
        else:
            sources = [Origin((len(self.steps), index)) for index in range(len(results))]
        written = operator.written(args, kwargs)
        self._mark_results(call, [*zip(results, labels, sources, strict=True)], written, operands, value)
        self.produced += call.produced
        if not is_view:
            if results and not written:  # what else it does cannot be seen to be of no use
                self._pure.add(len(self.steps))
            self.steps.append(self._step(call, row, operands, results, origins, held))
        self.ledger.step = None
        if name in ACTIVATIONS and not isinstance(call.module, RECURRENT):
            kind = kind_of(name, args, kwargs)
            if kind is not None:
                self.sites.append(Site(len(self.sites), name, where, kind, tuple(results[0].shape), labels[0]))
        return result

    def _mark_results(
        self,
        call: Call,
        results: Sequence[tuple[Tensor, Labels, Origin]],
        written: Sequence[Tensor],
        operands: Sequence[Tensor],
        value: Tensor | None,
    ) -> None:
        """Note what is known of the results, and that what else the operator has written to holds other values."""
        for tensor in written:
            self._count_write(tensor, [labels for _, labels, _ in results])
        for tensor, labels, origin in results:
            if any(tensor is other for other in written) and tensor._base is not None:
                self._write_through(call, tensor, labels, origin)
            elif call.name in _UNSAFE:
                self._parts += 1
                self.mark(tensor, labels, origin, (tensor.untyped_storage()._cdata, self._parts))
            else:
                self.mark(tensor, labels, origin, memory_among(tensor, operands), value)
        for tensor in written:
            if not any(tensor is other for other, _, _ in results):
                self.mark(tensor, labels_of(tensor), Origin((len(self.steps), -1)))

    def _step(
        self,
        call: Call,
        row: Row,
        operands: Sequence[Tensor],
        results: Sequence[Tensor],
        origins: tuple[Origin, ...],
        held: tuple[Any, ...],
    ) -> Step:
        """What a proof compares of a call."""
        elementwise = row is pointwise
        shapes = [distinct_shape(one) if elementwise else one.shape for one in operands]
        labelled = [*zip(shapes, self.blamed, strict=True), *((one.shape, labels_of(one)) for one in results)]
        loose = (
            elementwise
            or call.name in _ELEMENTWISE
            or (call.name in _PRODUCTS and not all(one.uniform for one in self.blamed))
        )
        types = [one.dtype for one in (*operands, *results)]
        constants = (*constants_of(call.name, call.args, call.kwargs), *types, *held)
        return Step(call.name, call.where, constants, tuple(labelled), origins, loose)

    def _without_constants(self, labels: Labels, call: Call) -> Labels:
        """A factor that varies along no axis can never go: its tensor would lose everything."""
        if all(factor.atoms.size > 1 for factor in labels.factors):
            return labels
        for factor in labels.factors:
            if factor.atoms.size == 1:
                self.ledger.pin(factor.atoms.ravel(), call.reason("it would lose everything: read"))
        return labels.with_factors(factor for factor in labels.factors if factor.atoms.size > 1)

    def finish(self, returned: Sequence[tuple[Tensor, str]], kept: Sequence[Tensor]) -> None:
        """Pin what the model returns, each for its reason, and leave out of account what was computed for nothing.

        kept: what its modules hold on to, which a later call may read.
        """
        outputs = [output for output, _ in returned]
        read = [self.read(output) for output in outputs]
        for one, (_, reason) in zip(read, returned, strict=True):
            for factor in one.factors:
                self.ledger.pin(factor.atoms.ravel(), reason)
        seen = tuple((tuple(output.shape), one) for output, one in zip(outputs, read, strict=True))
        self.steps.append(Step(OUTPUT, "", (), seen, tuple(origin_of(output) for output in outputs)))
        read_later = {source for tensor in kept if isinstance(source := origin_of(tensor).source[0], int)}
        dead: set[int] = set()
        for index, step in reversed([*enumerate(self.steps)]):
            if index in self._pure and index not in read_later:
                dead.add(index)
                self.steps[index] = replace(step, live=False)
            else:
                read_later.update(o.source[0] for o in step.origins if isinstance(o.source[0], int))
        weighted = {index for index in dead if any(labels.static for _, labels in self.steps[index].tensors)}
        self.ledger.forget(dead, weighted)

    def mark(
        self,
        tensor: Tensor,
        labels: Labels,
        origin: Origin,
        memory: Memory | None = None,
        value: Tensor | None = None,
    ) -> None:
        memory = memory or memory_among(tensor, [tensor])
        writes = len(self._writes.get(memory, ()))
        tensor._torchtrim_mark = Mark(labels, origin, memory, writes, value)  # type: ignore[attr-defined]

    def _count_write(self, tensor: Tensor, labels: Sequence[Labels]) -> None:
        """Counts stay when memory is freed and used again: what is marked later has seen them."""
        self._writes.setdefault(memory_among(tensor, [tensor]), []).append(
            tuple(factor for one in labels for factor in one.factors)
        )

    def _write_through(self, call: Call, view: Tensor, labels: Labels, origin: Origin) -> None:
        """An in-place operator on a view: its base follows where values changed, and stays whole where labels did."""
        base, before = view._base, labels_of(view)
        assert base is not None
        whole = labels_of(base)
        if [id(factor.atoms) for factor in before.factors] == [id(factor.atoms) for factor in labels.factors]:
            kept = all(new.zero or not old.zero for old, new in zip(before.factors, labels.factors, strict=True))
            whole = UNKNOWN if whole.uniform else whole
            if not kept:
                whole = whole.with_factors(Factor(factor.atoms, False) for factor in whole.factors)
        else:
            for factor in (*before.factors, *labels.factors, *whole.factors):
                self.ledger.pin(factor.atoms.ravel(), call.reason("written into part of another tensor"))
            whole = labels = UNKNOWN
        self.mark(base, whole, Origin(origin.source, (Look("written through"), *origin_of(view).looks)))
        self.mark(view, labels, origin)

    def read(self, tensor: Tensor) -> Labels:
        """The labels of an operand. One whose memory was written to under another name has none that hold."""
        mark = mark_of(tensor)
        if mark is None:
            return UNKNOWN
        writes = self._writes.get(memory_among(tensor, [tensor]), ()) if self._writes else ()
        if mark.writes == len(writes):
            return mark.labels
        bases = () if tensor._base is None else labels_of(tensor._base).factors
        for factor in (*mark.labels.factors, *bases, *(one for some in writes[mark.writes :] for one in some)):
            self.ledger.pin(factor.atoms.ravel(), "its memory is written to under another name")
        look = Look("written under another name", (len(writes),))
        self.mark(tensor, UNKNOWN, Origin(mark.origin.source, (*mark.origin.looks, look)))
        return UNKNOWN


def _as_it_is(tensor: Tensor, shape: Sequence[int], stride: Sequence[int], start: int | None = None) -> bool:
    """Whether `as_strided` gives every element its place, and another stride at most to axes of size 1."""
    kept = zip(shape, stride, tensor.stride(), strict=True)
    return (
        tuple(shape) == tuple(tensor.shape)
        and start in (None, tensor.storage_offset())
        and all(size == 1 or new == old for size, new, old in kept)
    )


def row_of(name: str, function: Any) -> Row:
    if name in TABLE:
        return TABLE[name]
    elementwise = torch.Tag.pointwise in function.tags or name in ACTIVATIONS
    return pointwise if elementwise else unknown


@dataclass(frozen=True, slots=True)
class _Operator:
    """What is the same in all calls of an operator. `name`: without the underscore of those that work in place.

    `mutable`: the places and names of the arguments into which it writes.
    """

    name: str
    mutable: tuple[tuple[int, str], ...]

    def written(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors into which a call writes."""
        if not self.mutable:
            return []
        return tensors(args[place] if place < len(args) else kwargs.get(name) for place, name in self.mutable)


@cache
def _operator(function: Any) -> _Operator:
    schema = function._schema
    namespace, _, name = schema.name.partition("::")
    name = name if namespace == "aten" else schema.name
    in_place = name.endswith("_") and not name.endswith("__")
    written = [
        (i, a.name) for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write
    ]
    return _Operator(name.rstrip("_") if in_place else name, tuple(written) if schema.is_mutable else ())
