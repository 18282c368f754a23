"""The job of `torchtrim run`: trim a model round by round into a run directory.

What is sure to fail fails first: names, data, how they fit, the layers, and the directory are looked at before
anything is trained.
"""

import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from rich.progress import Progress
from torch import nn
from torch.utils.data import Dataset

from torchtrim import criteria
from torchtrim._budget import Budget
from torchtrim._cost import measure
from torchtrim._data import batches
from torchtrim._graph import trace
from torchtrim._guard import Attempt
from torchtrim._loop import iterate
from torchtrim._measure import check_tolerance
from torchtrim._measuring import Watched
from torchtrim._repair import check_repair_positions
from torchtrim._report import Ancestor, RoundTable
from torchtrim._rounds import Progressive, Round
from torchtrim._run_directory import RunDirectory
from torchtrim._select import check_layers
from torchtrim._settings import LATENCY_BATCH, Settings
from torchtrim._source import Opened, open_source
from torchtrim._training import evaluate, train
from torchtrim._unmeasured import unmeasured
from torchtrim._words import REPORTS, closing, heading, place_of, rolled_back, write_report
from torchtrim.errors import ModelError

Say = Callable[[str], None]


def run(
    settings: Settings, say: Say, progress: Progress, *, resume: bool = False, overwrite: bool = False
) -> list[Round]:
    """Trim a model round by round. `say` is given the table line by line, and at the end what was written where.

    All is kept in the directory `settings.out`; with `resume`, an interrupted run goes on after its last whole round.
    Raises TorchtrimError, before any work if what is asked cannot be done.
    """
    check_repair_positions(settings.repair_positions, settings.repair, criteria.resolve(settings.criterion))
    check_tolerance(settings.zero_tolerance)
    opened = open_source(settings.source, through_norms=settings.through_norms)
    if settings.training is None and settings.source.untrained:
        raise ModelError(
            f"{settings.source.model} comes untrained; name its weights (--weights) or have it trained (--train-epochs)"
        )
    layers = None if isinstance(settings.layers, Progressive) else settings.layers
    blank = unmeasured(opened.model, opened.graph)
    check_layers(blank, layers)
    if isinstance(settings.rule, Budget):
        one = trace(opened.model, opened.data.example[:1], through_norms=settings.through_norms)
        settings.rule.check(opened.model, one, blank, layers)
    with RunDirectory.open(
        settings.out, settings.described(), asdict(settings.stop), resume=resume, overwrite=overwrite
    ) as directory:
        if not resume:
            for name in REPORTS:
                (settings.out / name).unlink(missing_ok=True)  # of the run that was replaced
        return _trim_all(settings, opened, directory, say, progress)


def _trim_all(settings: Settings, opened: Opened, directory: RunDirectory, say: Say, progress: Progress) -> list[Round]:
    say(heading(settings, opened))
    trimming = _Trimming(settings, opened, directory, progress)
    table = trimming.table()
    for text in (textwrap.fill(table.caption, 100), "", table.line(table.titles), table.line(table.first)):
        say(text)
    rounds: list[Round] = []
    for done in trimming.rounds(lambda attempt: say(rolled_back(attempt))):
        rounds.append(done)
        say(table.line(table.cells(done)))
    write_report(settings, table, rounds, directory.closed, float(directory.facts["accuracy"]))
    say(closing(settings, opened, rounds, directory.closed, complete=trimming.complete))
    return rounds


class _Trimming:
    """One run: its ancestor and its rounds, those that an earlier run left included."""

    def __init__(self, settings: Settings, opened: Opened, directory: RunDirectory, progress: Progress) -> None:
        self._settings = settings
        self._opened = opened
        self._directory = directory
        self._progress = progress
        self._number = 1  # of the round in progress
        self.complete = False  # whether an earlier run has left nothing to do
        self._example = torch.zeros(LATENCY_BATCH, *opened.data.shape)
        self._ancestor = self._kept_ancestor()

    def table(self) -> RoundTable:
        ancestor, facts, layers = self._ancestor, self._directory.facts, self._settings.layers
        graph = trace(ancestor, self._example, through_norms=self._settings.through_norms)
        widths = unmeasured(ancestor, graph).widths
        cost = measure(ancestor, self._example)
        cost = replace(cost, latency=float(facts.get("latency", cost.latency)))
        patterns = layers if isinstance(layers, tuple) else ()
        return RoundTable(
            Ancestor(widths, cost, float(facts["accuracy"]), float(facts["seconds"])),
            [name for name in widths if any(fnmatchcase(name, pattern) for pattern in patterns)],
            batch=LATENCY_BATCH,
            columns=shutil.get_terminal_size((200, 24)).columns if sys.stdout.isatty() else None,
            device=place_of(self._opened.device),
        )

    def rounds(self, rejected: Callable[[Attempt], None]) -> Iterator[Round]:
        """All rounds; what the guard rolls back is told to `rejected`, ahead of the round that holds."""
        settings, data, directory = self._settings, self._opened.data, self._directory
        done = directory.rounds(self._opened.fresh())
        for one in done:
            one.model.to(self._opened.device)
            for attempt in one.rejected:
                rejected(attempt)
            yield one
        for attempt in directory.closed:
            rejected(attempt)
        if directory.closed:
            self.complete = True
            return
        self._number += len(done)

        def reject(attempt: Attempt) -> None:
            directory.reject(attempt)
            rejected(attempt)

        reading = settings.retraining
        loader = batches(data.calibration, reading.batch_size, workers=reading.workers)
        new = iterate(
            self._ancestor,
            self._example,
            Watched(loader, self._progress, "measuring"),
            retrain=self._retrain,
            evaluate=lambda model: self._evaluate(model, data.calibration),
            test=lambda model: self._evaluate(model, data.test),
            rule=settings.rule_of_batch,
            stop=settings.stop,
            layers=settings.layers,
            criterion=settings.criterion,
            through_norms=settings.through_norms,
            repair=settings.repair or None,
            repair_positions=settings.repair_positions,
            guard=settings.guard,
            on_rejected=reject,
            zero_tolerance=settings.zero_tolerance,
            seed=settings.source.seed,
            done=done,
        )
        for one in directory.record(new):
            yield one
            self._number += 1
        self.complete = 0 < len(done) == self._number - 1 and not directory.closed

    def _kept_ancestor(self) -> nn.Module:
        """The ancestor that an earlier run left, or a new one."""
        kept = self._directory.ancestor(self._opened.fresh())
        if kept is not None:
            return kept.to(self._opened.device)
        model, data, training = self._opened.model, self._opened.data, self._settings.training
        begun = time.perf_counter()
        if training is not None:
            train(model, data.train, training, progress=self._progress, label="training the ancestor")
        label = "testing the ancestor"
        accuracy = evaluate(model, data.test, **self._reading(), progress=self._progress, label=label)
        seconds = time.perf_counter() - begun
        latency = measure(model, self._example).latency
        self._directory.keep_ancestor(model, {"accuracy": accuracy, "seconds": seconds, "latency": latency})
        return model

    def _retrain(self, model: nn.Module) -> None:
        seed = torch.initial_seed()  # the loop's, for this round
        train(
            model,
            self._opened.data.train,
            self._settings.retraining,
            seed=seed,
            teacher=self._ancestor,
            calibration=self._opened.data.calibration,
            progress=self._progress,
            label=f"round {self._number}: retraining",
        )

    def _evaluate(self, model: nn.Module, dataset: Dataset[Any]) -> float:
        label = f"round {self._number}: testing"
        return evaluate(model, dataset, **self._reading(), progress=self._progress, label=label)

    def _reading(self) -> dict[str, int]:
        training = self._settings.retraining
        return {"batch_size": training.batch_size, "workers": training.workers}
