"""Try a trace on a cut: what the proof finds to be no good is read another way, or locked."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor, nn

from torchtrim._copies import named_modules, named_tensors, rebuild
from torchtrim._experts import difference, without_experts
from torchtrim._flow import Step
from torchtrim._labels import Atoms, components
from torchtrim._neurons import Description, Kept, Layer, NeuronGraph, cut, group_of
from torchtrim._proof import Failure, prove
from torchtrim._run import uncollected
from torchtrim._surgery_attributes import set_attributes


def tried(model: nn.Module, graph: NeuronGraph) -> NeuronGraph:
    """The graph in which all is locked that a trial cut shows to be no good."""
    others = _Readings(model, graph)
    failed: set[tuple[str, frozenset[str]]] = set()  # reasons and layers, without their numbers
    failure = _try(model, graph)
    while failure is not None:
        if (other := others.next(graph, failure)) is not None:
            again = _try(model, other)
            if again is None or _is_better(again, failure):
                graph, failure = other, again
            continue
        failure = failure if failure.blamed else _narrowed(model, graph, failure)
        names = frozenset(_place_in_block(name) for name in _of(graph, failure.blamed))
        habit = _pattern(failure.reason), names
        if habit in failed:  # twice is a habit of all layers that are called so
            alike = [layer for name, layer in graph.layers.items() if _place_in_block(name) in names]
            failure = failure._replace(blamed=failure.blamed.union(*(layer.roots.tolist() for layer in alike)))
        failed.add(habit)
        graph = _regrouped(graph, graph.layers, failure.blamed, failure.reason)
        failure = _try(model, graph)
    return _with_proved_experts(model, graph) if graph.mixtures else graph


def _pattern(text: str) -> str:
    """Without the numbers by which repeated blocks differ."""
    return re.sub(r"\d+", "N", text)


def _place_in_block(layer: str) -> str:
    """A layer's name without the numbers of its block; one of its own tells it from its neighbours."""
    block, dot, own = layer.rpartition(".")
    return f"{_pattern(block)}{dot}{own}"


def _of(graph: NeuronGraph, roots: set[int]) -> list[str]:
    """The layers that have some of these roots."""
    return [name for name, layer in graph.layers.items() if not roots.isdisjoint(layer.roots.tolist())]


def trial(graph: NeuronGraph) -> Kept:
    """A third of every group's neurons removed at random, one at least. Every axis keeps two, or one of two.

    A single neuron has no label of its own to compare where it is joined to others. Experts are tried by themselves.
    """
    random = np.random.default_rng(0)
    kept = np.ones(len(graph.root), bool)
    groups: dict[str, set[int]] = {}
    for layer in graph.layers.values():
        if not layer.locked:
            groups.setdefault(layer.group, set()).update(layer.roots[layer.removable].tolist())
    for units in groups.values():
        ordered = np.array(sorted(units.difference(graph.experts_roots.tolist())), np.int64)
        if not ordered.size:
            continue
        kept[random.choice(ordered, max(1, len(ordered) * 3 // 10), replace=False)] = False
    for roots in (roots for per_axis in graph.axes.values() for roots in per_axis if roots.size > 1):
        if kept[roots].all():
            continue
        bodies = np.unique(roots)
        gone = bodies[~kept[bodies]]
        least = min(2, bodies.size - 1)
        if bodies.size - gone.size < least:
            kept[gone[: least - (bodies.size - gone.size)]] = True
    return kept


@uncollected()
def attempt(
    model: nn.Module, graph: NeuronGraph, kept: Kept, sources: Mapping[str, Tensor], *, keep: bool = True
) -> tuple[nn.Module, Failure | None]:
    """The model of which only this is kept, cut out of these tensors, and what is wrong with it.

    keep: whether it will be used; else the proof may run on it as it is.
    """
    experts = graph.experts_roots
    whole = kept.copy()
    whole[experts] = True
    tensors = cut(graph, sources, whole)
    trimmed = rebuild(model, tensors)
    set_attributes(model, trimmed, graph, whole)
    failure = prove(model, graph, trimmed, whole, tensors, keep=keep)
    if failure is None and not kept[experts].all():
        trimmed, fault = without_experts(model, graph, kept, sources)
        if fault is not None:
            failure = Failure(set(experts[~kept[experts]].tolist()), f"its experts stay: {fault}")
    return trimmed, failure


def _with_proved_experts(model: nn.Module, graph: NeuronGraph) -> NeuronGraph:
    """The graph in which those experts are locked that a trial, which removes a third of them, shows to be no good."""
    random = np.random.default_rng(0)
    kept = np.ones(len(graph.root), bool)
    for one in graph.mixtures:
        units = np.unique(one.roots)
        # the last stays, so that others have another number
        kept[random.choice(units[:-1], max(1, len(units) * 3 // 10), replace=False)] = False
        kept[one.lacking(kept)] = True
    faults: dict[str, str] = {}
    together = difference(model, graph, kept)
    for one in graph.mixtures:
        alone = np.ones(len(kept), bool)
        alone[one.roots] = kept[one.roots]
        fault = "all of them are picked" if alone.all() else together and difference(model, graph, alone)
        if fault is not None:
            faults[one.router] = fault
            graph = _regrouped(graph, graph.layers, set(one.roots.tolist()), f"its experts stay: {fault}")
    return replace(graph, mixtures=tuple(one for one in graph.mixtures if one.router not in faults))


def _try(model: nn.Module, graph: NeuronGraph) -> Failure | None:
    """Prove the trial."""
    kept = trial(graph)
    return None if kept.all() else attempt(model, graph, kept, _light(model, graph), keep=False)[1]


def _light(model: nn.Module, graph: NeuronGraph) -> dict[str, Tensor]:
    """The model's tensors where it is traced, without data if it can be."""
    return {name: tensor.detach().to(graph.device) for name, tensor in named_tensors(model).items()}


def _narrowed(model: nn.Module, graph: NeuronGraph, failure: Failure) -> Failure:
    """A failure that blames nobody, with blame for the first groups that fail without others, or else for all."""
    kept, light = trial(graph), _light(model, graph)
    groups: dict[str, set[int]] = {}
    for layer in graph.layers.values():
        groups.setdefault(layer.group, set()).update(layer.roots.tolist())

    def guilty(suspects: Sequence[set[int]]) -> set[int]:
        """The roots of the first groups of these that fail without all others, found by halving."""
        alone = np.ones(len(kept), bool)
        roots = sorted(set().union(*suspects))
        alone[roots] = kept[roots]
        if alone.all() or attempt(model, graph, alone, light, keep=False)[1] is None:
            return set()
        half = len(suspects) // 2
        return (half and (guilty(suspects[:half]) or guilty(suspects[half:]))) or set(roots)

    everything = list(groups.values())
    half = len(everything) // 2
    blamed = (guilty(everything[:half]) or guilty(everything[half:])) if half else set[int]()
    return failure._replace(blamed=blamed or set().union(*everything))


def _regrouped(graph: NeuronGraph, layers: Mapping[str, Layer], stuck: set[int], reason: str) -> NeuronGraph:
    """The graph with these layers, of which some roots cannot go."""
    regrouped: dict[str, Layer] = {}
    groups: dict[int, str] = {}
    for name, layer in layers.items():
        removable = layer.removable & ~np.isin(layer.roots, list(stuck))
        locked = layer.locked or (None if removable.any() else reason)
        group = group_of(name, layer.roots[removable], groups)
        regrouped[name] = replace(layer, removable=removable, locked=locked, group=group)
    return replace(graph, layers=regrouped)


_Meaning = tuple[
    type[nn.Module], str, int | None
]  # a class, an attribute, which of its sizes it is; None: of no neurons


class _Readings:
    """What else the model's own code may mean: other sizes by its attributes, sizes of its inputs by its numbers."""

    def __init__(self, model: nn.Module, graph: NeuronGraph) -> None:
        self._model = model
        self._meanings = _meanings(model, graph)
        self._tied: set[type[nn.Module]] = set()

    def next(self, graph: NeuronGraph, failure: Failure) -> NeuronGraph | None:
        """Another reading of the graph that nobody has tried yet; None if there is none."""
        if self._meanings:
            return _with_meaning(self._model, graph, *self._meanings.pop())
        if failure.where is None or (kind := type(self._model.get_submodule(failure.where))) in self._tied:
            return None
        self._tied.add(kind)
        return _with_widths_of_inputs(self._model, graph, failure.where, failure.blamed)


def _is_better(failure: Failure, before: Failure) -> bool:
    """Whether a reading is worth keeping that fails too: later, or of less."""
    return failure.reached > before.reached or (
        failure.reached == before.reached and 0 < len(failure.blamed) < len(before.blamed)
    )


def _meanings(model: nn.Module, graph: NeuronGraph) -> list[_Meaning]:
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


# ------------------------------------------------------------------ widths that code takes from another tensor


def _with_widths_of_inputs(model: nn.Module, graph: NeuronGraph, module: str, blamed: set[int]) -> NeuronGraph | None:
    """The graph in which what a module views in the width of its inputs goes with them; so in all of its class.

    Code such as `batch, width = x.shape; ... heads.view(batch, width)` ties the two by nothing but a number.
    """
    places = {place for place, own, _ in _views_like_inputs(graph, module) if not blamed.isdisjoint(own.tolist())}
    kind = type(model.get_submodule(module))
    pairs = [
        (own, given)
        for name, other in named_modules(model).items()
        if type(other) is kind
        for place, own, given in _views_like_inputs(graph, name)
        if place in places
    ]
    return _united(graph, pairs) if pairs else None


def _views_like_inputs(graph: NeuronGraph, module: str) -> Iterator[tuple[int, Atoms, Atoms]]:
    """Each axis that a module's own code made by a view: the how-manieth, its roots, and those of an input as wide."""
    given = [roots for _, steps in graph.recordings for roots in _inputs(graph, module, steps)]
    for place, size in enumerate(one for one in graph.sizes if one.where == module):
        own = graph.root[size.atoms].ravel()
        yield from ((place, own, roots) for roots in given if own.size == size.size == roots.size)


def _inputs(graph: NeuronGraph, module: str, steps: Sequence[Step]) -> Iterator[Atoms]:
    """The roots along each axis of the activations that the first operator of a module computes with."""
    inside = f"{module}." if module else ""
    for step in (step for step in steps if step.live and f"{step.where}.".startswith(inside)):
        given = [labels for (_, labels), _ in zip(step.tensors, step.origins, strict=False) if not labels.static]
        if any(labels.factors for labels in given):
            single = (factor for labels in given for factor in labels.factors if len(factor.axes()) == 1)
            yield from (graph.root[factor.atoms].ravel() for factor in single)
            return


def _united(graph: NeuronGraph, pairs: Sequence[tuple[Atoms, Atoms]]) -> NeuronGraph:
    """The graph in which roots go together, position by position."""
    to = components(len(graph.root), [one for one, _ in pairs], [other for _, other in pairs])
    layers = {name: replace(layer, roots=to[layer.roots]) for name, layer in graph.layers.items()}
    stuck = {0}.union(*(layer.roots[~layer.removable].tolist() for layer in layers.values()))
    merged = replace(
        graph,
        root=to[graph.root],
        axes={name: tuple(to[a] if a.size > 1 else a for a in axes) for name, axes in graph.axes.items()},
        descriptions=tuple(replace(one, roots=to[one.roots]) for one in graph.descriptions),
    )
    return _regrouped(merged, layers, stuck, "its width is that of its module's inputs, which must stay")
