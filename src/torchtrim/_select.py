"""The decision: from what was measured to a plan.

A criterion scores neurons, a rule chooses among the scores of one group, and `select` joins the two.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

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


@runtime_checkable
class Limited(Rule, Protocol):
    """A rule that chooses the units above a limit, and can say how the limit moves with the scores."""

    def limit(self, scores: Floats, /) -> tuple[float, Floats]:
        """The limit, and its derivative by each score: float64 [units]."""
        ...


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

    def limit(self, scores: Floats, /) -> tuple[float, Floats]:
        mean, spread = scores.mean(), scores.std()
        outward = (scores - mean) / spread if spread > 0 else np.zeros(scores.size)
        return float(mean + self.k * spread), (1 + self.k * outward) / scores.size

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

    def limit(self, scores: Floats, /) -> tuple[float, Floats]:
        return self.t, np.zeros(scores.size)

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
        chosen = np.zeros(scores.size, dtype=np.bool_)
        chosen[np.argsort(-scores, kind="stable")[: self._count(scores)]] = True
        return chosen

    def limit(self, scores: Floats, /) -> tuple[float, Floats]:
        order, count = np.argsort(-scores, kind="stable"), self._count(scores)
        beside = order[count - 1 : count + 1] if count else order[:0]
        slope = np.zeros(scores.size)
        slope[beside] = 1 / max(beside.size, 1)
        return float(scores @ slope) if beside.size else math.inf, slope

    def _count(self, scores: Floats) -> int:
        # 0.29 * 100 is 28.999999999999996, and 29 is meant.
        return math.floor(self.p * scores.size + 1e-9)

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
    found: Any = parse_rule(rule) if isinstance(rule, str) else rule
    if not callable(getattr(found, "choose", None)):
        raise PlanError(f'rule: expected such as Fraction(0.3) or "mean+1std", found {rule!r}')
    return found


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
    scored, notes = _all_scored(profile, groups, layers, function)
    removed: dict[str, tuple[int, ...]] = {}
    for group, units in scored.items():
        removed |= _choose(groups[group], units, rule, notes)
    plans = {name: LayerPlan(profile[name].width, removed[name]) for name in profile if name in removed}
    source = f"{getattr(function, '__name__', type(function).__name__)}, {rule}"
    return Plan(plans, source, tuple(notes), getattr(profile, "through_norms", False))


def scored_groups(
    profile: Mapping[str, LayerProfile], layers: Sequence[str] | None, criterion: Criterion | str
) -> dict[str, tuple[Floats, dict[str, NDArray[np.intp]]]]:
    """By group that `select` would choose from: the scores of its units, and by layer which of them its neurons are."""
    function, groups = criteria.resolve(criterion), _groups(profile)
    found = {group: _Scored.of(groups[group], function) for group in _chosen_groups(profile, groups, layers)}
    return {group: (scored.scores, scored.places) for group, scored in found.items() if not scored.unseen}


def observed_groups(
    profile: Mapping[str, LayerProfile], layers: Sequence[str] | None, criterion: Criterion | str
) -> tuple[dict[str, tuple[Floats, dict[str, NDArray[np.intp]]]], list[str]]:
    """As `scored_groups`, with notes of groups that nothing was observed of; raises PlanError as `select` does."""
    scored, notes = _all_scored(profile, _groups(profile), layers, criteria.resolve(criterion))
    return {group: (units.scores, units.places) for group, units in scored.items()}, notes


def check_layers(profile: Mapping[str, LayerProfile], layers: Sequence[str] | None) -> None:
    """Raise the PlanError that `select` would raise for these layers, before anything is measured; or for none."""
    if not _chosen_groups(profile, _groups(profile), layers):
        raise PlanError("layers: expected at least one name, found none; leave them out to trim all")


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


def _all_scored(
    profile: Mapping[str, LayerProfile],
    groups: Mapping[str, list[LayerProfile]],
    layers: Sequence[str] | None,
    function: Criterion,
) -> tuple[dict[str, "_Scored"], list[str]]:
    """The chosen groups with their scores, and notes of those that are left whole; raises PlanError."""
    found: dict[str, _Scored] = {}
    notes: list[str] = []
    faults: list[str] = []
    for group in _chosen_groups(profile, groups, layers):
        scored = _Scored.of(groups[group], function)
        if scored.unseen and layers is None:
            notes.append(f"{', '.join(scored.unseen)}: no activation was observed; left whole")
        elif scored.unseen:
            faults += [f"layer {name!r}: no activation was observed, so it has no score" for name in scored.unseen]
        else:
            found[group] = scored
    if faults:
        raise PlanError("\n".join([*faults, "profile them with data that reaches them, or leave them out"]))
    return found, notes


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


class _Scored(NamedTuple):
    """The units of a group and their scores, the means over its layers: float64 [units].

    places: by layer, where its removable neurons stand among the units. unseen: layers of which nothing was observed.
    """

    scores: Floats
    places: dict[str, NDArray[np.intp]]
    unseen: tuple[str, ...]

    @classmethod
    def of(cls, group: Sequence[LayerProfile], function: Criterion) -> "_Scored":
        units = np.unique(np.concatenate([layer.unit[layer.unit >= 0] for layer in group]))
        totals, counts = np.zeros(units.size), np.zeros(units.size)
        places: dict[str, NDArray[np.intp]] = {}
        unseen: list[str] = []
        for layer in group:
            removable = layer.unit >= 0
            scores = _scores(function, layer)[removable]
            unseen += [layer.name] if np.isnan(scores).any() else []
            place = places[layer.name] = np.searchsorted(units, layer.unit[removable])
            members = np.bincount(place, minlength=units.size)
            sums = np.bincount(place, scores, units.size)
            present = members > 0
            totals[present] += sums[present] / members[present]
            counts += present
        return cls(totals / counts, places, tuple(unseen))


def _choose(group: Sequence[LayerProfile], scored: _Scored, rule: Rule, notes: list[str]) -> dict[str, tuple[int, ...]]:
    """The removed neurons of each layer of a group; adds to `notes` what had to stay against the rule."""
    means, places, _ = scored
    goes = np.array(rule.choose(means), dtype=np.bool_)
    if goes.shape != means.shape:
        raise PlanError(f"the rule {rule} gave shape {goes.shape} for {means.size} scores; expected one each")

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
