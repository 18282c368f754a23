"""The layers that read neurons: which of them a plan leaves with fewer inputs, and in which order they run."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor, nn

from torchtrim._copies import named_modules
from torchtrim._neurons import Kept, NeuronGraph, memory_of
from torchtrim._origins import Look, Piece

Reader: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
_READERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = frozenset(["native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"])


@dataclass(frozen=True, eq=False)
class Consumer:
    """A linear or convolutional layer that loses inputs.

    inputs: bool [inputs, of one group], which stay. outputs: bool [outputs], which stay.
    norm: the batch norm that alone reads what the layer computes, or None.
    reads: equal for layers that are given the same input.
    """

    name: str
    inputs: Kept
    outputs: Kept
    norm: str | None
    reads: Any


def consumers(model: nn.Module, graph: NeuronGraph, kept: Kept) -> tuple[list[Consumer], dict[str, str]]:
    """The layers of a model that lose inputs when only this is kept, and of others that do, why they are none.

    The latter by parameter. What reads neurons without weights (norms, products of two activations) is in neither.
    """
    modules = named_modules(model)
    uses = _used(graph)
    found: list[Consumer] = []
    others: dict[str, str] = {}
    producing = {(layer.parameter, layer.axis) for layer in graph.layers.values()}
    for parameter, axes in graph.axes.items():
        stay = [kept[roots] if roots.size > 1 else np.ones(roots.size, bool) for roots in axes]
        lost = [axis for axis, one in enumerate(stay) if not one.all() and (parameter, axis) not in producing]
        if len(axes) < 2 or not lost:
            continue
        name, _, leaf = parameter.rpartition(".")
        reason = "it is not the weight of a layer" if leaf != "weight" else _not_plain(modules[name], model)
        if reason is None and lost != [1]:
            reason = "it reads them along an unusual axis"
        if reason is None:
            norm, reads = _norm_behind(graph, uses, parameter), _reads(graph, uses, parameter)
            found.append(Consumer(name, stay[1], stay[0], norm, reads))
        else:
            others[parameter] = reason
    return found, others


def _not_plain(module: nn.Module, model: nn.Module) -> str | None:
    """Why a module is not one that computes weight · input + bias, with a weight of its own; None if it is."""
    kind = next((kind for kind in _READERS if isinstance(module, kind)), None)
    if kind is None or type(module).forward is not kind.forward:
        return f"a {type(module).__name__} computes otherwise than a linear or convolutional layer"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed from other parameters"
    others = [name for name, tensor in _everywhere(model) if memory_of(tensor) == memory_of(weight)]
    return f"its weight is shared: {', '.join(others)}" if len(others) > 1 else None


def _everywhere(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter under each of its names."""
    for name, module in named_modules(model).items():
        for key, tensor in module._parameters.items():
            if tensor is not None:
                yield (f"{name}.{key}" if name else key), tensor


def _used(graph: NeuronGraph) -> dict[str | int, list[int]]:
    """The steps that read a parameter or an input, by its name, or what another step computed, by its number."""
    uses: dict[str | int, list[int]] = {}
    for index, step in enumerate(graph.recordings[0][1]):
        for source in {origin.source[0] for origin in step.origins}:
            uses.setdefault(source, []).append(index)
    return uses


def _norm_behind(graph: NeuronGraph, uses: Mapping[str | int, list[int]], weight: str) -> str | None:
    """The batch norm that alone reads what is computed with a weight, reads nothing else, and has its channels."""
    steps = graph.recordings[0][1]
    readers = [reader for step in uses.get(weight, ()) for reader in uses.get(step, ())]
    if len(readers) != 1 or steps[readers[0]].name not in _NORMS:
        return None
    sources = [str(origin.source[0]) for origin in steps[readers[0]].origins]
    means = [source for source in sources if source.endswith(".running_mean") and len(uses[source]) == 1]
    if not means or not np.array_equal(graph.axes[means[0]][0], graph.axes[weight][0]):
        return None  # it may read a part, or have positions for channels
    return means[0].removesuffix(".running_mean")


def _reads(graph: NeuronGraph, uses: Mapping[str | int, list[int]], weight: str) -> Any:
    """Equal for weights that are applied to the same input, each once; a weight that is used again has its own."""
    if len(uses.get(weight, ())) != 1:
        return weight
    bias = weight.removesuffix("weight") + "bias"
    origins = graph.recordings[0][1][uses[weight][0]].origins
    looks = [(origin.source, origin.looks) for origin in origins if origin.source[0] not in (weight, bias)]
    if any(isinstance(look, Piece) for _, some in looks for look in some):
        return weight
    return tuple(
        (source, *((look.kind, look.numbers) for look in some if isinstance(look, Look))) for source, some in looks
    )


def levels(graph: NeuronGraph, names: Collection[str]) -> list[list[str]]:
    """Layers in rows, in the order in which they run: one depends only on layers of the rows before its own."""
    steps = graph.recordings[0][1]
    weights: Mapping[Any, str] = {f"{name}.weight" if name else "weight": name for name in names}
    depth: list[int] = []  # of what each step computes: how many of the layers lie behind one another before it
    found: dict[str, int] = {}
    for step in steps:
        sources = [origin.source[0] for origin in step.origins]
        before = max((depth[source] for source in sources if isinstance(source, int)), default=0)
        mine = {weights[source] for source in sources if source in weights}
        for name in mine:
            found[name] = max(before, found.get(name, 0))
        depth.append(before + bool(mine))
    rows: dict[int, list[str]] = {}
    for name, row in found.items():
        rows.setdefault(row, []).append(name)
    return [rows[row] for row in sorted(rows)]
