"""Run a model once and carry labels through its operators.

Works on a copy whose tensors are replaced (`rebuild`), on the meta device where the model allows, so that the user's
model is never touched and no arithmetic is done.
"""

import copy
import hashlib
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
from torchtrim.errors import TraceError

TABLE = Table(_operators.ROWS | _operators_products.ROWS | _operators_shapes.ROWS | _operators_statistics.ROWS)

# Operators that only look at a tensor in another way. Which of them run may depend on strides: no proof compares them.
_VIEWS = frozenset(["view", "_unsafe_view", "reshape", "_reshape_alias", "t", "transpose", "permute", "squeeze",
                    "unsqueeze", "expand", "clone", "detach", "alias", "slice", "split", "unsafe_split",
                    "split_with_sizes", "unsafe_split_with_sizes", "select", "unbind", "_to_copy"])  # fmt: skip


# Operators besides the pointwise ones that hand a uniform tensor on whatever its size; and those that sum it with
# weights, which is as good if those have labels.
_ELEMENTWISE = FACTORIES | frozenset([
    "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "new_zeros", "new_ones",
    "new_full", "new_empty", "new_empty_strided", "bernoulli", "uniform", "normal", "fill", "zero", "copy", "cat",
    "native_dropout", "_fused_dropout", "dropout", "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm",
    "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"])  # fmt: skip
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

    `loose`: what it does to a uniform tensor does not depend on the tensor's size.
    """

    name: str
    where: str
    constants: tuple[Any, ...]
    tensors: tuple[tuple[Shape, Labels], ...]
    loose: bool = False


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every distinct parameter and buffer once, under its first name."""
    found: dict[str, Tensor] = dict(model.named_parameters())
    found.update(model.named_buffers())
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
    return copy.deepcopy(model, memo)


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

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        namespace, _, name = func._schema.name.partition("::")
        name = name if namespace == "aten" else func._schema.name
        in_place = name.endswith("_") and not name.endswith("__")
        name = name.rstrip("_") if in_place else name
        operands = tensors([*args, *kwargs.values()])
        self.blamed = [self._read(operand) for operand in operands]
        held = _held(operands)
        constants = (*_constants(name, args, kwargs), *held)
        result = func(*args, **kwargs)
        where = self.where[-1] if self.where else ""
        call = Call(name, func, args, kwargs, result, labels_of, self.ledger, where, self.modules.get(where))
        row = row_of(name, func)
        found = row(call)
        results = tensors(pytree.tree_leaves(result))
        labels = [found] * len(results) if isinstance(found, Labels) else list(found)
        labels = [self._without_constants(one, call) for one in labels]
        for tensor, one in zip(results, labels, strict=False):
            if in_place and tensor._base is not None:
                self._write_through(call, tensor, one)
            else:
                _label(tensor, one, in_place, _version_of(tensor, operands))
        self.produced += call.produced
        if name in _VIEWS or name == "lift_fresh":
            if held:
                self.steps.append(Step("data", where, held, ()))
        else:
            shape_of = distinct_shape if row is pointwise else _shape
            seen = [(shape_of(t), one) for t, one in zip(operands, self.blamed, strict=True)]
            seen += [(tuple(t.shape), labels_of(t)) for t in results]
            loose = (
                row is pointwise
                or name in _ELEMENTWISE
                or (name in _PRODUCTS and not all(one.uniform for one in self.blamed))
            )
            self.steps.append(Step(name, where, constants, tuple(seen), loose))
        kind = None if isinstance(call.module, RECURRENT) else kind_of(name, args, kwargs)
        if kind is not None:
            self.sites.append(Site(len(self.sites), name, where, kind, tuple(results[0].shape), labels[0]))
        return result

    def _without_constants(self, labels: Labels, call: Call) -> Labels:
        """A factor that varies along no axis can never go: its tensor would lose everything."""
        if all(factor.atoms.size > 1 for factor in labels.factors):
            return labels
        for factor in labels.factors:
            if factor.atoms.size == 1:
                self.ledger.pin(factor.atoms.ravel(), call.reason("it would lose everything: read"))
        return labels.with_factors(factor for factor in labels.factors if factor.atoms.size > 1)

    def _write_through(self, call: Call, view: Tensor, labels: Labels) -> None:
        """An in-place operator on a view: its base follows where values changed, and stays whole where labels did."""
        base, before = view._base, labels_of(view)
        assert base is not None
        if [id(factor.atoms) for factor in before.factors] == [id(factor.atoms) for factor in labels.factors]:
            kept = all(new.zero or not old.zero for old, new in zip(before.factors, labels.factors, strict=True))
            whole = UNKNOWN if labels_of(base).uniform else labels_of(base)
            if not kept:
                whole = whole.with_factors(Factor(factor.atoms, False) for factor in whole.factors)
            _label(base, whole, True)
            _label(view, labels, True)
            return
        for factor in (*before.factors, *labels.factors, *labels_of(base).factors):
            self.ledger.pin(factor.atoms.ravel(), call.reason("written into part of another tensor"))
        _label(base, UNKNOWN, True)
        _label(view, UNKNOWN, True)

    def _read(self, tensor: Tensor) -> Labels:
        """The labels of an operand. A view whose memory was written to under another name has none that hold."""
        labels = labels_of(tensor)
        stamped = getattr(tensor, "_torchtrim_version", None)
        if tensor._base is not None and stamped is not None and stamped != tensor._version:
            for factor in (*labels.factors, *labels_of(tensor._base).factors):
                self.ledger.pin(factor.atoms.ravel(), "its memory is written to under another name")
            labels = UNKNOWN
            _label(tensor, labels, False)
        return labels


def _shape(tensor: Tensor) -> Shape:
    return tuple(tensor.shape)


def row_of(name: str, function: Any) -> Row:
    if name in TABLE:
        return TABLE[name]
    elementwise = torch.Tag.pointwise in function.tags or name in ACTIVATIONS
    return pointwise if elementwise else unknown


def labels_of(tensor: Tensor) -> Labels:
    return getattr(tensor, "_torchtrim_labels", UNKNOWN)


def _label(tensor: Tensor, labels: Labels, written: bool, version: int | None = None) -> None:
    """Attach labels, stamped with the version of the memory: it rises by one after an operator that writes."""
    tensor._torchtrim_labels = labels  # type: ignore[attr-defined]
    tensor._torchtrim_version = (tensor._version if version is None else version) + written  # type: ignore[attr-defined]


def _version_of(result: Tensor, operands: list[Tensor]) -> int:
    """A view has its base's version, which inside the dispatch it does not know yet."""
    memory = result.untyped_storage()._cdata
    return next((t._version for t in operands if t.untyped_storage()._cdata == memory), result._version)


def _constants(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The numbers in an operator's arguments that a trimmed model must repeat; those that are widths may change."""
    if name in FACTORIES or name.startswith("new_"):
        values: list[Any] = [value for value in args if isinstance(value, (int, float))]
    elif name == "convolution":
        values = list(args[:8])
    elif name == "native_group_norm":
        values = [args[-1]]
    else:
        values = [*args, *kwargs.values()]
    return tuple(leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, (int, float, str)))


def _held(operands: list[Tensor]) -> tuple[Any, ...]:
    """The values of tensors that no operator made: numbers that the model's own code holds."""
    held = [t for t in operands if t.device.type == "cpu" and not hasattr(t, "_torchtrim_labels")]
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


class _Data(TorchFunctionMode):
    """Notes the numbers of which the model's code makes tensors."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _MAKERS:
            numbers = tuple(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, (int, float)))
            where = self.flow.where[-1] if self.flow.where else ""
            self.flow.steps.append(Step("data", where, numbers, ()))
        return func(*args, **(kwargs or {}))


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
    flow.modules = dict(model.named_modules())
    for name, tensor in named_tensors(model).items():
        if name in labels:
            _label(tensor, labels[name], False)
    args, kwargs = pytree.tree_map(
        lambda value: value.detach().to(device, copy=True) if isinstance(value, Tensor) else value,
        call_arguments(example),
    )
    for tensor in tensors(pytree.tree_leaves((args, kwargs))):
        _label(tensor, UNKNOWN, False)
    model.train(training)
    devices = [] if torch.device(device).type in ("cpu", "meta") else [device]
    try:
        with _located(model, flow), _unfused(), torch.random.fork_rng(devices), torch.no_grad(), flow, _Data(flow):
            outputs = model(*args, **kwargs)
    except Exception as error:
        raise RunError(flow, error) from error
    for output in _outputs(outputs):
        for factor in labels_of(output).factors:
            ledger.pin(factor.atoms.ravel(), "it is an output of the model")
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
        for name, module in model.named_modules():
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


def _outputs(value: Any) -> list[Tensor]:
    """All tensors in what a model returns, dataclasses and dictionaries of its own included."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping):
            found += _outputs(dict(leaf))
        elif hasattr(leaf, "__dict__"):
            found += _outputs(list(vars(leaf).values()))
    return found
