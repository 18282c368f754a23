"""Runs that keep their accuracy: the guard, a largest drop, and what retraining learns from, from settings to files."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress
from safetensors.torch import load_file
from torch import nn

from small_data import write_idx, write_model
from torchtrim import Budget, Guard, Progressive, Stop, TorchtrimError, TorchtrimWarning, _cost, _loop
from torchtrim import _job as job
from torchtrim._job import run
from torchtrim._settings import Settings, guard_at, layers_named, retraining_for, stop_at
from torchtrim._source import Source
from torchtrim._training import Training
from torchtrim.errors import StoreError

PLAIN = Training(epochs=0.5, batch_size=16, mixed_precision="no", shift=0)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_loop, "measure_beside", partial(_cost.measure_beside, seconds=0))
    monkeypatch.setattr(job, "measure", lambda model, example: _cost.measure_beside([model], example, seconds=0)[0])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        source=Source(write_model(tmp_path), write_idx(tmp_path / "digits")),
        out=tmp_path / "out",
        stop=Stop(rounds=2),
        retraining=PLAIN,
        training=PLAIN,
        layers=("conv2", "fc1"),
        guard=Guard(1.0, retries=1),
    )


def said(settings: Settings, **how: bool) -> list[str]:
    parts: list[str] = []
    run(settings, parts.append, Progress(disable=True), **how)
    return "\n".join(parts).splitlines()


class Script:
    """Accuracies on the calibration data by a table, after each retraining; the ancestor's is 90. Of the test, chance.

    interrupt: the retraining in which the user loses patience.
    """

    def __init__(self, patch: pytest.MonkeyPatch, *table: float, interrupt: int | None = None) -> None:
        self.trained: list[nn.Module] = []
        usual = getattr(job.train, "usual", job.train)

        def train(model: nn.Module, *arguments: Any, **named: Any) -> None:
            usual(model, *arguments, **named)
            if "retraining" in named["label"]:
                self.trained.append(model)
                if len(self.trained) == interrupt:
                    raise KeyboardInterrupt

        def evaluate(trimming: Any, model: nn.Module, dataset: Any) -> float:
            if dataset is trimming._opened.data.test:
                return 100 * float(torch.rand(()))
            places = [place for place, one in enumerate(self.trained) if one is model]
            return table[places[0]] if places else (90.0 if model is trimming._ancestor else 50.0)

        train.usual = usual  # type: ignore[attr-defined]
        patch.setattr(job, "train", train)
        patch.setattr(job._Trimming, "_evaluate", evaluate)


def rows(lines: list[str]) -> list[list[str]]:
    """The lines of the table, those of attempts that were rolled back included, without accuracies and timings."""
    found = [line.split() for line in lines if line[:5].strip().isdigit()]
    return [words if words[1] == "rolled" else words[:4] for words in found]


def contents(directory: Path) -> dict[str, bytes]:
    kept = sorted([*directory.glob("round-*/plan.json"), *directory.glob("round-*/*.safetensors")])
    return {str(path.relative_to(directory)): path.read_bytes() for path in kept}


def test_a_round_that_is_rolled_back_is_told_in_table_page_and_figures(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    Script(monkeypatch, 88.5, 89.25, 70.0, 71.0)
    lines = said(settings)
    assert "rolls back rounds that lose more than 1 percentage point of accuracy" in lines
    table = [row[:2] for row in rows(lines)]
    assert [number for number, _ in table] == ["0", "1", "1", "2", "2"]
    assert [kind for _, kind in table].count("rolled") == 3
    told = next(line for line in lines if "rolled back" in line)
    assert told.startswith("    1  rolled back: conv2 12 → ")
    assert told.endswith(" gave 88.50 % on the calibration data, below 89.00 %")
    end = "The guard ended the run: round 2 did not hold in 2 attempts; round 1 was the last that did."
    assert end in lines
    assert "round-01" in lines[-1]
    page = (settings.out / "report.md").read_text()
    assert f"   - {told.strip().partition('  ')[2]}\n2. {end}\n   - rolled back: " in page
    assert page.count("- rolled back") == 3
    assert "Rounds that lost more than 1 percentage point of accuracy were rolled back." in page
    metrics = json.loads((settings.out / "metrics.json").read_text())
    assert [one["accuracy"]["retrained"] for one in metrics["rounds"][0]["rejected"]] == [88.5]
    assert [one["accuracy"]["retrained"] for one in metrics["closed"]] == [70.0, 71.0]

    script = Script(monkeypatch)
    again = said(settings, resume=True)
    assert rows(again) == rows(lines)
    assert script.trained == []
    assert "The run was complete; nothing was left to do." in again
    assert (settings.out / "report.md").read_text().count("- rolled back") == 3
    with pytest.raises(StoreError, match="guard: asked nothing, found"):
        said(replace(settings, guard=None), resume=True)


@pytest.mark.parametrize("interrupt", [1, 2, 3])
def test_resumed_between_two_attempts(settings: Settings, monkeypatch: pytest.MonkeyPatch, interrupt: int) -> None:
    table = (88.5, 89.25, 80.0, 89.0)
    whole = replace(settings, out=settings.out.with_name("whole"))
    Script(monkeypatch, *table)
    expected = said(whole)
    Script(monkeypatch, *table, interrupt=interrupt)
    with pytest.raises(KeyboardInterrupt):
        said(settings)
    Script(monkeypatch, *(table if interrupt < 3 else table[2:]))
    assert rows(said(settings, resume=True)) == rows(expected)
    assert [row[0] for row in rows(expected)] == ["0", "1", "1", "2", "2"]
    assert contents(settings.out) == contents(whole.out)
    assert len(contents(whole.out)) == 6


def test_where_no_round_holds_nothing_is_trimmed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    Script(monkeypatch, 50.0, 60.0)
    with pytest.warns(TorchtrimWarning, match="no round holds"):
        lines = said(settings)
    end = "The guard ended the run: round 1 did not hold in 2 attempts; none did, and nothing was trimmed."
    assert end in lines
    assert not any(line.startswith(("Next:", "  round-NN", "  report.png")) for line in lines)
    page = (settings.out / "report.md").read_text()
    assert f"1. {end}\n   - rolled back: " in page
    assert [row[1] for row in rows(said(settings, resume=True))][1:] == ["rolled", "rolled"]


def test_a_budget_that_the_guard_did_not_let_pass_is_said_to_be_missed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    Script(monkeypatch, 50.0, 90.0)
    lines = said(replace(settings, rule=Budget(parameters=0.5), stop=Stop(rounds=1)))
    (missed,) = (line for line in lines if line.startswith("The budget"))
    assert re.fullmatch(r"The budget is not met: parameters at \d\d\.\d %, 50 % asked\.", missed)
    assert not any(line.startswith("The rule removes nothing more") for line in lines)


def test_the_round_that_drops_too_far_is_not_recommended(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    Script(monkeypatch, 89.5, 88.0)
    lines = said(replace(settings, guard=None, stop=Stop(max_drop=0.5)))
    below = "0.5 percentage points less than the ancestor's accuracy on the calibration data, 90.00 %."
    assert f"Round 2 fell below {below}" in lines
    assert "round-01" in lines[-1]


def test_retraining_learns_from_the_ancestor_and_looks_at_calibration_data(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []
    usual = job.train
    monkeypatch.setattr(job, "train", lambda *a, **named: (told.append(named), usual(*a, **named)))
    more = replace(PLAIN, epochs=2, distill=0.5, temperature=3, patience=1)
    said(replace(settings, guard=None, retraining=more))
    assert "teacher" not in told[0]
    assert {len(one["calibration"]) for one in told[1:]} == {12}
    assert len({id(one["teacher"]) for one in told[1:]}) == 1
    kept = load_file(settings.out / "ancestor.safetensors")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in told[1]["teacher"].state_dict().items())


# Settings


def test_what_came_later_is_named_only_where_it_is_asked(settings: Settings) -> None:
    """So that the directories of earlier runs can be resumed."""
    plain = replace(settings, guard=None)
    found = plain.described()
    names = (
        "epochs optimizer lr weight_decay momentum schedule batch_size label_smoothing mixed_precision channels_last "
        "shift seed"
    )
    expected = ["model", "data", "weights", "calibration", "resize", "crop", "seed", "layers", "rule", "criterion"]
    expected += [f"{when}.{name}" for when in ("training", "retraining") for name in names.split()]
    assert sorted(found) == sorted(expected)
    for change, key in (
        ({"guard": Guard(0.5)}, "guard"),
        ({"retraining": replace(PLAIN, distill=0.5)}, "retraining.distill"),
        ({"retraining": replace(PLAIN, temperature=2)}, "retraining.temperature"),
        ({"retraining": replace(PLAIN, epochs=2, patience=1)}, "retraining.patience"),
        ({"retraining": replace(PLAIN, keep_best=True)}, "retraining.keep_best"),
    ):
        assert replace(plain, **change).described().keys() - found.keys() == {key}
    assert replace(plain, layers=Progressive(3)).described()["layers"] == "progressive:3"
    assert replace(plain, layers=Progressive(3, 2)).described()["layers"] == "progressive:3, step 2"


def test_guards_drops_and_steps_as_they_are_asked() -> None:
    assert guard_at(None, None) is None
    assert guard_at(0.2, None) == Guard(0.2, 3)
    assert guard_at(0, 0) == Guard(0, 0)
    assert stop_at(None, None, None, 0.5) == Stop(max_drop=0.5)
    assert layers_named([], 2, 3) == Progressive(2, 3)
    asked = {"distill": 0.3, "temperature": None, "patience": None, "keep_best": False}
    assert retraining_for("mnist", epochs=1, **asked) == Training(epochs=1, distill=0.3)
    with pytest.raises(TorchtrimError, match="--temperature with --distill"):
        retraining_for("mnist", **(asked | {"distill": 0.0, "temperature": 2.0}))
