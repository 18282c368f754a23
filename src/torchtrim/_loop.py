"""The loop of the paper: profile, choose, trim, retrain, and again, a round at a time.

`iterate` is a generator of rounds; whoever draws from it decides what to keep. Hu et al., "Network Trimming", 2016.
"""

import math
import time
import warnings
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from torchtrim import criteria
from torchtrim._accuracy import accuracy_of
from torchtrim._budget import Budget
from torchtrim._cost import measure, measure_beside
from torchtrim._forward import Forward
from torchtrim._graph import trace
from torchtrim._guard import (
    Accuracy,
    Attempt,
    Guard,
    checked_guard,
    fell,
    is_number,
    none_holds,
    part_of,
    smaller_plans,
)
from torchtrim._history import history
from torchtrim._measure import check_tolerance, profile
from torchtrim._plan import Plan
from torchtrim._profile import Profile
from torchtrim._reconstruction import reconstruction
from torchtrim._repair import Ways, check_repair_positions, checked_ways, repair
from torchtrim._rounds import Progressive, Round, Stop
from torchtrim._schedule import budget_of_round
from torchtrim._select import Rule, check_layers, resolve_rule, select
from torchtrim._surgery import trim
from torchtrim._unmeasured import unmeasured
from torchtrim.criteria import Criterion
from torchtrim.errors import TorchtrimError, TorchtrimWarning

_WHOLE = "the model to begin with"

Retrain = Callable[[nn.Module], Any]
Evaluate = Callable[[nn.Module], float]


def iterate(
    model: nn.Module,
    example: Any,
    batches: Iterable[Any],
    *,
    retrain: Retrain,
    evaluate: Evaluate,
    rule: Rule | Budget | str,
    stop: Stop,
    layers: Sequence[str] | Progressive | None = None,
    criterion: Criterion | str = criteria.apoz,
    test: Evaluate | None = None,
    forward: Forward | None = None,
    seed: int = 0,
    done: Sequence[Round] = (),
    through_norms: bool = False,
    repair: Ways | None = None,
    repair_positions: int | None = None,
    guard: Guard | float | None = None,
    on_rejected: Callable[[Attempt], Any] | None = None,
    zero_tolerance: float = 0.0,
) -> Iterator[Round]:
    """Trim a model round by round; yields a `Round` after each. `model` itself is not changed.

    batches: data to measure on, held out of training, read once a round. retrain: trains the model it is given, in
    place. The global random state of PyTorch is seeded from `seed` and the round's number, for the round as a whole and
    for retraining anew, and restored.
    evaluate: the accuracy that stop conditions look at; use data that is not the test set. test: an accuracy that is
    only reported. rule: as for `select`, or a `Budget` of the ancestor, which is met in as many rounds as the stop has,
    or in one, each of which cuts by the same factor; the loop ends there. layers: names or patterns,
    `Progressive(...)`, or None for all that can be trimmed. done: rounds of an interrupted loop of the same arguments;
    it goes on after them, with the same result as without the interruption. through_norms: as for `trace`. repair: how
    each trimmed model is repaired from `batches` before it is retrained, as for `repair`; None: it is not.
    repair_positions: at how many of an example's positions least squares looks, as the `positions` of `repair`, and the
    criterion "reconstruction" too; None: at all. guard: which rounds are rolled back and tried again with less, as
    `Guard` says; a number is its largest drop. on_rejected: called with each attempt when it is rolled back; those of a
    round that holds at last are its `rejected` too. A loop of which no round holds warns, with the figures.
    zero_tolerance: as for `profile`.

    Raises, before any work: TraceError when the model cannot run on the example, PlanError for unknown or locked
    layers, when none can be trimmed, or for a budget out of reach. Surgery and measuring raise theirs, and what
    `evaluate` gives must be a number.
    """
    _check_kinds(stop, layers, seed, retrain=retrain, evaluate=evaluate, test=test, on_rejected=on_rejected)
    graph = trace(model, example, through_norms=through_norms)
    blank = unmeasured(model, graph)
    names = None if isinstance(layers, Progressive) else layers
    check_layers(blank, names)
    ways = None if repair is None else checked_ways(repair)
    check_repair_positions(repair_positions, ways or (), criteria.resolve(criterion))
    check_tolerance(zero_tolerance)
    if isinstance(rule, Budget):
        rule.check(model, graph, blank, names)
    guard = checked_guard(guard)
    if isinstance(batches, Iterator):
        raise TorchtrimError(
            f"batches: expected data that can be read once a round, such as a list or a DataLoader, found the "
            f"iterator {type(batches).__name__}, which is used up after one"
        )
    settings = _Settings(
        example,
        batches,
        retrain,
        evaluate,
        rule if isinstance(rule, Budget) else resolve_rule(rule),
        stop,
        layers,
        criterion,
        test,
        forward,
        seed,
        through_norms,
        ways,
        repair_positions,
        guard,
        on_rejected,
        zero_tolerance,
        blank.widths,
    )
    return _rounds(model, settings, list(done))


def _check_kinds(stop: Any, layers: Any, seed: Any, **functions: Any) -> None:
    """Raise one TorchtrimError for all that is not of the kind that the loop calls."""
    faults = [
        f"{name}: expected a function, found {value!r}"
        for name, value in functions.items()
        if not (callable(value) or (value is None and name in ("test", "on_rejected")))
    ]
    if not isinstance(stop, Stop):
        faults.append(f"stop: expected such as Stop(rounds=4), found {stop!r}")
    if not (layers is None or isinstance(layers, (Collection, Progressive))):  # an iterator would be used up
        faults.append(f"layers: expected a sequence of names, found {layers!r}")
    if not is_number(seed):
        faults.append(f"seed: expected a number, found {seed!r}")
    if faults:
        raise TorchtrimError("\n".join(faults))


@dataclass(frozen=True)
class _Settings:
    example: Any
    batches: Iterable[Any]
    retrain: Retrain
    evaluate: Evaluate
    rule: Rule | Budget
    stop: Stop
    layers: Sequence[str] | Progressive | None
    criterion: Criterion | str
    test: Evaluate | None
    forward: Forward | None
    seed: int
    through_norms: bool
    repair: Ways | None
    repair_positions: int | None
    guard: Guard | None
    on_rejected: Callable[[Attempt], Any] | None
    zero_tolerance: float
    widths: Mapping[str, int]  # of the ancestor

    def profile(self, model: nn.Module) -> Profile:
        return profile(
            model,
            self.batches,
            self.forward,
            through_norms=self.through_norms,
            zero_tolerance=self.zero_tolerance,
        )

    def evaluated(self, model: nn.Module, what: str) -> float:
        return accuracy_of(self.evaluate, model, what)

    def tested(self, model: nn.Module) -> float | None:
        """What is only reported; what it draws at random is put aside, since nothing may depend on it."""
        if self.test is None:
            return None
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            return accuracy_of(self.test, model, "the model", "test")


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
        measured = settings.profile(model)
        if measured.partial:
            raise KeyboardInterrupt
    with clock("select"):
        if all(layer.locked for layer in measured.values()):
            return None
        layers = _layers_left(settings.layers, measured, last)
        if layers is not None and not layers:
            return None
        choose = _chooser(ancestor, last, number, measured, layers, settings)
        plans = smaller_plans(choose, guard.retries if guard else 0)
        plan = next(plans, None)
    if plan is None:
        return None
    with clock("evaluate"):
        before = last.accuracy.retrained if last else settings.evaluated(model, _WHOLE)
        if last is None and not math.isfinite(before):
            raise TorchtrimError(
                f"evaluate: expected a finite accuracy of {_WHOLE}, found {before}; all is held to that"
            )
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
            small = repair(
                small,
                model,
                settings.example,
                settings.batches,
                settings.repair,
                forward=settings.forward,
                positions=settings.repair_positions,
            )
    with clock("evaluate"):
        trimmed, trimmed_test = settings.evaluated(small, "the trimmed model"), settings.tested(small)
    with clock("retrain"), _seeded(settings.seed, number):
        settings.retrain(small)
    with clock("evaluate"):
        return _Tried(small, plan, trimmed, trimmed_test, settings.evaluated(small, "the retrained model"))


def _chooser(
    ancestor: nn.Module,
    last: Round | None,
    number: int,
    measured: Profile,
    layers: Sequence[str] | None,
    settings: _Settings,
) -> Callable[[int], Plan]:
    """What gives the plan of a round, or a part of it, by the number by which it is divided."""
    model, rule, example = last.model if last else ancestor, settings.rule, settings.example
    criterion = _criterion(model, layers, settings)
    if not isinstance(rule, Budget):
        return lambda part: select(measured, rule=part_of(rule, part), layers=layers, criterion=criterion)
    rounds = settings.stop.rounds or 1
    whole = last.ancestor if last else measure(ancestor, example)
    now = last.cost if last else whole
    planned = partial(Budget.plan, model=model, example=example, profile=measured, criterion=criterion, layers=layers)
    if number == 1 < rounds and not isinstance(settings.layers, Progressive):  # whose layers become more
        planned(rule)  # if it is out of reach, it says so now, and not after some rounds

    def choose(part: int) -> Plan:
        gone = min(number / rounds, 1)
        budget = budget_of_round(rule, gone, whole, now, settings.widths, measured.widths, part=part)
        return Plan({}) if budget is None else planned(budget)

    return choose


def _criterion(model: nn.Module, layers: Sequence[str] | None, settings: _Settings) -> Criterion:
    """The criterion; one that needs more than a profile is measured."""
    criterion = criteria.resolve(settings.criterion)
    if criterion is not criteria.reconstruction:
        return criterion
    return reconstruction(
        model,
        settings.example,
        settings.batches,
        layers,
        forward=settings.forward,
        positions=settings.repair_positions,
        through_norms=settings.through_norms,
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
