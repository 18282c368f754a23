"""The decision: from what was measured to a plan.

A criterion scores neurons, a rule chooses among the scores of one group, and `select` joins the two.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from torchtrim import criteria
from torchtrim._plan import LayerPlan, Plan
from torchtrim.criteria import Criterion, Floats, LayerProfile
from torchtrim.errors import PlanError, nearest

Booleans: TypeAlias = NDArray[np.bool_]


class Rule(Protocol):
    """Chooses which units of a group go: scores float64 [units] -> bool [units]."""

    def choose(self, scores: Floats, /) -> Booleans: ...


@dataclass(frozen=True)
class MeanPlusStd:
    """Units whose score is above mean + k · standard deviation (population) of their group.

    Scores that are all equal choose nothing. Hu et al., "Network Trimming", 2016, take k = 1.
    """

    k: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.k) and self.k >= 0):
            raise PlanError(f"MeanPlusStd: expected a finite k >= 0, found {self.k!r}")

    def choose(self, scores: Floats, /) -> Booleans:
        scale = np.abs(scores).max(initial=0.0)
        if scale == 0:
            return np.zeros(scores.size, dtype=np.bool_)
        scaled = scores / scale
        # The sums round: of equal scores, or of two halves, some would else lie above a limit they equal.
        return scaled > scaled.mean() + self.k * scaled.std() + 1e-12

    def __str__(self) -> str:
        return f"mean + {float(self.k)} std"


@dataclass(frozen=True)
class Threshold:
    """Units whose score is above t."""

    t: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.t):
            raise PlanError(f"Threshold: expected a finite number, found {self.t!r}")

    def choose(self, scores: Floats, /) -> Booleans:
        return scores > self.t

    def __str__(self) -> str:
        return f"threshold:{float(self.t)}"


@dataclass(frozen=True)
class Fraction:
    """The floor(p · n) units of the highest scores; of equal scores the lower index goes first."""

    p: float

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise PlanError(f"Fraction: expected a share of at least 0 and below 1, found {self.p!r}; some must stay")

    def choose(self, scores: Floats, /) -> Booleans:
        # 0.29 * 100 is 28.999999999999996, and 29 is meant.
        count = math.floor(self.p * scores.size + 1e-9)
        chosen = np.zeros(scores.size, dtype=np.bool_)
        chosen[np.argsort(-scores, kind="stable")[:count]] = True
        return chosen

    def __str__(self) -> str:
        return f"fraction:{float(self.p)}"


_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
_MEAN_PLUS_STD = re.compile(rf"mean\s*\+\s*({_NUMBER})?\s*std")
_NAMED_RULE = re.compile(rf"(threshold|fraction)\s*:\s*({_NUMBER})")


def parse_rule(text: str) -> MeanPlusStd | Threshold | Fraction:
    """The rule that a text such as "mean+1std", "threshold:0.9" or "fraction:0.3" names.

    `str(rule)` is such a text. Raises PlanError when it names none.
    """
    plain = text.strip().lower()
    if found := _MEAN_PLUS_STD.fullmatch(plain):
        return MeanPlusStd(float(found[1] or 1))
    if found := _NAMED_RULE.fullmatch(plain):
        value = float(found[2])
        return Threshold(value) if found[1] == "threshold" else Fraction(value)
    raise PlanError(f'unknown rule {text!r}, expected such as "mean+1std", "threshold:0.9" or "fraction:0.3"')


def resolve_rule(rule: Rule | str) -> Rule:
    """The rule that a text names; a rule is returned as it is. Raises PlanError."""
    return parse_rule(rule) if isinstance(rule, str) else rule


def select(
    profile: Mapping[str, LayerProfile],
    *,
    rule: Rule | str,
    layers: Sequence[str] | None = None,
    criterion: Criterion | str = criteria.apoz,
) -> Plan:
    """Decide which neurons go.

    rule: such as `MeanPlusStd(1)`, or its text, "mean+1std". layers: names, or patterns such as "features.*"; None
    means every layer that is not locked. A layer brings in all layers of its group, since their neurons go together:
    a unit's score is the mean over the layers of the group. The last unit of a group, and the last neuron of a layer,
    always stays.

    Raises PlanError for unknown or locked layers, and for scores that are NaN because nothing was
    observed; with `layers=None`, such a group is left whole, and a note says so.
    """
    function, rule = criteria.resolve(criterion), resolve_rule(rule)
    groups = _groups(profile)
    chosen = _chosen_groups(profile, groups, layers)

    removed: dict[str, tuple[int, ...]] = {}
    notes: list[str] = []
    faults: list[str] = []
    for group in chosen:
        scores = {layer.name: _scores(function, layer) for layer in groups[group]}
        unseen = [layer.name for layer in groups[group] if np.isnan(scores[layer.name][layer.unit >= 0]).any()]
        if unseen and layers is None:
            notes.append(f"{', '.join(unseen)}: no activation was observed; left whole")
        elif unseen:
            faults += [f"layer {name!r}: no activation was observed, so it has no score" for name in unseen]
        else:
            removed |= _choose(groups[group], scores, rule, notes)
    if faults:
        raise PlanError("\n".join([*faults, "profile them with data that reaches them, or leave them out"]))
    plans = {name: LayerPlan(profile[name].width, removed[name]) for name in profile if name in removed}
    source = f"{getattr(function, '__name__', type(function).__name__)}, {rule}"
    return Plan(plans, source, tuple(notes), getattr(profile, "through_norms", False))


def check_layers(profile: Mapping[str, LayerProfile], layers: Sequence[str] | None) -> None:
    """Raise the PlanError that `select` would raise for these layers, before anything is measured."""
    _chosen_groups(profile, _groups(profile), layers)


def _groups(profile: Mapping[str, LayerProfile]) -> dict[str, list[LayerProfile]]:
    groups: dict[str, list[LayerProfile]] = {}
    for layer in profile.values():
        if layer.locked is None or (layer.unit >= 0).any():
            groups.setdefault(layer.group, []).append(layer)
    return groups


def _chosen_groups(
    profile: Mapping[str, LayerProfile],
    groups: Mapping[str, list[LayerProfile]],
    layers: Sequence[str] | None,
) -> list[str]:
    """The groups of the asked-for layers; raises one PlanError for all that are unknown or locked."""
    reasons = {name: _locked(layer, groups) for name, layer in profile.items()}
    if isinstance(layers, str):
        raise PlanError(f"layers: expected a sequence of names, found the text {layers!r}; pass [{layers!r}]")
    if layers is None:
        names = [name for name, reason in reasons.items() if reason is None]
        if not names:
            why = "\n  ".join(f"{name}: {reason}" for name, reason in reasons.items())
            raise PlanError(f"the model has no layer that can be trimmed:\n  {why or 'it has no layers'}")
        return list(dict.fromkeys(profile[name].group for name in names))
    names, faults = [], []
    for asked in layers:
        matches = [asked] if asked in profile else [name for name in profile if fnmatchcase(name, asked)]
        free = [name for name in matches if reasons[name] is None]
        names += free
        if not matches:
            faults.append(f"unknown layer {asked!r}{nearest(asked, profile)}")
        elif not free:
            faults += [f"layer {name!r} cannot be trimmed: {reasons[name]}" for name in matches]
    if faults:
        raise PlanError("\n".join(faults))
    return list(dict.fromkeys(profile[name].group for name in names))


def _locked(layer: LayerProfile, groups: Mapping[str, list[LayerProfile]]) -> str | None:
    """Why the layer cannot be trimmed: its own reason, or that of a layer it is tied to."""
    if layer.locked is not None:
        return layer.locked
    tied = (
        f"it is tied to {other.name!r}: {other.locked}" for other in groups[layer.group] if other.locked is not None
    )
    return next(tied, None)


def _scores(function: Criterion, layer: LayerProfile) -> Floats:
    scores = np.asarray(function(layer), dtype=np.float64)
    if scores.shape != (layer.width,):
        raise PlanError(
            f"layer {layer.name!r}: expected {layer.width} scores from the criterion, one per neuron, "
            f"found shape {scores.shape}"
        )
    # NaN says "not observed", and the caller deals with it; of a neuron that was observed it is a fault.
    removable, seen = layer.unit >= 0, layer.positions > 0
    if np.isinf(scores[removable]).any() or np.isnan(scores[removable & seen]).any():
        raise PlanError(
            f"layer {layer.name!r}: expected finite scores, found infinity, or NaN for neurons that were "
            "observed; look for NaN in the weights, or in the criterion"
        )
    return scores


def _choose(
    group: Sequence[LayerProfile], scores: Mapping[str, Floats], rule: Rule, notes: list[str]
) -> dict[str, tuple[int, ...]]:
    """The removed neurons of each layer of a group; adds to `notes` what had to stay against the rule."""
    units = np.unique(np.concatenate([layer.unit[layer.unit >= 0] for layer in group]))
    totals, counts = np.zeros(units.size), np.zeros(units.size)
    # Where each layer's removable neurons stand among the units.
    places = {layer.name: np.searchsorted(units, layer.unit[layer.unit >= 0]) for layer in group}
    for layer in group:
        members = np.bincount(places[layer.name], minlength=units.size)
        sums = np.bincount(places[layer.name], scores[layer.name][layer.unit >= 0], units.size)
        present = members > 0
        totals[present] += sums[present] / members[present]
        counts += present
    means = totals / counts
    goes = np.array(rule.choose(means), dtype=np.bool_)
    if goes.shape != units.shape:
        raise PlanError(f"the rule {rule} gave shape {goes.shape} for {units.size} scores; expected one each")

    if goes.size and goes.all():
        goes[np.argmin(means)] = False
        notes.append(f"{group[0].name}: the rule chose every neuron; the lowest score stays")
    for layer in group:
        own = np.unique(places[layer.name])
        if own.size and (layer.unit >= 0).all() and goes[own].all():
            goes[own[np.argmin(means[own])]] = False
            notes.append(f"{layer.name}: the rule chose every neuron; the lowest score stays")
    removed: dict[str, tuple[int, ...]] = {}
    for layer in group:
        removable = np.flatnonzero(layer.unit >= 0)
        removed[layer.name] = tuple(removable[goes[places[layer.name]]].tolist())
    return removed
