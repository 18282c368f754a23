"""What a trace found, and what can be done with it: the layers and their neurons, cut out or silenced."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm

from torchtrim._flow import Site, Step, named_tensors, rebuild
from torchtrim._labels import Atoms

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

    index: of a list of sizes, which one; None where the attribute is an integer.
    """

    module: str
    attribute: str
    index: int | None
    axis: int
    roots: Atoms

    def left(self, kept: Kept) -> int:
        others = tuple(other for other in range(self.roots.ndim) if other != self.axis)
        return int(kept[self.roots].any(axis=others).sum())


@dataclass(frozen=True, eq=False)
class NeuronGraph:
    """What `trace` found. `layers` in the order of execution; tied layers share a `group` (its first layer's name).

    `axes`: the roots of every axis of every tensor; `atoms`: the atoms that these are the roots of.
    """

    layers: Mapping[str, Layer]
    axes: Mapping[str, tuple[Atoms, ...]]
    atoms: Mapping[str, tuple[Atoms, ...]]
    device: str
    recordings: tuple[tuple[bool, tuple[Step, ...]], ...]
    sites: tuple[Site, ...]
    root: Atoms
    example: Any
    descriptions: tuple[Description, ...] = ()

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
    sliced = tensor
    for axis, roots in enumerate(axes):
        keep = kept[roots] if roots.size > 1 else np.ones(roots.size, bool)
        if not keep.all():
            sliced = sliced.index_select(axis, torch.from_numpy(np.flatnonzero(keep)).to(tensor.device))
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
    return silent


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
