"""What can be trimmed of a model, found without data: its layers, how they hang together, how much it comes to."""

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from torchtrim._graph import trace
from torchtrim._inputs import FORM, Input, example_of, listed, parse_inputs, usual_inputs
from torchtrim._models import PRETRAINED, build_model, check_model_name, load_weights
from torchtrim._neurons import Layer, NeuronGraph, aligned, layer_sites, neurons_of, operators
from torchtrim._reach import Reach, reach
from torchtrim._report import short_count
from torchtrim._run import RunError
from torchtrim._source import device_named
from torchtrim.errors import TorchtrimError, TraceError

_VERSION = 1  # of what `Inspection.described` gives
_NAMED = 4  # layers that are named where more share a reason

# An inspection ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Inspection:
    """What was found of a model that was called with `inputs`."""

    name: str
    inputs: tuple[Input, ...]
    graph: NeuronGraph
    reach: Reach

    def described(self) -> dict[str, Any]:
        """All of it as JSON can hold it; `version` changes when the meaning of a field does."""
        sites = layer_sites(self.graph)
        layers = [
            {
                "name": layer.name,
                "parameter": layer.parameter,
                "axis": layer.axis,
                "neurons": layer.width,
                "removable": int(layer.removable.sum()),
                "units": int(np.unique(layer.roots[layer.removable]).size),
                "group": None if layer.locked else layer.group,
                "sites": [{"operator": one.name, "module": one.module, "kind": one.kind} for one in sites[layer.name]],
                "locked": layer.locked,
            }
            for layer in self.graph.layers.values()
        ]
        amounts = {"parameters": self.reach.parameters, "flops": self.reach.flops}
        within = {
            what: {"within": share.within, "all": share.all, "share": round(share.part, 6)}
            for what, share in {"layers": self.reach.layers, **amounts}.items()
        }
        outputs = {what: {"within": share.inputs, "all": share.outputs} for what, share in amounts.items()}
        return {
            "version": _VERSION,
            "model": self.name,
            "through_norms": self.graph.through_norms,
            "experts": self.graph.experts,
            "input": [{"name": one.name, "shape": list(one.shape), "dtype": one.dtype} for one in self.inputs],
            "layers": layers,
            "reach": {
                **within,
                "outputs": {"layers": list(self.reach.outputs), **outputs},
                "flops_without_weights": self.reach.weightless,
            },
        }

    def text(self, columns: int = 100) -> str:
        """A tree of the layers by their modules, the reasons why some are locked, and how much is within reach."""
        tree = _Tree(self.graph)
        asked = ", through norms" * self.graph.through_norms + ", with experts" * self.graph.experts
        blocks = [
            [f"{self.name}, called with {listed(self.inputs)}{asked}"],
            tree.lines(),
            tree.notes(columns),
            tree.reasons(columns),
            _reach_lines(self.reach),
            [line for remark in _remarks(self.reach) for line in textwrap.wrap(remark, columns)],
        ]
        return "\n\n".join("\n".join(block) for block in blocks if block)


def inspect(
    name: str,
    *,
    inputs: str | None = None,
    weights: str | None = None,
    classes: int | None = None,
    device: str = "auto",
    through_norms: bool = False,
    experts: bool = False,
) -> Inspection:
    """Trace a model by its name, as the command line takes it.

    inputs: as `parse_inputs` reads them; without, the input that the model's library made it for. weights: a file, or
    "DEFAULT" for the library's own; without, the model is as it is made, for nothing depends on its weights. classes:
    how many it tells apart, if other than usual. through_norms, experts: as for `trace`.

    Raises TorchtrimError: an unknown name, inputs that do not fit the model or are needed, weights of another model.
    """
    given = None if inputs is None else parse_inputs(inputs)
    check_model_name(name, weights)
    if given is None and ".py:" in name:
        raise TorchtrimError(
            f"{name}: expected --input, as a file does not say what its model is called with; name {FORM}"
        )
    place = device_named(device)
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)
        usual = 10 if name == "lenet" else 1000
        model = build_model(name, classes=classes or usual, pretrained=weights == PRETRAINED)
    if weights is not None and weights != PRETRAINED:
        model = load_weights(model, weights)
    called = given or usual_inputs(name, model)
    # Of a single image, batch norm may have one value per channel, with which parts that only run in training cannot.
    traced = given or [replace(one, shape=(2, *one.shape[1:])) for one in called]
    model = model.to(place)
    try:
        graph = trace(model, example_of(traced), through_norms=through_norms, experts=experts)
    except TraceError as error:
        cause = error.__cause__
        found = f"{cause} (in {cause.where})" if isinstance(cause, RunError) else str(error)
        raise TraceError(
            f"the input {listed(called)} does not fit the model, {type(model).__name__}: {found}; "
            f"name another with --input: {FORM}"
        ) from error
    return Inspection(name, called, graph, reach(model, graph, example_of(called)))


# The tree -----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Node:
    """A module, or a layer where `layers` has any. `siblings`: the labels of those that are shown as this one.

    layers: its own, and at the same place those of the siblings.
    """

    label: str
    layers: list[Layer] = field(default_factory=list)
    children: list["_Node"] = field(default_factory=list)
    siblings: list[str] = field(default_factory=list)

    def title(self) -> str:
        if len(self.siblings) < 2:
            return ", ".join([self.label, *self.siblings])
        return f"{self.label} … {self.siblings[-1]} ({len(self.siblings) + 1} alike)"

    def below(self) -> Iterator[Layer]:
        """All layers, in order."""
        yield from self.layers
        for child in self.children:
            yield from child.below()

    def take(self, other: "_Node") -> None:
        """Stand for another node too, whose layers are alike."""
        self.layers += other.layers
        for own, others in zip(self.children, other.children, strict=True):
            own.take(others)


class _Tree:
    """The layers of a graph by their modules; modules that are alike are shown once."""

    def __init__(self, graph: NeuronGraph) -> None:
        self._sites = layer_sites(graph)
        self._members: dict[str, list[str]] = {}  # of every group
        for layer in graph.layers.values():
            if not layer.locked:
                self._members.setdefault(layer.group, []).append(layer.name)
        self._locks = _by_reason(graph)
        self._letters = {
            name: f"{chr(ord('a') + number % 26)}{number // 26 or ''}"
            for number, (names, _) in enumerate(self._locks.values())
            for name in names
        }
        self._numbers: dict[str, str] = {}  # of the groups that have several layers, as they are shown
        self._repeated = False  # whether modules that are alike have groups of their own
        self._units = any(neurons_of(layer)[1] for layer in graph.layers.values())
        self._root = _joined(_tree_of(graph.layers.values()))
        self._collapse(self._root)

    def lines(self) -> list[str]:
        titles = ("layer", "neurons", "units", "group", "activations", "locked")
        return aligned([titles, *(row for child in self._root.children for row in self._rows(child))])

    def notes(self, columns: int) -> list[str]:
        """What the columns mean that need it; after `lines`."""
        notes: list[str] = []
        if self._numbers:
            notes.append("Layers with the same group number share neurons, which go together.")
        if self._repeated:
            notes.append("Modules that are alike are shown once; each has groups of its own.")
        if self._units:
            notes.append("Neurons of one unit, such as an attention head, go as a whole.")
        if any(reason.startswith("normalised over") for reason in self._locks):
            notes.append("What a norm averages over goes too with --through-norms.")
        return textwrap.wrap(" ".join(notes), columns)

    def reasons(self, columns: int) -> list[str]:
        """Why layers are locked, each reason once."""
        lines: list[str] = []
        for reason, (names, places) in self._locks.items():
            where = f" in {_few(places, 2, 'places')}" if places else ""
            text = f"  {self._letters[names[0]]}: {reason}{where}: {_few(names, _NAMED, 'layers')}"
            lines += textwrap.wrap(text, columns, subsequent_indent=" " * 5, break_on_hyphens=False)
        return ["Locked:", *lines] if lines else []

    def _rows(self, node: _Node, branch: str = "", stem: str = "") -> Iterator[tuple[str, ...]]:
        """branch: what is before the node's title; stem: what is before the branches of its children."""
        yield (branch + node.title(), *self._cells(node.layers))
        for child in node.children[:-1]:
            yield from self._rows(child, f"{stem}├─ ", f"{stem}│  ")
        for child in node.children[-1:]:
            yield from self._rows(child, f"{stem}└─ ", f"{stem}   ")

    def _cells(self, layers: Sequence[Layer]) -> tuple[str, ...]:
        if not layers:
            return ("",) * 5
        first, group = layers[0], ""
        if len(self._members.get(first.group, ())) > 1 and not first.locked:
            group = self._numbers.setdefault(first.group, str(len(self._numbers) + 1))
        return (*neurons_of(first), group, self._activations(layers), self._letters.get(first.name, ""))

    def _activations(self, layers: Sequence[Layer]) -> str:
        """The operators of layers that are alike, and how often they are called: `relu ×2–6`."""
        counts = [Counter(site.name for site in self._sites[layer.name]) for layer in layers]
        least = {name: min(count[name] for count in counts) for name in counts[0]}
        most = {name: max(count[name] for count in counts) for name in counts[0]}
        if least == most:
            return operators(self._sites[layers[0].name])
        return ", ".join(f"{name} ×{least[name]}–{most[name]}" for name in least)

    def _collapse(self, node: _Node, path: str = "") -> None:
        """Show neighbouring modules once that differ in their names alone, and in how often activations are called."""
        shown: list[_Node] = []
        before: Any = None
        for child in node.children:
            place = f"{path}{child.label}."
            signature = self._signature(child, place)
            self._collapse(child, place)
            if child.children and shown and signature == before:
                shown[-1].siblings.append(child.label)
                shown[-1].take(child)
                self._repeated |= any(inner is not None for *_, inner in signature[1:])
            else:
                shown.append(child)
            before = signature
        node.children = shown

    def _signature(self, node: _Node, place: str) -> tuple[Any, ...]:
        """Equal for modules whose layers are alike, and go with the same layers or with their own neighbours."""
        found: list[Any] = [node.label.partition(".")[2]]
        for layer in node.below():
            members = self._members.get(layer.group, []) if not layer.locked else []
            own = all(f"{name}.".startswith(place) for name in members)
            calls = frozenset(site.name for site in self._sites[layer.name])
            outer = None if own else layer.group
            inner = layer.group[len(place) :] if own and len(members) > 1 else None
            found.append(
                (layer.name[len(place) :], neurons_of(layer), calls, self._letters.get(layer.name), outer, inner)
            )
        return tuple(found)


def _tree_of(layers: Iterable[Layer]) -> _Node:
    root = _Node("")
    places = {"": root}
    for layer in layers:
        path = ""
        for part in layer.name.split("."):
            above, path = places[path], f"{path}.{part}" if path else part
            if path not in places:
                places[path] = _Node(part)
                above.children.append(places[path])
        places[path].layers.append(layer)
    return root


def _joined(node: _Node) -> _Node:
    """Modules that hold nothing but one other are shown on one line with it."""
    children = [_joined(child) for child in node.children]
    if node.label and not node.layers and len(children) == 1:
        return replace(children[0], label=f"{node.label}.{children[0].label}")
    return replace(node, children=children)


def _by_reason(graph: NeuronGraph) -> dict[str, tuple[list[str], list[str]]]:
    """The locked layers, and the modules that the reasons name, by what else the reasons say."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for name, reason in graph.locked.items():
        what, _, place = reason.rpartition(" in ")
        named = bool(what) and "by aten::" in what
        names, places = found.setdefault(what if named else reason, ([], []))
        names.append(name)
        if named and place not in places:
            places.append(place)
    return found


def _few(names: Sequence[str], most: int, what: str) -> str:
    """The first names, and how many there are."""
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[: most - 1])}, … ({len(names):,} {what})"


def _reach_lines(found: Reach) -> list[str]:
    rows = [
        (title, write(share.within), write(share.all), _percent(share.within, share.all))
        for title, share, write in (
            ("layers", found.layers, "{:,}".format),
            ("weights", found.parameters, "{:,}".format),
            ("FLOPs", found.flops, short_count),
        )
    ]
    rows.insert(0, ("Within reach", "", "of all", "share"))
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(sizes[0]), *(cell.rjust(size) for cell, size in zip(row[1:], sizes[1:], strict=True))])
        for row in rows
    ]


def _remarks(found: Reach) -> Iterator[str]:
    yield (
        "Weights are those of convolutions and matrix products. One is within reach where neurons can go along one of "
        "its axes; so are its FLOPs."
    )
    weights, flops = found.parameters, found.flops
    if found.outputs:
        which = f"output layer{'s' * (len(found.outputs) > 1)} {_few(found.outputs, _NAMED, 'layers')}"
        inputs = "no inputs" if not weights.inputs else "inputs" if weights.inputs == weights.outputs else "some inputs"
        yield (
            f"Counted apart, as what the model gives out stays: the {which}, {weights.outputs:,} weights "
            f"({_percent(weights.outputs, weights.all)}) and {short_count(flops.outputs)} FLOPs, which can lose "
            f"{inputs}."
        )
    if found.weightless:
        share = _percent(found.weightless, flops.all)
        yield f"FLOPs without weights, such as attention's: {short_count(found.weightless)} ({share})."


def _percent(part: int, whole: int) -> str:
    """100 % only of what is all."""
    if not whole:
        return "–"
    return "100 %" if part == whole else f"{min(100 * part / whole, 99.9):.1f} %"
