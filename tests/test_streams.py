"""Data that come one by one, without a length or an end in sight, and passes that are cut short."""

import io
import signal
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from torchtrim import MeanPlusStd, Profile, Stop, TorchtrimWarning, iterate, profile
from torchtrim._progress import training_progress, uninterrupted


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def inputs(count: int = 12) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(1))


def interrupted(batches: list[Any]) -> Iterator[Any]:
    yield from batches
    raise KeyboardInterrupt


class Stream(IterableDataset[tuple[Tensor, dict[str, Any]]]):
    """Examples with what is known of them, as webdataset gives them."""

    def __iter__(self) -> Iterator[Any]:
        for number, example in enumerate(inputs()):
            yield example, {"__key__": str(number), "label": number % 3}


def test_streams_without_a_length() -> None:
    expected = profile(network(), [inputs()]).zeros["0"]
    loader = DataLoader(Stream(), batch_size=5)
    mappings = ({"input": example, "more": None} for example in inputs().split(5))
    for progress in (True, False):
        np.testing.assert_array_equal(profile(network(), loader, progress=progress).zeros["0"], expected)
    found = profile(network(), mappings, lambda model, batch: model(batch["input"]), progress=True)
    np.testing.assert_array_equal(found.zeros["0"], expected)


@pytest.mark.parametrize("progress", [True, False])
def test_only_the_batch_in_progress_is_held(progress: bool, tmp_path: Path) -> None:
    before: list[weakref.ref[Tensor]] = []

    def loader() -> Iterator[tuple[Tensor, int]]:
        for _ in range(6):
            assert all(one() is None for one in before)
            batch = torch.randn(3, 4)
            before.append(weakref.ref(batch))
            yield batch, 0
            del batch

    profile(network(), loader(), progress=progress, checkpoint=tmp_path / "pass", every=2)
    assert len(before) == 6


# Progress -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_rate_and_total_on_a_terminal_only(terminal: bool) -> None:
    file = io.StringIO()
    with training_progress(Console(file=file, force_terminal=terminal, width=100)) as progress:

        def loader() -> Iterator[Tensor]:
            for batch in inputs().split(4):
                yield batch
                progress.refresh()

        profile(network(), loader(), progress=progress)
        assert not progress.tasks
        progress.refresh()
    shown = file.getvalue()
    assert ("examples/s" in shown and "2/?" in shown) if terminal else not shown.strip()


def test_progress_knows_the_length_of_a_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    totals: list[Any] = []
    progress = training_progress(Console(file=io.StringIO()))
    monkeypatch.setattr(progress, "add_task", lambda label, total: totals.append(total) or 0)
    monkeypatch.setattr(progress, "update", lambda *_, **__: None)
    monkeypatch.setattr(progress, "remove_task", lambda task: None)
    profile(network(), inputs().split(5), progress=progress)
    profile(network(), iter(inputs().split(5)), progress=progress)
    assert totals == [3, None]


# Interrupts ---------------------------------------------------------------------------------------------


def test_an_interrupt_gives_what_was_measured_so_far(tmp_path: Path) -> None:
    model, random = network().train(), torch.get_rng_state()
    with pytest.warns(TorchtrimWarning, match="^partial: measuring was interrupted after 8 examples$"):
        found = profile(model, interrupted(list(inputs().split(4))[:2]))
    assert found.partial
    assert "partial: " in str(found)
    np.testing.assert_array_equal(found.zeros["0"], profile(network(), [inputs()[:8]]).zeros["0"])
    found.save(tmp_path / "profile")
    assert Profile.load(tmp_path / "profile").partial
    rest = profile(network(), [inputs()[8:]])
    assert rest.merge(found).partial
    assert not rest.partial
    assert model.training
    assert not model._forward_hooks
    assert torch.equal(torch.get_rng_state(), random)


def test_an_interrupt_before_the_first_batch_goes_on() -> None:
    model = network().train()
    with pytest.raises(KeyboardInterrupt):
        profile(model, interrupted([]))
    assert model.training
    assert not model._forward_hooks


def test_a_batch_that_is_interrupted_does_not_count() -> None:
    class Interrupting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.armed = network(), False

        def forward(self, inputs: Tensor) -> Tensor:
            outputs = self.inside(inputs)
            if self.armed:
                raise KeyboardInterrupt
            return outputs

    def loader() -> Iterator[Tensor]:
        yield from inputs().split(4)
        model.armed = True
        yield inputs()

    model = Interrupting()
    with pytest.warns(TorchtrimWarning, match="partial"):
        found = profile(model, loader())
    assert found.examples == 12
    np.testing.assert_array_equal(found.zeros["inside.0"], profile(network(), [inputs()]).zeros["0"])
    assert set(found.positions["inside.0"]) == {12}


def test_an_interrupt_waits_until_a_batch_has_counted() -> None:
    done: list[int] = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append(1)
        done.append(2)
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_loop_of_rounds_does_not_go_on_with_a_partial_profile() -> None:
    class Interrupted(list[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return interrupted([inputs()])

    rounds = iterate(
        network(),
        inputs(2),
        Interrupted(),
        rule=MeanPlusStd(1),
        stop=Stop(rounds=1),
        retrain=lambda model: None,
        evaluate=lambda model: 1.0,
    )
    with pytest.warns(TorchtrimWarning, match="partial"), pytest.raises(KeyboardInterrupt):
        next(rounds)
