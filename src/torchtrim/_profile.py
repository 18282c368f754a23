"""What was measured of a model: every neuron's share of zeros and moments, and how far to trust them."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from torchtrim._classes import Label, in_order
from torchtrim._counting import Counts
from torchtrim._drawing import form_of
from torchtrim._files import write_whole
from torchtrim._parts import Part, SiteProfile, added_up, measured_layer, sites_of
from torchtrim._profile_picture import classes_picture, layers_picture
from torchtrim._summary import SILENT, Summary, half_widths
from torchtrim.criteria import Floats, Integers, LayerProfile
from torchtrim.errors import ProfileError, StoreError, nearest

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
    go, and is None without it; `classes` holds a profile of the examples of each class, by label, where `profile` was
    asked for them.
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
        classes: Mapping[Label, "Profile"] | None = None,
    ) -> None:
        self.layers = dict(layers)
        self.examples = examples
        self.partial = partial
        self.classes = dict(classes or {})
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
        free = [layer for layer in seen if layer.locked is None]  # of the others nobody chooses
        constant = [layer.name for layer in free if layer.width > 1 and np.ptp(layer.apoz) == 0]
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
        left = [name for name in self if self.classes and self[name].positions.sum() > self._by_class(name)]
        if left:
            notes.append(f"not by class: {_some(left)}, where the first axis of an activation is not the examples")
        return tuple(notes)

    def _by_class(self, name: str) -> int:
        """How many activations of a layer were counted by class."""
        return sum(int(one[name].positions.sum()) for one in self.classes.values())

    def summary(self) -> Summary:
        """A row for each layer that was seen, as table 1 of Hu et al., 2016; it prints as a table."""
        return Summary.of(self.layers.values())

    def plot(self, path: str | Path, *, layer: str | None = None) -> None:
        """Draw the neurons' APoZ, as histograms and as a heat map of all layers; the ending says the form, such as png.

        layer: draw that layer's neurons for each class, as a heat map. Needs `pip install 'torchtrim[report]'`.
        Raises ProfileError: nothing was seen, or not by class; no such layer; no matplotlib; an unknown ending.
        Raises StoreError: the file cannot be written.
        """
        form = form_of(path)
        seen = [one for one in self.layers.values() if one.positions.any()]
        if layer is not None:
            classes = self._seen_by_class(layer)
            content = classes_picture(self[layer], classes, self.examples, form)
        elif seen:
            content = layers_picture(seen, self.examples, form)
        else:
            raise ProfileError("plot: expected a profile that has seen data, found none")
        write_whole(Path(path), content)

    def _seen_by_class(self, name: str) -> dict[Label, LayerProfile]:
        if name not in self:
            raise ProfileError(f"plot: expected a layer that was measured, found {name!r}{nearest(name, self)}")
        seen = {label: one[name] for label, one in self.classes.items() if one[name].positions.any()}
        if not seen:
            raise ProfileError(f"plot: {name!r} was not measured by class; pass classes=True to `profile`")
        return seen

    def silent_for(self, label: Label, apoz: float = SILENT) -> dict[str, tuple[int, ...]]:
        """By layer, the neurons that are silent for one class only: whose APoZ is above `apoz` there and nowhere else.

        Raises ProfileError: there is no such class; `profile(..., classes=True)` measures them.
        """
        if label not in self.classes:
            known = ", ".join(map(repr, self.classes)) or "none; measure with classes=True"
            raise ProfileError(f"silent_for: expected one of the classes, found {label!r}; there are {known}")
        silent = {name: {key: one.apoz[name] > apoz for key, one in self.classes.items()} for name in self}
        found = {
            name: np.flatnonzero(by[label] & ~np.any([by[key] for key in by if key != label] or [False], axis=0))
            for name, by in silent.items()
        }
        return {name: tuple(neurons.tolist()) for name, neurons in found.items() if neurons.size}

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
        classes: dict[Label, Profile] = {}
        for label in sorted({label for one in (self, *others) for label in one.classes}, key=in_order):
            first, *more = [one.classes[label] for one in (self, *others) if label in one.classes]
            classes[label] = first.merge(*more) if more else first
        return self.with_parts(parts, examples, zero_tolerance=self.zero_tolerance, partial=partial, classes=classes)

    def with_parts(
        self,
        parts: Sequence[Part],
        examples: int,
        *,
        zero_tolerance: float,
        partial: bool = False,
        in_doubt: Mapping[str, Sequence[int]] | None = None,
        classes: Mapping[Label, "Profile"] | None = None,
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
            classes=classes,
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
            "classes": [self._packed_class(index, label, arrays) for index, label in enumerate(self.classes)],
            "in_doubt": self.in_doubt,
            "layers": [{name: getattr(layer, name) for name in _WORDS} for layer in self.layers.values()],
            "parts": [
                {name: getattr(part, name) for name in _CALL} | {name: getattr(part.counts, name) for name in _NUMBERS}
                for part in self._parts
            ],
        }
        return to_safetensors(arrays, {"torchtrim": json.dumps(content)})

    def _packed_class(self, index: int, label: Label, arrays: dict[str, Any]) -> dict[str, Any]:
        """What describes a class in the file; its arrays are added."""
        found, places = self.classes[label], {part.key: place for place, part in enumerate(self._parts)}
        parts: list[dict[str, Any]] = []
        for part in found._parts:
            place = places[part.key]  # its whole has the same
            arrays |= {f"class{index}.part{place}.{name}": getattr(part.counts, name).numpy() for name in _TENSORS}
            parts.append({"part": place} | {name: getattr(part.counts, name) for name in _NUMBERS})
        return {"label": label, "examples": found.examples, "parts": parts}

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
            counts, roots_of = _counts(arrays, f"part{index}.", described), arrays[f"part{index}.roots"]
            parts.append(Part(**{name: described[name] for name in _CALL}, roots=roots_of, counts=counts))
        how = {name: content[name] for name in ("through_norms", "zero_tolerance", "partial", "in_doubt")}
        whole = cls(layers, content["examples"], parts=parts, roots=roots, **how)
        for index, described in enumerate(content["classes"]):
            counted_parts = [
                replace(parts[one["part"]], counts=_counts(arrays, f"class{index}.part{one['part']}.", one))
                for one in described["parts"]
            ]
            whole.classes[described["label"]] = whole.with_parts(
                counted_parts, described["examples"], zero_tolerance=whole.zero_tolerance
            )
        return whole

    def __str__(self) -> str:
        unseen = [name for name, layer in self.layers.items() if not layer.positions.any()]
        notes = [f"no activation was observed at: {', '.join(unseen)}"] if unseen else []
        if self.in_doubt is not None:
            doubtful = sum(map(len, self.in_doubt.values()))
            notes.append(
                f"settled for all neurons but {doubtful}, see in_doubt" if doubtful else "settled for all neurons"
            )
        return "\n".join([f"Profile of {self.examples:,} examples", str(self.summary()), *self.notes, *notes])


def _counts(arrays: Mapping[str, Any], prefix: str, numbers: Mapping[str, int]) -> Counts:
    found: dict[str, Any] = {name: torch.from_numpy(arrays[f"{prefix}{name}"]) for name in _TENSORS}
    found |= {name: numbers[name] for name in _NUMBERS}
    return Counts(**found)


_TOO_WIDE = 0.05  # of half an interval


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else "")


def difference(one: Profile, other: Profile) -> str:
    """How two profiles are not of one model and measured in one way; empty if they are."""
    if not (one._roots and other._roots):
        return "one that was not measured"
    if list(one) != list(other):
        return "other layers"
    if bool(one.classes) != bool(other.classes):
        return "classes in one of them only"
    for name, layer in one.items():
        theirs = other[name]
        if layer.locked != theirs.locked or not np.array_equal(one._roots[name], other._roots[name]):
            return f"other neurons in {name!r}"
        for norm in ("incoming_l1", "outgoing_l1"):  # sums of weights round otherwise on other machines
            if not np.allclose(getattr(layer, norm), getattr(theirs, norm), rtol=1e-4):
                return f"other weights in {name!r}"
    settings = [(key, getattr(one, key), getattr(other, key)) for key in ("through_norms", "zero_tolerance")]
    return "; ".join(f"{key}={mine} and {key}={theirs}" for key, mine, theirs in settings if mine != theirs)
