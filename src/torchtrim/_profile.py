"""What was measured of a model: every neuron's share of zeros and moments, and how far to trust them."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from torchtrim._counting import Counts
from torchtrim._files import write_whole
from torchtrim._parts import Part, SiteProfile, added_up, measured_layer, sites_of
from torchtrim._summary import Summary, half_widths
from torchtrim.criteria import Floats, Integers, LayerProfile
from torchtrim.errors import ProfileError, StoreError

_FORMAT = "torchtrim-profile"
_VERSION = 2
_WORDS = ("name", "group", "locked")
_ARRAYS = tuple(one.name for one in fields(LayerProfile) if one.name not in _WORDS)
_CALL = ("index", "operator", "module", "kind", "factor")
_TENSORS = ("zeros", "total", "square", "nonzero_square", "nonzero_positions")
_NUMBERS = ("positions", "positions_square", "examples")


class Profile(Mapping[str, LayerProfile]):
    """What was measured of a model: a `LayerProfile` for each layer, in the order of execution.

    `zeros`, `positions`, `apoz`, `standard_error` and `mean` hold one array per layer with one entry per neuron;
    `examples` is how many examples were seen; `sites` lists what each activation call contributed; `notes` says what
    to beware of; `through_norms` is as in `trace`, `zero_tolerance` as in `profile`; `partial` says whether the pass
    over the data was interrupted; `in_doubt` lists, by layer, the neurons of which `until` had not settled whether they
    go, and is None without it.
    `print(profile)` shows the mean APoZ by layer, as table 1 of Hu et al., "Network Trimming", 2016, does.
    """

    def __init__(
        self,
        layers: Mapping[str, LayerProfile],
        examples: int,
        *,
        parts: Iterable[Part] = (),
        roots: Mapping[str, Integers] | None = None,
        through_norms: bool = False,
        zero_tolerance: float = 0.0,
        partial: bool = False,
        in_doubt: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self.layers = dict(layers)
        self.examples = examples
        self.partial = partial
        self.in_doubt = None if in_doubt is None else {name: tuple(neurons) for name, neurons in in_doubt.items()}
        self.through_norms = through_norms
        self.zero_tolerance = zero_tolerance
        self._parts = tuple(parts)
        self._roots = dict(roots or {})

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
    def standard_error(self) -> dict[str, Floats]:
        return {name: layer.standard_error for name, layer in self.layers.items()}

    @property
    def mean(self) -> dict[str, Floats]:
        return {name: layer.mean for name, layer in self.layers.items()}

    @property
    def widths(self) -> dict[str, int]:
        return {name: layer.width for name, layer in self.layers.items()}

    @cached_property
    def sites(self) -> dict[str, tuple[SiteProfile, ...]]:
        return {name: sites_of(self._parts, self._roots[name]) if self._roots else () for name in self.layers}

    @property
    def notes(self) -> tuple[str, ...]:
        """What to beware of: figures that are uncertain, and figures that say little."""
        seen = [layer for layer in self.layers.values() if layer.positions.any()]
        typical = float(np.median(np.concatenate([[0.0], *map(half_widths, seen)])))
        notes = [f"few examples: half of the neurons' APoZ is known to ± {100 * typical:.1f} % or worse; measure more"]
        notes = notes if typical > _TOO_WIDE else []
        if self.partial:
            notes.insert(0, f"partial: measuring was interrupted after {self.examples:,} examples")
        constant = [layer.name for layer in seen if layer.width > 1 and np.ptp(layer.apoz) == 0]
        without = [name for name in constant if not self[name].zeros.any()]
        if without:
            how = "a larger zero_tolerance" if self.zero_tolerance else "zero_tolerance=0.01"
            calls = sorted({site.operator for name in without for site in self.sites[name]})
            notes.append(
                f"no zeros after {', '.join(calls)} in {_some(without)}: APoZ says nothing there; measure with {how}, "
                "or choose by another criterion"
            )
        alike = [name for name in constant if name not in without]
        if alike:
            notes.append(f"all neurons have the same APoZ in {_some(alike)}: it gives no reason to choose among them")
        return tuple(notes)

    def summary(self) -> Summary:
        """A row for each layer that was seen, as table 1 of Hu et al., 2016; it prints as a table."""
        return Summary.of(self.layers.values())

    def merge(self, *others: "Profile") -> "Profile":
        """This profile and others of the same model, measured over other data, as one measured over all of it.

        `Profile.merge(first, second)` does as well. Raises ProfileError where they are not of the same model, weights
        included, or were measured otherwise.
        """
        for other in others:
            if differs := difference(self, other):
                raise ProfileError(
                    f"merge: expected profiles of one model, measured in one way, found {differs}; measure both anew"
                )
        parts = added_up(part for one in (self, *others) for part in one._parts)
        examples = sum(one.examples for one in (self, *others))
        partial = any(one.partial for one in (self, *others))
        return self.with_parts(parts, examples, zero_tolerance=self.zero_tolerance, partial=partial)

    def with_parts(
        self,
        parts: Sequence[Part],
        examples: int,
        *,
        zero_tolerance: float,
        partial: bool = False,
        in_doubt: Mapping[str, Sequence[int]] | None = None,
    ) -> "Profile":
        """The same layers with the figures that these parts give."""
        return Profile(
            {name: measured_layer(layer, self._roots[name], parts) for name, layer in self.layers.items()},
            examples,
            parts=parts,
            roots=self._roots,
            through_norms=self.through_norms,
            zero_tolerance=zero_tolerance,
            partial=partial,
            in_doubt=in_doubt,
        )

    def save(self, path: str | Path) -> None:
        """Write the profile as one safetensors file; it appears complete or not at all. Raises StoreError."""
        write_whole(Path(path), self.packed())

    def packed(self, more: Mapping[str, Any] | None = None) -> bytes:
        """The content of that file, with more words in it."""
        arrays: dict[str, Any] = {}
        for index, layer in enumerate(self.layers.values()):
            arrays |= {f"{index}.{name}": np.ascontiguousarray(getattr(layer, name)) for name in _ARRAYS}
            arrays |= {f"{index}.roots": self._roots[layer.name]} if self._roots else {}
        for index, part in enumerate(self._parts):
            arrays[f"part{index}.roots"] = part.roots
            arrays |= {f"part{index}.{name}": getattr(part.counts, name).numpy() for name in _TENSORS}
        content = {
            **(more or {}),
            "format": _FORMAT,
            "version": _VERSION,
            "examples": self.examples,
            "through_norms": self.through_norms,
            "zero_tolerance": self.zero_tolerance,
            "partial": self.partial,
            "in_doubt": self.in_doubt,
            "layers": [{name: getattr(layer, name) for name in _WORDS} for layer in self.layers.values()],
            "parts": [
                {name: getattr(part, name) for name in _CALL} | {name: getattr(part.counts, name) for name in _NUMBERS}
                for part in self._parts
            ],
        }
        return to_safetensors(arrays, {"torchtrim": json.dumps(content)})

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
        layers = {
            words["name"]: LayerProfile(**words, **{name: arrays[f"{index}.{name}"] for name in _ARRAYS})
            for index, words in enumerate(content["layers"])
        }
        roots = {name: arrays[f"{index}.roots"] for index, name in enumerate(layers) if f"{index}.roots" in arrays}
        parts: list[Part] = []
        for index, described in enumerate(content["parts"]):
            counted: dict[str, Any] = {name: torch.from_numpy(arrays[f"part{index}.{name}"]) for name in _TENSORS}
            counted |= {name: described.pop(name) for name in _NUMBERS}
            parts.append(Part(**described, roots=arrays[f"part{index}.roots"], counts=Counts(**counted)))
        how = {name: content[name] for name in ("through_norms", "zero_tolerance", "partial", "in_doubt")}
        return cls(layers, content["examples"], parts=parts, roots=roots, **how)

    def __str__(self) -> str:
        unseen = [name for name, layer in self.layers.items() if not layer.positions.any()]
        notes = [f"no activation was observed at: {', '.join(unseen)}"] if unseen else []
        if self.in_doubt is not None:
            doubtful = sum(map(len, self.in_doubt.values()))
            notes.append(
                f"settled for all neurons but {doubtful}, see in_doubt" if doubtful else "settled for all neurons"
            )
        return "\n".join([f"Profile of {self.examples:,} examples", str(self.summary()), *self.notes, *notes])


_TOO_WIDE = 0.05  # of half an interval


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else "")


def difference(one: Profile, other: Profile) -> str:
    """How two profiles are not of one model and measured in one way; empty if they are."""
    if not (one._roots and other._roots):
        return "one that was not measured"
    if list(one) != list(other):
        return "other layers"
    for name, layer in one.items():
        theirs = other[name]
        if layer.locked != theirs.locked or not np.array_equal(one._roots[name], other._roots[name]):
            return f"other neurons in {name!r}"
        for norm in ("incoming_l1", "outgoing_l1"):  # sums of weights round otherwise on other machines
            if not np.allclose(getattr(layer, norm), getattr(theirs, norm), rtol=1e-4):
                return f"other weights in {name!r}"
    settings = [(key, getattr(one, key), getattr(other, key)) for key in ("through_norms", "zero_tolerance")]
    return "; ".join(f"{key}={mine} and {key}={theirs}" for key, mine, theirs in settings if mine != theirs)
