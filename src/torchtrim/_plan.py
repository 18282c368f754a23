"""The plan: which neurons of which layers go.

A plan is data. It is decided once, can be looked at, stored as JSON, and is then carried out.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from operator import index
from types import MappingProxyType
from typing import Any

from torchtrim.errors import PlanError, nearest

_FORMAT = "torchtrim-plan"
_VERSION = 1
_ASKED = ("through_norms", "experts")  # what may go only if it is asked for


@dataclass(frozen=True)
class LayerPlan:
    """The neurons that one layer loses.

    width: neurons before. removed: their indices, ascending.
    Raises PlanError unless these are unique, within the width, and leave at least one neuron.
    """

    width: int
    removed: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        # Callers may hand over lists or numpy integers; what is kept must hash and write as JSON.
        object.__setattr__(self, "width", index(self.width))
        object.__setattr__(self, "removed", tuple(map(index, self.removed)))
        if self.width < 1:
            raise PlanError(f"expected a width of at least 1, found {self.width}")
        outside = [neuron for neuron in self.removed if not 0 <= neuron < self.width]
        if outside:
            raise PlanError(f"expected neurons from 0 to {self.width - 1}, found {outside}")
        if list(self.removed) != sorted(set(self.removed)):
            raise PlanError(f"expected neurons in ascending order, each once, found {list(self.removed)}")
        if len(self.removed) == self.width:
            raise PlanError(f"all {self.width} neurons would be removed; at least one must stay")

    @property
    def remaining(self) -> int:
        """Neurons after."""
        return self.width - len(self.removed)


@dataclass(frozen=True)
class Plan:
    """The neurons that a model loses; `print(plan)` shows it as a table.

    layers: what each layer loses, by its name. source: how it was decided, such as "apoz, mean + 1.0 std".
    notes: what the user should know about the decision. through_norms: whether neurons that norms average over may be
    among them, as in `trace`; experts: likewise for the experts of mixtures.
    """

    layers: Mapping[str, LayerPlan]
    source: str = ""
    notes: tuple[str, ...] = ()
    through_norms: bool = False
    experts: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))
        object.__setattr__(self, "notes", tuple(self.notes))

    def __hash__(self) -> int:
        return hash((frozenset(self.layers.items()), self.source, self.notes, self.through_norms, self.experts))

    def __reduce__(self) -> tuple[type["Plan"], tuple[dict[str, LayerPlan], str, tuple[str, ...], bool, bool]]:
        # A mapping proxy cannot be pickled or deep-copied.
        return type(self), (dict(self.layers), self.source, self.notes, self.through_norms, self.experts)

    @property
    def removed(self) -> dict[str, tuple[int, ...]]:
        """The removed neurons by layer, without the layers that lose none."""
        return {name: layer.removed for name, layer in self.layers.items() if layer.removed}

    def check(self, widths: Mapping[str, int]) -> None:
        """Raise one PlanError that lists every layer of the plan that is not among `widths` or differs."""
        faults: list[str] = []
        for name, layer in self.layers.items():
            if name not in widths:
                faults.append(f"layer {name!r} does not exist{nearest(name, widths)}")
            elif widths[name] != layer.width:
                faults.append(f"layer {name!r}: the plan has {layer.width} neurons, the model {widths[name]}")
        if faults:
            raise PlanError(
                "the plan does not fit the model; make it from a profile of this model:\n  " + "\n  ".join(faults)
            )

    def to_json(self) -> str:
        """The plan as JSON text, read back by `from_json`."""
        layers = {name: {"width": layer.width, "removed": list(layer.removed)} for name, layer in self.layers.items()}
        content = {"format": _FORMAT, "version": _VERSION, "source": self.source, "notes": list(self.notes)}
        asked = {name: True for name in _ASKED if getattr(self, name)}
        return json.dumps({**content, **asked, "layers": layers})

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan that `to_json` wrote. Raises PlanError, listing every fault, when it is not one."""
        try:
            content: Any = json.loads(text, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"the plan is not JSON: {error}") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise PlanError(f'not a plan: expected a JSON object with "format": "{_FORMAT}"')
        if content.get("version") != _VERSION:
            raise PlanError(f"plan: expected version {_VERSION}, found {content.get('version')!r}")
        faults: list[str] = []
        source: Any = content.get("source")
        notes: Any = content.get("notes")
        asked: dict[str, Any] = {name: content.get(name, False) for name in _ASKED}
        entries: Any = content.get("layers")
        if not isinstance(source, str):
            faults.append(f"source: expected text, found {source!r}")
        if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
            faults.append(f"notes: expected a list of texts, found {notes!r}")
        faults += [
            f"{name}: expected true or false, found {value!r}"
            for name, value in asked.items()
            if not isinstance(value, bool)
        ]
        if not isinstance(entries, dict):
            faults.append(f"layers: expected an object, found {entries!r}")
            entries = {}
        layers: dict[str, LayerPlan] = {}
        for name, entry in entries.items():
            try:
                layers[name] = _read_layer(entry)
            except PlanError as error:
                faults.append(f"layer {name!r}: {error}")
        if faults:
            raise PlanError("malformed plan:\n  " + "\n  ".join(faults))
        return cls(layers, source, tuple(notes), **asked)

    def __str__(self) -> str:
        rows = [("layer", "width", "", "after", "removed", "share")]
        rows += [_row(name, layer.width, len(layer.removed)) for name, layer in self.layers.items()]
        if len(self.layers) > 1:
            width = sum(layer.width for layer in self.layers.values())
            rows.append(_row("total", width, sum(len(layer.removed) for layer in self.layers.values())))
        sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                [row[0].ljust(sizes[0])] + [cell.rjust(size) for cell, size in zip(row[1:], sizes[1:], strict=True)]
            )
            for row in rows
        ]
        head = [f"Plan: {self.source}"] if self.source else ["Plan"]
        norms = ["its norms average over fewer: exact only without them"] if self.through_norms else []
        return "\n".join(head + lines + [f"note: {note}" for note in (*self.notes, *norms)])


def _row(name: str, width: int, removed: int) -> tuple[str, str, str, str, str, str]:
    return name, str(width), "→", str(width - removed), str(removed), f"{removed / width:.1%}"


def _read_layer(entry: Any) -> LayerPlan:
    if not isinstance(entry, dict) or set(entry) != {"width", "removed"}:
        raise PlanError(f"expected an object of width and removed, found {entry!r}")
    width, removed = entry["width"], entry["removed"]
    # `type`, not `isinstance`: JSON's true is an int to Python.
    if type(width) is not int:
        raise PlanError(f"expected a whole width, found {width!r}")
    if not isinstance(removed, list) or not all(type(neuron) is int for neuron in removed):
        raise PlanError(f"expected removed to be a list of whole numbers, found {removed!r}")
    return LayerPlan(width, tuple(removed))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return content
