"""Trace a model into its neurons: which layers produce them, what goes with each, what is locked and why.

`trace` runs the model once under label propagation, resolves what must go together, then proves itself on a trial:
some neurons of every group are removed, and the labels of the trimmed model must be the original ones without them,
at every operator. A group that fails is locked with the reason; the others stay.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchtrim._copies import named_tensors, rebuild
from torchtrim._flow import Flow, RunError, run
from torchtrim._labels import Atoms, Labels, Ledger
from torchtrim._neurons import Description, Kept, Layer, NeuronGraph, cut, memory_of
from torchtrim._proof import Failure, numbered, on_device, prove
from torchtrim._surgery_attributes import descriptions, set_attributes
from torchtrim.errors import TraceError

__all__ = ["Layer", "NeuronGraph", "trace", "trial"]

_WEIGHTS = (".weight", ".weight_v", ".weight_orig")  # the latter two where `weight_norm` or `prune` compute the weight


def trace(model: nn.Module, example: Any, *, through_norms: bool = False) -> NeuronGraph:
    """The neurons of a model. `example` is what the model is called with; only its shapes matter where possible.

    What depends on the data, on the mode or on the sizes of the inputs is proved for the path through the model's code
    that the example takes; other paths are not looked at.

    Raises `TraceError` when the model cannot run on the example. The model is not touched.
    """
    return tried(model, untried(model, example, through_norms=through_norms))


def untried(model: nn.Module, example: Any, *, through_norms: bool = False) -> NeuronGraph:
    """As `trace`, of which the labels are right, but not all that looks free need be: nothing has been cut yet."""
    sources = named_tensors(model)
    lazy = [
        name
        for name, tensor in sources.items()
        if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer))
    ]
    if lazy:
        raise TraceError(f"{lazy[0]} has no shape yet; expected a model whose lazy layers have run: call it once first")
    axes, count = _number(sources)
    labels = numbered(model, axes)
    ledger = Ledger(through_norms=through_norms)
    flow, device = _evaluated(model, example, labels, ledger)
    flows = [(False, flow)]
    touched = ledger.touched(count)
    trained_on = example
    if any(t.ndim >= 2 and not any(touched[a].any() for a in axes[n]) for n, t in sources.items()):
        for trained_on in (example, _doubled(example)):  # some norms want more than one value in training
            if (trained := _trained(model, trained_on, labels, ledger, device)) is not None:
                flows.append((True, trained))
                break
    root, pinned = ledger.resolve(count)
    rooted = {name: tuple(root[a] if a.size > 1 else a for a in per_axis) for name, per_axis in axes.items()}
    for roots in (roots for per_axis in rooted.values() for roots in per_axis):
        if roots.size > 1 and (roots == roots[0]).all():
            pinned.setdefault(int(roots[0]), "all its neurons must go together")
    recordings = tuple((training, tuple(one.steps)) for training, one in flows)
    owners = _owners(axes, [atoms for _, one in flows for atoms in one.produced])
    described = tuple(descriptions(model, ledger, root))
    sites = tuple(flow.sites)
    graph = NeuronGraph(
        {}, rooted, axes, device, recordings, sites, root, example, trained_on, described, through_norms
    )
    return replace(graph, layers=_layers(owners, rooted, pinned))


def tried(model: nn.Module, graph: NeuronGraph) -> NeuronGraph:
    """The graph in which all is locked that a trial cut shows to be no good."""
    doubts = _doubts(model, graph)
    while (failure := _try(model, graph)) is not None:
        while failure is not None and doubts:
            other = _with_meaning(model, graph, *doubts.pop())
            again = _try(model, other)
            if again is None or len(again[0]) < len(failure[0]):
                graph, failure = other, again
        if failure is not None:
            graph = _lock(graph, *failure)
    return graph


_Meaning = tuple[
    type[nn.Module], str, int | None
]  # a class, an attribute, which of its sizes it is; None: of no neurons


def _doubts(model: nn.Module, graph: NeuronGraph) -> list[_Meaning]:
    """What else an attribute may mean, by the class of its module: its value is also the size of other axes."""
    found: dict[tuple[str, str, int | None], list[Description]] = {}
    for one in graph.descriptions:
        found.setdefault((one.module, one.attribute, one.index), []).append(one)
    doubts: list[_Meaning] = []
    for (name, attribute, _), several in found.items():
        kind, meanings = type(model.get_submodule(name)), {one.line for one in several if not one.fixed}
        if meanings and any(one.fixed for one in several):
            doubts.append((kind, attribute, None))
        if len(meanings) > 1:
            doubts += [(kind, attribute, place) for place in range(len(meanings))]
    return list(dict.fromkeys(doubts))


def _with_meaning(
    model: nn.Module, graph: NeuronGraph, kind: type[nn.Module], attribute: str, place: int | None
) -> NeuronGraph:
    """The graph in which an attribute of modules of a class means one of its sizes, in the order of execution.

    In a module that has fewer, it means the last.
    """
    doubtful = [d for d in graph.descriptions if d.attribute == attribute]
    doubtful = [d for d in doubtful if type(model.get_submodule(d.module)) is kind]
    lines: dict[tuple[str, int | None], dict[bytes, None]] = {}
    for one in doubtful:
        if place is not None and not one.fixed:
            lines.setdefault((one.module, one.index), {})[one.line] = None
    meant = {key: list(several)[: place + 1][-1] for key, several in lines.items() if place is not None}
    dropped = {id(d) for d in doubtful if d.fixed or meant.get((d.module, d.index)) != d.line}
    return replace(graph, descriptions=tuple(d for d in graph.descriptions if id(d) not in dropped))


def _lock(graph: NeuronGraph, blamed: set[int], reason: str) -> NeuronGraph:
    """The graph in which these roots cannot go."""
    layers: dict[str, Layer] = {}
    groups: dict[int, str] = {}
    for name, layer in graph.layers.items():
        removable = layer.removable & ~np.isin(layer.roots, list(blamed))
        locked = layer.locked or (None if removable.any() else reason)
        group = _group(name, layer.roots[removable], groups)
        layers[name] = replace(layer, removable=removable, locked=locked, group=group)
    return replace(graph, layers=layers)


def _group(name: str, free: Atoms, groups: dict[int, str]) -> str:
    """The group of a layer, by the first layer that has a free root in common; notes it for those that follow."""
    group = next((groups[value] for value in free.tolist() if value in groups), name)
    for value in free.tolist():
        groups.setdefault(value, group)
    return group


def _number(sources: Mapping[str, Tensor]) -> tuple[dict[str, tuple[Atoms, ...]], int]:
    """Fresh atoms for every axis of every tensor; tensors that share memory share atoms."""
    shared: dict[Any, tuple[Atoms, ...]] = {}
    axes: dict[str, tuple[Atoms, ...]] = {}
    count = 1
    for name, tensor in sources.items():
        key = memory_of(tensor)
        if key not in shared:
            numbered: list[Atoms] = []
            for size in tensor.shape:
                numbered.append(np.arange(count, count + size) if size > 1 else np.zeros(size, np.int64))
                count += size if size > 1 else 0
            shared[key] = tuple(numbered)
        axes[name] = shared[key]
    return axes, count


def _evaluated(model: nn.Module, example: Any, labels: Mapping[str, Labels], ledger: Ledger) -> tuple[Flow, str]:
    """Run in evaluation mode, without data where the model allows."""
    tensors = list(named_tensors(model).values())
    real = str(tensors[0].device) if tensors else "cpu"
    try:
        trial = Ledger(through_norms=ledger.through_norms)
        flow = run(on_device(model, "meta"), example, labels, trial, training=False, device="meta")
        ledger.absorb(trial)
        return flow, "meta"
    except RunError:
        pass  # control flow that needs data, or a real mistake: the real run tells
    try:
        return run(on_device(model, real), example, labels, ledger, training=False, device=real), real
    except RunError as error:
        raise TraceError(
            f"{type(model).__name__} cannot run on the example: {error} (in {error.where}). "
            "Expected an input that the model accepts; pass what you call the model with: a tensor, a tuple of "
            "positional inputs, or a dict of keyword inputs."
        ) from error


def _trained(model: nn.Module, example: Any, labels: Mapping[str, Labels], ledger: Ledger, device: str) -> Flow | None:
    """Run parts that only training reaches, such as auxiliary classifiers, if the model can be run so."""
    trial = Ledger(through_norms=ledger.through_norms)
    try:
        flow = run(on_device(model, device), example, labels, trial, training=True, device=device)
    except RunError:
        return None
    ledger.absorb(trial)
    return flow


def _doubled(example: Any) -> Any:
    """The example with batches of two where they were of one."""
    return pytree.tree_map(
        lambda one: torch.cat([one, one]) if isinstance(one, Tensor) and one.ndim and len(one) == 1 else one, example
    )


@dataclass(frozen=True)
class _Owner:
    """Where a layer's neurons lie: along an axis of a parameter."""

    name: str
    parameter: str
    axis: int


def _owners(axes: Mapping[str, tuple[Atoms, ...]], produced: Sequence[Atoms]) -> list[_Owner]:
    """The layers, in the order in which their neurons were produced."""
    places: dict[int, tuple[str, int]] = {}
    for name, per_axis in axes.items():
        for axis, atoms in enumerate(per_axis):
            if atoms.size > 1:
                places.setdefault(int(atoms[0]), (name, axis))
    starts = np.array(sorted(places))
    owners: dict[str, _Owner] = {}
    for atoms in produced:
        first = int(atoms.max())
        if first:
            parameter, axis = places[int(starts[np.searchsorted(starts, first, "right") - 1])]
            if parameter.endswith("_mask") and (original := f"{parameter.removesuffix('_mask')}_orig") in axes:
                parameter = original  # torch.nn.utils.prune keeps a parameter and its mask
            name = _layer_name(parameter)
            owners.setdefault(name, _Owner(name, parameter, axis))
    for parameter, per_axis in axes.items():
        name = _layer_name(parameter)
        if name not in owners and ".parametrizations.weight." in parameter and len(per_axis) > 1:
            owners[name] = _Owner(name, parameter, 0)  # its weight is computed in a way that hides its neurons
    return list(owners.values())


def _layer_name(parameter: str) -> str:
    """The module's name, where the parameter is its weight; else the parameter's own."""
    module, parametrized, _ = parameter.partition(".parametrizations.weight.")
    if parametrized:
        return module
    return next((parameter.removesuffix(end) for end in _WEIGHTS if parameter.endswith(end)), parameter)


def _layers(
    owners: Sequence[_Owner], axes: Mapping[str, tuple[Atoms, ...]], pinned: Mapping[int, str]
) -> dict[str, Layer]:
    layers: dict[str, Layer] = {}
    groups: dict[int, str] = {}
    for owner in owners:
        roots = axes[owner.parameter][owner.axis]
        removable = np.array([int(value) not in pinned for value in roots])
        group = _group(owner.name, roots[removable], groups)
        reason = None if removable.any() else pinned[int(roots[0])]
        layers[owner.name] = Layer(owner.name, owner.parameter, owner.axis, roots, removable, group, reason)
    return layers


def trial(graph: NeuronGraph) -> Kept:
    """A third of every group's neurons removed at random, one at least. Every axis keeps two, or one of two.

    A single neuron has no label of its own to compare where it is joined to others.
    """
    random = np.random.default_rng(0)
    kept = np.ones(len(graph.root), bool)
    groups: dict[str, set[int]] = {}
    for layer in graph.layers.values():
        if not layer.locked:
            groups.setdefault(layer.group, set()).update(layer.roots[layer.removable].tolist())
    for units in groups.values():
        ordered = np.array(sorted(units))
        kept[random.choice(ordered, max(1, len(ordered) * 3 // 10), replace=False)] = False
    for roots in (roots for per_axis in graph.axes.values() for roots in per_axis):
        bodies = np.unique(roots)
        gone = bodies[~kept[bodies]]
        least = min(2, bodies.size - 1)
        if roots.size > 1 and bodies.size - gone.size < least:
            kept[gone[: least - (bodies.size - gone.size)]] = True
    return kept


def _try(model: nn.Module, graph: NeuronGraph) -> Failure | None:
    """Prove the trial. A failure that blames nobody locks the groups that fail alone too, or else everything."""
    kept = trial(graph)
    light = {name: tensor.detach().to(graph.device) for name, tensor in named_tensors(model).items()}
    failure = None if kept.all() else attempt(model, graph, kept, light)[1]
    if failure is None or failure[0]:
        return failure
    groups: dict[str, set[int]] = {}
    for layer in graph.layers.values():
        groups.setdefault(layer.group, set()).update(layer.roots.tolist())
    blamed: set[int] = set()
    for roots in groups.values():
        alone = np.ones(len(kept), bool)
        alone[list(roots)] = kept[list(roots)]
        if not alone.all() and attempt(model, graph, alone, light)[1] is not None:
            blamed |= roots
    return blamed or set().union(*groups.values()), failure[1]


def attempt(
    model: nn.Module, graph: NeuronGraph, kept: Kept, sources: Mapping[str, Tensor]
) -> tuple[nn.Module, Failure | None]:
    """The model of which only this is kept, cut out of these tensors, and what is wrong with it."""
    tensors = cut(graph, sources, kept)
    trimmed = rebuild(model, tensors)
    set_attributes(model, trimmed, graph, kept)
    return trimmed, prove(model, graph, trimmed, kept, tensors)
