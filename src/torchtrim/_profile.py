"""Run a model over data and measure how often each of its neurons is silent.

`profile` counts at the model's activation sites: on the tensors that the activation functions return, wherever and
however often they are called. Every site's counts go to the neurons whose labels reach it (`_graph.py`).
"""

import json
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchtrim._activations import KINDS, Kind
from torchtrim._copies import named_tensors
from torchtrim._counting import Counts, native_room
from torchtrim._files import write_whole
from torchtrim._flow import Site
from torchtrim._graph import Layer, NeuronGraph
from torchtrim._tally import Totals
from torchtrim._watch import NotFiniteError, Watch
from torchtrim.criteria import Floats, Integers, LayerProfile
from torchtrim.errors import ProfileError, StoreError, TraceError

_FORMAT = "torchtrim-profile"
_VERSION = 1
_ARRAYS = tuple(field.name for field in fields(LayerProfile) if field.name not in ("name", "group", "locked"))


@dataclass(frozen=True, eq=False)
class SiteProfile:
    """What one activation call contributed to a layer; zeros, positions: int64 [neurons].

    index: the how-manieth activation call of a forward pass. operator, module: what was called, and where.
    kind: "rectifier" (ReLU and its kin, which give exact zeros), "smooth" or "gate".
    """

    index: int
    operator: str
    module: str
    kind: Kind
    zeros: Integers
    positions: Integers


class Profile(Mapping[str, LayerProfile]):
    """What was measured of a model: a `LayerProfile` for each layer, in the order of execution.

    `zeros`, `positions`, `apoz` and `mean` hold one array per layer with one entry per neuron; `examples` is how many
    examples were seen; `sites` lists what each activation call contributed; `through_norms` is as in `trace`.
    `print(profile)` shows the mean APoZ by layer, as table 1 of Hu et al., "Network Trimming", 2016, does.
    """

    def __init__(
        self,
        layers: Mapping[str, LayerProfile],
        examples: int,
        sites: Mapping[str, tuple[SiteProfile, ...]] | None = None,
        *,
        through_norms: bool = False,
    ) -> None:
        self.layers = dict(layers)
        self.examples = examples
        self.sites = dict(sites or {})
        self.through_norms = through_norms

    def __getitem__(self, name: str) -> LayerProfile:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def zeros(self) -> dict[str, Integers]:
        return {name: layer.zeros for name, layer in self.layers.items()}

    @property
    def positions(self) -> dict[str, Integers]:
        return {name: layer.positions for name, layer in self.layers.items()}

    @property
    def apoz(self) -> dict[str, Floats]:
        return {name: layer.apoz for name, layer in self.layers.items()}

    @property
    def mean(self) -> dict[str, Floats]:
        return {name: layer.mean for name, layer in self.layers.items()}

    @property
    def widths(self) -> dict[str, int]:
        return {name: layer.width for name, layer in self.layers.items()}

    def save(self, path: str | Path) -> None:
        """Write the profile as one safetensors file; it appears complete or not at all. Raises StoreError."""
        arrays: dict[str, Any] = {}
        described: list[dict[str, Any]] = []
        for index, layer in enumerate(self.layers.values()):
            arrays |= {f"{index}.{name}": np.ascontiguousarray(getattr(layer, name)) for name in _ARRAYS}
            sites = self.sites.get(layer.name, ())
            for position, site in enumerate(sites):
                arrays |= {
                    f"{index}.site{position}.zeros": site.zeros,
                    f"{index}.site{position}.positions": site.positions,
                }
            described.append(
                {
                    "name": layer.name,
                    "group": layer.group,
                    "locked": layer.locked,
                    "sites": [[site.index, site.operator, site.module, site.kind] for site in sites],
                }
            )
        content = {"format": _FORMAT, "version": _VERSION, "examples": self.examples, "layers": described}
        content |= {"through_norms": True} if self.through_norms else {}
        write_whole(Path(path), to_safetensors(arrays, {"torchtrim": json.dumps(content)}))

    @classmethod
    def load(cls, path: str | Path) -> "Profile":
        """Read what `save` wrote. Raises StoreError when the file is missing, damaged, or something else."""
        try:
            with safe_open(str(path), "numpy") as file:
                content = json.loads((file.metadata() or {}).get("torchtrim", "{}"))
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise StoreError(f"{path}: expected a profile that `Profile.save` wrote, found: {error}") from error
        if content.get("format") != _FORMAT or content.get("version") != _VERSION:
            raise StoreError(
                f"{path}: expected a profile of version {_VERSION} that `Profile.save` wrote, found "
                f"{content.get('format', 'another safetensors file')!r} {content.get('version', '')}".rstrip()
            )
        layers: dict[str, LayerProfile] = {}
        sites: dict[str, tuple[SiteProfile, ...]] = {}
        for index, entry in enumerate(content["layers"]):
            of_layer = {name: arrays[f"{index}.{name}"] for name in _ARRAYS}
            name = entry["name"]
            layers[name] = LayerProfile(name=name, group=entry["group"], locked=entry["locked"], **of_layer)
            sites[name] = tuple(
                SiteProfile(
                    site,
                    operator,
                    module,
                    kind,
                    *(arrays[f"{index}.site{at}.{array}"] for array in ("zeros", "positions")),
                )
                for at, (site, operator, module, kind) in enumerate(entry["sites"])
            )
        return cls(layers, content["examples"], sites, through_norms=content.get("through_norms", False))

    def __str__(self) -> str:
        rows = [("layer", "neurons", "mean APoZ", "above 90 %", "always zero")]
        rows += [_row(layer) for layer in self.layers.values() if layer.positions.any()]
        sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                [row[0].ljust(sizes[0]), *(cell.rjust(size) for cell, size in zip(row[1:], sizes[1:], strict=True))]
            )
            for row in rows
        ]
        unseen = [name for name, layer in self.layers.items() if not layer.positions.any()]
        notes = [f"no activation was observed at: {', '.join(unseen)}"] if unseen else []
        return "\n".join([f"Profile of {self.examples:,} examples", *lines, *notes])


def _row(layer: LayerProfile) -> tuple[str, ...]:
    apoz = layer.apoz
    dead = layer.zeros == layer.positions
    return (
        layer.name,
        str(layer.width),
        f"{100 * np.nanmean(apoz):.2f} %",
        str(int((apoz > 0.9).sum())),
        str(int((dead & (layer.positions > 0)).sum())),
    )


Forward = Callable[[nn.Module, Any], Any]


def profile(
    model: nn.Module, batches: Iterable[Any], forward: Forward | None = None, *, through_norms: bool = False
) -> Profile:
    """Measure every neuron of a model over data, in one pass, in evaluation mode and without gradients.

    batches: any iterable, such as a DataLoader. A batch that is a tensor is the model's input; of a tuple or list the
    first element is; a mapping holds keyword inputs. `forward=lambda model, batch: ...` calls the model otherwise.
    Tensors are moved to where the model is. Memory does not grow with the data. through_norms: as for `trace`; a plan
    that is selected from the profile has it too.

    The model is left as it was found: modes, gradients, hooks and random state.
    Raises ProfileError: no batches, a batch that does not fit the model, an activation that is NaN or infinite; the
    message names the batch, and the layer where there is one.
    """
    if isinstance(batches, Tensor):
        raise ProfileError(
            "batches: expected an iterable of batches, found a tensor, whose rows it would give; pass [it]"
        )
    device = next((tensor.device for tensor in named_tensors(model).values()), torch.device("cpu"))
    native_room(device.type)  # a way to count that is asked for and missing is known before the first batch
    call = forward or _call
    watch = Watch(model, through_norms=through_norms)
    number = 0
    with _as_found(model, device):
        for number, batch in enumerate(batches, 1):
            moved = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), batch)
            try:
                watch.run(partial(call, model, moved))
            except NotFiniteError:
                raise
            except ProfileError as error:
                raise ProfileError(f"batch {number}: {error}") from error
            except TraceError as error:
                otherwise = "" if forward else " To call it otherwise, pass forward=lambda model, batch: ..."
                raise ProfileError(f"batch {number}: {error}{otherwise}") from error
        watch.look()
    if watch.graph is None:
        raise ProfileError(
            "`forward` did not call the model; expected it to call model(...) with the batch"
            if number and forward
            else "expected at least one batch, found none; look at what the loader yields"
        )
    return _result(model, watch.graph, watch.tallies.totals(), watch.examples)


def unmeasured(model: nn.Module, graph: NeuronGraph) -> Profile:
    """The profile of a model that has seen no data: its layers, groups, locks and norms of weights."""
    return _result(model, graph, {}, 0)


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


@contextmanager
def _as_found(model: nn.Module, device: torch.device) -> Generator[None]:
    """Evaluation mode inside; modes and random state are as before at the end."""
    modes = [(module, module.training) for module in model.modules()]
    fused = torch.backends.mha.get_fastpath_enabled()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            model.eval()
            torch.backends.mha.set_fastpath_enabled(False)  # it would hide the activations of a transformer layer
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for module, mode in modes:
                module.training = mode


# ------------------------------------------------------------------ from sites to layers


def _result(model: nn.Module, graph: NeuronGraph, totals: Totals, examples: int) -> Profile:
    incoming, outgoing = _incoming(model, graph), _outgoing(model, graph)
    seen = [_ByRoot(graph, site, index, counts) for (site, index), counts in totals.items()]
    layers: dict[str, LayerProfile] = {}
    sites: dict[str, tuple[SiteProfile, ...]] = {}
    for name, layer in graph.layers.items():
        reached = [(one.site, found) for one in seen if (found := one.of(layer)) is not None]
        sites[name] = _sites(reached)
        best = min((KINDS.index(site.kind) for site, _ in reached), default=0)
        chosen = [entry for entry in reached if KINDS.index(entry[0].kind) == best]
        share = _Share.of_nothing(layer.width)
        for _, part in chosen:
            share = share.plus(part)
        layers[name] = LayerProfile(
            name=name,
            zeros=share.zeros,
            positions=share.positions,
            mean=_ratio(share.total, share.positions),
            mean_square=_ratio(share.square, share.positions),
            incoming_l1=incoming[name][0],
            incoming_l2=incoming[name][1],
            outgoing_l1=outgoing[0][layer.roots],
            outgoing_l2=outgoing[1][layer.roots],
            unit=np.where(layer.removable, layer.roots, -1),
            group=layer.group,
            locked=layer.locked,
        )
    return Profile(layers, examples, sites, through_norms=graph.through_norms)


class _Share(NamedTuple):
    """The counts of some neurons: int64 or float64, [neurons] each."""

    zeros: Integers
    positions: Integers
    total: Floats
    square: Floats

    @classmethod
    def of_nothing(cls, width: int) -> "_Share":
        none = np.zeros(width, np.int64)
        return cls(none, none, none.astype(np.float64), none.astype(np.float64))

    def plus(self, other: "_Share") -> "_Share":
        return _Share(
            self.zeros + other.zeros,
            self.positions + other.positions,
            self.total + other.total,
            self.square + other.square,
        )


class _ByRoot:
    """The counts of one factor of one site, and how to find a layer's share of them."""

    def __init__(self, graph: NeuronGraph, site: Site, index: int, counts: Counts) -> None:
        self.site = site
        self.roots = graph.root[site.labels.factors[index].atoms].ravel()
        zeros, total, square = (t.cpu().numpy().ravel() for t in (counts.zeros, counts.total, counts.square))
        self.counts = _Share(zeros, np.full(zeros.size, counts.positions), total, square)
        self.unique, self.inverse = np.unique(self.roots, return_inverse=True)

    def of(self, layer: Layer) -> _Share | None:
        """What was counted of the layer's neurons; None if it has none here."""
        if np.array_equal(self.roots, layer.roots):
            return self.counts  # neurons that only go together still keep counts of their own
        place = np.searchsorted(self.unique, layer.roots).clip(max=self.unique.size - 1)
        here = (self.unique[place] == layer.roots) & (layer.roots > 0)
        if not here.any():
            return None
        gathered: list[Any] = []
        for array in self.counts:
            sums = np.zeros(self.unique.size, array.dtype)
            np.add.at(sums, self.inverse, array)
            gathered.append(np.where(here, sums[place], 0))
        return _Share(*gathered)


def _sites(reached: list[tuple[Site, _Share]]) -> tuple[SiteProfile, ...]:
    """One entry per activation call; a call that was traced at several sizes is one."""
    merged: dict[int, tuple[Site, _Share]] = {}
    for site, share in reached:
        merged[site.index] = (site, merged[site.index][1].plus(share) if site.index in merged else share)
    return tuple(
        SiteProfile(site.index, site.name, site.module, site.kind, share.zeros, share.positions)
        for _, (site, share) in sorted(merged.items())
    )


def _ratio(total: Floats, positions: Integers) -> Floats:
    return np.divide(total, positions, out=np.full(total.size, np.nan), where=positions > 0)


def _incoming(model: nn.Module, graph: NeuronGraph) -> dict[str, tuple[Floats, Floats]]:
    """L1 and L2 norm of the weights that produce each neuron: float64 [neurons]."""
    weights = _weights(model)
    return {
        name: (_norms(weights[layer.parameter], layer.axis, 1), _norms(weights[layer.parameter], layer.axis, 2))
        for name, layer in graph.layers.items()
    }


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, without the connections that `torch.nn.utils.prune` has taken out."""
    buffers = dict(model.named_buffers())
    masks = {name: f"{name.removesuffix('_orig')}_mask" for name, _ in model.named_parameters()}
    return {
        name: parameter * buffers[masks[name]] if masks[name] in buffers else parameter
        for name, parameter in named_tensors(model).items()
        if isinstance(parameter, nn.Parameter)
    }


def _outgoing(model: nn.Module, graph: NeuronGraph) -> tuple[Floats, Floats]:
    """L1 and L2 norm of the weights that read each root: float64 [roots]."""
    first, second = np.zeros((2, len(graph.root)))
    producing = {(layer.parameter, layer.axis) for layer in graph.layers.values()}
    for name, parameter in _weights(model).items():
        for axis, roots in enumerate(graph.axes[name] if parameter.ndim > 1 else ()):
            if (name, axis) not in producing and roots.size > 1:
                np.add.at(first, roots, _norms(parameter, axis, 1))
                np.add.at(second, roots, _norms(parameter, axis, 2) ** 2)
    return first, np.sqrt(second)


def _norms(weight: Tensor, axis: int, order: int) -> Floats:
    """The norm of each slice along an axis: float64 [slices], summed in single precision at least."""
    others = [other for other in range(weight.ndim) if other != axis]
    values = weight.detach() if weight.dtype == torch.float64 else weight.detach().float()
    powers = values.abs() if order == 1 else values.square()
    sums = (powers.sum(others) if others else powers).double().cpu().numpy()
    return sums if order == 1 else np.sqrt(sums)
