"""The guard of the loop: how much accuracy a round may cost, and what is tried when it costs more."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchtrim._plan import Plan
from torchtrim._select import Booleans, Rule
from torchtrim.criteria import Floats
from torchtrim.errors import TorchtrimError


@dataclass(frozen=True)
class Accuracy:
    """What `evaluate` said of the model before the round, after trimming (and repair), and after retraining."""

    before: float
    trimmed: float
    retrained: float


@dataclass(frozen=True)
class Guard:
    """A round that costs too much accuracy is rolled back, and tried again with half of its neurons.

    max_drop: how far the accuracy after retraining may lie below that of the loop's first model, both by `evaluate` and
    in its unit. retries: how often a round is tried again, each time with half as many neurons of every layer, those of
    the highest scores; 0 tries once. Where no attempt holds, or nothing is left to remove, the loop ends.

    Every attempt begins with the model of the last round that held. An optimizer is the affair of `retrain`: the
    built-in training makes a new one each time, so that nothing of a failed attempt is left.
    """

    max_drop: float
    retries: int = 3

    def __post_init__(self) -> None:
        faults: list[str] = []
        if not is_drop(self.max_drop):
            faults.append(f"max_drop must be a finite number of at least 0, found {self.max_drop!r}")
        if not (type(self.retries) is int and self.retries >= 0):
            faults.append(f"retries must be a whole number of at least 0, found {self.retries!r}")
        if faults:
            raise TorchtrimError("Guard: " + "; ".join(faults))


@dataclass(frozen=True)
class Attempt:
    """A round that its guard rolled back.

    number: of the round. plan: what it had removed. accuracy: what `evaluate` said. least: what it had to keep.
    """

    number: int
    plan: Plan
    accuracy: Accuracy
    least: float


def checked_guard(guard: Guard | float | None) -> Guard | None:
    """The guard; a number is its largest drop. Raises TorchtrimError."""
    return guard if guard is None or isinstance(guard, Guard) else Guard(guard)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and type(value) is not bool


def is_drop(value: Any) -> bool:
    """Whether this can be a largest drop of an accuracy."""
    return is_number(value) and bool(0 <= value < math.inf)


def fell(accuracy: float, ancestor: float, max_drop: float) -> bool:
    """Whether an accuracy is more than `max_drop` below the ancestor's, or no number at all."""
    rounding = 1e-9 * max(abs(ancestor), abs(max_drop))  # 99.3 - 99.1 is 0.2000000000000028, and 0.2 is meant
    return not accuracy >= ancestor - max_drop - rounding


def smaller_plans(choose: Callable[[int], Plan], retries: int) -> Iterator[Plan]:
    """The whole plan; then half of its neurons, and half of those, as often as retries, while any are left.

    choose: a part of the plan, by the number by which it is divided.
    """
    plan, halvings = choose(1), 0
    for _ in range(retries + 1):
        size = _size(plan)
        if not size:
            return
        yield plan
        while _size(plan) == size:  # where `select` kept one against the rule, the first half can be the whole
            halvings += 1
            plan = choose(2**halvings)


def none_holds(attempts: Sequence[Attempt]) -> str:
    """What to say of a loop of which no round holds."""
    found = ", ".join(f"{a.accuracy.retrained:.2f} without {_size(a.plan):,} neurons" for a in attempts)
    last = attempts[-1]
    return (
        f"no round holds: expected an accuracy of at least {last.least:.2f} after retraining (the model's own is "
        f"{last.accuracy.before:.2f}), found {found}; allow a larger drop, retrain longer, or trim other layers"
    )


def _size(plan: Plan) -> int:
    return sum(map(len, plan.removed.values()))


def part_of(rule: Rule, divisor: int) -> Rule:
    """The rule that takes a part of what another one does."""
    return rule if divisor == 1 else _Part(rule, divisor)


@dataclass(frozen=True)
class _Part:
    """The highest scores among those that a rule chooses, as many as the number chosen divided by `divisor`."""

    rule: Rule
    divisor: int

    def choose(self, scores: Floats, /) -> Booleans:
        chosen = np.flatnonzero(np.asarray(self.rule.choose(scores), dtype=np.bool_))
        order = chosen[np.argsort(-scores[chosen], kind="stable")]
        part = np.zeros(scores.size, dtype=np.bool_)
        part[order[: order.size // self.divisor]] = True
        return part

    def __str__(self) -> str:
        return f"1/{self.divisor} of {self.rule}"
