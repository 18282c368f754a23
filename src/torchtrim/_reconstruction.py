"""Choose the neurons without which the layers that read them can still compute what they do.

Optimal brain surgeon (Hassibi and Stork, 1993) on activations, a neuron at a time: what its removal costs once the
layers that read it have been refitted by least squares, as `repair` does. Exact for one neuron; for many, greedy: the
cheapest goes, the others' costs are brought up to date by a block of the inverse, and so on.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from torchtrim._calibration import Calibration, as_found
from torchtrim._consumers import Consumer, Reader, consumers
from torchtrim._copies import named_modules
from torchtrim._forward import Forward
from torchtrim._gains import Refitted, errors_at_outputs
from torchtrim._graph import trace
from torchtrim._labels import Atoms
from torchtrim._moments import Moments, check_fit, factor, features, groups, pieces, rows
from torchtrim._neurons import Layer, NeuronGraph
from torchtrim._select import check_layers
from torchtrim._unmeasured import unmeasured
from torchtrim.criteria import Criterion, Floats, LayerProfile
from torchtrim.errors import PlanError, ProfileError

_EXACT = 256  # neurons left, up to which they go one by one; of more, as many at once as there are times as many
_DAMAGE = 0.3  # the error of layers of which it is measured what becomes at the outputs


def reconstruction(
    model: nn.Module,
    example: Any,
    batches: Iterable[Any],
    layers: Sequence[str] | None = None,
    *,
    forward: Forward | None = None,
    ridge: float = 1e-3,
    block: int = 6144,
    positions: int | None = None,
    through_norms: bool = False,
) -> Criterion:
    """A criterion for `select`: minus the error of what reads a layer, once a neuron and all before it are gone.

    The squared error is that of the outputs of the linear and convolutional layers that read the neurons, refitted by
    least squares; relative to the outputs' variance, and the mean over these layers. Neurons go in the order in which
    it rises least, so that `Fraction(0.5)` takes half of that order, and `Threshold(-0.01)` as many as cost an error of
    1 %; other rules mean little here. Each group of layers is looked at alone, the others being whole. What such an
    error becomes at the model's outputs, by which `Budget` weighs layers, is measured too: the model runs on the first
    few hundred examples once for each group, refitted without as many neurons as cost an error of 30 %.

    example: as for `trim`; what `trace` found will do. batches, forward: as for `profile`; a pass over them for as many
    layers as `block` has room for. Of each layer that reads neurons the square of its inputs (times the kernel), or of
    its blocks, is kept in float64, and twice while its group is looked at. layers: as for `select`. ridge, block,
    positions: as for `repair`; a layer with more inputs than `block` is looked at by blocks, each of which has to make
    up for its own. through_norms: as for `trace`.

    Raises PlanError: layers that are unknown or locked, or that no linear or convolutional layer reads. Raises
    ProfileError: batches that do not fit.
    """
    check_fit("reconstruction", ridge, block, positions)
    graph = example if isinstance(example, NeuronGraph) else trace(model, example, through_norms=through_norms)
    profile = unmeasured(model, graph)
    check_layers(profile, layers)
    data = Calibration(batches, forward)
    chosen = _chosen(graph, layers)
    readers = _measured(model, graph, chosen, data, ridge, block, positions)
    cost = np.full(len(graph.root), np.nan)
    damaged: dict[str, tuple[float, list[Refitted]]] = {}
    for group in dict.fromkeys(layer.group for layer in chosen.values()):
        units = [layer.roots[layer.removable] for layer in chosen.values() if layer.group == group]
        damaged[group] = _remove_all(np.unique(np.concatenate(units)), readers, cost)
    with as_found(model):
        felt = errors_at_outputs(model, {group: layers for group, (_, layers) in damaged.items()}, data)
    gains = felt and {group: felt[group] / error if error else 1.0 for group, (error, _) in damaged.items()}
    return Reconstruction({name: cost[layer.roots] for name, layer in chosen.items()}, gains)


class Reconstruction:
    """costs: by layer, float64 [neurons], the error once this one and all before it are gone; NaN: nothing is known.

    gains: by group of layers, the error of the model's outputs over that of the layers that read the group, where that
    is `_DAMAGE`; None where outputs cannot be compared.
    """

    __name__ = "reconstruction"

    def __init__(self, costs: Mapping[str, Floats], gains: Mapping[str, float] | None) -> None:
        self.costs, self.gains = costs, gains

    def __call__(self, profile: LayerProfile) -> Floats:
        costs = self.costs.get(profile.name)
        if costs is None or costs.shape != (profile.width,):
            raise PlanError(
                f"reconstruction: layer {profile.name!r} was not measured with {profile.width} neurons; measure it "
                "with this model and these layers"
            )
        if np.isnan(costs[profile.unit >= 0]).any():
            raise PlanError(
                f"reconstruction: nothing that reads layer {profile.name!r} is linear or convolutional, with weights "
                "of its own; leave it out"
            )
        return -costs


def _chosen(graph: NeuronGraph, layers: Sequence[str] | None) -> dict[str, Layer]:
    """The layers asked for, and those of their groups."""
    free = {name: layer for name, layer in graph.layers.items() if layer.locked is None}
    asked = [
        layer.group
        for name, layer in free.items()
        if layers is None or any(name == one or fnmatchcase(name, one) for one in layers)
    ]
    return {name: layer for name, layer in free.items() if layer.group in asked}


def _measured(
    model: nn.Module,
    graph: NeuronGraph,
    chosen: Mapping[str, Layer],
    data: Calibration,
    ridge: float,
    block: int,
    positions: int | None,
) -> list["_Reader"]:
    """What reads the layers, with the moments of all that it reads, of the model as it is."""
    kept = np.ones(len(graph.root), bool)
    for layer in chosen.values():
        kept[layer.roots[layer.removable]] = False
    found, _ = consumers(model, graph, kept)
    modules = cast(Mapping[str, Any], named_modules(model))
    waiting: list[_Reader] = []
    for consumer in found:
        module = modules[consumer.name]
        roots = graph.axes[f"{consumer.name}.weight".lstrip(".")][1]
        parts = pieces(module, block)
        waiting += [_Reader(consumer, module, columns, roots[columns], positions) for columns in parts]
    ready = list(waiting)
    with as_found(model):
        while waiting:
            now = [waiting.pop(0)]
            while waiting and sum(reader.size for reader in (*now, waiting[0])) <= block**2:
                now.append(waiting.pop(0))
            for batch in data:
                listeners: dict[nn.Module, _Listeners] = {}
                for reader in now:
                    listeners.setdefault(reader.module, _Listeners()).append(reader)
                data.run(model, batch, listeners)
            for reader in now:
                reader.solve(ridge)
    return [reader for reader in ready if reader.moments.count]


class _Listeners(list["_Reader"]):
    """Several blocks of the inputs of one layer."""

    def __call__(self, inputs: Tensor, outputs: Tensor) -> None:
        for reader in self:
            reader.add(inputs, outputs)


class _Reader:
    """A block of the inputs of a layer, and what it costs the layer to do without some of them.

    roots: int64 [input channels of the block], the neuron that each is of.
    """

    def __init__(self, consumer: Consumer, module: Reader, columns: slice, roots: Atoms, positions: int | None) -> None:
        self.name, self.module, self.columns, self.positions = consumer.name, module, columns, positions
        self.centred = module.bias is not None or consumer.norm is not None
        self.moments = Moments()
        owners = np.repeat(roots, features(module))
        self.inputs = {int(root): torch.from_numpy(np.flatnonzero(owners == root)) for root in np.unique(roots) if root}
        self.size = groups(module) * owners.size**2

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        for read, _ in rows(self.module, inputs, outputs, self.columns, self.positions, self.moments.count):
            self.moments.add(self.moments.about(read))

    def solve(self, ridge: float) -> None:
        """The inverse of the moments, float64 [groups, inputs, inputs]; from here on they are not needed."""
        if not self.moments.count:
            return
        square = self.moments.spread(centred=self.centred)
        if not square.isfinite().all():
            raise ProfileError(f"{self.name}: what it reads is not finite; look at the weights and the data")
        self.weight = self._original()
        self.mean = self.moments.mean
        self.variance = float((self.weight * (square @ self.weight)).sum())
        self.moments.square = self.moments.total
        variances = square.diagonal(dim1=1, dim2=2).clone()
        self.inverse = torch.cholesky_inverse(factor(square, ridge, self.name))
        added = square.diagonal(dim1=1, dim2=2) - variances
        self.free = added * self.weight.square().sum(2)  # what goes is no change of what is left, and costs no ridge

    def copy(self) -> "_Reader":
        """Another that is whole when this one is."""
        other = copy.copy(self)
        other.inputs, other.weight, other.inverse = dict(self.inputs), self.weight.clone(), self.inverse.clone()
        return other

    def constant(self) -> Tensor:
        """What the outputs are moved by, so that their means stay: float64 [outputs]."""
        lost = self._original() - self.weight
        return (self.mean.unsqueeze(1) @ lost).flatten() * self.centred

    def _original(self) -> Tensor:
        """The weight of this block, float64 [groups, inputs, outputs of a group]."""
        weight = self.module.weight.detach().unflatten(0, (groups(self.module), -1))[:, :, self.columns]
        return weight.flatten(2).mT.double()

    def costs(self, units: Atoms) -> Floats:
        """By how much the squared error rises, relative to the variance, when one of these goes: float64 [units]."""
        found = np.zeros(units.size)
        places: dict[int, list[int]] = {}
        for place, unit in enumerate(units.tolist()):
            if unit in self.inputs:
                places.setdefault(len(self.inputs[unit]), []).append(place)
        for some in places.values():
            inputs = torch.stack([self.inputs[int(unit)] for unit in units[some]])
            found[some] = self._rise(inputs).cpu().numpy()
        return found / (self.variance or 1.0)

    def _rise(self, inputs: Tensor) -> Tensor:
        """Of sets of inputs, int64 [sets, inputs]: Σ w (P⁻¹) w over the groups, P the inverse's block of a set.

        Less the ridge on the weights that go, which the inverse has like that on all others.
        """
        inputs = inputs.to(self.weight.device)
        weight = self.weight[:, inputs]
        if inputs.shape[1] == 1:
            diagonal = self.inverse.diagonal(dim1=1, dim2=2)[:, inputs[:, 0]]
            rise = (weight.square().sum((2, 3)) / diagonal).sum(0)
        else:
            block = self.inverse[:, inputs[:, :, None], inputs[:, None, :]]
            rise = (weight * torch.linalg.solve(block, weight)).sum((0, 2, 3))
        return (rise - self.free[:, inputs].sum((0, 2))).clamp_min(0)

    def remove(self, units: Atoms) -> float:
        """Do without these, the others making up for them; by how much the squared error rises."""
        mine = [self.inputs.pop(unit) for unit in units.tolist() if unit in self.inputs]
        if not mine:
            return 0.0
        gone = torch.cat(mine).to(self.weight.device)
        rise = float(self._rise(gone[None])) / (self.variance or 1.0)
        across = torch.linalg.solve(self.inverse[:, gone[:, None], gone[None]], self.inverse[:, gone])
        self.weight -= across.mT @ self.weight[:, gone]
        self.inverse.baddbmm_(self.inverse[:, :, gone], across, alpha=-1)
        return rise


def _remove_all(units: Atoms, readers: Sequence[_Reader], cost: Floats) -> tuple[float, list[Refitted]]:
    """Remove the units in the order of what they cost, and note for each the error once it is gone.

    Returns the first error of at least `_DAMAGE`, or the last, and the layers that read the units as they are then.
    """
    mine = [reader.copy() for reader in readers if not reader.inputs.keys().isdisjoint(units.tolist())]
    known = np.isin(units, [unit for reader in mine for unit in reader.inputs])
    left, error = units[known], 0.0
    count = len({reader.name for reader in mine}) or 1
    damaged: tuple[float, list[Refitted]] = 0.0, []
    while left.size:
        rises = np.sum([reader.costs(left) for reader in mine], 0) / count
        now = np.argsort(rises, kind="stable")[: max(1, left.size // _EXACT)]
        rise = sum(reader.remove(left[now]) for reader in mine) / count
        shares = np.cumsum(rises[now])
        cost[left[now]] = error + rise * (shares / shares[-1] if shares[-1] > 0 else 1.0)
        error += max(rise, 0.0)
        left = np.delete(left, now)
        if damaged[0] < _DAMAGE and (error >= _DAMAGE or not left.size):
            damaged = error, _refitted(mine)
    return damaged


def _refitted(readers: Sequence[_Reader]) -> list[Refitted]:
    """The layers of these blocks."""
    layers: dict[Reader, Refitted] = {}
    for reader in readers:
        module = reader.module
        weight = module.weight.detach()
        before = layers.setdefault(module, Refitted(module, weight.clone(), torch.zeros(len(weight)).to(weight)))
        block = before.weight.unflatten(0, (groups(module), -1))[:, :, reader.columns]
        block.copy_(reader.weight.mT.reshape(block.shape))
        layers[module] = before._replace(constant=before.constant + reader.constant())
    return [*layers.values()]
