"""Run a model once and carry labels through its operators.

Works on a copy whose tensors are replaced (`rebuild`), on the meta device where the model allows, so that the user's
model is never touched and no arithmetic is done.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torchtrim._errors import TraceError
from torchtrim._labels import UNKNOWN, Atoms, Labels, Ledger, Shape
from torchtrim._operators import RECTIFIERS, ROWS, SMOOTH, Call, pointwise, tensors, unknown

Step = tuple[str, str, tuple[float, ...], tuple[tuple[Shape, Labels], ...]]

_VIEWS = frozenset(
    [
        "view",
        "_unsafe_view",
        "reshape",
        "_reshape_alias",
        "t",
        "transpose",
        "permute",
        "squeeze",
        "unsqueeze",
        "expand",
        "clone",
        "detach",
        "alias",
        "slice",
        "split",
        "split_with_sizes",
        "select",
        "unbind",
        "lift_fresh",
        "_to_copy",
    ]
)


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """One call of an activation function: the how-manieth of a forward pass, and whose values it produces."""

    index: int
    name: str
    module: str
    rectifies: bool
    shape: Shape
    labels: Labels


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every distinct parameter and buffer once, under its first name."""
    found: dict[str, Tensor] = dict(model.named_parameters())
    found.update(model.named_buffers())
    return found


def rebuild(model: nn.Module, replace: Mapping[str, Tensor]) -> nn.Module:
    """A deep copy of the model in which the named parameters and buffers are other tensors."""
    memo: dict[int, Any] = {}
    for name, old in named_tensors(model).items():
        new = replace[name]
        memo[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
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
        self.blamed = [labels_of(operand) for operand in operands]
        result = func(*args, **kwargs)
        call = Call(name, args, kwargs, result, labels_of, self.ledger, self.where[-1] if self.where else "")
        row = ROWS.get(name)
        if row is None:
            elementwise = torch.Tag.pointwise in func.tags or name in RECTIFIERS or name in SMOOTH
            row = pointwise if elementwise else unknown
        found = row(call)
        outs = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        labels = [found] * len(outs) if isinstance(found, Labels) else list(found)
        labels = [self._without_constants(one, call) for one in labels]
        for out, one in zip(outs, labels, strict=False):
            if in_place and out._base is not None:
                self._written_through_a_view(call, out, one)
            else:
                out._torchtrim_labels = one  # type: ignore[attr-defined]
        self.produced += call.produced
        if name not in _VIEWS:
            numbers = [float(v) for v in args if isinstance(v, float)]
            numbers += [float(t) for t in operands if t.ndim == 0 and t.device.type == "cpu" and not t.is_meta]
            seen = [(tuple(t.shape), one) for t, one in zip(operands, self.blamed, strict=True)]
            seen += [(tuple(t.shape), labels_of(t)) for t in outs]
            self.steps.append((name, call.where, tuple(numbers), tuple(seen)))
        if name in RECTIFIERS or name in SMOOTH:
            site = Site(len(self.sites), name, call.where, name in RECTIFIERS, tuple(outs[0].shape), labels[0])
            self.sites.append(site)
        return result

    def _without_constants(self, labels: Labels, call: Call) -> Labels:
        """A factor that varies along no axis can never go: its tensor would lose everything."""
        if all(factor.atoms.size > 1 for factor in labels.factors):
            return labels
        for factor in labels.factors:
            if factor.atoms.size == 1:
                self.ledger.pin(factor.atoms.ravel(), call.reason("it would lose everything: read"))
        return labels.with_factors(factor for factor in labels.factors if factor.atoms.size > 1)

    def _written_through_a_view(self, call: Call, view: Tensor, labels: Labels) -> None:
        """The base cannot learn what was written into part of it: what was written stays whole."""
        before = labels_of(view)
        if labels is not before:
            for factor in labels.factors:
                self.ledger.pin(factor.atoms.ravel(), call.reason("written into part of another tensor"))
            view._base._torchtrim_labels = UNKNOWN  # type: ignore[union-attr]
            view._torchtrim_labels = Labels(before.factors)  # type: ignore[attr-defined]


def labels_of(tensor: Tensor) -> Labels:
    return getattr(tensor, "_torchtrim_labels", UNKNOWN)


def run(
    model: nn.Module,
    example: Any,
    labels: Mapping[str, Labels],
    ledger: Ledger,
    *,
    training: bool,
    device: str,
) -> Flow:
    """Run a rebuilt model under a `Flow`; its outputs are pinned. Raises what the model raises, with `flow` set."""
    flow = Flow(ledger)
    handles: list[Any] = []
    for name, tensor in named_tensors(model).items():
        if name in labels:
            tensor._torchtrim_labels = labels[name]  # type: ignore[attr-defined]
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(_enter(flow, name)))
        handles.append(module.register_forward_hook(_leave(flow), always_call=True))
    move: Callable[[Any], Any] = lambda v: v.detach().to(device, copy=True) if isinstance(v, Tensor) else v  # noqa: E731
    args, kwargs = pytree.tree_map(move, call_arguments(example))
    model.train(training)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), flow:
            outputs = model(*args, **kwargs)
    except Exception as error:
        raise RunError(flow, error) from error
    finally:
        for handle in handles:
            handle.remove()
    for output in _leaves(outputs):
        for factor in labels_of(output).factors:
            ledger.pin(factor.atoms.ravel(), "it is an output of the model")
    return flow


class RunError(TraceError):
    """The model failed under a flow; `flow.blamed` are the labels at the failing operator."""

    def __init__(self, flow: Flow, error: Exception) -> None:
        super().__init__(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else error}")
        self.flow = flow


def _enter(flow: Flow, name: str) -> Callable[..., None]:
    return lambda module, inputs: flow.where.append(name)


def _leave(flow: Flow) -> Callable[..., None]:
    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        flow.where.pop()

    return leave


def _leaves(value: Any) -> list[Tensor]:
    """All tensors in what a model returns, dataclasses and dictionaries of its own included."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping):
            found += _leaves(dict(leaf))
        elif hasattr(leaf, "__dict__"):
            found += _leaves(list(vars(leaf).values()))
    return found
