"""Run a model once under a `Flow`.

Works on a copy whose tensors are replaced (`rebuild`), on the meta device where the model allows, so that the user's
model is never touched and no arithmetic is done.
"""

import gc
from collections.abc import Generator, Iterator, Mapping, Set
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from torchtrim._copies import call_arguments, modules_of, named_modules, tensors_of
from torchtrim._doubts import tells_widths
from torchtrim._flow import IS_OUTPUT, Flow, Step
from torchtrim._labels import UNKNOWN, Labels, Ledger
from torchtrim._marks import SMALL, mark_of, memory_among, origin_of
from torchtrim._operators import tensors
from torchtrim._operators_statistics import note_normalized
from torchtrim._origins import Origin
from torchtrim.errors import TraceError

# Functions that make a tensor of Python's data, which on the meta device would be lost.
_MAKERS = frozenset([torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor, Tensor.new_tensor, Tensor.new])
_INDEXERS = frozenset([Tensor.__getitem__, Tensor.__setitem__])
_RMS_NORMS = frozenset([torch.rms_norm, F.rms_norm])
_DATA: Any = Tensor.data.__get__  # type: ignore[attr-defined]
# Functions that hand the data of a tensor to Python.
_READERS = frozenset([Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__])
_WATCHED = _MAKERS | _INDEXERS | _RMS_NORMS | _READERS | {_DATA}


class _Data(TorchFunctionMode):
    """Notes the numbers of which the model's code makes tensors, and the tensors of which it makes numbers."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.flow.knows_widths = self.flow.knows_widths or tells_widths(func, args, kwargs)
        self.flow.announced = True
        try:
            return self._watched(func, args, kwargs) if func in _WATCHED else func(*args, **kwargs)
        finally:
            self.flow.announced = False

    def _watched(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        where = self.flow.where[-1]
        if func in _MAKERS:
            numbers = tuple(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, (int, float)))
            self.flow.steps.append(Step("data", where, numbers))
        elif func in _INDEXERS:  # lists and ranges, of which PyTorch makes tensors unseen
            places = [one for one in pytree.tree_leaves(args[1:2]) if isinstance(one, range)]
            lists = args[1] if isinstance(args[1], tuple) else args[1:2]
            numbers = [leaf for one in lists if isinstance(one, list) for leaf in pytree.tree_leaves(one)]
            numbers += [number for place in places for number in place]
            if numbers:
                constants = tuple(one for one in numbers if isinstance(one, (int, float)))
                self.flow.steps.append(Step("data", where, constants))
        elif func in _RMS_NORMS:  # made of other operators, which do not hear of the shape that it is told
            factors = self.flow.read(args[0]).factors
            note_normalized(self.flow.ledger, where, factors, args[0].ndim, args[1])
        elif func in _READERS:
            labels = self.flow.read(args[0])
            for factor in labels.factors:
                self.flow.ledger.pin(factor.atoms.ravel(), "its data leave PyTorch")
            seen = ((tuple(args[0].shape), labels),)
            self.flow.steps.append(Step("data", "", (), seen, (origin_of(args[0]),)))
            mark = mark_of(args[0])
            if args[0].is_meta and mark is not None and mark.value is not None:
                args = (mark.value, *args[1:])
        result = func(*args, **kwargs)
        if func == _DATA and isinstance(result, Tensor):  # which no operator makes
            self.flow.mark(result, self.flow.read(args[0]), origin_of(args[0]), memory_among(args[0], [args[0]]))
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
    for name, tensor in tensors_of(flow.modules).items():
        if name in labels:
            flow.mark(tensor, labels[name], Origin((name, 0)))
    if device == "meta":
        _leave_data(flow)
    args, kwargs = pytree.tree_map(
        lambda value: value.detach().to(device, copy=True) if isinstance(value, Tensor) else value,
        call_arguments(example),
    )
    given = tensors(pytree.tree_leaves(call_arguments(example)))
    for index, tensor in enumerate(tensors(pytree.tree_leaves((args, kwargs)))):
        value = given[index].detach().cpu() if tensor.is_meta and not given[index].is_meta else None
        known = value if value is not None and value.numel() <= SMALL else None
        flow.mark(tensor, UNKNOWN, Origin(("an input", index)), value=known)
    model.train(training)
    devices = [] if torch.device(device).type in ("cpu", "meta") else [device]
    try:
        with (
            _located(flow),
            _unfused(),
            torch.random.fork_rng(devices),
            torch.no_grad(),
            flow,
            _Data(flow),
        ):
            outputs = model(*args, **kwargs)
    except Exception as error:
        raise RunError(flow, error) from error
    held = [vars(module).items() for module in modules_of(model)]
    kept = tensors(value for some in held for name, value in some if name not in ("_parameters", "_buffers"))
    flow.finish(_outputs(outputs, set()), kept)
    return flow


def _leave_data(flow: Flow) -> None:
    """Take the data from tensors that modules hold besides parameters and buffers, such as grids; note small ones."""
    left: dict[int, Tensor] = {}
    for name, module in flow.modules.items():
        for key, tensor in vars(module).items():
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta:
                if id(tensor) not in left:
                    known = tensor.detach().cpu() if tensor.numel() <= SMALL else None
                    left[id(tensor)] = tensor.detach().to("meta")
                    flow.mark(left[id(tensor)], UNKNOWN, Origin((f"{name}.{key}", 0)), value=known)
                vars(module)[key] = left[id(tensor)]


class RunError(TraceError):
    """The model failed under a flow; `flow.blamed` are the labels at the failing operator."""

    def __init__(self, flow: Flow, error: Exception) -> None:
        lines = str(error).splitlines()
        super().__init__(f"{type(error).__name__}: {lines[0] if lines else error}")
        self.flow = flow
        self.module = next((name for name in reversed(flow.where) if name), "")
        self.where = self.module or "the model itself"


@contextmanager
def _located(flow: Flow) -> Generator[None]:
    """Tell the flow which module is running, in the place that PyTorch keeps for other ways to call a module.

    Hooks would do, at the price of PyTorch's slow path through every call.
    """
    for name, module in flow.modules.items():
        vars(module)["_compiled_call_impl"] = partial(_called, flow.where, name, module)
    try:
        yield
    finally:
        for module in flow.modules.values():
            del vars(module)["_compiled_call_impl"]


def _called(where: list[str], name: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A module's call. What has raised is not left, so that the error can say where it was."""
    where.append(name)
    result = module._call_impl(*args, **kwargs)
    where.pop()
    return result


@contextmanager
def _unfused() -> Generator[None]:
    """PyTorch's fused transformer layers hide their operators in one."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def uncollected() -> Generator[None]:
    """The many small objects of a run are kept anyway, so that looking for cycles among them is in vain.

    What Python looks through then is all that was ever imported, in a quarter of the time of the work itself.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _outputs(value: Any, seen: set[int], reason: str = IS_OUTPUT) -> list[tuple[Tensor, str]]:
    """All tensors in what a model returns, in containers and objects of any kind, and why each must stay as it is."""
    found: list[tuple[Tensor, str]] = []
    for leaf in pytree.tree_leaves(value, is_leaf=_is_cache):
        if isinstance(leaf, Tensor):
            found.append((leaf, reason))
        elif id(leaf) not in seen and not isinstance(leaf, (type, nn.Module)):
            seen.add(id(leaf))
            cache = f"{IS_OUTPUT}, in its {type(leaf).__name__}: use_cache=False leaves that out"
            found += _outputs(_parts(leaf), seen, cache if _is_cache(leaf) else reason)
    return found


def _is_cache(value: Any) -> bool:
    """Whether it holds keys and values of attention for later calls, as Transformers' models return."""
    return type(value).__name__.endswith("Cache")


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
