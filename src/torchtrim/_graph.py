"""Trace a model into its neurons: which layers produce them, what goes with each, what is locked and why.

`trace` runs the model once under label propagation, resolves what must go together, then proves itself on a trial:
some neurons of every group are removed, and the labels of the trimmed model must be the original ones without them,
at every operator. A group that fails is locked with the reason; the others stay. Code that cannot know its widths
needs no trial.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchtrim._copies import modules_of, named_tensors
from torchtrim._doubts import may_read_widths
from torchtrim._experts import candidates, settled
from torchtrim._flow import Flow
from torchtrim._labels import Atoms, Labels, Ledger
from torchtrim._neurons import Layer, Mixture, NeuronGraph, group_of, memory_of
from torchtrim._proof import numbered, on_device
from torchtrim._run import RunError, run, uncollected
from torchtrim._surgery_attributes import descriptions
from torchtrim._trial import tried
from torchtrim.errors import TraceError

__all__ = ["Layer", "NeuronGraph", "trace"]

_WEIGHTS = (".weight", ".weight_v", ".weight_orig")  # the latter two where `weight_norm` or `prune` compute the weight


def trace(model: nn.Module, example: Any, *, through_norms: bool = False, experts: bool = False) -> NeuronGraph:
    """The neurons of a model. `example` is what the model is called with; only its shapes matter where possible.

    What depends on the data, on the mode or on the sizes of the inputs is proved for the path through the model's code
    that the example takes; other paths are not looked at. through_norms: whether neurons that norms average over may
    go. experts: whether experts of a mixture may, as neurons of its router; this is proved by running the model.

    Raises `TraceError` when the model cannot run on the example. The model is not touched.
    """
    graph = untried(model, example, through_norms=through_norms, experts=experts)
    return graph if graph.certain else tried(model, graph)


@uncollected()
def untried(model: nn.Module, example: Any, *, through_norms: bool = False, experts: bool = False) -> NeuronGraph:
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
    owners = _owners(axes, [atoms for _, one in flows for atoms in one.produced])
    root, pinned = ledger.resolve(count)
    found = _mixtures(model, owners, axes, root, pinned) if experts else []
    for _, lines in found:
        for name, axis in lines:
            ledger.unite(axes[lines[0][0]][lines[0][1]], axes[name][axis], "they belong to one expert")
    if found:
        root, pinned = ledger.resolve(count)
    rooted = {name: tuple(root[a] if a.size > 1 else a for a in per_axis) for name, per_axis in axes.items()}
    for roots in (roots for per_axis in rooted.values() for roots in per_axis):
        if roots.size > 1 and (roots == roots[0]).all():
            pinned.setdefault(int(roots[0]), "all its neurons must go together")
    recordings = tuple((training, tuple(one.steps)) for training, one in flows)
    described = tuple(descriptions(model, ledger, root))
    sites, sizes = tuple(flow.sites), tuple(ledger.sizes)
    mixtures: list[Mixture] = []
    for one, lines in found:
        roots = rooted[lines[0][0]][lines[0][1]]
        if np.unique(roots).size > 1 and 0 not in roots:
            mixtures.append(settled(model, one, roots, root, flow.steps))
            pinned = {value: reason for value, reason in pinned.items() if value not in roots}
    ignorant = device == "meta" and not any(one.knows_widths for _, one in flows)
    decided = not (through_norms or mixtures or ledger.undecided)
    attributes = {one.attribute for one in described}
    certain = ignorant and decided and not may_read_widths(modules_of(model), attributes)
    graph = NeuronGraph(
        {}, rooted, axes, device, recordings, sites, root, example, trained_on, described, sizes, through_norms,
        certain, experts, tuple(mixtures),
    )  # fmt: skip
    return replace(graph, layers=_layers(owners, rooted, pinned, count))


def _mixtures(
    model: nn.Module,
    owners: Sequence["_Owner"],
    axes: Mapping[str, tuple[Atoms, ...]],
    root: Atoms,
    pinned: Mapping[int, str],
) -> list[tuple[Mixture, list[tuple[str, int]]]]:
    """What may be mixtures, of which the router's neurons would stay otherwise."""
    roots = {one.name: root[axes[one.parameter][one.axis]].tolist() for one in owners}
    reasons = {name: pinned[own[0]] for name, own in roots.items() if pinned.keys() >= set(own)}
    routers = {one.name: (one.parameter, one.axis) for one in owners if one.name in reasons}
    return list(candidates(model, routers, reasons))


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
    owners: Sequence[_Owner], axes: Mapping[str, tuple[Atoms, ...]], pinned: Mapping[int, str], count: int
) -> dict[str, Layer]:
    stuck = np.zeros(count, bool)
    stuck[[*pinned]] = True
    layers: dict[str, Layer] = {}
    groups: dict[int, str] = {}
    for owner in owners:
        roots = axes[owner.parameter][owner.axis]
        removable = ~stuck[roots]
        group = group_of(owner.name, roots[removable], groups)
        reason = None if removable.any() else pinned[int(roots[0])]
        layers[owner.name] = Layer(owner.name, owner.parameter, owner.axis, roots, removable, group, reason)
    return layers
