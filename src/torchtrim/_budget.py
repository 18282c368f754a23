"""Neurons chosen over all layers at once, so that what is left of a model meets a budget."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from torchtrim import _amounts, criteria
from torchtrim._allot import TOLERANCE, Queue, allot, by_savings
from torchtrim._amounts import PerLayer, amount, amount_text, limits, per_layer, positive
from torchtrim._cost import bytes_of, flops_of, latencies_beside, parameters_of
from torchtrim._forward import device_of
from torchtrim._graph import trace
from torchtrim._history import history
from torchtrim._latency import Latencies, LatencyTable
from torchtrim._neurons import Kept, NeuronGraph
from torchtrim._plan import LayerPlan, Plan
from torchtrim._price import Prices
from torchtrim._profile import Profile
from torchtrim._reconstruction import Reconstruction
from torchtrim._select import observed_groups
from torchtrim._surgery import trim
from torchtrim.criteria import Criterion, Floats, Integers
from torchtrim.errors import PlanError, TorchtrimWarning

_TARGETS = ("parameters", "flops", "bytes", "latency")
_SECONDS_EACH = 2.0  # that a trimmed model and its original are timed
_CORRECTIONS = 8  # of what is priced by what is measured
_RUINED = 0.999  # the error of layers beyond which nothing more is lost
_CLEARLY = 1.1  # times a target, where units are unequal
_STRIDE = 1.5  # times as far as in proportion, since part of a latency does not fall with the widths


@dataclass(frozen=True)
class Budget:
    """What may be left of a model at most. At least one target is given; of several, all must hold.

    parameters, flops, bytes: as `measure` counts them. A number below 1 is a share of the model's own, from 1 on it is
    the amount itself: 0.5 or 200_000. latency: of one call on the example; a number below 1 is a share of the model's
    own, and a time is a text with its unit: 0.5, "12 ms", "0.05 s".

    floor, cap: how many neurons of a layer must stay, and may stay, whatever their scores: below 1 a share of the
    layer's neurons, from 1 on their number; one for all layers, or by names and patterns such as "features.*", of which
    the first that fits a layer counts. One neuron always stays. multiple_of: layers that lose neurons keep a multiple
    of it, which many devices compute faster; a group of layers whose locked neurons allow no multiple is named in a
    note. weights: factors on the importance of layers' neurons, by names and patterns, such as `Sensitivity.weights()`;
    the others have 1.

    Raises PlanError: no target, or numbers that make no sense.
    """

    parameters: float | None = None
    flops: float | None = None
    latency: float | str | None = None
    bytes: float | None = None
    floor: PerLayer = 0.05
    cap: PerLayer | None = None
    multiple_of: int = 1
    weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        faults = [
            f"{name}: expected a number above 0, found {value!r}"
            for name in ("parameters", "flops", "bytes")
            if (value := getattr(self, name)) is not None and not positive(value)
        ]
        if self.latency is not None and not _amounts.is_latency(self.latency):
            faults.append(
                f'latency: expected a share below 1, or a time with its unit such as "12 ms", found {self.latency!r}'
            )
        if not self.asked:
            faults.append("expected a target, found none; give parameters, flops, bytes or latency")
        faults += _amounts.per_layer_faults(self.floor, self.cap, self.weights)
        if type(self.multiple_of) is not int or self.multiple_of < 1:
            faults.append(f"multiple_of: expected a whole number of at least 1, found {self.multiple_of!r}")
        if faults:
            raise PlanError("Budget: " + "\n  ".join(faults))

    def plan(
        self,
        model: nn.Module,
        example: Any,
        profile: Profile,
        *,
        criterion: Criterion | str = criteria.apoz,
        layers: Sequence[str] | None = None,
        latencies: str | Path | None = None,
    ) -> Plan:
        """Choose the neurons that go, over all layers at once, so that the trimmed model meets the budget.

        Every unit (neurons that go together) has an importance that is comparable between layers. For `apoz` it is the
        share of activations that are not zero, as it is; other criteria are negated and divided by their root mean
        square over the group of layers (Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient
        Inference", 2017, section 2.2). A criterion of one's own is taken as it is where it has an attribute
        `comparable` that is true. The units of the least importance go, until all targets are met.

        For what `torchtrim.reconstruction` returns, with E the relative squared error of the layers that read a group,
        importance is what a unit more adds to -log(1 - E), times what such an error becomes at the model's outputs,
        over what it saves of the target that is furthest away. So the sum over all groups is about the least that the
        budget allows.

        A plan costs what it leaves of every tensor and every product, not the sum of what its neurons cost alone. The
        trimmed model is counted at the end, or timed beside the original, and the choice is corrected until it ends at
        most 1 % below a target, or no layer can be given a unit more; then a note of the plan says so.
        Latencies of layers are measured on this machine at several widths, and interpolated; what is measured on a
        shared machine varies by more than 1 %.

        example, layers, criterion: as for `trim` and `select`. profile: what was measured of this model; it says
        whether what norms average over may go. latencies: a file in which the latencies of layers are kept, which is
        read if there is one.

        Raises PlanError: a budget that is out of reach, which says the smallest that is not; a profile of another
        model; layers that are unknown or locked. Raises StoreError: latencies of another machine.
        """
        graph = (
            example if isinstance(example, NeuronGraph) else trace(model, example, through_norms=profile.through_norms)
        )
        widths = {name: layer.width for name, layer in profile.items()}
        Plan({name: LayerPlan(width) for name, width in widths.items()}).check(
            {name: layer.width for name, layer in graph.layers.items()}
        )
        choice = _Choice(self, model, graph, profile, criteria.resolve(criterion), layers, latencies)
        return choice.made()

    def check(
        self, model: nn.Module, graph: NeuronGraph, profile: Profile, layers: Sequence[str] | None = None
    ) -> None:
        """Raise PlanError for what cannot be planned whatever is measured: a budget that is clearly out of reach, and
        floors, caps and weights of unknown layers, or that exclude each other.

        profile: of the model, which need not have seen data. layers: as for `plan`. A latency is not looked at, since
        that takes time.
        """
        limits(self.floor, self.cap, profile.widths)
        per_layer("weights", self.weights or {}, profile.widths, 1.0)
        counted = [name for name in self.asked if name != "latency"]
        if counted:
            _Choice(replace(self, latency=None), model, graph, profile, criteria.l1_norm, layers, None).check()

    @property
    def asked(self) -> dict[str, float | str]:
        """The targets that are given, by name."""
        return {name: value for name in _TARGETS if (value := getattr(self, name)) is not None}

    def __str__(self) -> str:
        targets = (f"{name} {_amounts.amount_asked(name, value)}" for name, value in self.asked.items())
        return ", ".join(targets)


class _Choice:
    """The work of `Budget.plan`."""

    def __init__(
        self,
        budget: Budget,
        model: nn.Module,
        graph: NeuronGraph,
        profile: Profile,
        criterion: Criterion,
        layers: Sequence[str] | None,
        latencies: str | Path | None,
    ) -> None:
        self._budget, self._model, self._graph, self._profile = budget, model, graph, profile
        self._source = f"{getattr(criterion, '__name__', type(criterion).__name__)}, {budget}"
        scored, self._notes = observed_groups(profile, layers, criterion)
        self._scored = {name: (importance(scores, criterion), places) for name, (scores, places) in scored.items()}
        weights = per_layer("weights", budget.weights or {}, profile, 1.0)
        self._factors = {name: float(np.mean([weights[one] for one in places])) for name, (_, places) in scored.items()}
        self._errors = isinstance(criterion, Reconstruction)
        if isinstance(criterion, Reconstruction):
            if criterion.gains is None:
                self._notes.append("the model's outputs cannot be compared; errors count alike in all layers")
            gains = criterion.gains or {}
            self._factors = {name: factor * gains.get(name, 1.0) for name, factor in self._factors.items()}
        self._prices = Prices(model, graph, flops=budget.flops is not None)
        self._own: dict[str, float] = {
            name: self._priced(name, self._all_kept) for name in budget.asked if name != "latency"
        }
        if budget.latency is not None:
            self._latencies = Latencies(model, graph, LatencyTable(device_of(model), latencies))
            self._own["latency"] = self._latencies.whole
        if budget.flops is not None:
            self._own["flops"] = flops_of(model, graph.example)
        self._targets = {name: amount(value, self._own[name]) for name, value in budget.asked.items()}
        self._scale = {name: own / (self._priced(name, self._all_kept) or 1.0) for name, own in self._own.items()}

    @property
    def _all_kept(self) -> Kept:
        return np.ones(len(self._graph.root), bool)

    def check(self) -> None:
        """Raise PlanError where what floors leave is still too much; clearly, where scores decide which units stay."""
        queues, kept_after = self._queues()
        kept = kept_after(np.array([queue.steps[-1] for queue in queues], np.int64))
        least = {name: self._cost(name, kept) for name in self._targets}
        members = (
            np.stack([np.bincount(place, minlength=values.size) for place in places.values()])
            for values, places in self._scored.values()
        )
        margin = 1.0 if all((some == some[:, :1]).all() for some in members) else _CLEARLY
        if any(least[name] > margin * target for name, target in self._targets.items()):
            self._refuse(least)

    def made(self) -> Plan:
        best: tuple[float, Plan, dict[str, float]] | None = None
        measured: list[tuple[dict[str, float], dict[str, float]]] = []  # priced and found
        for _ in range(_CORRECTIONS):
            plan, kept, notes, smallest = self._chosen()
            found, stayed = self._measured(plan)
            if stayed:  # what cannot be proved is left whole; without it, again
                for group in {self._profile[name].group for name in stayed}:
                    self._scored.pop(group, None)
                self._notes += [f"{', '.join(stayed)}: could not be proved; left whole"]
                continue
            worst = max(found[name] / target for name, target in self._targets.items())
            if smallest and worst > 1:
                self._refuse(found)
            # the nearest below; above, the nearest
            if best is None or _off(worst) < _off(best[0]):
                best = worst, Plan(plan.layers, plan.source, (*self._notes, *notes), plan.through_norms), found
            if 1 - TOLERANCE <= worst <= 1:
                break
            priced = {name: self._priced(name, kept) for name in found}
            if any(priced == before for before, _ in measured):
                break
            measured.append((priced, found))
            self._scale = {name: self._corrected(name, measured) for name in found}
        if best is None:
            raise PlanError(
                "nothing of what was chosen can be proved; look at the notes of print(trace(model, example))"
            )
        worst, plan, found = best
        return Plan(plan.layers, plan.source, (*plan.notes, *self._said(found, worst)), plan.through_norms)

    def _corrected(self, name: str, measured: Sequence[tuple[dict[str, float], dict[str, float]]]) -> float:
        """What to multiply a price with, so that what ends at the target ends there when it is measured."""
        points = [(found[name], priced[name]) for priced, found in measured]
        found, price = points[-1]
        if name != "latency":
            return found / price if price else 1.0
        # what is timed is no multiple of a price: between a plan that was too slow and one that was too fast, linear
        goal = self._targets[name] * (1 - TOLERANCE / 2)
        slow, fast = ([one for one in points if (one[0] > goal) is over] for over in (True, False))
        if slow and fast:
            (low, low_price), (high, high_price) = max(fast), min(slow)
            price = low_price + (high_price - low_price) * (goal - low) / (high - low)
        else:  # so far that the other side is found
            found, price = min(slow, key=itemgetter(1)) if slow else max(fast, key=itemgetter(1))
            price *= (goal / found) ** _STRIDE
        return self._targets[name] / price if price else 1.0

    def _chosen(self) -> tuple[Plan, Kept, list[str], bool]:
        """The plan for what things are thought to cost, what it keeps, notes, and whether that is still too much."""
        budget, profile, notes = self._budget, self._profile, list[str]()
        queues, kept_after = self._queues()

        def excess(counts: Integers) -> float:
            kept = kept_after(counts)
            return max(self._cost(name, kept) / target for name, target in self._targets.items())

        if not queues:
            raise PlanError("no layer is left to choose from:\n  " + "\n  ".join(self._notes))
        factors = [self._factors[name] for name in self._scored]
        if self._errors:
            losses = [
                -factor * np.log1p(-np.minimum(queue.importance, _RUINED))
                for factor, queue in zip(factors, queues, strict=True)
            ]
            queues = by_savings(queues, losses, excess)
        else:
            queues = [
                replace(queue, importance=factor * queue.importance)
                for factor, queue in zip(factors, queues, strict=True)
            ]
        counts, left = allot(queues, excess)
        kept = kept_after(counts)
        odd = [name for name, queue in zip(self._scored, queues, strict=True) if queue.odd]
        if odd:
            notes.append(f"{', '.join(odd)}: no smaller width is a multiple of {budget.multiple_of}")
        removed = {
            name: np.flatnonzero(~kept[self._graph.layers[name].roots])
            for _, places in self._scored.values()
            for name in places
        }
        plans = {
            name: LayerPlan(layer.width, tuple(removed[name].tolist()))
            for name, layer in profile.items()
            if name in removed
        }
        return Plan(plans, self._source, (), profile.through_norms), kept, notes, left > 1

    def _queues(self) -> tuple[list[Queue], Callable[[Integers], Kept]]:
        """A queue for each group, and what is kept once so many of each are gone."""
        budget, widths, groups = self._budget, self._profile.widths, list(self._scored.values())
        least, most = limits(budget.floor, budget.cap, widths)
        queues = [Queue.of(values, places, widths, least, most, budget.multiple_of) for values, places in groups]
        roots = [_roots_of_units(self._graph, self._profile, places, values.size) for values, places in groups]
        going = [_going(queue, units) for queue, units in zip(queues, roots, strict=True)]

        def kept_after(counts: Integers) -> Kept:
            kept = self._all_kept
            for (order, ends), count in zip(going, counts, strict=True):
                kept[order[: ends[count]]] = False
            return kept

        return queues, kept_after

    def _cost(self, name: str, kept: Kept) -> float:
        return self._priced(name, kept) * self._scale[name]

    def _priced(self, name: str, kept: Kept) -> float:
        return self._latencies.seconds(kept) if name == "latency" else getattr(self._prices, name)(kept)

    def _refuse(self, smallest: Mapping[str, float]) -> None:
        raise PlanError(_amounts.out_of_reach(self._targets, smallest, self._own, self._notes))

    def _measured(self, plan: Plan) -> tuple[dict[str, float], list[str]]:
        """What the trimmed model costs, and the layers that stayed whole against the plan."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TorchtrimWarning)  # a note says it
            trimmed = trim(self._model, plan, self._graph)
        carried_out = history(trimmed).plans[-1]
        stayed = [name for name in plan.removed if carried_out.layers[name].removed != plan.layers[name].removed]
        return ({} if stayed else self._costs(trimmed)), stayed

    def _costs(self, trimmed: nn.Module) -> dict[str, float]:
        found: dict[str, float] = {}
        for name in self._targets:
            if name == "latency":
                before, after = latencies_beside([self._model, trimmed], self._graph.example, _SECONDS_EACH)
                # of a share: a machine that is slower just now is so for both
                found[name] = after if isinstance(self._budget.latency, str) else self._own[name] * after / before
            elif name == "flops":
                found[name] = flops_of(trimmed, self._graph.example)
            else:
                found[name] = parameters_of(trimmed) if name == "parameters" else bytes_of(trimmed)
        return found

    def _said(self, found: Mapping[str, float], worst: float) -> list[str]:
        """What it comes to, and how it differs from what was asked."""
        said = [
            f"{name}: {amount_text(name, self._own[name])} → {amount_text(name, found[name])}, "
            f"at most {amount_text(name, target)} asked"
            for name, target in self._targets.items()
        ]
        if worst > 1:
            said.append(f"{worst - 1:.1%} above what was asked: latencies vary, or multiples and floors are in the way")
        elif all(self._own[name] <= target for name, target in self._targets.items()):
            said.append("the model met it to begin with")
        elif worst < 1 - TOLERANCE:
            said.append(
                f"{1 - worst:.1%} below what was asked: caps ask for it, or no layer has a step that is small enough"
            )
        return said


def importance(scores: Floats, criterion: Criterion) -> Floats:
    """What a group of layers would lose with each unit, comparable between groups: float64 [units].

    scores: float64 [units], those of the criterion.
    """
    if criterion is criteria.apoz:
        return 1 - scores
    lost = -scores
    if isinstance(criterion, Reconstruction) or getattr(criterion, "comparable", False):
        return lost
    lost = lost - min(float(lost.min(initial=0.0)), 0.0)
    return lost / (math.sqrt(np.square(lost).mean()) or 1.0)


def _roots_of_units(graph: NeuronGraph, profile: Profile, places: Mapping[str, Integers], count: int) -> list[Integers]:
    """The roots of each unit of a group."""
    roots = np.concatenate([graph.layers[name].roots[profile[name].unit >= 0] for name in places])
    units = np.concatenate([*places.values()])
    order = np.argsort(units, kind="stable")
    bounds = np.searchsorted(units[order], np.arange(1, count))
    return [np.unique(some) for some in np.split(roots[order], bounds)]


def _going(queue: Queue, roots: Sequence[Integers]) -> tuple[Integers, Integers]:
    """The roots of a queue's units in the order in which they go, and how many are gone after each number of units."""
    order = [roots[unit] for unit in queue.units]
    return np.concatenate([np.zeros(0, np.int64), *order]), np.cumsum([0, *map(len, order)])


def _off(worst: float) -> tuple[bool, float]:
    return worst > 1, abs(worst - 1)
