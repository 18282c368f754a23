"""Carry out a plan: `trim` removes neurons for good, `mask` silences them and is the oracle of every test."""

import warnings
from typing import Any

import numpy as np
from torch import Tensor, nn

from torchtrim._copies import compacted, named_tensors, without_caches
from torchtrim._experts import close, lists_left
from torchtrim._graph import untried
from torchtrim._history import remember
from torchtrim._neurons import Kept, NeuronGraph, memory_of, silence
from torchtrim._plan import LayerPlan, Plan
from torchtrim._trial import attempt, tried
from torchtrim.errors import PlanError, TorchtrimWarning


def trim(model: nn.Module, plan: Plan, example: Any) -> nn.Module:
    """A new model without the plan's neurons; `model` is untouched.

    example: what the model is called with, or what `trace` found of the model as it is, which spares finding it again.

    Raises `PlanError` when the plan does not fit the model. A group that cannot be proved stays whole, with a
    `TorchtrimWarning` that says why. The plan as it was carried out is noted on the new model, for `save`.
    """
    trimmed, graph, kept = _carry_out(model, plan, example)
    remember(model, trimmed, _carried_out(graph, plan, kept), lists_left(graph, kept))
    return trimmed


def mask(model: nn.Module, plan: Plan, example: Any) -> nn.Module:
    """A new model of the old shape in which the plan's neurons are silent: their parameters are zero.

    The scores of experts that go are minus infinity, so that none of them is picked.

    example: as for `trim`.
    """
    _, graph, kept = _carry_out(model, plan, example)
    silent = silence(model, graph, kept)
    close(silent, graph, {one.router: np.flatnonzero(~kept[one.roots]) for one in graph.mixtures})
    return silent


def _kept(graph: NeuronGraph, plan: Plan) -> Kept:
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
    faults += [
        f"{one.router}: {one.picked} of its experts are picked; keep {lacking.size} more"
        for one in graph.mixtures
        if (lacking := one.lacking(kept)).size
    ]
    if faults:
        raise PlanError("the plan cannot be carried out:\n  " + "\n  ".join(faults))
    return kept


def _carried_out(graph: NeuronGraph, plan: Plan, kept: Kept) -> Plan:
    """The plan with what really went: tied layers are listed, and what had to stay is not."""
    layers: dict[str, LayerPlan] = {}
    for name, layer in graph.layers.items():
        gone = np.flatnonzero(~kept[layer.roots])
        if name in plan.layers or gone.size:
            layers[name] = LayerPlan(layer.width, tuple(gone.tolist()))
    return Plan(layers, plan.source, plan.notes, plan.through_norms, plan.experts)


def _carry_out(model: nn.Module, plan: Plan, example: Any) -> tuple[nn.Module, NeuronGraph, Kept]:
    """The model without the plan's neurons, or without as many of them as can be proved."""
    graph = _graph_of(model, plan, example)
    kept = _kept(graph, plan)
    trimmed, failure = attempt(model, graph, kept, named_tensors(model))
    # A trial tells which layers are locked, so that the plan is refused if it means them; `trace` tells of no other.
    if failure is not None and not graph.certain:
        graph = tried(model, graph)
        kept = _kept(graph, plan)
        trimmed, failure = attempt(model, graph, kept, named_tensors(model))
    while failure is not None and not kept.all():  # where nothing goes there is nothing to prove
        blamed, reason = failure.blamed, failure.reason
        names = [name for name, layer in graph.layers.items() if blamed & set(layer.roots.tolist())]
        left = ", ".join(names) or "everything"
        warnings.warn(f"left untrimmed: {left}: {reason}", TorchtrimWarning, stacklevel=3)
        kept = kept.copy()
        kept[[root for root in blamed if not kept[root]] or slice(None)] = True
        trimmed, failure = attempt(model, graph, kept, named_tensors(model))
    return _own(model, without_caches(trimmed) if graph.device == "meta" else trimmed), graph, kept


def _graph_of(model: nn.Module, plan: Plan, example: Any) -> NeuronGraph:
    """What was found of the model already, or is found now."""
    if not isinstance(example, NeuronGraph):
        return untried(model, example, through_norms=plan.through_norms, experts=plan.experts)
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
    found = {name: tuple(map(len, axes)) for name, axes in example.axes.items()}
    if shapes != found:
        odd = sorted(name for name, _ in shapes.items() ^ found.items())
        raise PlanError(f"the graph is of another model: {odd[0]} differs; trace this one")
    if plan.through_norms and not example.through_norms:
        raise PlanError("the plan goes through norms, the graph does not; trace with through_norms=True")
    if plan.experts and not example.experts:
        raise PlanError("the plan is of experts too, the graph is not; trace with experts=True")
    return example


def _own(model: nn.Module, trimmed: nn.Module) -> nn.Module:
    """Give the trimmed model memory of its own where a tensor was handed on whole."""
    theirs = {tensor.untyped_storage()._cdata for tensor in named_tensors(model).values()}
    own: dict[Any, Tensor] = {}
    for tensor in named_tensors(trimmed).values():
        if tensor.untyped_storage()._cdata in theirs and tensor.device.type != "meta":
            memory = memory_of(tensor)
            if memory not in own:
                own[memory] = tensor.data.clone()
            tensor.data = own[memory]
    return compacted(trimmed)
