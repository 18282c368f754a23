"""Runs and profiles on a data set of the test's own, from settings to files."""

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

from small_data import write_idx, write_images, write_model
from torchtrim import (
    Budget,
    Fraction,
    MeanPlusStd,
    Profile,
    Progressive,
    Stop,
    TorchtrimError,
    TorchtrimWarning,
    _cost,
    _loop,
)
from torchtrim import _job as job
from torchtrim._job import run
from torchtrim._measuring import silence
from torchtrim._models import build_model, load_weights
from torchtrim._settings import (
    Settings,
    demo_settings,
    is_demo,
    layers_named,
    stop_at,
    training_for,
    usual_directory,
    usual_training,
)
from torchtrim._source import Source, open_source
from torchtrim._training import Training
from torchtrim.errors import ModelError, PlanError, StoreError, TraceError

PLAIN = Training(epochs=0.5, batch_size=16, mixed_precision="no", shift=0)
SILENT = Progress(disable=True)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Faster for networks this small, above all on a machine that is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def short_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_loop, "measure_beside", partial(_cost.measure_beside, seconds=0))
    monkeypatch.setattr(job, "measure", lambda model, example: _cost.measure_beside([model], example, seconds=0)[0])


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        source=Source(write_model(tmp_path), write_idx(tmp_path / "digits")),
        out=tmp_path / "out",
        stop=Stop(rounds=3),
        retraining=PLAIN,
        training=replace(PLAIN, epochs=2),
        layers=("conv2", "fc1"),
    )


def said(settings: Settings, **how: bool) -> tuple[list[str], list[Any]]:
    """What a run says, line by line, and its rounds."""
    parts: list[str] = []
    rounds = run(settings, parts.append, SILENT, **how)
    return "\n".join(parts).splitlines(), rounds


def contents(directory: Path) -> dict[str, bytes]:
    """What the rounds of a run decided, measured and computed: plans, profiles and models."""
    kept = sorted([*directory.glob("round-*/plan.json"), *directory.glob("round-*/*.safetensors")])
    return {str(path.relative_to(directory)): path.read_bytes() for path in kept}


# A run


def test_a_run_says_a_line_a_round_and_writes_everything(settings: Settings) -> None:
    lines, rounds = said(settings)
    assert [one.number for one in rounds] == [1, 2, 3]
    assert lines[0].endswith("digits: 108 examples to train, 12 to decide on, 30 to test")
    start = next(place for place, line in enumerate(lines) if line.startswith("round  conv1-conv2-fc1-fc2"))
    assert [line.split()[0] for line in lines[start + 1 : start + 5]] == ["0", "1", "2", "3"]
    widths = "-".join(map(str, rounds[-1].widths.values()))
    assert lines[start + 4].split()[1] == widths
    assert rounds[0].widths["conv1"] == 8
    assert all(one.test is not None for one in rounds)

    written = {str(path.relative_to(settings.out)) for path in settings.out.rglob("*")}
    assert {"run.json", "metrics.json", "report.md", "report.png", "ancestor.safetensors"} <= written
    assert {"round-03/plan.json", "round-03/profile.safetensors", "round-03/model.safetensors"} <= written
    page = (settings.out / "report.md").read_text()
    assert "![" in page
    assert f"| 3 | {widths} |" in page
    changes = [f"{name} {rounds[0].profile.widths[name]} → {rounds[0].widths[name]}" for name in ("conv2", "fc1")]
    assert f"\n1. {', '.join(changes)}\n2. " in page
    weights = settings.out / "round-03" / "model.safetensors"
    profiled = f"torchtrim profile {settings.source.model} --data {settings.source.data} --weights {weights}"
    assert lines[-1].strip() == profiled
    function = settings.source.model.rpartition(":")[2]
    assert lines[-2].strip() == f'model = torchtrim.load({function}(), "{weights}")'
    assert json.loads((settings.out / "metrics.json").read_text())["ancestor"]["facts"].keys() == {
        "accuracy",
        "seconds",
        "latency",
    }
    trained = load_file(settings.out / "ancestor.safetensors")
    assert not torch.equal(trained["fc2.weight"], open_source(settings.source).model.state_dict()["fc2.weight"])


def test_the_table_tells_the_accuracy_of_the_written_model(settings: Settings) -> None:
    _, rounds = said(settings)
    fresh = build_model(settings.source.model, classes=3)
    model = load_weights(fresh, settings.out / "round-03" / "model.safetensors").eval()
    data = open_source(settings.source).data
    inputs, labels = (torch.stack(part) for part in zip(*data.test, strict=True))
    with torch.inference_mode():
        accuracy = 100 * float((model(inputs).argmax(1) == labels).double().mean())
    assert rounds[-1].test.retrained == pytest.approx(accuracy)


def test_a_resumed_run_equals_an_uninterrupted_one(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = replace(settings, out=settings.out.with_name("whole"))
    expected, _ = said(whole)
    calls = []
    usual = job.train

    def killed_in_round_two(*args: Any, **kwargs: Any) -> None:
        calls.append(kwargs["label"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        usual(*args, **kwargs)

    monkeypatch.setattr(job, "train", killed_in_round_two)
    with pytest.raises(KeyboardInterrupt):
        said(settings)
    assert calls == ["training the ancestor", "round 1: retraining", "round 2: retraining"]
    assert not (settings.out / "round-02").exists()
    assert not (settings.out / "report.md").exists()

    lines, rounds = said(settings, resume=True)
    assert calls[3:] == ["round 2: retraining", "round 3: retraining"]
    assert [one.number for one in rounds] == [1, 2, 3]
    assert contents(settings.out) == contents(whole.out)
    assert len(contents(settings.out)) == 9
    columns = [[line.split()[1:7] for line in text if line[:5].strip().isdigit()] for text in (expected, lines)]
    assert columns[0] == columns[1]  # all but the timings
    assert len(columns[0]) == 4


def test_a_run_repairs_before_it_retrains(settings: Settings) -> None:
    lines, rounds = said(replace(settings, stop=Stop(rounds=1), repair=("mean", "least-squares")))
    assert "repairs by mean and least-squares" in "\n".join(lines)
    assert rounds[0].seconds["repair"] > 0


def test_positions_of_the_repair_decide_and_are_described_where_they_are_asked_for(settings: Settings) -> None:
    assert "repair_positions" not in settings.described()
    with pytest.raises(TorchtrimError, match="found 3 alone"):
        said(replace(settings, repair_positions=3))
    assert not settings.out.exists()
    few = replace(settings, stop=Stop(rounds=1), repair=("least-squares",), repair_positions=3)
    lines, rounds = said(few)
    assert "repairs by least-squares, looks at 3 positions of an example" in "\n".join(lines)
    assert rounds[0].seconds["repair"] > 0
    with pytest.raises(StoreError, match="repair_positions: asked 4, found 3"):
        said(replace(few, repair_positions=4), resume=True)


def test_reconstruction_is_a_criterion_by_name(settings: Settings) -> None:
    options = {
        "criterion": "reconstruction",
        "rule": Fraction(0.3),
        "stop": Stop(rounds=1),
        "repair": ("least-squares",),
    }
    _, rounds = said(replace(settings, **options))
    assert rounds[0].plan.source == "reconstruction, fraction:0.3"
    source = replace(settings.source, weights=str(settings.out / "ancestor.safetensors"))
    parts = list(silence(source, Fraction(0.3), "reconstruction", settings.retraining, SILENT, None))
    assert "the rule fraction:0.3 removes" in parts[1]
    assert "--criterion reconstruction" in parts[-1]


def test_a_finished_run_can_go_on_for_more_rounds(settings: Settings) -> None:
    before, _ = said(replace(settings, stop=Stop(rounds=1)))
    _, rounds = said(settings, resume=True)
    assert [one.number for one in rounds] == [1, 2, 3]
    lines, again = said(settings, resume=True)
    assert [one.number for one in again] == [1, 2, 3]
    assert sum(line[:5].strip().isdigit() for line in lines) == 4
    assert len({line for line in (*before, *lines) if line.startswith("    0  ")}) == 1
    assert "The run was complete; nothing was left to do." in "\n".join(lines)


def test_another_run_in_the_directory_is_kept_unless_asked(settings: Settings) -> None:
    said(replace(settings, stop=Stop(rounds=1)))
    before = contents(settings.out)
    with pytest.raises(StoreError, match="found a run with 1 whole round; pass --resume"):
        said(settings)
    longer = replace(settings, retraining=replace(PLAIN, epochs=3))
    with pytest.raises(StoreError, match=r"asked otherwise; .*:\n  retraining.epochs: asked 3, found 0.5$"):
        said(longer, resume=True)
    assert contents(settings.out) == before
    other = replace(settings, stop=Stop(rounds=1), source=replace(settings.source, seed=1))
    said(other, overwrite=True)
    assert contents(settings.out) != before


def test_what_does_not_decide_the_result_may_differ_when_resuming(settings: Settings) -> None:
    other = replace(
        settings,
        out=Path("elsewhere"),
        source=replace(settings.source, device="cpu"),
        retraining=replace(PLAIN, workers=3),
        stop=Stop(rounds=9),
    )
    assert other.described() == settings.described()
    for change in ({"criterion": "l1_norm"}, {"rule": MeanPlusStd(2)}, {"layers": None}, {"training": None}):
        assert replace(settings, **change).described() != settings.described()


def test_the_round_below_the_smallest_accuracy_is_not_recommended(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies = iter([99.0, 99.0, 98.0, 0.0, 0.0, 50.0, 0.0, 0.0])
    monkeypatch.setattr(job._Trimming, "_evaluate", lambda self, model, dataset: next(accuracies, 10.0))
    lines, rounds = said(replace(settings, stop=Stop(accuracy=90.0)))
    assert [one.accuracy.retrained for one in rounds] == [0.0]
    assert "Round 1 fell below the smallest accuracy, 90.0 %." in lines
    assert not any(line.startswith("Next:") for line in lines)


def test_a_rule_that_removes_nothing_ends_the_run(settings: Settings) -> None:
    lines, rounds = said(replace(settings, rule=MeanPlusStd(50)))
    assert rounds == []
    assert any(line.startswith("The rule removes nothing more") for line in lines)
    assert not (settings.out / "report.png").exists()


def test_flops_are_asked_of_one_input(settings: Settings) -> None:
    opened = open_source(settings.source)
    own = _cost.flops_of(opened.model, opened.data.example[:1])
    asked = round(0.7 * own)
    lines, (done,) = said(replace(settings, rule=Budget(flops=asked), stop=Stop(rounds=1)))
    small = _cost.flops_of(done.model, opened.data.example[:1])
    assert 0.85 * asked < small <= asked
    assert f"by apoz, flops {asked:,}" in lines[1]


def test_what_a_run_for_a_budget_says_at_its_end(settings: Settings) -> None:
    met, rounds = said(replace(settings, rule=Budget(parameters=0.7), stop=Stop(max_drop=100)))
    assert len(rounds) == 1
    assert "The budget is met." in met
    plain, _ = said(replace(settings, rule=Budget(parameters=0.7), stop=Stop(rounds=1)), overwrite=True)
    assert not any(line.startswith("The budget") for line in plain)


def test_progressive_layers(settings: Settings) -> None:
    lines, rounds = said(replace(settings, layers=Progressive(1)))
    assert len(rounds[0].plan.removed) == 1
    assert len(rounds[-1].layers) > 1
    assert lines[1] == "trims the 1 most silent layers, then their neighbours, by apoz, mean + 1.0 std"


def test_a_folder_of_images_and_saved_weights(tmp_path: Path) -> None:
    torch.manual_seed(7)
    model = build_model("torchvision:squeezenet1_1", classes=3)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    data = write_images(tmp_path / "colours")
    settings = Settings(
        source=Source("torchvision:squeezenet1_1", data, str(tmp_path / "weights.pt"), 6, resize=40, crop=32),
        out=tmp_path / "out",
        stop=Stop(rounds=1),
        retraining=training_for(data, epochs=1, batch_size=15),
        layers=("features.12.squeeze", "features.3.*"),
    )
    lines, rounds = said(settings)
    assert lines[0].endswith("30 examples to train, 6 to decide on, 12 to test")
    assert rounds[0].plan.removed.keys() <= {"features.12.squeeze", "features.3.squeeze", "features.3.expand1x1",
                                             "features.3.expand3x3"}  # fmt: skip
    ancestor = load_file(settings.out / "ancestor.safetensors")
    assert all(torch.equal(ancestor[name], value) for name, value in model.state_dict().items())


# Before any work


def refused(settings: Settings, monkeypatch: pytest.MonkeyPatch, error: type[TorchtrimError], match: str) -> None:
    """The run is refused, nothing is trained, and nothing is written."""
    monkeypatch.setattr(job, "train", lambda *_, **__: pytest.fail("trained before the mistake was found"))
    with pytest.raises(error, match=match):
        said(settings)
    assert not settings.out.exists()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"layers": ("conv3", "fc2")}, PlanError, r"unknown layer 'conv3'; did you mean 'conv2'[\s\S]*'fc2' cannot"),
        ({"criterion": "apos"}, PlanError, r"unknown criterion 'apos'.* did you mean 'apoz'\?"),
        ({"source": {"data": "mnits"}}, TorchtrimError, r"found 'mnits'; did you mean 'mnist'\?"),
        ({"source": {"device": "tpu"}}, TorchtrimError, "expected auto, cpu or cuda, found 'tpu'"),
        ({"source": {"weights": "none.pt"}}, ModelError, "none.pt: no such file of weights"),
        ({"source": {"calibration": 0}}, TorchtrimError, "expected 1 to 119 training examples for `calibration`"),
        (
            {"source": {"model": "lenet"}},
            TraceError,
            r"of size 1 × 8 × 8, do not fit the model, LeNet: RuntimeError: .*in conv2.*; use data",
        ),
        (
            {"source": {"model": "torchvision:resnet99"}, "training": None},
            ModelError,
            "torchvision has no classifier named 'resnet99'",
        ),
    ],
)
def test_a_mistake_is_found_before_any_work(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    error: type[TorchtrimError],
    match: str,
) -> None:
    if "source" in change:
        change = change | {"source": replace(settings.source, **change["source"])}
    refused(replace(settings, **change), monkeypatch, error, match)


def test_a_budget_out_of_reach_is_found_before_the_ancestor_is_trained(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said of one input, as it was asked."""
    costs = r"flops: expected at most 2, but the smallest that can be reached is ([\d,]+), "
    with pytest.raises(PlanError, match=costs) as caught:
        said(replace(settings, rule=Budget(flops=2)))
    found = re.search(costs, str(caught.value))
    opened = open_source(settings.source)
    assert found
    assert int(found[1].replace(",", "")) < _cost.flops_of(opened.model, opened.data.example[:1])
    refused(replace(settings, rule=Budget(parameters=0.001)), monkeypatch, PlanError, "the budget is out of reach")


def test_a_model_for_other_classes_is_refused(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(settings.source.model.rpartition(":")[0])
    path.write_text(path.read_text().replace("nn.Linear(24, 3)", "nn.Linear(24, 7)"))
    refused(settings, monkeypatch, ModelError, r"tells 7 classes apart, the data idx:\S+ has 3")


def test_a_model_without_trimmable_layers_is_refused_with_reasons(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(settings.source.model.rpartition(":")[0])
    path.write_text("from torch import nn\n\ndef flat(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))\n")
    source = replace(settings.source, model=f"{path}:flat")
    reasons = r"no layer that can be trimmed:\n  1: it is an output of the model"
    refused(replace(settings, source=source, layers=None), monkeypatch, PlanError, reasons)
    refused(replace(settings, source=source, layers=Progressive()), monkeypatch, PlanError, reasons)


def test_a_damaged_data_file_is_refused(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(settings.source.data.removeprefix("idx:")) / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:300])
    refused(settings, monkeypatch, TorchtrimError, "train-images-idx3-ubyte.gz: expected a readable IDX file")


def test_a_directory_that_cannot_be_made_is_refused(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    (settings.out.parent / "file").write_text("")
    refused(replace(settings, out=settings.out.parent / "file" / "out"), monkeypatch, StoreError, "file/out")


# A profile


def test_silence_is_measured_on_the_calibration_data_and_kept(settings: Settings, tmp_path: Path) -> None:
    source = replace(settings.source, calibration=20)
    parts = list(silence(source, MeanPlusStd(1), "apoz", PLAIN, SILENT, tmp_path / "profile.safetensors"))
    assert parts[1].startswith("Trim first, as their mean APoZ is highest: ")
    kept = Profile.load(tmp_path / "profile.safetensors")
    assert kept.examples == 20
    opened = open_source(source)
    inputs = torch.stack([inputs for inputs, _ in opened.data.calibration])
    with torch.inference_mode():
        zeros = (opened.model.conv1(inputs).relu() == 0).sum((0, 2, 3))
    assert kept.zeros["conv1"].tolist() == zeros.tolist()
    first = ",".join(Progressive().choose(kept, ()))
    assert parts[-1] == f"Next: torchtrim run {source.model} --data {source.data} --calibration 20 --layers {first}"


def test_what_is_advised_next_is_what_was_looked_at(settings: Settings) -> None:
    parts = list(silence(settings.source, Fraction(0.3), "l1_norm", PLAIN, SILENT, None))
    assert " --rule fraction:0.3 --criterion l1_norm --layers " in parts[-1]


def test_reconstruction_is_advised_with_a_budget(settings: Settings) -> None:
    parts = list(silence(settings.source, MeanPlusStd(), "reconstruction", PLAIN, SILENT, None))
    assert parts[-1].endswith(" --criterion reconstruction --repair least-squares --parameters 0.5 --rounds 1")


def test_an_untrained_model_is_not_trimmed(settings: Settings, tmp_path: Path) -> None:
    source = Source("torchvision:squeezenet1_1", write_images(tmp_path / "colours"), resize=32, crop=32)
    with pytest.raises(ModelError, match="squeezenet1_1 comes untrained; name its weights"):
        said(replace(settings, source=source, training=None))
    assert not settings.out.exists()


def test_an_untrained_model_is_measured_with_a_warning(tmp_path: Path) -> None:
    source = Source("torchvision:squeezenet1_1", write_images(tmp_path / "colours"), resize=32, crop=32)
    with pytest.warns(TorchtrimWarning, match="squeezenet1_1 comes untrained"):
        parts = list(silence(source, MeanPlusStd(1), "apoz", PLAIN, SILENT, None))
    assert "--resize 32 --crop 32 --train-epochs 4 --layers" in parts[-1]


def test_a_profile_replaces_nothing_but_a_profile(settings: Settings, tmp_path: Path) -> None:
    place = tmp_path / "profile.safetensors"
    for _ in range(2):
        list(silence(settings.source, MeanPlusStd(1), "apoz", PLAIN, SILENT, place))
    place.write_text("mine")
    with pytest.raises(StoreError, match="expected a profile"):
        list(silence(settings.source, MeanPlusStd(1), "apoz", PLAIN, SILENT, place))
    assert place.read_text() == "mine"
    with pytest.raises(StoreError, match="expected a file to write into, found a directory"):
        list(silence(settings.source, MeanPlusStd(1), "apoz", PLAIN, SILENT, tmp_path))
    with pytest.raises(StoreError, match="a directory that exists"):
        list(silence(settings.source, MeanPlusStd(1), "apoz", PLAIN, SILENT, tmp_path / "none" / "profile"))


# Settings


def test_the_usual_training_of_image_folders_is_fine_tuning() -> None:
    assert usual_training("mnist") == Training()
    usual = usual_training("imagefolder:flowers")
    assert (usual.optimizer, usual.lr, usual.momentum, usual.weight_decay) == ("sgd", 1e-3, 0.9, 5e-4)
    assert (usual.shift, usual.label_smoothing) == (0, 0)
    changed = training_for("imagefolder:flowers", lr=0.01, epochs=3, batch_size=None)
    assert changed == replace(usual, lr=0.01, epochs=3)
    with pytest.raises(TorchtrimError, match="epochs must be ≥ 0, found -1"):
        training_for("mnist", epochs=-1)


def test_a_run_ends_after_four_rounds_unless_a_limit_is_given() -> None:
    assert stop_at(None, None, None) == Stop(rounds=4)
    assert stop_at(None, 2.5, None) == Stop(compression=2.5)
    assert stop_at(7, None, 99.0) == Stop(rounds=7, accuracy=99.0)
    with pytest.raises(TorchtrimError, match="rounds must be a whole number of at least 1, found 0"):
        stop_at(0, None, None)


def test_layers_are_named_one_by_one_or_with_commas_or_counted() -> None:
    assert layers_named(["conv2, fc1", "features.*"], None) == ("conv2", "fc1", "features.*")
    assert layers_named([], None) is None
    assert layers_named([], 3) == Progressive(3)
    with pytest.raises(TorchtrimError, match="either layers or a number of progressive ones"):
        layers_named(["conv2"], 3)
    with pytest.raises(TorchtrimError, match="start of at least 1, found 0"):
        layers_named([], 0)


@pytest.mark.parametrize(
    ("model", "data", "expected"),
    [
        ("lenet", "mnist", "lenet-mnist"),
        ("torchvision:vgg16", "imagefolder:/data/my flowers/", "vgg16-my-flowers"),
        ("nets/small.py:make", "idx:digits", "make-digits"),
    ],
)
def test_the_usual_directory_names_model_and_data(model: str, data: str, expected: str) -> None:
    assert usual_directory(model, data) == Path("runs") / expected


def test_the_demo_is_the_papers_experiment(tmp_path: Path) -> None:
    settings = demo_settings(tmp_path, fast=False, seed=3, device="cpu")
    assert settings.layers == ("conv2", "fc1")
    assert settings.stop == Stop(rounds=4)
    assert settings.training == Training(epochs=4, seed=3)
    assert settings.retraining == Training(epochs=1, seed=3)
    assert settings.source == Source("lenet", "mnist", device="cpu", seed=3)
    assert str(settings.rule) == "mean + 1.0 std"


def test_only_a_demo_is_taken_for_one(tmp_path: Path, settings: Settings) -> None:
    assert not is_demo(tmp_path)
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"settings": demo_settings(tmp_path, fast=True, seed=1, device="cpu").described()}))
    assert is_demo(tmp_path)
    for other in (json.dumps({"settings": settings.described()}), "[]", "{"):
        file.write_text(other)
        with pytest.raises(StoreError, match="found another run; choose another --out"):
            is_demo(tmp_path)
