"""Runs that are kept: the same result after any interruption, and no file of others lost."""

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import torchtrim
from test_store import MODELS, assert_same, made
from torchtrim import Fraction, Progressive, Round, Stop, TorchtrimWarning, _loop, _run_directory
from torchtrim._run_directory import RunDirectory
from torchtrim.errors import PlanError, StoreError, TorchtrimError

run = partial(torchtrim.run, rule=Fraction(0.2))


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Short timings, and no threads that wait for each other over tiny tensors."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_loop, "measure_beside", partial(_loop.measure_beside, seconds=0))
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


class Work:
    """A task on random data: noisy steps in whatever mode the model is, and an accuracy that shows every bit.

    interrupt: the round in whose retraining the user loses patience.
    """

    def __init__(self, name: str, interrupt: int | None = None) -> None:
        self.name = name
        self.example = MODELS[name][1]
        self.interrupt = interrupt
        self.trained = 0

    def ancestor(self) -> nn.Module:
        model, _ = made(self.name)
        next(iter(model.parameters())).requires_grad_(False)
        return model

    def fresh(self) -> nn.Module:
        """As a later process builds it: other weights, all trained, in another mode."""
        return made(self.name, 1)[0].eval()

    def retrain(self, model: nn.Module) -> None:
        self.trained += 1
        if self.trained == self.interrupt:
            raise KeyboardInterrupt
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 0.01)
        for _ in range(2):
            optimizer.zero_grad()
            model(self.example + 0.1 * torch.randn_like(self.example)).float().square().mean().backward()
            optimizer.step()

    def evaluate(self, model: nn.Module) -> float:
        model.train(not model.training)  # a mode that only the model itself remembers
        with torch.no_grad():
            return float(model(self.example).double().sum())

    def run(self, model: nn.Module, directory: Path, rounds: int = 3, **options) -> list[Round]:
        calls = {"retrain": self.retrain, "evaluate": self.evaluate, "test": self.evaluate}
        return run(model, self.example, [self.example], directory=directory, stop=Stop(rounds), **(calls | options))


def assert_same_rounds(one: list[Round], other: list[Round]) -> None:
    assert [done.number for done in one] == [done.number for done in other] == list(range(1, len(one) + 1))
    for ours, theirs in zip(one, other, strict=True):
        assert ours.plan == theirs.plan
        assert ours.plan.removed
        assert ours.layers == theirs.layers
        assert (ours.accuracy, ours.test) == (theirs.accuracy, theirs.test)
        assert ours.profile.examples == theirs.profile.examples
        for kind in ("zeros", "positions", "mean"):
            expected, found = getattr(ours.profile, kind), getattr(theirs.profile, kind)
            assert all(np.array_equal(expected[name], found[name], equal_nan=True) for name in expected)
        assert ours.cost.parameters == theirs.cost.parameters
        assert ours.widths == theirs.widths
        assert_same(ours.model, theirs.model)
        assert [module.training for module in ours.model.modules()] == [m.training for m in theirs.model.modules()]
        assert [p.requires_grad for p in ours.model.parameters()] == [
            p.requires_grad for p in theirs.model.parameters()
        ]


@pytest.mark.parametrize("name", MODELS)
def test_an_interrupted_run_comes_to_the_same_result(tmp_path, name) -> None:
    whole = Work(name).run(Work(name).ancestor(), tmp_path / "whole")
    work = Work(name, interrupt=2)
    with pytest.raises(KeyboardInterrupt):
        work.run(work.ancestor(), tmp_path / "parts")
    rest = Work(name)
    found = rest.run(rest.fresh(), tmp_path / "parts", resume=True)
    assert rest.trained == 2
    assert_same_rounds(whole, found)
    # and what is on the disk is the same: read back, nothing is left to do
    again = Work(name)
    assert_same_rounds(whole, again.run(again.fresh(), tmp_path / "whole", resume=True))
    assert again.trained == 0
    ours, theirs = (json.loads((tmp_path / place / "metrics.json").read_text()) for place in ("whole", "parts"))
    for one, other in zip(ours["rounds"], theirs["rounds"], strict=True):
        assert {key: one[key] for key in ("number", "widths", "compression", "accuracy", "test", "source")} == {
            key: other[key] for key in ("number", "widths", "compression", "accuracy", "test", "source")
        }


@pytest.mark.filterwarnings("ignore:left as they are by the repair")
@pytest.mark.parametrize("name", MODELS)
def test_an_interrupted_run_that_repairs_comes_to_the_same_result(tmp_path, name) -> None:
    options = {"repair": ("mean", "least-squares", "batchnorm")}
    whole = Work(name).run(Work(name).ancestor(), tmp_path / "whole", **options)
    work = Work(name, interrupt=2)
    with pytest.raises(KeyboardInterrupt):
        work.run(work.ancestor(), tmp_path / "parts", **options)
    assert_same_rounds(whole, Work(name).run(work.fresh(), tmp_path / "parts", resume=True, **options))
    with pytest.raises(StoreError, match="repair"):
        work.run(work.fresh(), tmp_path / "parts", resume=True)


def test_positions_of_the_repair_are_kept_where_they_are_asked_for(tmp_path) -> None:
    options = {"repair": "least-squares", "repair_positions": 2}
    work = Work("BatchNorm")
    whole = work.run(work.ancestor(), tmp_path / "few", rounds=1, **options)
    assert json.loads((tmp_path / "few" / "run.json").read_text())["settings"]["repair_positions"] == 2
    assert_same_rounds(whole, work.run(work.fresh(), tmp_path / "few", rounds=1, resume=True, **options))
    with pytest.raises(StoreError, match="repair_positions"):
        work.run(work.fresh(), tmp_path / "few", rounds=1, resume=True, repair="least-squares")
    work.run(work.ancestor(), tmp_path / "all", rounds=1, repair="least-squares")
    assert "repair_positions" not in json.loads((tmp_path / "all" / "run.json").read_text())["settings"]
    with pytest.raises(TorchtrimError, match="found 2 alone"):
        work.run(work.ancestor(), tmp_path / "none", rounds=1, repair="mean", repair_positions=2)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("interrupt", [1, 3])
def test_interrupted_in_any_round(tmp_path, interrupt) -> None:
    whole = Work("BatchNorm").run(Work("BatchNorm").ancestor(), tmp_path / "whole")
    work = Work("BatchNorm", interrupt)
    with pytest.raises(KeyboardInterrupt):
        work.run(work.ancestor(), tmp_path / "parts")
    assert_same_rounds(whole, Work("BatchNorm").run(work.fresh(), tmp_path / "parts", resume=True))


def test_a_stop_may_grow(tmp_path) -> None:
    whole = Work("BatchNorm").run(Work("BatchNorm").ancestor(), tmp_path / "whole")
    work = Work("BatchNorm")
    assert_same_rounds(whole[:1], work.run(work.ancestor(), tmp_path / "parts", rounds=1))
    assert_same_rounds(whole[:2], work.run(work.fresh(), tmp_path / "parts", rounds=2, resume=True))
    assert_same_rounds(whole, work.run(work.fresh(), tmp_path / "parts", rounds=3, resume=True))
    assert json.loads((tmp_path / "parts" / "run.json").read_text())["stop"]["rounds"] == 3


def test_an_ancestor_that_was_trimmed_before(tmp_path) -> None:
    work = Work("BatchNorm")
    start = work.run(work.ancestor(), tmp_path / "first", rounds=1)[0].model
    whole = work.run(copy.deepcopy(start), tmp_path / "whole", rounds=2)
    work.run(copy.deepcopy(start), tmp_path / "parts", rounds=1)
    assert_same_rounds(whole, work.run(start, tmp_path / "parts", rounds=2, resume=True))
    assert_same_rounds(whole, work.run(work.fresh(), tmp_path / "parts", rounds=2, resume=True))


KILLED = """
import os, signal, stat, sys
from functools import partial
from pathlib import Path

import torch
from test_run_directory import Work
from torchtrim import _files, _loop

torch.set_num_threads(1)
_loop.measure_beside = partial(_loop.measure_beside, seconds=0)
work, directory = Work("BatchNorm"), Path(sys.argv[1])
work.run(work.ancestor(), directory / "warm", rounds=1, retrain=lambda model: None)  # what is imported late
for killed in range(1, 100):
    child = os.fork()
    if not child:
        calls = []
        def counted(handle):
            calls.extend([handle] * stat.S_ISREG(os.fstat(handle).st_mode))
            if len(calls) == killed:
                os.kill(os.getpid(), signal.SIGKILL)
        _files.os.fsync = counted
        work.run(work.ancestor(), directory / f"{killed:02}", rounds=2)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


@pytest.mark.skipif(os.name != "posix", reason="kills with signals")
def test_killed_at_any_write(tmp_path) -> None:
    """When a file is written under its temporary name, and all before it are there."""
    work = Work("BatchNorm")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=environment, check=True, timeout=100)
    places = sorted(path for path in tmp_path.iterdir() if path.name.isdecimal())
    assert len(places) == 13 + 1
    whole = Work("BatchNorm").run(work.ancestor(), tmp_path / "whole", rounds=2)
    for place in places:
        # a run that was killed before its ancestor was kept needs the ancestor itself
        model = work.fresh() if (place / "ancestor.safetensors").exists() else work.ancestor()
        assert_same_rounds(whole, work.run(model, place, rounds=2, resume=True))
        assert {path.name for path in place.rglob("*")} == {path.name for path in (tmp_path / "whole").rglob("*")}
        metrics = json.loads((place / "metrics.json").read_text())
        assert [done["number"] for done in metrics["rounds"]] == [1, 2]


# ------------------------------------------------------------------ what is on the disk


def test_metrics_are_complete(tmp_path) -> None:
    work = Work("BatchNorm")
    found = work.run(work.ancestor(), tmp_path / "new" / "run", rounds=2, layers=["a"])
    place = tmp_path / "new" / "run"
    assert {path.name for path in place.iterdir()} == {
        *("run.json", "run.lock", "ancestor.safetensors", "metrics.json", "round-01", "round-02")
    }
    metrics = json.loads((place / "metrics.json").read_text())
    assert metrics["ancestor"]["widths"] == {"a": 8, "b": 8, "out": 3}
    assert metrics["ancestor"]["accuracy"] == found[0].accuracy.before
    for done, entry in zip(found, metrics["rounds"], strict=True):
        assert entry == json.loads((place / f"round-{done.number:02}" / "metrics.json").read_text())
        assert entry["widths"]["a"] == [done.plan.layers["a"].width, done.widths["a"]]
        assert entry["layers"] == ["a"]
        assert entry["source"] == done.plan.source
        assert entry["compression"] == done.compression
        assert entry["speedup"] == done.speedup
        assert entry["cost"] == vars(done.cost)
        assert entry["ancestor"] == vars(done.ancestor)
        assert entry["accuracy"] == vars(done.accuracy)
        assert entry["test"] == vars(done.test)
        assert entry["seconds"] == done.seconds
        loaded = torchtrim.load(work.fresh(), place / f"round-{done.number:02}" / "model.safetensors")
        assert_same(loaded, done.model)
    asked = json.loads((place / "run.json").read_text())
    assert asked["settings"] == {
        "rule": "Fraction(p=0.2)",
        "layers": ["a"],
        "criterion": "torchtrim.criteria.apoz",
        "seed": 0,
    }
    assert asked["stop"] == {"rounds": 2, "compression": None, "accuracy": None, "max_drop": None}
    assert set(asked["versions"]) == {"torchtrim", "torch", "python"}


def test_numbers_of_other_libraries_are_kept(tmp_path) -> None:
    work = Work("BatchNorm")
    options = {"evaluate": lambda _: np.float32(0.3), "test": lambda _: torch.tensor(0.25)}
    work.run(work.ancestor(), tmp_path, rounds=1, **options)
    found = work.run(work.fresh(), tmp_path, rounds=1, resume=True, **options)
    assert vars(found[0].accuracy) == dict.fromkeys(("before", "trimmed", "retrained"), float(np.float32(0.3)))
    assert found[0].test == _loop.Accuracy(0.25, 0.25, 0.25)


def test_without_a_test(tmp_path) -> None:
    work = Work("BatchNorm")
    work.run(work.ancestor(), tmp_path, rounds=1, test=None)
    assert work.run(work.fresh(), tmp_path, rounds=1, test=None, resume=True)[0].test is None


def test_the_ancestor_and_its_facts(tmp_path) -> None:
    work = Work("BatchNorm")
    with RunDirectory.open(tmp_path / "run", {}) as kept:
        assert kept.ancestor(work.fresh()) is None
        assert kept.facts == {}
        assert kept.rounds(work.fresh()) == []
        ancestor = work.ancestor()
        kept.keep_ancestor(ancestor, {"accuracy": 98.5, "seconds": 3})
    with RunDirectory.open(tmp_path / "run", {}, resume=True) as kept:
        found = kept.ancestor(work.fresh())
        assert found is not None
        assert_same(found, ancestor)
        assert found.training
        assert kept.facts == {"accuracy": 98.5, "seconds": 3}
        assert json.loads((tmp_path / "run" / "metrics.json").read_text())["ancestor"]["facts"] == kept.facts


# ------------------------------------------------------------------ used directories


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("finished")
    Work("BatchNorm").run(Work("BatchNorm").ancestor(), place, rounds=2)
    return place


@pytest.fixture
def used(tmp_path, finished) -> Path:
    """A copy of a directory with two rounds."""
    for path in finished.rglob("*"):
        place = tmp_path / "run" / path.relative_to(finished)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            place.write_bytes(path.read_bytes())
    return tmp_path / "run"


def contents(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def test_a_used_directory_is_not_touched(used) -> None:
    work, before = Work("BatchNorm"), contents(used)
    with pytest.raises(
        StoreError, match=r"found a run with 2 whole rounds; pass --resume to .*, --overwrite to .*, or another --out"
    ):
        work.run(work.ancestor(), used)
    assert work.trained == 0
    with pytest.raises(StoreError, match="found both"):
        work.run(work.ancestor(), used, resume=True, overwrite=True)
    before.pop("run.lock")
    after = contents(used)
    after.pop("run.lock")
    assert after == before


def test_overwrite_removes_only_what_a_run_wrote(used) -> None:
    (used / "notes.txt").write_text("mine")
    (used / "round-02" / "notes.txt").write_text("mine")
    (used / "round-01" / ".model.safetensors.abc.partial").write_text("half")
    (used / "round-03").mkdir()
    (used / "round-three").mkdir()
    with RunDirectory.open(used, {"other": 1}, overwrite=True) as kept:
        assert kept.ancestor(nn.Linear(1, 1)) is None
        assert kept.rounds(nn.Linear(1, 1)) == []
    assert {str(path.relative_to(used)) for path in used.rglob("*")} == {
        *("run.json", "run.lock", "notes.txt", "round-02", "round-02/notes.txt", "round-three")
    }
    assert json.loads((used / "run.json").read_text())["settings"] == {"other": 1}


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_directories_of_others_are_left_alone(tmp_path, flags) -> None:
    (tmp_path / "thesis.tex").write_text("ten years")
    with pytest.raises(StoreError, match=r"found other files: thesis\.tex; choose another --out"):
        RunDirectory.open(tmp_path, {}, **flags)
    (tmp_path / "run.json").write_text('{"format": "marathon"}')
    with pytest.raises(StoreError, match=r"run\.json: expected torchtrim-run of version 1, found another file"):
        RunDirectory.open(tmp_path, {}, **flags)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(StoreError, match=r"run\.json: expected a file that a run wrote"):
        RunDirectory.open(tmp_path, {}, **flags)
    assert (tmp_path / "thesis.tex").read_text() == "ten years"
    with pytest.raises(StoreError, match=r"thesis\.tex: cannot be used: Not a directory"):
        RunDirectory.open(tmp_path / "thesis.tex", {}, **flags)
    with pytest.raises(StoreError, match=r"run: cannot be (used|changed): Not a directory"):
        RunDirectory.open(tmp_path / "thesis.tex" / "run", {}, **flags)


def test_resume_of_nothing_starts(tmp_path) -> None:
    work = Work("BatchNorm")
    assert len(work.run(work.ancestor(), tmp_path / "deep" / "er", rounds=1, resume=True)) == 1
    (tmp_path / "empty").mkdir()
    assert len(work.run(work.ancestor(), tmp_path / "empty", rounds=1, overwrite=True)) == 1


def test_a_request_that_fails_does_not_use_the_directory(tmp_path) -> None:
    work = Work("BatchNorm")
    with pytest.raises(PlanError, match="unknown layer 'fc9'"):
        work.run(work.ancestor(), tmp_path / "run", layers=["fc9"])
    with pytest.raises(PlanError, match="unknown criterion"):
        work.run(work.ancestor(), tmp_path / "new", criterion="apos")
    assert list(tmp_path.iterdir()) == []
    assert len(work.run(work.ancestor(), tmp_path / "run", rounds=1, layers=["a"])) == 1


def test_a_request_that_fails_drops_no_earlier_run(used) -> None:
    before = contents(used)
    work = Work("BatchNorm")
    with pytest.raises(PlanError, match="unknown layer 'fc9'"):
        work.run(work.ancestor(), used, layers=["fc9"], overwrite=True)
    assert contents(used) == before


def test_what_is_asked_is_the_same_in_another_process(tmp_path) -> None:
    """The address of a function or an object would differ."""

    class Rule:
        def choose(self, scores: np.ndarray, /) -> np.ndarray:
            return Fraction(0.2).choose(scores)

    for place, rule in enumerate((Rule(), Rule())):
        criterion = partial(torchtrim.criteria.apoz)
        Work("BatchNorm").run(
            Work("BatchNorm").ancestor(), tmp_path / str(place), rounds=1, rule=rule, criterion=criterion
        )
    one, other = (json.loads((tmp_path / place / "run.json").read_text())["settings"] for place in "01")
    assert one == other
    assert one["criterion"] == "functools.partial(<function apoz>)"


def test_differing_settings_are_listed(tmp_path) -> None:
    asked = {"rule": "mean", "layers": ("a", "b"), "seed": 0, "epochs": 4, "data": {"name": "mnist"}}
    with RunDirectory.open(tmp_path, asked, {"rounds": 3}) as kept:
        kept.keep_ancestor(nn.Linear(1, 1), {})
    RunDirectory.open(tmp_path, asked, {"rounds": 4, "compression": 2}, resume=True).close()
    changed = {"rule": "fraction", "layers": ["a", "b"], "seed": 0, "batch": None, "data": {"name": "folder"}}
    with pytest.raises(StoreError, match="asked otherwise; resume it with the same settings") as caught:
        RunDirectory.open(tmp_path, changed, {"rounds": 4}, resume=True)
    assert str(caught.value).splitlines()[1:] == [
        '  rule: asked "fraction", found "mean"',
        "  batch: asked null, found nothing",
        '  data: asked {"name": "folder"}, found {"name": "mnist"}',
        "  epochs: asked nothing, found 4",
    ]
    with pytest.raises(StoreError, match=r"expected what JSON can say, found PosixPath|WindowsPath"):
        RunDirectory.open(tmp_path / "new", {"data": tmp_path})
    assert not (tmp_path / "new").exists()


def test_layers_and_criteria_are_settings_too(used) -> None:
    work = Work("BatchNorm")
    with pytest.raises(StoreError) as caught:
        work.run(work.fresh(), used, resume=True, layers=Progressive(1), criterion="l1_norm", seed=3)
    assert [line.strip().partition(":")[0] for line in str(caught.value).splitlines()[1:]] == [
        *("layers", "criterion", "seed")
    ]


def test_another_version_warns(used, monkeypatch) -> None:
    monkeypatch.setattr(_run_directory, "library_version", lambda: "9.9")
    with pytest.warns(TorchtrimWarning, match=r"began with torchtrim .* and goes on with torchtrim 9\.9, torch"):
        RunDirectory.open(used, json.loads((used / "run.json").read_text())["settings"], resume=True).close()


def test_one_process_at_a_time(tmp_path) -> None:
    kept = RunDirectory.open(tmp_path, {})
    kept.keep_ancestor(nn.Linear(1, 1), {})
    for flags in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(StoreError, match="works in it already"):
            RunDirectory.open(tmp_path, {}, **flags)
    kept.close()
    kept.close()
    forgotten = RunDirectory.open(tmp_path, {}, resume=True)
    del forgotten
    with pytest.raises(ZeroDivisionError), RunDirectory.open(tmp_path, {}, resume=True):
        _ = 1 / 0
    with pytest.raises(StoreError, match="pass --resume"):
        RunDirectory.open(tmp_path, {})
    RunDirectory.open(tmp_path, {}, resume=True).close()


def test_rounds_that_are_damaged_or_missing(used) -> None:
    work = Work("BatchNorm")
    settings = json.loads((used / "run.json").read_text())["settings"]
    with RunDirectory.open(used, settings, resume=True) as kept:
        done = kept.rounds(work.fresh())
        with pytest.raises(StoreError, match=r"round-02: round 2 is there already"):
            list(kept.record(done[1:]))
        with pytest.raises(StoreError, match="some that start from another model"):
            kept.keep_ancestor(work.ancestor(), {})
        (used / "round-02" / "plan.json").unlink()
        with pytest.raises(StoreError, match=r"round-02: expected a whole round, found FileNotFoundError"):
            kept.rounds(work.fresh())
        (used / "round-01" / "metrics.json").rename(used / "metrics.one")
        with pytest.raises(StoreError, match=r"expected round 1, found round 2 next"):
            kept.rounds(work.fresh())
        (used / "metrics.one").rename(used / "round-01" / "metrics.json")
        (used / "round-02" / "metrics.json").unlink()
        assert_same_rounds(done[:1], kept.rounds(work.fresh()))


def test_files_in_the_way_are_named(used) -> None:
    settings = json.loads((used / "run.json").read_text())["settings"]
    (used / "round-02" / "model.safetensors").unlink()
    (used / "round-02" / "model.safetensors").mkdir()
    with pytest.raises(StoreError, match=r"run: cannot be changed: "):
        RunDirectory.open(used, settings, overwrite=True)
    shutil.rmtree(used / "round-02")
    (used / "round-02").write_text("mine")
    with RunDirectory.open(used, settings, resume=True) as kept:
        done = kept.rounds(Work("BatchNorm").fresh())
        with pytest.raises(StoreError, match=r"round-02: cannot be changed: File exists"):
            list(kept.record([dataclasses.replace(done[0], number=2)]))


def test_many_rounds_are_in_order(used) -> None:
    with RunDirectory.open(used, {}, overwrite=True) as kept:
        first = Work("BatchNorm").run(Work("BatchNorm").ancestor(), used.parent / "one", rounds=1)[0]
        rounds = [dataclasses.replace(first, number=number) for number in range(1, 12)]
        assert list(kept.record(rounds)) == rounds
        assert [one.number for one in kept.rounds(Work("BatchNorm").fresh())] == list(range(1, 12))


def test_the_model_must_fit_the_run(used) -> None:
    work = Work("BatchNorm")
    with pytest.raises(StoreError, match=r"a\.weight: the file's ancestor has 8 × 6, this model 9 × 6"):
        work.run(MODELS["BatchNorm"][0](9), used, resume=True)
