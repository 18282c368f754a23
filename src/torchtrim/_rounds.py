"""What a round of the loop is, when the loop ends, and which layers each round trims."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from torchtrim._cost import Cost
from torchtrim._guard import Accuracy, Attempt, fell, is_drop, is_number
from torchtrim._plan import Plan
from torchtrim._profile import Profile
from torchtrim.errors import TorchtrimError


@dataclass(frozen=True, eq=False)
class Round:
    """One pass through the loop.

    number: from 1. model: the trimmed and retrained model. layers: those the plan could choose from.
    plan: what was removed. profile: what it was decided on. cost, ancestor: of the model and of the loop's first
    model, timed side by side. accuracy: by `evaluate`, which decides. test: by `test`, which is only reported.
    seconds: what each step took, attempts that were rolled back included. ancestor_accuracy: of the loop's first model,
    by `evaluate`. rejected: the attempts that the guard rolled back before this one held.
    """

    number: int
    model: nn.Module
    layers: tuple[str, ...]
    plan: Plan
    profile: Profile
    cost: Cost
    ancestor: Cost
    accuracy: Accuracy
    test: Accuracy | None
    seconds: Mapping[str, float]
    ancestor_accuracy: float
    rejected: tuple[Attempt, ...] = ()

    @property
    def compression(self) -> float:
        """Parameters of the ancestor over parameters left."""
        return self.ancestor.parameters / self.cost.parameters

    @property
    def speedup(self) -> float:
        """Latency of the ancestor over latency now."""
        return self.ancestor.latency / self.cost.latency

    @property
    def widths(self) -> dict[str, int]:
        """Neurons of every layer after the round."""
        kept = {name: layer.remaining for name, layer in self.plan.layers.items()}
        return self.profile.widths | kept


@dataclass(frozen=True)
class Stop:
    """When the loop ends: after so many rounds, at this compression, or when accuracy after retraining is too low.

    accuracy: the least that it may be. max_drop: how far it may lie below that of the loop's first model. Both are in
    the unit of `evaluate`. Whichever comes first; the loop also ends when the rule removes nothing. The round that
    reaches a limit is still yielded, so that one that fell too low can be looked at; `Guard` rolls it back instead.
    """

    rounds: int | None = None
    compression: float | None = None
    accuracy: float | None = None
    max_drop: float | None = None

    def __post_init__(self) -> None:
        rounds, compression, accuracy, drop = self.rounds, self.compression, self.accuracy, self.max_drop
        fitting: tuple[tuple[str, str, Any, Callable[[Any], bool]], ...] = (
            ("rounds", "a whole number of at least 1", rounds, lambda x: is_number(x) and x >= 1 and x % 1 == 0),
            ("compression", "above 1", compression, lambda x: is_number(x) and x > 1),
            ("accuracy", "a finite number", accuracy, lambda x: is_number(x) and math.isfinite(x)),
            ("max_drop", "a finite number of at least 0", drop, is_drop),
        )
        faults = [
            f"{name} must be {expected}, found {value!r}"
            for name, expected, value, fits in fitting
            if value is not None and not fits(value)
        ]
        if rounds is compression is accuracy is drop is None:
            faults.append("expected at least one of rounds, compression, accuracy, max_drop, found none")
        if faults:
            raise TorchtrimError("Stop: " + "; ".join(faults))

    def reached(self, done: Round) -> bool:
        """Whether the loop ends with this round."""
        return (
            (self.rounds is not None and done.number >= self.rounds)
            or (self.compression is not None and done.compression >= self.compression)
            or not self.keeps(done)
        )

    def keeps(self, done: Round) -> bool:
        """Whether the round's accuracy is not below what `accuracy` and `max_drop` ask."""
        retrained = done.accuracy.retrained
        return not (
            (self.accuracy is not None and not retrained >= self.accuracy)  # so that no number is too low too
            or (self.max_drop is not None and fell(retrained, done.ancestor_accuracy, self.max_drop))
        )


@dataclass(frozen=True)
class Progressive:
    """Which layers each round trims, as in the paper: first those of highest mean APoZ, then their neighbours too.

    start: how many layers the first round trims. step: how many layers before and after each of them, in order of
    execution, join it in each further round. Hu et al., "Network Trimming", 2016, sections 2.3 and 3.
    """

    start: int = 2
    step: int = 1

    def __post_init__(self) -> None:
        faults = [
            f"expected a whole {name} of at least 1, found {value!r}"
            for name, value in (("start", self.start), ("step", self.step))
            if not (type(value) is int and value >= 1)
        ]
        if faults:
            raise TorchtrimError("Progressive: " + "; ".join(faults))

    def choose(self, measured: Profile, before: Sequence[str]) -> tuple[str, ...]:
        """The layers of the next round, after one that trimmed the layers `before`."""
        able = [
            name
            for name, layer in measured.items()
            if name == layer.group and layer.locked is None and layer.positions.any()
        ]
        if not before:
            silent = sorted(able, key=lambda name: -float(np.nanmean(measured[name].apoz)))
            return tuple(name for name in able if name in silent[: self.start])
        trimmed = {able.index(name) for name in before if name in able}
        near = {place + offset for place in trimmed for offset in range(-self.step, self.step + 1)}
        return tuple(name for place, name in enumerate(able) if place in near)
