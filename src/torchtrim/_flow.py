"""Run a model once and carry labels through its operators.

Works on a copy whose tensors are replaced (`rebuild`), on the meta device where the model allows, so that the user's
model is never touched and no arithmetic is done.
"""

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Generator, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from torchtrim import _operators, _operators_products, _operators_shapes, _operators_statistics
from torchtrim._activations import ACTIVATIONS, RECURRENT, Kind, kind_of
from torchtrim._labels import UNKNOWN, Atoms, Factor, Labels, Ledger, Shape
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
from torchtrim._origins import NOWHERE, VIEWS, Look, Origin, seen_through
from torchtrim.errors import TraceError

TABLE = Table(_operators.ROWS | _operators_products.ROWS | _operators_shapes.ROWS | _operators_statistics.ROWS)

# Operators besides the pointwise ones that hand a uniform tensor on whatever its size; and those that sum it with
# weights, which is as good if those have labels.
_ELEMENTWISE = FACTORIES | frozenset([
    "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "new_zeros", "new_ones",
    "new_full", "new_empty", "new_empty_strided", "bernoulli", "uniform", "normal", "fill", "zero", "copy", "cat",
    "native_dropout", "_fused_dropout", "dropout", "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm",
    "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"])  # fmt: skip
# Their results share memory, but whoever calls them promises to treat each as a tensor of its own.
_UNSAFE = frozenset(["unsafe_split", "unsafe_split_with_sizes"])
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


Memory = tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Mark:
    """What is known of a tensor, and how often its memory had been written to when that was so.

    memory: the storage, and which part of it where pieces count as tensors of their own. value: what a tensor without
    data would hold, where inputs and constants alone decide that.
    """

    labels: Labels
    origin: Origin
    memory: Memory
    writes: int
    value: Tensor | None = None


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every distinct module once, under its first name, as `nn.Module.named_modules` but without its recursion."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if id(module) not in seen:
            seen.add(id(module))
            found[name] = module
            inside = f"{name}." if name else ""
            children = [(inside + key, child) for key, child in module._modules.items() if child is not None]
            waiting += reversed(children)
    return found


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every distinct parameter, then every distinct buffer, once, under its first name."""
    modules = named_modules(model)
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for kind in ("_parameters", "_buffers"):
        for name, module in modules.items():
            for key, tensor in vars(module)[kind].items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[f"{name}.{key}" if name else key] = tensor
    return found


def rebuild(model: nn.Module, replace: Mapping[str, Tensor]) -> nn.Module:
    """A deep copy of the model in which the named parameters and buffers are other tensors."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # deepcopy refuses what a graph produced
                memo[id(value)] = value.detach().clone()
    for name, old in named_tensors(model).items():
        new = replace[name]
        memo[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        vars(memo[id(old)]).update(vars(old))  # marks that users leave on parameters, such as `no_weight_decay`
    return _copied(model, memo)


# What `copy.deepcopy` hands on as it is.
_ATOMIC = (bool, int, float, str, type(None), type, torch.dtype, torch.device, torch.Size)


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """`copy.deepcopy`, which would spend most of its time on the empty dictionaries of modules."""
    plain = [module for module in model.modules() if _is_plain(type(module))]
    for module in plain:
        memo[id(module)] = object.__new__(type(module))
    for module in plain:
        new = vars(memo[id(module)])
        for name, value in vars(module).items():
            if name == "_compiled_call_impl":
                continue  # `torch.compile` left it; PyTorch's own copies go without it too
            if type(value) in _ATOMIC:
                new[name] = value
            elif type(value) in (dict, OrderedDict) and not value:
                new[name] = type(value)()
            else:
                new[name] = copy.deepcopy(value, memo)
    return copy.deepcopy(model, memo)


@cache
def _is_plain(kind: type) -> bool:
    """Whether all that is to be copied of such a module is in its dictionary."""
    return (
        not hasattr(kind, "__deepcopy__")
        and kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__getstate__ in (object.__getstate__, getattr(nn.Module, "__getstate__", None))
        and (kind.__setstate__ is nn.Module.__setstate__ or kind.__module__.startswith("torch.nn."))
        and not any("__slots__" in vars(parent) for parent in kind.__mro__)
    )


def call_arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An example is a tensor, a tuple of positional inputs, or a dict of keyword inputs."""
    if isinstance(example, dict):
        return (), dict(example)
    return (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}


class Flow(TorchDispatchMode):
    """Hands labels from operator to operator while a model runs."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger
        self.steps: list[Step] = []
        self.sites: list[Site] = []
        self.produced: list[Atoms] = []
        self.where: list[str] = []
        self.modules: dict[str, nn.Module] = {}
        self.blamed: list[Labels] = []
        self._parts = 0
        self._writes: dict[Memory, list[tuple[Factor, ...]]] = {}  # by memory, the labels of what was written

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        namespace, _, name = func._schema.name.partition("::")
        name = name if namespace == "aten" else func._schema.name
        in_place = name.endswith("_") and not name.endswith("__")
        name = name.rstrip("_") if in_place else name
        self.ledger.step = None if name in VIEWS else len(self.steps)
        operands = tensors([*args, *kwargs.values()])
        self.blamed = [self.read(operand) for operand in operands]
        origins = tuple(origin_of(operand) for operand in operands)
        held = _held(operands)
        value = _value(name, func, args, kwargs)
        result = _without_data(name, func, args, kwargs, value)
        where = self.where[-1] if self.where else ""
        call = Call(name, func, args, kwargs, result, labels_of, self.ledger, where, self.modules.get(where))
        row = row_of(name, func)
        found = row(call)
        results = tensors(pytree.tree_leaves(result))
        labels = [found] * len(results) if isinstance(found, Labels) else list(found)
        labels = [self._without_constants(one, call) for one in labels]
        labels += [UNKNOWN] * (len(results) - len(labels))
        if name in VIEWS:
            sources = seen_through(call, origins[0], labels)
            if held:
                self.steps.append(Step("data", where, held))
        else:
            sources = [Origin((len(self.steps), index)) for index in range(len(results))]
        written = _written(func, args, kwargs)
        for tensor in written:
            self._count_write(tensor, labels)
        for tensor, one, source in zip(results, labels, sources, strict=True):
            if any(tensor is other for other in written) and tensor._base is not None:
                self._write_through(call, tensor, one, source)
            elif name in _UNSAFE:
                self._parts += 1
                self.mark(tensor, one, source, (tensor.untyped_storage()._cdata, self._parts))
            else:
                self.mark(tensor, one, source, _memory(tensor, operands), value)
        for tensor in written:
            if not any(tensor is other for other in results):
                self.mark(tensor, labels_of(tensor), Origin((len(self.steps), -1)))
        self.produced += call.produced
        if name not in VIEWS:
            seen = [*zip(operands, self.blamed, strict=True), *((t, labels_of(t)) for t in results)]
            live = bool(written) or not results  # what else it does cannot be seen to be of no use
            self.steps.append(self._step(call, row, seen, origins, held, live))
        self.ledger.step = None
        kind = None if isinstance(call.module, RECURRENT) else kind_of(name, args, kwargs)
        if kind is not None:
            self.sites.append(Site(len(self.sites), name, where, kind, tuple(results[0].shape), labels[0]))
        return result

    def _step(
        self,
        call: Call,
        row: Row,
        seen: Sequence[tuple[Tensor, Labels]],
        origins: tuple[Origin, ...],
        held: tuple[Any, ...],
        live: bool,
    ) -> Step:
        """What a proof compares of a call. `seen`: its operands, then its results."""
        shape_of = distinct_shape if row is pointwise else _shape
        operands = len(origins)
        shapes = [shape_of(one) if place < operands else _shape(one) for place, (one, _) in enumerate(seen)]
        loose = (
            row is pointwise
            or call.name in _ELEMENTWISE
            or (call.name in _PRODUCTS and not all(one.uniform for one in self.blamed))
        )
        constants = (*_constants(call.name, call.args, call.kwargs), *(str(one.dtype) for one, _ in seen), *held)
        labelled = tuple(zip(shapes, (labels for _, labels in seen), strict=True))
        return Step(call.name, call.where, constants, labelled, origins, loose, live)

    def _without_constants(self, labels: Labels, call: Call) -> Labels:
        """A factor that varies along no axis can never go: its tensor would lose everything."""
        if all(factor.atoms.size > 1 for factor in labels.factors):
            return labels
        for factor in labels.factors:
            if factor.atoms.size == 1:
                self.ledger.pin(factor.atoms.ravel(), call.reason("it would lose everything: read"))
        return labels.with_factors(factor for factor in labels.factors if factor.atoms.size > 1)

    def finish(self, outputs: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
        """Pin what the model returns, and leave out of account what was computed for nothing.

        kept: what its modules hold on to, which a later call may read.
        """
        read = [self.read(output) for output in outputs]
        for factor in (factor for one in read for factor in one.factors):
            self.ledger.pin(factor.atoms.ravel(), "it is an output of the model")
        seen = tuple((tuple(output.shape), one) for output, one in zip(outputs, read, strict=True))
        self.steps.append(Step(OUTPUT, "", (), seen, tuple(origin_of(output) for output in outputs)))
        live = {index for index, step in enumerate(self.steps) if step.live or step.name == OUTPUT}
        read_later = {source for tensor in kept if isinstance(source := origin_of(tensor).source[0], int)}
        for index in reversed(range(len(self.steps))):
            if index in live or index in read_later:
                live.add(index)
                read_later.update(o.source[0] for o in self.steps[index].origins if isinstance(o.source[0], int))
        self.steps = [replace(step, live=index in live) for index, step in enumerate(self.steps)]
        self.ledger.forget({index for index in range(len(self.steps)) if index not in live})

    def mark(
        self,
        tensor: Tensor,
        labels: Labels,
        origin: Origin,
        memory: Memory | None = None,
        value: Tensor | None = None,
    ) -> None:
        memory = memory or _memory(tensor, [tensor])
        writes = len(self._writes.get(memory, ()))
        tensor._torchtrim_mark = Mark(labels, origin, memory, writes, value)  # type: ignore[attr-defined]

    def _count_write(self, tensor: Tensor, labels: Sequence[Labels]) -> None:
        """Counts stay when memory is freed and used again: what is marked later has seen them."""
        self._writes.setdefault(_memory(tensor, [tensor]), []).append(
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
        writes = self._writes.get(_memory(tensor, [tensor]), ())
        if mark is None or mark.writes == len(writes):
            return UNKNOWN if mark is None else mark.labels
        bases = () if tensor._base is None else labels_of(tensor._base).factors
        for factor in (*mark.labels.factors, *bases, *(one for some in writes[mark.writes :] for one in some)):
            self.ledger.pin(factor.atoms.ravel(), "its memory is written to under another name")
        look = Look("written under another name", (len(writes),))
        self.mark(tensor, UNKNOWN, Origin(mark.origin.source, (*mark.origin.looks, look)))
        return UNKNOWN


def _memory(tensor: Tensor, operands: Sequence[Tensor]) -> Memory:
    """The memory of a tensor: that of the operand whose storage it has, or a storage of its own."""
    storage = tensor.untyped_storage()._cdata
    marks = (mark for operand in operands if (mark := mark_of(operand)) is not None)
    return next((mark.memory for mark in marks if mark.memory[0] == storage), (storage, 0))


def _shape(tensor: Tensor) -> Shape:
    return tuple(tensor.shape)


def row_of(name: str, function: Any) -> Row:
    if name in TABLE:
        return TABLE[name]
    elementwise = torch.Tag.pointwise in function.tags or name in ACTIVATIONS
    return pointwise if elementwise else unknown


def _value(name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What an operator gives on tensors without data, where inputs and constants alone decide it, such as a mask.

    Code looks at such tensors (`if mask.all()`), which then needs no weights.
    """
    operands = tensors([*args, *kwargs.values()])
    known = [_known(operand) for operand in operands]
    on_meta = any(one.is_meta for one in operands) or str(kwargs.get("device")) == "meta"
    if not on_meta or any(one is None for one in known) or (not operands and name not in _CONSTANTS):
        return None
    if function._schema.is_mutable or torch.Tag.nondeterministic_seeded in function.tags:
        return None
    with suppress(Exception):  # what cannot be told so, is not
        on_cpu = {key: torch.device("cpu") if key == "device" else value for key, value in kwargs.items()}
        result = function(*pytree.tree_map_only(Tensor, _known, args), **pytree.tree_map_only(Tensor, _known, on_cpu))
        if isinstance(result, Tensor) and result.numel() <= _SMALL:
            return result
        if isinstance(result, (bool, int, float)):
            return torch.tensor(result)
    return None


_CONSTANTS = frozenset(["arange", "zeros", "ones", "full", "scalar_tensor", "tril_indices", "triu_indices", "eye"])
_SMALL = 1 << 18


def _known(tensor: Tensor) -> Tensor | None:
    mark = mark_of(tensor)
    if mark is not None and mark.value is not None:
        return mark.value
    return tensor if mark is None and tensor.device.type == "cpu" and tensor.numel() <= _SMALL else None


def _without_data(name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor | None) -> Any:
    """Run an operator; where it would take PyTorch's meta kernels long, and shapes are plain, make the results."""
    first = args[0] if args else None
    if value is not None and name == "_local_scalar_dense":
        return value.item()
    if value is not None and name == "nonzero":
        return torch.empty_like(value, device="meta")
    if not isinstance(first, Tensor) or not first.is_meta:
        return function(*args, **kwargs)
    if name in _SLOW_NORMS and len(args) > 5 and args[5] is False and _fits_channels(first, args[1:5]):
        return torch.empty_like(first), first.new_empty(0), first.new_empty(0)
    if (
        name in _SLOW_SUMS
        and function._overloadname == "Tensor"
        and len(args) == 2
        and not function._schema.is_mutable
        and not kwargs
    ):
        second: Any = args[-1]
        if (
            isinstance(second, Tensor)
            and first.dtype.is_floating_point
            and (first.dtype, first.shape, first.stride())
            == (
                second.dtype,
                second.shape,
                second.stride(),
            )
        ):
            return torch.empty_like(first)
    return function(*args, **kwargs)


_SLOW_NORMS = frozenset(["native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"])
_SLOW_SUMS = frozenset(["add", "sub", "mul", "div"])


def _fits_channels(inputs: Tensor, vectors: Sequence[Tensor | None]) -> bool:
    return inputs.ndim > 1 and all(vector is None or vector.shape == inputs.shape[1:2] for vector in vectors)


def mark_of(tensor: Tensor) -> Mark | None:
    return getattr(tensor, "_torchtrim_mark", None)


def labels_of(tensor: Tensor) -> Labels:
    mark = mark_of(tensor)
    return UNKNOWN if mark is None else mark.labels


def origin_of(tensor: Tensor) -> Origin:
    mark = mark_of(tensor)
    return NOWHERE if mark is None else mark.origin


def _written(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors into which an operator writes."""
    if not function._schema.is_mutable:
        return []
    values = {a.name: value for a, value in zip(function._schema.arguments, args, strict=False)} | kwargs
    mutable = (a.name for a in function._schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    return tensors(values[name] for name in mutable if name in values)


def _constants(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The numbers in an operator's arguments that a trimmed model must repeat; those that are widths may change."""
    if name in FACTORIES or name.startswith("new_"):
        values: list[Any] = [value for value in args if isinstance(value, (int, float))] + [kwargs.get("generator")]
    elif name == "convolution":
        values = list(args[:8])
    elif name == "native_group_norm":
        values = [args[-1]]
    else:
        values = [*args, *kwargs.values()]
    return tuple(_constant(leaf) for leaf in pytree.tree_leaves(values))


def _constant(value: Any) -> Any:
    """A number or a text as it is; where a tensor is, or nothing; what seeds a generator, and what kind the rest is."""
    if value is None or isinstance(value, (int, float, complex, str)):
        return value
    if isinstance(value, torch.Generator):
        return "generator", value.initial_seed()
    return "tensor" if isinstance(value, Tensor) else type(value).__name__


def _held(operands: list[Tensor]) -> tuple[Any, ...]:
    """The values of tensors that no operator made: numbers that the model's own code holds."""
    held = [t for t in operands if t.device.type == "cpu" and mark_of(t) is None]
    with _disable_current_modes():
        return tuple(value for t in held for value in _values(t.detach()))


def _values(tensor: Tensor) -> list[Any]:
    """A few numbers as they are; many, or of another kind, by their bytes."""
    if tensor.layout != torch.strided:
        return []
    if tensor.numel() <= _FEW and not tensor.is_complex():
        return [float(value) for value in tensor.flatten().tolist()]
    return [hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()]


_FEW = 64
# Functions that make a tensor of Python's data, which on the meta device would be lost.
_MAKERS = frozenset([torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor, Tensor.new_tensor, Tensor.new])


_INDEXERS = frozenset([Tensor.__getitem__, Tensor.__setitem__])
_DATA = Tensor.data
# Functions that hand the data of a tensor to Python.
_READERS = frozenset([Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__])


class _Data(TorchFunctionMode):
    """Notes the numbers of which the model's code makes tensors, and the tensors of which it makes numbers."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _MAKERS:
            numbers = tuple(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, (int, float)))
            where = self.flow.where[-1] if self.flow.where else ""
            self.flow.steps.append(Step("data", where, numbers))
        elif func in _INDEXERS:  # lists and ranges, of which PyTorch makes tensors unseen
            places = [one for one in pytree.tree_leaves(args[1:2]) if isinstance(one, range)]
            lists = args[1] if isinstance(args[1], tuple) else args[1:2]
            numbers = [leaf for one in lists if isinstance(one, list) for leaf in pytree.tree_leaves(one)]
            numbers += [number for place in places for number in place]
            if numbers:
                where = self.flow.where[-1] if self.flow.where else ""
                constants = tuple(one for one in numbers if isinstance(one, (int, float)))
                self.flow.steps.append(Step("data", where, constants))
        elif func in _READERS:
            labels = self.flow.read(args[0])
            for factor in labels.factors:
                self.flow.ledger.pin(factor.atoms.ravel(), "its data leave PyTorch")
            seen = ((tuple(args[0].shape), labels),)
            self.flow.steps.append(Step("data", "", (), seen, (origin_of(args[0]),)))
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__self__", None) is _DATA and isinstance(result, Tensor):  # `.data`, which no operator makes
            self.flow.mark(result, self.flow.read(args[0]), origin_of(args[0]), _memory(args[0], [args[0]]))
        return result


def run(
    model: nn.Module,
    example: Any,
    labels: Mapping[str, Labels],
    ledger: Ledger,
    *,
    training: bool,
    device: str,
) -> Flow:
    """Run a rebuilt model under a `Flow`; its outputs are pinned. Raises `RunError` where the model raises."""
    flow = Flow(ledger)
    flow.modules = named_modules(model)
    for name, tensor in named_tensors(model).items():
        if name in labels:
            flow.mark(tensor, labels[name], Origin((name, 0)))
    args, kwargs = pytree.tree_map(
        lambda value: value.detach().to(device, copy=True) if isinstance(value, Tensor) else value,
        call_arguments(example),
    )
    given = tensors(pytree.tree_leaves(call_arguments(example)))
    for index, tensor in enumerate(tensors(pytree.tree_leaves((args, kwargs)))):
        value = given[index].detach().cpu() if tensor.is_meta and not given[index].is_meta else None
        known = value if value is not None and value.numel() <= _SMALL else None
        flow.mark(tensor, UNKNOWN, Origin(("an input", index)), value=known)
    model.train(training)
    devices = [] if torch.device(device).type in ("cpu", "meta") else [device]
    try:
        with _located(model, flow), _unfused(), torch.random.fork_rng(devices), torch.no_grad(), flow, _Data(flow):
            outputs = model(*args, **kwargs)
    except Exception as error:
        raise RunError(flow, error) from error
    held = [vars(module).items() for module in model.modules()]
    kept = tensors(value for some in held for name, value in some if name not in ("_parameters", "_buffers"))
    flow.finish(_outputs(outputs, set()), kept)
    return flow


class RunError(TraceError):
    """The model failed under a flow; `flow.blamed` are the labels at the failing operator."""

    def __init__(self, flow: Flow, error: Exception) -> None:
        lines = str(error).splitlines()
        super().__init__(f"{type(error).__name__}: {lines[0] if lines else error}")
        self.flow = flow
        self.where = next((name for name in reversed(flow.where) if name), "the model itself")


@contextmanager
def _located(model: nn.Module, flow: Flow) -> Generator[None]:
    """Tell the flow which module is running. What has raised is not left, so that the error can say where it was."""
    with ExitStack() as handles:
        for name, module in named_modules(model).items():
            handles.enter_context(module.register_forward_pre_hook(lambda *_, name=name: flow.where.append(name)))
            handles.enter_context(module.register_forward_hook(lambda *_: _ignore(flow.where.pop())))
        yield


def _ignore(_: Any) -> None:
    """A hook that returns something would replace the module's output."""


@contextmanager
def _unfused() -> Generator[None]:
    """PyTorch's fused transformer layers hide their operators in one."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _outputs(value: Any, seen: set[int]) -> list[Tensor]:
    """All tensors in what a model returns, in containers and objects of any kind."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif id(leaf) not in seen and not isinstance(leaf, (type, nn.Module)):
            seen.add(id(leaf))
            found += _outputs(_parts(leaf), seen)
    return found


def _parts(value: Any) -> list[Any]:
    """What an object that is no plain container holds."""
    if isinstance(value, Iterator):
        raise TraceError("the model returns an iterator, whose outputs cannot be seen; expected tensors: return a list")
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, Set):
        return sorted(value, key=lambda one: str(origin_of(one).source) if isinstance(one, Tensor) else "")
    slots = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__]
    names = [name for some in slots for name in ((some,) if isinstance(some, str) else some)]
    return [*getattr(value, "__dict__", {}).values(), *(getattr(value, name, None) for name in names)]
