"""The loop of the paper: profile, choose, trim, retrain, and again, a round at a time.

`iterate` is a generator of rounds; whoever draws from it decides what to keep. Hu et al., "Network Trimming", 2016.
"""

import math
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from torchtrim import criteria
from torchtrim._cost import Cost, measure_beside
from torchtrim._forward import Forward
from torchtrim._graph import trace
from torchtrim._guard import Accuracy, Attempt, Guard, checked_guard, fell, is_drop, none_holds, smaller_plans
from torchtrim._history import history
from torchtrim._measure import profile
from torchtrim._plan import Plan
from torchtrim._profile import Profile
from torchtrim._reconstruction import reconstruction
from torchtrim._repair import Ways, checked_ways, repair
from torchtrim._select import Rule, check_layers, resolve_rule, select
from torchtrim._surgery import trim
from torchtrim._unmeasured import unmeasured
from torchtrim.criteria import Criterion
from torchtrim.errors import TorchtrimError, TorchtrimWarning


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
        fitting = (
            ("rounds", "a whole number of at least 1", rounds, rounds is None or (rounds == int(rounds) >= 1)),
            ("compression", "above 1", compression, compression is None or compression > 1),
            ("accuracy", "a finite number", accuracy, accuracy is None or math.isfinite(accuracy)),
            ("max_drop", "a finite number of at least 0", drop, drop is None or is_drop(drop)),
        )
        faults = [f"{name} must be {expected}, found {value!r}" for name, expected, value, fits in fitting if not fits]
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
            (self.accuracy is not None and retrained < self.accuracy)
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


Retrain = Callable[[nn.Module], Any]
Evaluate = Callable[[nn.Module], float]


def iterate(
    model: nn.Module,
    example: Any,
    batches: Iterable[Any],
    *,
    retrain: Retrain,
    evaluate: Evaluate,
    rule: Rule | str,
    stop: Stop,
    layers: Sequence[str] | Progressive | None = None,
    criterion: Criterion | str = criteria.apoz,
    test: Evaluate | None = None,
    forward: Forward | None = None,
    seed: int = 0,
    done: Sequence[Round] = (),
    through_norms: bool = False,
    repair: Ways | None = None,
    guard: Guard | float | None = None,
    on_rejected: Callable[[Attempt], Any] | None = None,
) -> Iterator[Round]:
    """Trim a model round by round; yields a `Round` after each. `model` itself is not changed.

    batches: data to measure on, held out of training, read once a round. retrain: trains the model it is given, in
    place. The global random state of PyTorch is seeded from `seed` and the round's number, for the round as a whole and
    for retraining anew, and restored.
    evaluate: the accuracy that stop conditions look at; use data that is not the test set. test: an accuracy that
    is only reported. layers: names or patterns, `Progressive(...)`, or None for all that can be trimmed.
    done: rounds of an interrupted loop of the same arguments; it goes on after them, with the same result as without
    the interruption. through_norms: as for `trace`. repair: how each trimmed model is repaired from `batches` before it
    is retrained, as for `repair`; None: it is not. guard: which rounds are rolled back and tried again with less, as
    `Guard` says; a number is its largest drop. on_rejected: called with each attempt when it is rolled back; those of a
    round that holds at last are its `rejected` too. A loop of which no round holds warns, with the figures.

    Raises, before any work: TraceError when the model cannot run on the example, PlanError for unknown or locked
    layers, or when none can be trimmed. Surgery and measuring raise theirs.
    """
    graph = trace(model, example, through_norms=through_norms)
    check_layers(unmeasured(model, graph), None if isinstance(layers, Progressive) else layers)
    criteria.resolve(criterion)
    ways = None if repair is None else checked_ways(repair)
    guard = checked_guard(guard)
    if isinstance(batches, Iterator):
        raise TorchtrimError(
            f"batches: expected data that can be read once a round, such as a list or a DataLoader, found the "
            f"iterator {type(batches).__name__}, which is used up after one"
        )
    rule = resolve_rule(rule)
    settings = _Settings(
        example,
        batches,
        retrain,
        evaluate,
        rule,
        stop,
        layers,
        criterion,
        test,
        forward,
        seed,
        through_norms,
        ways,
        guard,
        on_rejected,
    )
    return _rounds(model, settings, list(done))


@dataclass(frozen=True)
class _Settings:
    example: Any
    batches: Iterable[Any]
    retrain: Retrain
    evaluate: Evaluate
    rule: Rule
    stop: Stop
    layers: Sequence[str] | Progressive | None
    criterion: Criterion | str
    test: Evaluate | None
    forward: Forward | None
    seed: int
    through_norms: bool
    repair: Ways | None
    guard: Guard | None
    on_rejected: Callable[[Attempt], Any] | None

    def tested(self, model: nn.Module) -> float | None:
        """What is only reported; what it draws at random is put aside, since nothing may depend on it."""
        if self.test is None:
            return None
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            return self.test(model)


def _rounds(ancestor: nn.Module, settings: _Settings, done: list[Round]) -> Iterator[Round]:
    last = done[-1] if done else None
    while last is None or not settings.stop.reached(last):
        number = last.number + 1 if last else 1
        with _seeded(settings.seed, number):
            last = _round(ancestor, last, number, settings)
        if last is None:
            return
        yield last


def _round(ancestor: nn.Module, last: Round | None, number: int, settings: _Settings) -> Round | None:
    """The next round, or None when the rule removes nothing or the guard lets none pass."""
    model, guard = last.model if last else ancestor, settings.guard
    clock = _Clock()
    with clock("profile"):
        measured = profile(model, settings.batches, settings.forward, through_norms=settings.through_norms)
        if measured.partial:
            raise KeyboardInterrupt
    with clock("select"):
        if all(layer.locked for layer in measured.values()):
            return None
        layers = _layers_left(settings.layers, measured, last)
        if layers is not None and not layers:
            return None
        choose = partial(select, measured, layers=layers, criterion=_criterion(model, layers, settings))
        plans = smaller_plans(lambda rule: choose(rule=rule), settings.rule, guard.retries if guard else 0)
        plan = next(plans, None)
    if plan is None:
        return None
    with clock("evaluate"):
        before = last.accuracy.retrained if last else settings.evaluate(model)
        before_test = last.test.retrained if last and last.test else settings.tested(model)
    first = last.ancestor_accuracy if last else before
    rejected: list[Attempt] = []
    while plan is not None and (tried := _try(model, plan, number, settings, clock)) is not None:
        accuracy = Accuracy(before, tried.trimmed, tried.retrained)
        if guard is not None and fell(tried.retrained, first, guard.max_drop):
            rejected.append(Attempt(number, tried.plan, accuracy, first - guard.max_drop))
            del tried  # its model, before the next is made
            if settings.on_rejected is not None:
                settings.on_rejected(rejected[-1])
            with clock("select"):
                plan = next(plans, None)
            continue
        with clock("evaluate"):
            retrained_test = settings.tested(tried.model)
        with clock("measure"):
            cost, ancestor_cost = measure_beside([tried.model, ancestor], settings.example)
        test = None
        if before_test is not None and tried.trimmed_test is not None and retrained_test is not None:
            test = Accuracy(before_test, tried.trimmed_test, retrained_test)
        return Round(
            number,
            tried.model,
            tuple(tried.plan.layers),
            tried.plan,
            measured,
            cost,
            ancestor_cost,
            accuracy,
            test,
            clock.seconds,
            first,
            tuple(rejected),
        )
    if rejected and last is None:
        warnings.warn(none_holds(rejected), TorchtrimWarning, stacklevel=3)
    return None


class _Tried(NamedTuple):
    """A model that was trimmed and retrained, the plan as it was carried out, and what was said of it."""

    model: nn.Module
    plan: Plan
    trimmed: float
    trimmed_test: float | None
    retrained: float


def _try(model: nn.Module, plan: Plan, number: int, settings: _Settings, clock: "_Clock") -> _Tried | None:
    """Carry out a plan on a copy and retrain that; None where nothing of the plan can be carried out."""
    with clock("trim"):
        small = trim(model, plan, settings.example)
    if not (plan := history(small).plans[-1]).removed:
        return None
    if settings.repair is not None:
        with clock("repair"):
            small = repair(small, model, settings.example, settings.batches, settings.repair, forward=settings.forward)
    with clock("evaluate"):
        trimmed, trimmed_test = settings.evaluate(small), settings.tested(small)
    with clock("retrain"), _seeded(settings.seed, number):
        settings.retrain(small)
    with clock("evaluate"):
        return _Tried(small, plan, trimmed, trimmed_test, settings.evaluate(small))


def _criterion(model: nn.Module, layers: Sequence[str] | None, settings: _Settings) -> Criterion:
    """The criterion; one that needs more than a profile is measured."""
    criterion = criteria.resolve(settings.criterion)
    if criterion is not criteria.reconstruction:
        return criterion
    norms = settings.through_norms
    return reconstruction(
        model, settings.example, settings.batches, layers, forward=settings.forward, through_norms=norms
    )


def _layers_left(
    layers: Sequence[str] | Progressive | None, measured: Profile, last: Round | None
) -> Sequence[str] | None:
    """The layers to trim next; one of which a single neuron is left is locked, and has nothing more to give."""
    if layers is None or last is None:
        return layers.choose(measured, ()) if isinstance(layers, Progressive) else layers
    if isinstance(layers, Progressive):
        return layers.choose(measured, last.layers)
    asked = [name for name in measured if any(fnmatchcase(name, pattern) for pattern in layers)]
    return [name for name in asked if measured[name].locked is None]


class _Clock:
    """Adds up the seconds of each named step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Generator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - begun


@contextmanager
def _seeded(seed: int, number: int) -> Generator[None]:
    """Random numbers that follow from the seed and the round alone; the global state is restored at the end."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(1_000 * seed + number)
        yield
