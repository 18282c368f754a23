"""A run kept in a directory, round by round, so that one that was interrupted goes on to the same result.

run.json              what was asked, and by which versions
ancestor.safetensors  the model that the loop starts from
round-01/             a round; it counts once its numbers are there
closed.json           the attempts of the round that the guard never let pass, which ends the loop
metrics.json          the numbers of the ancestor and of all rounds, for people and scripts
"""

import json
import platform
import re
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from torchtrim import criteria
from torchtrim._budget import Budget
from torchtrim._files import hold, is_partial, write_whole
from torchtrim._forward import Forward
from torchtrim._guard import Attempt, Guard, checked_guard, none_holds
from torchtrim._loop import Evaluate, Retrain, iterate
from torchtrim._repair import Ways, checked_ways
from torchtrim._round_files import (
    METRICS,
    OF_ROUND,
    VERSION,
    attempts_from,
    described,
    read_json,
    read_round,
    write_round,
)
from torchtrim._rounds import Progressive, Round, Stop
from torchtrim._saved import library_version, read_facts
from torchtrim._select import Rule, resolve_rule
from torchtrim._store import read_model, write_model
from torchtrim.criteria import Criterion
from torchtrim.errors import PlanError, StoreError, TorchtrimWarning

_FORMAT = "torchtrim-run"
_RUN, _LOCK, _ANCESTOR, _CLOSED = "run.json", "run.lock", "ancestor.safetensors", "closed.json"


def run(
    model: nn.Module,
    example: Any,
    batches: Iterable[Any],
    *,
    directory: str | Path,
    retrain: Retrain,
    evaluate: Evaluate,
    rule: Rule | Budget | str,
    stop: Stop,
    layers: Sequence[str] | Progressive | None = None,
    criterion: Criterion | str = criteria.apoz,
    test: Evaluate | None = None,
    forward: Forward | None = None,
    seed: int = 0,
    repair: Ways | None = None,
    repair_positions: int | None = None,
    guard: Guard | float | None = None,
    zero_tolerance: float = 0.0,
    resume: bool = False,
    overwrite: bool = False,
) -> list[Round]:
    """`iterate` to its end, with every round kept in a directory; all rounds, those of an earlier run included.

    resume: go on after the last whole round in the directory, if there is one; the result is that of a run without
    the interruption. The stop may be another than before; the rest must be the same, as far as it can be told (not
    the functions and the data). The loop then starts from the ancestor in the directory: `model` may be newly built.
    overwrite: drop the run that is there.
    Raises StoreError when the directory cannot be used, and what `iterate` raises.
    """
    guard = checked_guard(guard)
    loop = partial(
        iterate,
        example=example,
        batches=batches,
        retrain=retrain,
        evaluate=evaluate,
        rule=rule,
        stop=stop,
        layers=layers,
        criterion=criterion,
        test=test,
        forward=forward,
        seed=seed,
        repair=repair,
        repair_positions=repair_positions,
        guard=guard,
        zero_tolerance=zero_tolerance,
    )
    loop(model)  # what cannot be asked is found here, before a run that is there is dropped
    settings = {
        "rule": _name(rule if isinstance(rule, Budget) else resolve_rule(rule)),
        "layers": _progressive(layers) if isinstance(layers, Progressive) else layers and list(layers),
        "criterion": _name(criteria.resolve(criterion)),
        "seed": seed,
        **({} if repair is None else {"repair": list(checked_ways(repair))}),
        **({} if repair_positions is None else {"repair_positions": repair_positions}),
        **({} if guard is None else {"guard": asdict(guard)}),
        **({"steps": stop.rounds} if isinstance(rule, Budget) else {}),
        **({"zero_tolerance": zero_tolerance} if zero_tolerance else {}),
    }
    with RunDirectory.open(directory, settings, asdict(stop), resume=resume, overwrite=overwrite) as kept:
        ancestor = kept.ancestor(model)
        done = kept.rounds(model)
        rounds = loop(model if ancestor is None else ancestor, done=done, on_rejected=kept.reject)
        if ancestor is None:
            kept.keep_ancestor(model, {})
        if kept.closed and not done:
            warnings.warn(none_holds(kept.closed), TorchtrimWarning, stacklevel=2)
        return [*done, *(() if kept.closed else kept.record(rounds))]


class RunDirectory:
    """A directory that keeps one run; made by `open`, and this process's alone until `close` or the end of a `with`."""

    def __init__(self, path: Path, release: Callable[[], None]) -> None:
        self.path = path
        self._rejected: list[Attempt] = []  # of the round in progress
        self._release = weakref.finalize(self, release)  # should it be forgotten rather than closed

    @classmethod
    def open(
        cls,
        path: str | Path,
        settings: Mapping[str, Any],
        stop: Mapping[str, Any] | None = None,
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> "RunDirectory":
        """Begin a run in a directory, which is made if need be, or go on with the one that is there.

        settings: what was asked, as JSON can say it; what a resumed run must have in common with the earlier one.
        stop: the same, of what may differ. resume: go on with the run that is there; what is half written is dropped.
        overwrite: drop the run that is there, its own files only.
        Raises StoreError: a directory that is used, whose run was asked otherwise, that another process works in, or
        that cannot be written.
        """
        place = Path(path)
        if resume and overwrite:
            raise StoreError(f"{place}: expected resume or overwrite, found both; resume keeps what overwrite drops")
        asked = _as_json(place, {"settings": settings, "stop": stop or {}})
        _check_ours(place)
        with _changing(place):
            place.mkdir(parents=True, exist_ok=True)
        kept = cls(place, hold(place / _LOCK))
        try:
            kept._begin(asked, resume, overwrite)
        except BaseException:
            kept.close()
            raise
        return kept

    def _begin(self, asked: dict[str, Any], resume: bool, overwrite: bool) -> None:
        before = read_json(self.path / _RUN, _FORMAT) if (self.path / _RUN).exists() else None
        used = (self.path / _ANCESTOR).exists() or any(
            (place / METRICS).exists() for place in _round_places(self.path).values()
        )
        if before is not None and used and not resume and not overwrite:
            whole = sum(1 for _ in _whole_rounds(self.path))
            raise StoreError(
                f"{self.path}: expected an unused directory, found a run with {whole} whole "
                f"round{'s' * (whole != 1)}; pass --resume to go on with it, --overwrite to drop it, or another --out"
            )
        goes_on = before is not None and used and resume
        if before is not None and goes_on:
            _check_asked(self.path, asked["settings"], before)
        with _changing(self.path):
            self._drop_leftovers(everything=not goes_on)
        versions = {"torchtrim": library_version(), "torch": torch.__version__, "python": platform.python_version()}
        made = before["versions"] if before is not None and goes_on else versions
        if made != versions:
            warnings.warn(
                f"{self.path}: the run began with {_listed(made)} and goes on with {_listed(versions)}; its result may "
                "differ from that of one run",
                TorchtrimWarning,
                stacklevel=4,
            )
        content = {"format": _FORMAT, "version": VERSION, **asked, "versions": made}
        write_whole(self.path / _RUN, json.dumps(content, indent=2) + "\n")
        if (self.path / _ANCESTOR).exists():
            self._summarise()

    def _drop_leftovers(self, everything: bool) -> None:
        """Remove what was half written, or all that a run wrote; the last round first, so that no gap can be left."""
        for _, place in sorted(_round_places(self.path).items(), reverse=True):
            if everything:
                (place / METRICS).unlink(missing_ok=True)
            if not (place / METRICS).exists():
                _remove(place, OF_ROUND)
                if not any(place.iterdir()):
                    place.rmdir()
        _remove(self.path, (METRICS, _ANCESTOR, _CLOSED) if everything else ())

    def close(self) -> None:
        """Let other processes use the directory."""
        self._release()

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def facts(self) -> dict[str, Any]:
        """What `keep_ancestor` was told; empty without an ancestor."""
        place = self.path / _ANCESTOR
        return read_facts(place) if place.exists() else {}

    def keep_ancestor(self, model: nn.Module, facts: Mapping[str, Any]) -> None:
        """Keep the model that the loop starts from, and what JSON can say of it, such as its accuracy.

        Raises StoreError: the model cannot be saved, or the rounds that are there start from another.
        """
        if any(_whole_rounds(self.path)):
            raise StoreError(
                f"{self.path}: expected no rounds yet, found some that start from another model; pass --overwrite to "
                "drop them, or choose another --out"
            )
        write_model(model, self.path / _ANCESTOR, _as_json(self.path, facts))
        self._summarise()

    def ancestor(self, fresh: nn.Module) -> nn.Module | None:
        """The model that was kept, on a newly built one; None if none was. Raises StoreError as `load` does."""
        place = self.path / _ANCESTOR
        return read_model(fresh, place)[0] if place.exists() else None

    def rounds(self, fresh: nn.Module) -> list[Round]:
        """The whole rounds, their models on a newly built ancestor. Raises StoreError: one is damaged or missing."""
        found: list[Round] = []
        for place in _whole_rounds(self.path):
            found.append(read_round(place, fresh, found[0].ancestor_accuracy if found else None))
        return found

    @property
    def closed(self) -> tuple[Attempt, ...]:
        """The attempts of the round that the guard never let pass, where that has ended the loop."""
        place = self.path / _CLOSED
        if not place.exists():
            return ()
        try:
            attempts = attempts_from(read_json(place, "torchtrim-closed")["rejected"])
        except (KeyError, TypeError, PlanError) as error:
            raise StoreError(f"{place}: expected attempts, found {error}; delete it and --resume") from error
        later = attempts[0].number == sum(1 for _ in _whole_rounds(self.path)) + 1
        return attempts if later else ()  # else rounds were deleted since

    def reject(self, attempt: Attempt) -> None:
        """Note an attempt that was rolled back; it is kept with its round, or when the loop ends without it."""
        self._rejected.append(attempt)

    def record(self, rounds: Iterable[Round]) -> Iterator[Round]:
        """Keep each round when it is done, then hand it on; at the end, what the guard never let pass."""
        self._rejected.clear()
        for done in rounds:
            place = self.path / f"round-{done.number:02}"
            if (place / METRICS).exists():
                raise StoreError(f"{place}: round {done.number} is there already; hand the rounds so far to the loop")
            with _changing(place):
                place.mkdir(exist_ok=True)
            write_round(done, place)
            self._rejected.clear()
            self._summarise()
            yield done
        if self._rejected:
            content = {"format": "torchtrim-closed", "version": VERSION, "rejected": described(self._rejected)}
            write_whole(self.path / _CLOSED, json.dumps(content, indent=2) + "\n")
            self._summarise()

    def _summarise(self) -> None:
        rounds = [read_json(place / METRICS, "torchtrim-round") for place in _whole_rounds(self.path)]
        ancestor: dict[str, Any] = {"facts": self.facts}
        for first in rounds[:1]:
            ancestor |= {
                "widths": {name: before for name, (before, _) in first["widths"].items()},
                "cost": first["ancestor"],
                "accuracy": first["accuracy"]["before"],
                "test": first["test"] and first["test"]["before"],
            }
        content = {"format": "torchtrim-metrics", "version": VERSION, "ancestor": ancestor, "rounds": rounds}
        content |= {"closed": described(self.closed)} if self.closed else {}
        write_whole(self.path / METRICS, json.dumps(content, indent=2) + "\n")


# ------------------------------------------------------------------ rounds


def _round_places(directory: Path) -> dict[int, Path]:
    found = ((place.name.removeprefix("round-"), place) for place in directory.glob("round-*") if place.is_dir())
    return {int(number): place for number, place in found if number.isdecimal()}


def _whole_rounds(directory: Path) -> Generator[Path]:
    """In order. Raises StoreError if one between is missing."""
    whole = {number: place for number, place in _round_places(directory).items() if (place / METRICS).exists()}
    for expected, number in enumerate(sorted(whole), 1):
        if number != expected:
            raise StoreError(
                f"{directory}: expected round {expected}, found round {number} next; put it back, or delete the rounds "
                "after it and --resume"
            )
        yield whole[number]


# ------------------------------------------------------------------ what was asked


def _check_ours(place: Path) -> None:
    """Raise StoreError unless the directory is new, empty, or a run's. Touches nothing."""
    try:
        names = {entry.name for entry in place.iterdir()} if place.exists() else set[str]()
    except OSError as error:
        raise StoreError(f"{place}: cannot be used: {error.strerror}; choose another --out") from error
    found = sorted(name for name in names if name != _LOCK and not is_partial(name, _RUN))
    if found and _RUN not in names:
        listed = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        raise StoreError(
            f"{place}: expected a new or empty directory, or one of a run, found other files: {listed}; choose another "
            "--out"
        )


def _check_asked(place: Path, asked: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    found: Mapping[str, Any] = before.get("settings", {})
    none = object()
    differing = [
        f"{name}: asked {_shown(asked, name)}, found {_shown(found, name)}"
        for name in dict.fromkeys([*asked, *found])
        if asked.get(name, none) != found.get(name, none)
    ]
    if differing:
        raise StoreError(
            f"{place}: the run there was asked otherwise; resume it with the same settings, or choose another --out:"
            "\n  " + "\n  ".join(differing)
        )


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return json.dumps(settings[name], ensure_ascii=False) if name in settings else "nothing"


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _as_json(place: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """As it will be read back: lists for tuples, texts for keys. Raises StoreError when JSON cannot say it."""
    try:
        return json.loads(json.dumps(content, default=_as_dict))
    except (TypeError, ValueError) as error:
        raise StoreError(f"{place}: expected what JSON can say, found {error}: {content}") from error


def _as_dict(value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise TypeError(f"{value!r} of type {type(value).__name__}")
    return dict(value)


@contextmanager
def _changing(place: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"{place}: cannot be changed: {error.strerror or error}; choose another --out") from error


def _remove(place: Path, names: Iterable[str]) -> None:
    """Remove these files, and what a killed process left of writing them."""
    for entry in place.iterdir():
        if entry.name in names or any(is_partial(entry.name, name) for name in (*OF_ROUND, _RUN, _ANCESTOR, _CLOSED)):
            entry.unlink()


def _progressive(layers: Progressive) -> str:
    """As runs were written before there was a step, where there is none."""
    return f"Progressive(start={layers.start})" if layers.step == 1 else repr(layers)


def _name(chosen: Any) -> str:
    """What is the same in another process: a function's name, or what an object says of itself without its address."""
    if hasattr(chosen, "__qualname__"):
        return f"{chosen.__module__}.{chosen.__qualname__}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(chosen))
