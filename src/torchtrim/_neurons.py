"""What a trace found, and what can be done with it: the layers and their neurons, cut out or silenced."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm

from torchtrim._copies import compacted, named_tensors, rebuild, without_caches
from torchtrim._flow import Site, Step
from torchtrim._labels import Atoms, Ledger, Size

Kept = NDArray[np.bool_]  # for each root, whether it stays


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
class Description:
    """An attribute of a module that says how many there are along an axis of a label, such as `num_heads`.

    index: of a list of sizes, which one; None where the attribute is an integer. size: what it is before a trim.
    """

    module: str
    attribute: str
    index: int | None
    axis: int
    size: int
    roots: Atoms

    @property
    def fixed(self) -> bool:
        """Whether it is of an axis that keeps its size, beside the neurons' own: such as the features of a head."""
        return self.roots.shape[self.axis] == 1

    @property
    def line(self) -> bytes:
        """Tells the neurons apart of which it is the number."""
        return np.moveaxis(self.roots, self.axis, 0).reshape(self.roots.shape[self.axis], -1)[:, 0].tobytes()

    def left(self, kept: Kept) -> int:
        others = tuple(other for other in range(self.roots.ndim) if other != self.axis)
        return int(kept[self.roots].any(axis=others).sum())


@dataclass(frozen=True, eq=False)
class Mixture:
    """Experts among which a router picks by data. `router`: the layer whose neurons they are; it names its scores.

    block: the module in which all of them run. vectors: what is added to their scores besides. lists: of modules, one
    for each expert. attributes: by module and name, those that count them. limits: how many must stay of which roots,
    for they are picked from these.
    """

    router: str
    block: str
    vectors: tuple[str, ...]
    lists: tuple[str, ...]
    attributes: tuple[tuple[str, str], ...]
    roots: Atoms
    limits: tuple[tuple[Atoms, int], ...]

    @property
    def picked(self) -> int:
        """How many experts a token goes to at most."""
        return max((least for roots, least in self.limits if roots.size == self.roots.size), default=1)

    def lacking(self, kept: Kept) -> Atoms:
        """The roots that must stay too, or there would be fewer than are picked."""
        kept, wanted = kept.copy(), []
        for roots, least in self.limits:
            for root in roots[~kept[roots]]:
                if kept[roots].sum() < least:
                    kept[root] = True
                    wanted.append(root)
        return np.array(wanted, np.int64)


@dataclass(frozen=True, eq=False)
class NeuronGraph:
    """What `trace` found. `layers` in the order of execution; tied layers share a `group` (its first layer's name).

    `axes`: the roots of every axis of every tensor; `atoms`: the atoms that these are the roots of.
    `sizes`: what the modules' own code gave to labelled axes. `through_norms`: whether what norms average over may go.
    `certain`: whether a trial cut can teach nothing, since the model's code was seen to know none of its widths.
    `experts`: whether experts may, which `mixtures` then lists.
    """

    layers: Mapping[str, Layer]
    axes: Mapping[str, tuple[Atoms, ...]]
    atoms: Mapping[str, tuple[Atoms, ...]]
    device: str
    recordings: tuple[tuple[bool, tuple[Step, ...]], ...]
    sites: tuple[Site, ...]
    root: Atoms
    example: Any
    training_example: Any
    descriptions: tuple[Description, ...] = ()
    sizes: tuple[Size, ...] = ()
    through_norms: bool = False
    certain: bool = False
    experts: bool = False
    mixtures: tuple[Mixture, ...] = ()

    @property
    def locked(self) -> dict[str, str]:
        return {name: layer.locked for name, layer in self.layers.items() if layer.locked}

    def ledger(self, root: Atoms | None = None) -> Ledger:
        """An empty ledger for a run of the model, or of what is left of it."""
        return Ledger(root, through_norms=self.through_norms)

    def bodies(self, removed: Mapping[str, Any]) -> Kept:
        """Which roots are kept when these neurons of these layers go."""
        kept = np.ones(len(self.root), bool)
        for name, neurons in removed.items():
            kept[self.layers[name].roots[list(neurons)]] = False
        return kept

    @property
    def experts_roots(self) -> Atoms:
        """Those of all experts."""
        return np.concatenate([np.empty(0, np.int64), *(mixture.roots for mixture in self.mixtures)])

    def __str__(self) -> str:
        """A line per layer: its neurons, the group with which they go, its activation calls, and why it is locked."""
        sites = layer_sites(self)
        rows = [("layer", "neurons", "units", "group", "sites", "locked")]
        for name, layer in self.layers.items():
            neurons, units = neurons_of(layer)
            group = "" if layer.locked else layer.group
            rows.append((name, neurons, units, group, operators(sites[name]), layer.locked or ""))
        return "\n".join(aligned(rows))

    def __repr__(self) -> str:
        neurons = sum(layer.width for layer in self.layers.values())
        trimmable = len(self.layers) - len(self.locked)
        return f"NeuronGraph({len(self.layers):,} layers, {trimmable:,} trimmable, {neurons:,} neurons)"


def group_of(name: str, free: Atoms, groups: dict[int, str]) -> str:
    """The group of a layer, by the first layer that has a free root in common; notes it for those that follow."""
    group = next((groups[value] for value in free.tolist() if value in groups), name)
    for value in free.tolist():
        groups.setdefault(value, group)
    return group


def neurons_of(layer: Layer) -> tuple[str, str]:
    """How many neurons a layer has, `64` or `40 of 64` that can go; and in how many units, if some only go together."""
    bodies = layer.roots[layer.removable]
    units = np.unique(bodies).size
    some = f"{bodies.size:,} of " if 0 < bodies.size < layer.width else ""
    return f"{some}{layer.width:,}", f"{units:,}" if units < bodies.size else ""


def layer_sites(graph: NeuronGraph) -> dict[str, tuple[Site, ...]]:
    """For each layer, the activation calls that its neurons reach, in the order of execution."""
    found: dict[str, list[Site]] = {name: [] for name in graph.layers}
    for site in graph.sites:
        here = np.zeros(len(graph.root), bool)
        for factor in site.labels.factors:
            here[graph.root[factor.atoms]] = True
        here[0] = False  # stands for what is no neuron
        for name, layer in graph.layers.items():
            if here[layer.roots].any():
                found[name].append(site)
    return {name: tuple(sites) for name, sites in found.items()}


def operators(sites: Sequence[Site]) -> str:
    """The operators of activation calls with their counts: `relu ×2, sigmoid`."""
    counts = Counter(site.name for site in sites)
    return ", ".join(f"{name} ×{count}" if count > 1 else name for name, count in counts.items())


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines of text, the titles first; numbers are set right. A column with nothing in it is left out."""
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    if not columns:
        return []
    rows = [*zip(*columns, strict=True)]
    # a row with nothing but its first cell may be longer than the column
    sizes = [max(map(len, column)) for column in zip(*(row for row in rows if any(row[1:])), strict=True)]
    numeric = [title in ("neurons", "units") for title in rows[0]]
    return [
        "  ".join(
            cell.rjust(size) if right else cell.ljust(size)
            for cell, size, right in zip(row, sizes, numeric, strict=True)
        ).rstrip()
        for row in rows
    ]


def memory_of(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same memory seen in the same way, as tied parameters are."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()


def cut(graph: NeuronGraph, sources: Mapping[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """Index every parameter and buffer by what is kept; tied ones stay tied, an untouched one is handed on as it is."""
    result: dict[str, Tensor] = {}
    shared: dict[Any, Tensor] = {}
    for name, tensor in sources.items():
        memory = memory_of(tensor)
        if memory not in shared:
            shared[memory] = _sliced(tensor.detach(), graph.axes[name], kept)
        result[name] = shared[memory]
    return result


def _sliced(tensor: Tensor, axes: tuple[Atoms, ...], kept: Kept) -> Tensor:
    kept_along = {axis: kept[roots] for axis, roots in enumerate(axes) if roots.size > 1}
    cuts = {axis: np.flatnonzero(keep) for axis, keep in kept_along.items() if not keep.all()}
    sliced = tensor
    if cuts and tensor.is_meta:
        sliced = tensor.new_empty([len(cuts[axis]) if axis in cuts else size for axis, size in enumerate(tensor.shape)])
    else:
        for axis, positions in cuts.items():
            sliced = sliced.index_select(axis, torch.from_numpy(positions).to(tensor.device))
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(tensor.ndim)
    if sliced is not tensor and last and tensor.is_contiguous(memory_format=last) and not tensor.is_contiguous():
        sliced = sliced.contiguous(memory_format=last)
    return sliced


def silence(model: nn.Module, graph: NeuronGraph, kept: Kept) -> nn.Module:
    """A copy of the model in which the parameters of what is not kept are zero: what a trimmed model must compute."""
    directions = _directions(model)
    silent = rebuild(model, {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()})
    for name, parameter in silent.named_parameters():
        for axis, roots in enumerate(graph.axes[name]):
            gone = np.flatnonzero(~kept[roots]) if roots.size > 1 else np.empty(0, np.int64)
            if gone.size:
                # a direction has no zero; its length, which is a parameter of its own, is silenced instead
                value = 1 if directions.get(name) == axis else 0
                parameter.data.index_fill_(axis, torch.from_numpy(gone).to(parameter.device), value)
    return compacted(without_caches(silent) if graph.device == "meta" else silent)


def _directions(model: nn.Module) -> dict[str, int]:
    """The parameters that weight norm, of either kind, takes for directions, and the axis whose lengths it keeps."""
    found: dict[str, int] = {}
    for place, module in model.named_modules():
        inside = f"{place}." if place else ""
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                found[f"{inside}{hook.name}_v"] = hook.dim
        if isinstance(module, ParametrizationList):
            norms = [one for one in module if isinstance(one, _WeightNorm)]
            found |= {f"{inside}original1": one.dim for one in norms}
    return found
