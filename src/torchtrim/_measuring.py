"""The jobs that measure a model and change nothing: how silent its neurons are, and what its layers can lose.

What is sure to fail fails first.
"""

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch.utils.data import DataLoader

from torchtrim import criteria
from torchtrim._data import batches
from torchtrim._drawing import form_of
from torchtrim._measure import check_tolerance, profile
from torchtrim._profile import Profile
from torchtrim._progress import shown
from torchtrim._reconstruction import reconstruction
from torchtrim._repair import Way, check_repair_positions
from torchtrim._report import advice, classes_table, profile_table
from torchtrim._rounds import Progressive
from torchtrim._select import Rule, check_layers
from torchtrim._sensitivity import Sensitivity, checked_fractions, sensitivity
from torchtrim._source import Source, open_source
from torchtrim._stable import Stable
from torchtrim._training import Training, evaluate
from torchtrim._unmeasured import unmeasured
from torchtrim._words import command, next_run, settled, short
from torchtrim.errors import ModelError, StoreError, TorchtrimWarning


def silence(
    source: Source,
    rule: Rule,
    criterion: str,
    reading: Training,
    progress: Progress,
    out: Path | None,
    *,
    through_norms: bool = False,
    resume: bool = False,
    plot: Path | None = None,
    per_class: bool = False,
    zero_tolerance: float = 0.0,
    until: float | None = None,
) -> Iterator[Any]:
    """Measure a model over the calibration data, and keep the profile in the file `out`; yields what to print.

    `reading` says how the data are read. With `resume`, an interrupted pass goes on from what the file holds. `plot`:
    where pictures go. `until`: the confidence at which what the rule removes is settled, and the pass ends.
    Raises TorchtrimError, before any work if what is asked cannot be done; KeyboardInterrupt at the end where one came.
    """
    criteria.resolve(criterion)
    check_tolerance(zero_tolerance)
    stable = None if until is None else Stable(rule, confidence=until, criterion=criterion)
    _check_asked(out, plot, resume=resume, ends=stable is not None)
    opened = open_source(source, through_norms=through_norms)
    check_layers(unmeasured(opened.model, opened.graph), None)
    if source.untrained:
        warnings.warn(
            f"{source.model} comes untrained, so that its silence says little; name its weights (--weights)",
            TorchtrimWarning,
            stacklevel=2,
        )
    shuffled: dict[str, Any] = {"shuffle": True, "generator": torch.Generator().manual_seed(reading.seed)}
    loader = batches(
        opened.data.calibration, reading.batch_size, workers=reading.workers, **({} if stable is None else shuffled)
    )
    if out is not None and not resume:
        out.unlink(missing_ok=True)
    measured = profile(
        opened.model,
        loader,
        through_norms=through_norms,
        zero_tolerance=zero_tolerance,
        until=stable,
        checkpoint=out if stable is None else None,
        progress=progress,
        classes=per_class,
    )
    if out is not None and stable is not None:
        measured.save(out)
    function = criteria.resolve(criterion)
    if function is criteria.reconstruction:
        if measured.partial:
            yield str(measured)
            raise KeyboardInterrupt  # the criterion wants all data once more
        function = reconstruction(opened.model, opened.graph, Watched(loader, progress, "measuring"))
    yield profile_table(measured, rule, function)
    if per_class:
        yield classes_table(measured)
    if measured.in_doubt is not None:
        yield settled(measured, len(opened.data.calibration))  # pyright: ignore[reportArgumentType]
    yield "\n".join(advice(measured, rule, function))
    if out is not None:
        yield f"The profile is in {short(out)}."
    if plot is not None:
        yield f"Drawn: {', '.join(short(place) for place in _plotted(measured, plot))}."
    if measured.partial:
        raise KeyboardInterrupt
    yield f"Next: {next_run(source, measured, rule, criterion)}"


def fall(
    source: Source,
    criterion: str,
    layers: tuple[str, ...] | None,
    fractions: Sequence[float],
    reading: Training,
    progress: Progress,
    out: Path,
    *,
    repair: tuple[Way, ...] = (),
    repair_positions: int | None = None,
    through_norms: bool = False,
    resume: bool = False,
    plot: Path | None = None,
) -> Iterator[Any]:
    """Measure how a model's accuracy falls when one group of layers alone is trimmed; yields what to print.

    `out`: the file that keeps it, with each accuracy as it is found; with `resume`, an interrupted one goes on.
    Raises TorchtrimError, before any work if what is asked cannot be done.
    """
    check_repair_positions(repair_positions, repair, criteria.resolve(criterion))
    checked_fractions(fractions)
    _check_place(out, "--out")
    if out.exists():
        Sensitivity.load(out)  # anything else is not ours to replace
    if plot is not None:
        _check_place(plot, "--plot")
        form_of(plot)
    opened = open_source(source, through_norms=through_norms)
    check_layers(unmeasured(opened.model, opened.graph), layers)
    if source.untrained:
        raise ModelError(f"{source.model} comes untrained, and has no accuracy to lose; name its weights (--weights)")
    if not resume:
        out.unlink(missing_ok=True)
    data = opened.data.calibration
    loader = Watched(batches(data, reading.batch_size, workers=reading.workers), progress, "measuring")
    found = sensitivity(
        opened.model,
        opened.graph,
        loader,
        partial(evaluate, dataset=data, batch_size=reading.batch_size, workers=reading.workers, progress=progress),
        fractions=fractions,
        criterion=criterion,
        layers=layers,
        repair=repair or None,
        repair_positions=repair_positions,
        checkpoint=out,
    )
    found.save(out)
    yield str(found)
    yield "The weight says how much a budget spares the layer."
    if plot is not None:
        found.plot(plot)
        yield f"Drawn: {short(plot)}."
    yield f"The sensitivity is in {short(out)}."
    yield f"Next: {command('run', source, '--flops', '0.5', '--sensitivity', short(out))}"


def _plotted(measured: Profile, plot: Path) -> Iterator[Path]:
    """Draw what was measured, by class too where it was: of the layer to begin with."""
    measured.plot(plot)
    yield plot
    first = [name for name in Progressive(1).choose(measured, ()) if measured.classes]
    for name in first:
        place = plot.with_name(f"{plot.stem}-by-class{plot.suffix}")
        measured.plot(place, layer=name)
        yield place


def _check_asked(out: Path | None, plot: Path | None, *, resume: bool, ends: bool) -> None:
    """Whether a pass can be kept, gone on with and drawn as is asked. ends: whether it may end by itself."""
    if resume and out is None:
        raise StoreError("expected --resume with --out FILE, the file of the pass that goes on; found it alone")
    if resume and ends:
        raise StoreError("expected either --resume or --until, whose pass keeps nothing on the way; found both")
    if out is not None:
        _check_place(out, "--out")
        if out.exists():
            Profile.load(out)  # anything else is not ours to replace
    if plot is not None:
        _check_place(plot, "--plot")
        form_of(plot)


def _check_place(path: Path, option: str) -> None:
    if path.is_dir():
        raise StoreError(f"{path}: expected a file to write into, found a directory; add a name to {option}")
    if not path.exists() and (not path.parent.is_dir() or not os.access(path.parent, os.W_OK)):
        raise StoreError(
            f"{path}: expected a place in a directory that exists and can be written; choose another {option}"
        )


class Watched(Iterable[Any]):
    """A loader whose reading is shown; it can be read once a round."""

    def __init__(self, loader: DataLoader[Any], progress: Progress, label: str) -> None:
        self._loader = loader
        self._progress = progress
        self._label = label

    def __iter__(self) -> Iterator[Any]:
        with shown(self._progress, self._label, len(self._loader)) as show:
            for batch in self._loader:
                yield batch
                show("")
