"""What can be trimmed of a model, found without data: its layers, how they hang together, how much it comes to."""

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from torchtrim._flow import RunError, named_tensors, run
from torchtrim._graph import trace
from torchtrim._labels import Ledger
from torchtrim._models import PRETRAINED, build_model, check_model_name, load_weights
from torchtrim._neurons import Layer, NeuronGraph, aligned, layer_sites, neurons_of, operators
from torchtrim._proof import on_device
from torchtrim._report import _short
from torchtrim._source import _device
from torchtrim.errors import TorchtrimError, TraceError, nearest

_VERSION = 1  # of what `Inspection.described` gives
_OUTPUT = "it is an output of the model"
_NAMED = 4  # layers that are named where more share a reason

# Inputs -------------------------------------------------------------------------------------------------

_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in ["float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
}
_INPUT = re.compile(r"(?:(?P<name>[^\W\d]\w*)=)?(?P<sizes>\d{1,15}(?:[x×]\d{1,15})*)(?::(?P<dtype>\w+))?")
_FORM = "sizes such as 1x3x224x224, with a type if not float32 (8x128:int64), several with commas"


@dataclass(frozen=True)
class Input:
    """One tensor that a model is called with. `name`: of the keyword argument, or None where it has its place."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    name: str | None = None

    def __str__(self) -> str:
        name = f"{self.name}=" if self.name else ""
        dtype = "" if self.dtype == "float32" else f":{self.dtype}"
        return name + "x".join(map(str, self.shape)) + dtype

    def tensor(self, random: torch.Generator) -> Tensor:
        """Noise; zeros of an integer type, as any table of embeddings has a row 0."""
        dtype = _DTYPES[self.dtype]
        if dtype.is_floating_point:
            return torch.randn(self.shape, generator=random).to(dtype)
        return torch.zeros(self.shape, dtype=dtype)


def _listed(inputs: Sequence[Input]) -> str:
    return ",".join(map(str, inputs))


def parse_inputs(text: str) -> tuple[Input, ...]:
    """`1x3x224x224`, `8x128:int64,8x128:bool`, or `ids=8x128:int64,mask=8x128` as inputs. Raises TorchtrimError."""
    found: list[Input] = []
    for part in text.split(","):
        match = _INPUT.fullmatch(part.strip())
        if match is None:
            raise TorchtrimError(f"input: expected {_FORM}, found {part.strip() or text!r}")
        shape = tuple(int(size) for size in re.split("[x×]", match["sizes"]))
        if 0 in shape:
            raise TorchtrimError(f"input: expected sizes of at least 1, found {match['sizes']!r}")
        dtype = match["dtype"] or "float32"
        if dtype not in _DTYPES:
            hint = nearest(dtype, _DTYPES) or f"; use one of {', '.join(_DTYPES)}"
            raise TorchtrimError(f"input: unknown type {dtype!r}{hint}")
        found.append(Input(shape, dtype, match["name"]))
    names = [one.name for one in found]
    if None in names and any(names):
        raise TorchtrimError(f"input: expected a name for every input or for none, found {text!r}")
    if any(names) and len({*names}) < len(names):
        raise TorchtrimError(f"input: expected each name once, found {text!r}")
    return tuple(found)


def example_of(inputs: Sequence[Input]) -> Any:
    """What `trace` calls a model with: a tensor, a tuple of several, or a dict of those with names."""
    random = torch.Generator().manual_seed(0)
    try:
        tensors = [one.tensor(random) for one in inputs]
    except (RuntimeError, MemoryError) as error:
        raise TorchtrimError(f"input: {_listed(inputs)} does not fit into memory; use a smaller one") from error
    if inputs[0].name:
        return {str(one.name): tensor for one, tensor in zip(inputs, tensors, strict=True)}
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def _usual_inputs(name: str, model: nn.Module) -> tuple[Input, ...]:
    """The input that a model was made for, so far as its library says: one image."""
    if name == "lenet":
        return (Input((1, 1, 28, 28)),)
    settings = getattr(model, "pretrained_cfg", None)
    if name.startswith("timm:") and settings:
        return (Input((1, *settings["input_size"])),)
    side = 299 if name == "torchvision:inception_v3" else int(getattr(model, "image_size", 224))
    return (Input((1, 3, side, side)),)


# How much is within reach -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """`within`: what is within reach. `all`: of the whole model. `outputs`: of its output layers, which do not count
    as within reach though some of them, `inputs`, can lose what they read."""

    within: int
    all: int
    outputs: int
    inputs: int

    @property
    def part(self) -> float:
        return self.within / self.all if self.all else 0.0


@dataclass(frozen=True)
class Reach:
    """How much of a model trimming can make smaller.

    A weight is within reach if neurons can go along one of its axes; FLOPs are if they are those of such a weight.
    `parameters`: the weights of convolutions and matrix products, without biases and norms. `flops`: of one call;
    `weightless` of them multiply activations with each other, as attention does. `outputs`: the layers that are locked
    because they give the model's outputs.
    """

    layers: Share
    parameters: Share
    flops: Share
    weightless: int
    outputs: tuple[str, ...]


def reach(model: nn.Module, graph: NeuronGraph, example: Any) -> Reach:
    """How much of a traced model is within reach; the FLOPs are those of one call on the example."""
    outputs = [layer for layer in graph.layers.values() if layer.locked == _OUTPUT]
    reachable = _reachable(graph)
    flops = _flops_of_weights(model, graph, example)
    parameters = dict(model.named_parameters())
    products = {name for weights in flops for name in weights} & parameters.keys() | _weights(model)
    last = frozenset(layer.parameter for layer in outputs)
    trimmable = len(graph.layers) - len(graph.locked)
    return Reach(
        Share(trimmable, len(graph.layers), len(outputs), 0),
        _share({frozenset([name]): parameters[name].numel() for name in products}, reachable, last),
        _share(flops, reachable, last),
        flops.get(frozenset(), 0),
        tuple(layer.name for layer in outputs),
    )


def _reachable(graph: NeuronGraph) -> frozenset[str]:
    """The tensors that lose something along an axis when all goes that can."""
    free = np.zeros(len(graph.root), bool)
    for layer in graph.layers.values():
        free[layer.roots[layer.removable]] = True
    free[0] = False
    return frozenset(name for name, axes in graph.axes.items() if any(free[roots].any() for roots in axes))


def _share(amounts: Mapping[frozenset[str], int], reachable: frozenset[str], outputs: frozenset[str]) -> Share:
    within = sum(amount for names, amount in amounts.items() if names & reachable and not names & outputs)
    last = sum(amount for names, amount in amounts.items() if names & outputs)
    inputs = sum(amount for names, amount in amounts.items() if names & outputs and names & reachable)
    return Share(within, sum(amounts.values()), last, inputs)


def _weights(model: nn.Module) -> set[str]:
    """The weights of linear layers and convolutions, those that this mode or input does not reach among them."""
    known = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Linear, _ConvNd))}
    return {name for name, parameter in model.named_parameters() if id(parameter) in known}


def _flops_of_weights(model: nn.Module, graph: NeuronGraph, example: Any) -> dict[frozenset[str], int]:
    """The FLOPs of one call, by the weights that they multiply with."""
    moved = on_device(model, graph.device)
    with FlopCounterMode(display=False) as counter, _Attribution(moved, counter) as attributed:
        run(moved, example, {}, Ledger(), training=False, device=graph.device)
    return attributed.flops


class _Attribution(TorchDispatchMode):
    """Which weights the FLOPs belong to that a counter counts.

    By operand rather than by module: attention reads its `out_proj.weight` without calling `out_proj`. What is computed
    of weights alone, as by weight norm, belongs to them too.
    """

    def __init__(self, model: nn.Module, counter: FlopCounterMode) -> None:
        super().__init__()
        self.flops: dict[frozenset[str], int] = {}
        self._counter = counter
        self._tensors = named_tensors(model)
        self._names = {_memory(tensor): frozenset([name]) for name, tensor in self._tensors.items()}
        self._held: list[Tensor] = []  # memory that is freed is given to other tensors

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = self._counter.get_total_flops()
        result = func(*args, **kwargs)
        flops = self._counter.get_total_flops() - before
        operands = _leaves((args, kwargs))
        names = [self._names.get(_memory(tensor), frozenset[str]()) for tensor in operands]
        if flops:
            weights = frozenset(name for some in names for name in some if self._tensors[name].ndim > 1)
            self.flops[weights] = self.flops.get(weights, 0) + flops
        if operands and all(names):
            for tensor in _leaves(result):
                self._names.setdefault(_memory(tensor), frozenset[str]().union(*names))
                self._held.append(tensor)
        return result


def _leaves(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor) and leaf.layout == torch.strided]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


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
        blocks = [
            [f"{self.name}, called with {_listed(self.inputs)}"],
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
) -> Inspection:
    """Trace a model by its name, as the command line takes it.

    inputs: as `parse_inputs` reads them; without, the input that the model's library made it for. weights: a file, or
    "DEFAULT" for the library's own; without, the model is as it is made, for nothing depends on its weights. classes:
    how many it tells apart, if other than usual.

    Raises TorchtrimError: an unknown name, inputs that do not fit the model or are needed, weights of another model.
    """
    given = None if inputs is None else parse_inputs(inputs)
    check_model_name(name, weights)
    if given is None and ".py:" in name:
        raise TorchtrimError(
            f"{name}: expected --input, as a file does not say what its model is called with; name {_FORM}"
        )
    place = _device(device)
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)
        usual = 10 if name == "lenet" else 1000
        model = build_model(name, classes=classes or usual, pretrained=weights == PRETRAINED)
    if weights is not None and weights != PRETRAINED:
        model = load_weights(model, weights)
    called = given or _usual_inputs(name, model)
    # Of a single image, batch norm may have one value per channel, with which parts that only run in training cannot.
    traced = given or [replace(one, shape=(2, *one.shape[1:])) for one in called]
    model = model.to(place)
    try:
        graph = trace(model, example_of(traced))
    except TraceError as error:
        cause = error.__cause__
        found = f"{cause} (in {cause.where})" if isinstance(cause, RunError) else str(error)
        raise TraceError(
            f"the input {_listed(called)} does not fit the model, {type(model).__name__}: {found}; "
            f"name another with --input: {_FORM}"
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
            ("FLOPs", found.flops, _short),
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
            f"({_percent(weights.outputs, weights.all)}) and {_short(flops.outputs)} FLOPs, which can lose {inputs}."
        )
    if found.weightless:
        share = _percent(found.weightless, flops.all)
        yield f"FLOPs without weights, such as attention's: {_short(found.weightless)} ({share})."


def _percent(part: int, whole: int) -> str:
    """100 % only of what is all."""
    if not whole:
        return "–"
    return "100 %" if part == whole else f"{min(100 * part / whole, 99.9):.1f} %"
