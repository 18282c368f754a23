"""Trace a model into its neurons: which layers produce them, what goes with each, what is locked and why.

`trace` runs the model once under label propagation, resolves what must go together, then proves itself on a trial:
some neurons of every group are removed, and the labels of the trimmed model must be the original ones without them,
at every operator. A group that fails is locked with the reason; the others stay.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from torchtrim._errors import TraceError
from torchtrim._flow import Flow, RunError, Site, Step, named_tensors, rebuild, run
from torchtrim._labels import UNKNOWN, Atoms, Factor, Labels, Ledger, Shape, canonical
from torchtrim._surgery_attributes import set_attributes

Kept = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Layer:
    """Neurons of one parameter. `roots`: int64 [width], one number per neuron body; equal numbers go together.

    `axis`: the axis of `parameter` along which its neurons lie.
    """

    name: str
    parameter: str
    axis: int
    roots: Atoms
    removable: NDArray[np.bool_]
    group: str
    locked: str | None

    @property
    def width(self) -> int:
        return len(self.roots)


@dataclass(frozen=True, eq=False)
class NeuronGraph:
    """What `trace` found. `layers` in the order of execution; tied layers share a `group` (its first layer's name)."""

    layers: Mapping[str, Layer]
    axes: Mapping[str, tuple[Atoms, ...]]
    device: str
    recordings: tuple[tuple[bool, tuple[Step, ...]], ...]
    sites: tuple[Site, ...]
    root: Atoms
    example: Any

    @property
    def locked(self) -> dict[str, str]:
        return {name: layer.locked for name, layer in self.layers.items() if layer.locked}

    def bodies(self, removed: Mapping[str, Any]) -> Kept:
        """Which roots are kept when these neurons of these layers go."""
        kept = np.ones(len(self.root), bool)
        for name, neurons in removed.items():
            kept[self.layers[name].roots[list(neurons)]] = False
        return kept

    def __str__(self) -> str:
        lines = [
            f"{layer.name:40} {layer.width:6} neurons  "
            + (f"locked: {layer.locked}" if layer.locked else f"group {layer.group}")
            for layer in self.layers.values()
        ]
        return "\n".join(lines)


def trace(model: nn.Module, example: Any) -> NeuronGraph:
    """The neurons of a model. `example` is what the model is called with; only its shapes matter where possible.

    Raises `TraceError` when the model cannot run on the example. The model is not touched.
    """
    sources = named_tensors(model)
    axes, count = _number(sources)
    labels = {name: _fresh(axes[name], isinstance(sources[name], nn.Parameter)) for name in sources}
    ledger = Ledger()
    flow, device = _first_run(model, example, labels, ledger)
    recordings = [(False, tuple(flow.steps))]
    produced = list(flow.produced)
    touched = ledger.touched(count)
    if any(t.ndim >= 2 and not any(touched[a].any() for a in axes[n]) for n, t in sources.items()):
        # parts that only training reaches, such as auxiliary classifiers
        trial = Ledger()
        try:
            other = run(_on(model, device), example, labels, trial, training=True, device=device)
        except RunError:
            pass
        else:
            recordings.append((True, tuple(other.steps)))
            produced += other.produced
            ledger.absorb(trial)
    root, pinned = ledger.resolve(count)
    graph = _assemble(model, example, axes, device, recordings, flow.sites, produced, root, pinned)
    while (failure := _try(model, graph)) is not None:
        blamed, reason = failure
        pinned |= {value: reason for value in blamed if value not in pinned}
        graph = _assemble(model, example, axes, device, recordings, flow.sites, produced, root, pinned)
    return graph


def _number(sources: Mapping[str, Tensor]) -> tuple[dict[str, tuple[Atoms, ...]], int]:
    """Fresh atoms for every axis of every tensor; tensors that share memory share atoms."""
    shared: dict[Any, tuple[Atoms, ...]] = {}
    axes: dict[str, tuple[Atoms, ...]] = {}
    count = 1
    for name, tensor in sources.items():
        key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
        if key not in shared:
            numbered: list[Atoms] = []
            for size in tensor.shape:
                numbered.append(np.arange(count, count + size) if size > 1 else np.zeros(size, np.int64))
                count += size if size > 1 else 0
            shared[key] = tuple(numbered)
        axes[name] = shared[key]
    return axes, count


def _fresh(axes: tuple[Atoms, ...], zero: bool) -> Labels:
    factors: list[Factor] = []
    for axis, atoms in enumerate(axes):
        if atoms.size > 1:
            factors.append(Factor(atoms.reshape([-1 if i == axis else 1 for i in range(len(axes))]), zero))
    return Labels(tuple(factors), static=True)


def _on(model: nn.Module, device: str, cut: Mapping[str, Tensor] | None = None) -> nn.Module:
    sources = cut if cut is not None else named_tensors(model)
    return rebuild(model, {n: t.detach().to(device, copy=device != "meta") for n, t in sources.items()})


def _first_run(model: nn.Module, example: Any, labels: Any, ledger: Ledger) -> tuple[Flow, str]:
    tensors = list(named_tensors(model).values())
    real = str(tensors[0].device) if tensors else "cpu"
    try:
        trial = Ledger()
        flow = run(_on(model, "meta"), example, labels, trial, training=False, device="meta")
        ledger.absorb(trial)
        return flow, "meta"
    except RunError:
        pass  # control flow that needs data, or a real mistake: the real run tells
    try:
        return run(_on(model, real), example, labels, ledger, training=False, device=real), real
    except RunError as error:
        where = next((name for name in reversed(error.flow.where) if name), "the model itself")
        raise TraceError(
            f"{type(model).__name__} cannot run on the example: {error} (in {where}). "
            "Expected an input that the model accepts; pass what you call the model with: a tensor, a tuple of "
            "positional inputs, or a dict of keyword inputs."
        ) from error


def _assemble(
    model: nn.Module, example: Any, axes: Any, device: str, recordings: Any, sites: Any, produced: list[Atoms],
    root: Atoms, pinned: dict[int, str],
) -> NeuronGraph:  # fmt: skip
    owner: dict[int, tuple[str, int]] = {}
    for name, per_axis in axes.items():
        for axis, atoms in enumerate(per_axis):
            if atoms.size > 1:
                owner.setdefault(int(atoms[0]), (name, axis))
    starts = np.array(sorted(owner))
    layers: dict[str, Layer] = {}
    groups: dict[int, str] = {}
    for atoms in produced:
        first = int(atoms.max())
        if first == 0:
            continue
        parameter, axis = owner[int(starts[np.searchsorted(starts, first, "right") - 1])]
        name = parameter.removesuffix(".weight")
        if name in layers:
            continue
        roots = root[axes[parameter][axis]]
        removable = np.array([int(value) not in pinned for value in roots])
        reason = None if removable.any() else pinned[int(roots[0])]
        if reason is None and len(np.unique(roots[removable])) == len(np.unique(roots)) == 1:
            reason = "all its neurons must go together"
        group = next((groups[v] for v in roots[removable].tolist() if v in groups), name)
        for value in roots[removable].tolist():
            groups.setdefault(value, group)
        layers[name] = Layer(name, parameter, axis, roots, removable, group, reason)
    rooted = {name: tuple(root[atoms] if atoms.size > 1 else atoms for atoms in a) for name, a in axes.items()}
    return NeuronGraph(layers, rooted, device, tuple(recordings), tuple(sites), root, example)


def cut(graph: NeuronGraph, sources: Mapping[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """Index every parameter and buffer by what is kept; an untouched one is handed on as it is."""
    result: dict[str, Tensor] = {}
    for name, tensor in sources.items():
        sliced = tensor.detach()
        for axis, roots in enumerate(graph.axes[name]):
            keep = kept[roots] if roots.size > 1 else np.ones(roots.size, bool)
            if not keep.all():
                sliced = sliced.index_select(axis, torch.from_numpy(np.flatnonzero(keep)).to(tensor.device))
        if sliced.shape != tensor.shape and tensor.ndim == 4 and not tensor.is_contiguous():
            sliced = sliced.to(memory_format=torch.channels_last)
        result[name] = sliced
    return result


def prove(model: nn.Module, graph: NeuronGraph, trimmed: nn.Module, kept: Kept) -> tuple[set[int], str] | None:
    """None if `trimmed` computes the masked model; else the roots to blame, and why.

    By induction over the operators: the trimmed model runs the same ones, and at each of them every label is the
    original label without the removed elements, in the same order, on a tensor of the size that follows.
    """
    labels: dict[str, Labels] = {}
    for name, tensor in named_tensors(model).items():
        axes = tuple(a[kept[a]] if a.size > 1 else a for a in graph.axes[name])
        labels[name] = _fresh(axes, isinstance(tensor, nn.Parameter))
    memo: dict[tuple[int, int], Any] = {}
    for training, steps in graph.recordings:
        copy = _on(trimmed, graph.device)
        try:
            flow = run(copy, graph.example, labels, Ledger(), training=training, device=graph.device)
        except RunError as error:
            where = next((name for name in reversed(error.flow.where) if name), "the model itself")
            position = min(len(error.flow.steps), len(steps) - 1)
            blamed = _removed((labels for labels in error.flow.blamed), graph, kept, mapped=True)
            blamed = blamed or _removed((one for _, one in steps[position][3]), graph, kept)
            return blamed, f"the model's own code in {where} holds its width ({error})"
        for index, (name, where, numbers, seen) in enumerate(steps):
            new = flow.steps[index] if index < len(flow.steps) else None
            agreed = new is not None and new[0] == name and new[2] == numbers and len(new[3]) == len(seen)
            agreed = agreed and all(
                _agree(old, other, graph.root, kept, memo)
                for old, other in zip(seen, new[3], strict=True)  # type: ignore[index]
            )
            if not agreed:
                blamed = _removed((one for _, one in seen), graph, kept)
                return blamed, f"trimmed labels disagree at aten::{name} in {where or 'the model itself'}"
    return None


def _removed(labels: Any, graph: NeuronGraph, kept: Kept, mapped: bool = False) -> set[int]:
    """The roots at an operator that lost neurons, with all roots of their layers."""
    found: set[int] = set()
    for one in labels:
        for factor in one.factors:
            roots = factor.atoms if mapped else graph.root[factor.atoms]
            found |= set(np.unique(roots).tolist())
    blamed: set[int] = set()
    for layer in graph.layers.values():
        roots = set(layer.roots.tolist())
        if roots & found and not kept[layer.roots].all():
            blamed |= roots
    return blamed


def _agree(old: tuple[Shape, Labels], new: tuple[Shape, Labels], root: Atoms, kept: Kept, memo: Any) -> bool:
    key = (id(old[1]), id(new[1]))
    if key not in memo:
        memo[key] = _compare(old[1], new[1], root, kept), old[1], new[1]
    counts = memo[key][0]
    if counts is None:
        return False
    ndim = len(old[0])
    if len(new[0]) != ndim:
        return False
    if old[1].uniform:
        return True
    return all(new[0][axis] == counts.get(axis - ndim, old[0][axis]) for axis in range(ndim))


def _compare(old: Labels, new: Labels, root: Atoms, kept: Kept) -> dict[int, int] | None:
    """How many positions are kept along each labelled axis (counted from the end), or None if labels differ."""
    if old is UNKNOWN or not old.factors:
        return {} if not any(canonical(f.atoms) is not None for f in new.factors) else None
    counts: dict[int, NDArray[np.bool_]] = {}
    expected: set[tuple[Shape, bytes]] = set()
    for factor in old.factors:
        atoms = canonical(factor.atoms, root)
        if atoms is None:
            continue
        keep = kept[atoms]
        lines = [np.atleast_1d(keep.any(axis=tuple(j for j in range(keep.ndim) if j != i))) for i in range(keep.ndim)]
        if keep.sum() != np.prod([line.sum() for line in lines]):
            return None
        for axis, line in enumerate(lines):
            if len(line) > 1:
                where = axis - atoms.ndim
                counts[where] = np.logical_and(counts[where], line) if where in counts else line
    for factor in old.factors:
        atoms = canonical(factor.atoms, root)
        if atoms is None:
            continue
        for axis, size in enumerate(atoms.shape):
            if size > 1:
                atoms = atoms.take(np.flatnonzero(counts[axis - factor.atoms.ndim]), axis)
        if (short := canonical(atoms)) is not None:
            expected.add((short.shape, np.ascontiguousarray(short).tobytes()))
    found = {
        (short.shape, np.ascontiguousarray(short).tobytes())
        for factor in new.factors
        if (short := canonical(factor.atoms)) is not None
    }
    return {axis: int(line.sum()) for axis, line in counts.items()} if found == expected else None


def trial(graph: NeuronGraph) -> Kept:
    """A third of every group's units removed at random, one at least and never all."""
    random = np.random.default_rng(0)
    kept = np.ones(len(graph.root), bool)
    groups: dict[str, set[int]] = {}
    for layer in graph.layers.values():
        if not layer.locked:
            groups.setdefault(layer.group, set()).update(layer.roots[layer.removable].tolist())
    for units in groups.values():
        ordered = np.array(sorted(units))
        if len(ordered) > 1:
            kept[random.choice(ordered, max(1, len(ordered) * 3 // 10), replace=False)] = False
    return kept


def _try(model: nn.Module, graph: NeuronGraph) -> tuple[set[int], str] | None:
    kept = trial(graph)
    if kept.all():
        return None
    light = {name: tensor.detach().to(graph.device) for name, tensor in named_tensors(model).items()}
    trimmed = rebuild(model, cut(graph, light, kept))
    set_attributes(model, trimmed, graph.axes, kept)
    failure = prove(model, graph, trimmed, kept)
    if failure is not None and not failure[0]:
        return {v for layer in graph.layers.values() for v in layer.roots.tolist()}, failure[1]
    return failure
