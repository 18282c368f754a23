"""Carry out a plan: `trim` removes neurons for good, `mask` silences them and is the oracle of every test."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch import nn

from torchtrim._errors import PlanError, TorchtrimWarning
from torchtrim._flow import named_tensors, rebuild
from torchtrim._graph import Kept, NeuronGraph, cut, prove, trace
from torchtrim._surgery_attributes import set_attributes


class Choice(Protocol):
    """What surgery needs of a plan: it fits these widths, and names the neurons to remove."""

    @property
    def removed(self) -> Mapping[str, Sequence[int]]: ...
    def check(self, widths: Mapping[str, int]) -> None: ...


def trim(model: nn.Module, plan: Choice, example: Any) -> nn.Module:
    """A new model without the plan's neurons; `model` is untouched.

    Raises `PlanError` when the plan does not fit the model. A group that cannot be proved stays whole, with a
    `TorchtrimWarning` that says why.
    """
    graph = trace(model, example)
    return _carry_out(model, graph, _kept(graph, plan))[0]


def mask(model: nn.Module, plan: Choice, example: Any) -> nn.Module:
    """A new model of the old shape in which the plan's neurons are silent: their parameters are zero."""
    graph = trace(model, example)
    _, kept = _carry_out(model, graph, _kept(graph, plan))
    silent = rebuild(model, {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()})
    for name, parameter in silent.named_parameters():
        for axis, roots in enumerate(graph.axes[name]):
            gone = np.flatnonzero(~kept[roots]) if roots.size > 1 else []
            if len(gone):
                parameter.data.index_fill_(axis, parameter.data.new_tensor(gone).long(), 0)
    return silent


def _kept(graph: NeuronGraph, plan: Choice) -> Kept:
    plan.check({name: layer.width for name, layer in graph.layers.items()})
    faults: list[str] = []
    for name, neurons in plan.removed.items():
        layer = graph.layers[name]
        stuck = [int(n) for n in neurons if not layer.removable[n]]
        if stuck:
            faults.append(f"{name}: neurons {stuck[:5]} cannot be removed: {layer.locked or 'they are pinned'}")
    kept = graph.bodies(plan.removed)
    for name, layer in graph.layers.items():
        if not kept[layer.roots].any():
            faults.append(f"{name}: it would lose all its {layer.width} neurons; keep at least one")
    if faults:
        raise PlanError("the plan cannot be carried out:\n  " + "\n  ".join(faults))
    return kept


def _carry_out(model: nn.Module, graph: NeuronGraph, kept: Kept) -> tuple[nn.Module, Kept]:
    while True:
        trimmed = rebuild(model, cut(graph, named_tensors(model), kept))
        for old, new in zip(model.modules(), trimmed.modules(), strict=True):
            new.training = old.training
        set_attributes(model, trimmed, graph.axes, kept)
        failure = prove(model, graph, trimmed, kept)
        if failure is None:
            return _own(model, trimmed), kept
        blamed, reason = failure
        names = [name for name, layer in graph.layers.items() if blamed & set(layer.roots.tolist())]
        warnings.warn(f"left untrimmed: {', '.join(names) or 'everything'}: {reason}", TorchtrimWarning, stacklevel=3)
        kept = kept.copy()
        kept[list(blamed) or slice(None)] = True


def _own(model: nn.Module, trimmed: nn.Module) -> nn.Module:
    """Give the trimmed model memory of its own where a tensor was handed on whole."""
    theirs = {tensor.untyped_storage()._cdata for tensor in named_tensors(model).values()}
    for tensor in named_tensors(trimmed).values():
        if tensor.untyped_storage()._cdata in theirs and tensor.device.type != "meta":
            tensor.data = tensor.data.clone()
    return trimmed
