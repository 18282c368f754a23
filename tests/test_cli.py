"""The command line as a user meets it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from small_data import write_idx, write_model
from torchtrim import Budget, Profile, _job, _measuring, _settings
from torchtrim._guard import Guard
from torchtrim._rounds import Progressive, Stop
from torchtrim.cli import app
from torchtrim.errors import TorchtrimError

COMMANDS = ("demo", "run", "profile", "sensitivity", "inspect")


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments that name a model and data, from a working directory of the test's own."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path)
    write_idx(tmp_path / "digits")
    return ["small.py:Small", "--data", "idx:digits"]


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), terminal_width=200)


def refused(*arguments: str) -> str:
    """The one message that a mistake is answered with."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


def asked(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[_settings.Settings, dict[str, bool]]:
    """What the job would be told."""
    told: list[Any] = []
    monkeypatch.setattr(_job, "run", lambda settings, say, progress, **how: told.append((settings, how)))
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return told[0]


# Help


def test_help_lists_the_commands() -> None:
    result = call("--help")
    assert result.exit_code == 0
    assert all(f" {command} " in result.stdout for command in COMMANDS)
    assert call("--version").stdout == f"torchtrim {version('torchtrim')}\n"


def test_help_does_not_wait_for_pytorch() -> None:
    program = "import sys, torchtrim.cli; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100)
    assert run.stdout == "False\n"


def test_every_option_of_every_command_is_explained() -> None:
    import typer

    group = typer.main.get_command(app)
    for name in COMMANDS:
        command = group.commands[name]  # type: ignore[attr-defined]
        assert command.help
        unexplained = [parameter.name for parameter in command.params if not parameter.help]  # type: ignore[attr-defined]
        assert unexplained == []
        text = call(name, "--help").stdout
        for parameter in command.params:
            assert parameter.param_type_name == "argument" or parameter.opts[0] in text


# What is asked


def test_run_hands_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    line = (
        "run timm:resnet18 --data imagefolder:flowers --weights w.pt --calibration 50 --resize 70 --crop 64 "
        "--layers conv1,layer1.* --layers fc --rule fraction:0.2 --criterion l1_norm --rounds 3 --compression 2 "
        "--repair mean,least-squares --repair-positions 16 --max-drop 2 --guard 0.5 --retries 2 --distill 0.4 "
        "--temperature 3 --keep-best "
        "--smallest-accuracy 90 --train-epochs 2 --retrain-epochs 0.5 --optimizer adamw --lr 0.1 --schedule onecycle "
        "--batch-size 8 --weight-decay 0.2 --label-smoothing 0.3 --shift 1 --workers 2 --device cpu --seed 5 "
        "--mixed-precision no --out there --overwrite"
    )
    settings, how = asked(monkeypatch, *line.split())
    assert settings.source == _settings.Source(
        "timm:resnet18", "imagefolder:flowers", "w.pt", 50, 70, 64, device="cpu", seed=5
    )
    assert settings.layers == ("conv1", "layer1.*", "fc")
    assert (str(settings.rule), settings.criterion) == ("fraction:0.2", "l1_norm")
    assert settings.repair == ("mean", "least-squares")
    assert settings.repair_positions == 16
    assert settings.described()["repair"] == ["mean", "least-squares"]
    assert settings.described()["repair_positions"] == 16
    assert settings.stop == Stop(rounds=3, compression=2, accuracy=90, max_drop=2)
    assert settings.guard == Guard(0.5, retries=2)
    training = _settings.Training(
        epochs=0.5,
        optimizer="adamw",
        lr=0.1,
        schedule="onecycle",
        batch_size=8,
        weight_decay=0.2,
        label_smoothing=0.3,
        shift=1,
        mixed_precision="no",
        workers=2,
        seed=5,
    )
    assert settings.retraining == _settings.replace(training, distill=0.4, temperature=3, keep_best=True)
    assert settings.training == _settings.replace(training, epochs=2)
    assert settings.out == Path("there")
    assert how == {"resume": False, "overwrite": True}


def test_threads_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    asked(monkeypatch, "run", "lenet", "--data", "mnist")
    assert torch.get_num_threads() == 2
    asked(monkeypatch, "run", "lenet", "--data", "mnist", "--threads", "3")
    assert torch.get_num_threads() == 3
    asked(monkeypatch, "demo")
    assert torch.get_num_threads() == 1


def test_run_has_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, how = asked(monkeypatch, "run", "lenet", "--data", "mnist", "--resume")
    assert (settings.layers, settings.training, settings.stop) == (None, None, Stop(rounds=4))
    assert settings.retraining == _settings.Training(epochs=1)
    assert settings.out == Path("runs/lenet-mnist")
    assert how == {"resume": True, "overwrite": False}
    settings, _ = asked(monkeypatch, "run", "lenet", "--data", "mnist", "--progressive", "3")
    assert (settings.layers, settings.guard) == (Progressive(3), None)
    more = ("--progressive", "3", "--step", "2", "--guard", "1", "--retrain-epochs", "3", "--patience", "2")
    settings, _ = asked(monkeypatch, "run", "lenet", "--data", "mnist", *more)
    assert (settings.layers, settings.guard) == (Progressive(3, step=2), Guard(1))
    assert settings.retraining == _settings.Training(epochs=3, patience=2)


def test_demo_replaces_only_an_earlier_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    line = ("demo", "--out", str(tmp_path), "--seed", "3")
    settings, how = asked(monkeypatch, *line)
    assert settings == _settings.demo_settings(tmp_path, fast=False, seed=3, device="auto")
    assert how == {"resume": False, "overwrite": False}
    monkeypatch.setattr(_settings, "is_demo", lambda out: True)
    assert asked(monkeypatch, *line)[1] == {"resume": False, "overwrite": True}
    assert asked(monkeypatch, *line, "--resume")[1] == {"resume": True, "overwrite": False}
    assert asked(monkeypatch, *line, "--fast")[0].stop == Stop(rounds=2)


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "floor", "cap"),
    [
        ("", 0.05, None),
        ("--floor 0.2 --cap 30", 0.2, 30),
        ("--floor conv*=0.5,fc1=8 --cap fc1=0.5", {"conv*": 0.5, "fc1": 8, "*": 0.05}, {"fc1": 0.5}),
        ("--floor 0.1 --floor conv1=2", {"conv1": 2, "*": 0.1}, None),
    ],
)
def test_floors_and_caps_of_all_layers_or_of_some(
    monkeypatch: pytest.MonkeyPatch, arguments: str, floor: Any, cap: Any
) -> None:
    settings, _ = asked(monkeypatch, "run", "lenet", "--data", "mnist", "--flops", "0.5", *arguments.split())
    assert settings.rule == Budget(flops=0.5, floor=floor, cap=cap)
    if isinstance(floor, dict):  # the first that fits counts
        assert isinstance(settings.rule, Budget)
        assert isinstance(settings.rule.floor, dict)
        assert list(settings.rule.floor) == list(floor)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--layers conv3", r"unknown layer 'conv3'; did you mean 'conv2'"),
        ("--layers fc2", r"layer 'fc2' cannot be trimmed: it is an output of the model"),
        ("--layers fc1 --progressive 2", "expected either layers or a number of progressive ones"),
        ("--rule mean", "unknown rule 'mean', expected such as"),
        ("--criterion apos", r"unknown criterion 'apos'.*did you mean 'apoz'\?"),
        ("--retrain-epochs -1", "epochs must be ≥ 0, found -1"),
        ("--train-epochs -1", "epochs must be ≥ 0, found -1"),
        ("--rounds 0", "rounds must be a whole number of at least 1, found 0"),
        ("--compression 0.5", "compression must be above 1, found 0.5"),
        ("--optimizer adam", "optimizer must be 'adamw' or 'sgd', found 'adam'"),
        ("--seed -1", "seed must be whole, ≥ 0 and below 2³², found -1"),
        ("--batch-size 0 --lr -1", "lr must be ≥ 0, found -1.0; .*batch_size must be whole and ≥ 1, found 0"),
        ("--calibration 500", "expected 1 to 119 training examples"),
        ("--device tpu", "expected auto, cpu or cuda, found 'tpu'"),
        ("--weights none.pt", "none.pt: no such file of weights"),
        ("--weights DEFAULT", "expected a model of torchvision or timm"),
        ("--resume --overwrite", "expected resume or overwrite, found both"),
        ("--out small.py", "small.py"),
        ("--rounds two", "Invalid value for '--rounds'"),
        (f"--seed {10**30}", "seed must be whole, ≥ 0 and below 2³²"),
        ("--smallest-accuracy 300", "smallest accuracy: expected per cent, from 0 to 100, found 300"),
        ("--smallest-accuracy nan", "smallest accuracy: expected per cent, from 0 to 100, found nan"),
        ("--layers ,", "layers: expected names, found ','"),
        ("--progressive 2 --step 0", "expected a whole step of at least 1, found 0"),
        ("--step 2", "expected --step with --progressive"),
        ("--guard 120", "guard: expected per cent, from 0 to 100, found 120"),
        ("--guard nan", "guard: expected per cent, from 0 to 100, found nan"),
        ("--guard 1 --retries -1", "retries must be a whole number of at least 0, found -1"),
        ("--retries 2", "expected --retries with --guard"),
        ("--max-drop -1", "largest drop: expected per cent, from 0 to 100, found -1"),
        ("--distill 2", "distill must be ≥ 0 and ≤ 1, found 2"),
        ("--distill 0.5 --temperature 0", "temperature must be > 0, found 0"),
        ("--temperature 3", "expected --temperature with --distill"),
        (
            "--flops 0.5 --rule mean+1std",
            r"expected either a rule or a budget, found both --rule mean\+1std and --flops",
        ),
        ("--floor 0.2", "expected --floor with a budget"),
        ("--cap 0.5", "expected --cap with a budget"),
        ("--flops 0.5 --floor conv9=2", "floor: unknown layer 'conv9'; did you mean"),
        ("--flops 0.5 --floor conv1=much", "--floor: expected an amount such as 0.1, .*, found 'conv1=much'"),
        ("--flops 0.5 --cap 3,4", r"--cap: expected one amount for all layers, found 3\.0, 4\.0"),
        ("--flops -1", "flops: expected a number above 0, found -1"),
        ("--latency soon", "latency: expected a share below 1, or a time with its unit"),
        ("--train-epochs 1 --zero-tolerance -1", "zero_tolerance: expected a share"),
        ("--flops 0.5 --multiple-of 0", "multiple_of: expected a whole number of at least 1, found 0"),
        ("--flops 0.5 --sensitivity none.json", "none.json: expected a sensitivity"),
        ("--patience 0 --retrain-epochs 3", "patience must be None, or whole and ≥ 1, found 0"),
        ("--patience 1", "patience must be below epochs, 1, found 1; train for longer"),
        ("--threads 100000", "Invalid value for '--threads'"),
        ("--threads 0", "Invalid value for '--threads'"),
        ("--nothing", "No such option: --nothing"),
    ],
)
def test_a_mistake_in_a_run_is_one_message(small: list[str], arguments: str, expected: str) -> None:
    assert re.search(expected, refused("run", *small, *arguments.split()))
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("lenett --data mnist", r"found 'lenett'; did you mean 'lenet'\?"),
        ("lenet --data mnits", r"found 'mnits'; did you mean 'mnist'\?"),
        ("lenet --data idx:nowhere", "nowhere: expected the four files of an IDX data set"),
        ("lenet --data idx:digits", "of size 1 × 8 × 8, do not fit the model"),
        ("small.py:Small --data idx:digits --criterion apos", "unknown criterion 'apos'"),
        ("small.py:Small --data idx:digits --rule x", "unknown rule 'x'"),
        ("small.py:Small --data idx:digits --out none/p", "none/p: expected a place in a directory that exists"),
        (
            "small.py:Small --data idx:digits --plot none/a.png",
            "none/a.png: expected a place in a directory that exists",
        ),
        ("small.py:Small --data idx:digits --resume", "expected --resume with --out FILE"),
        ("small.py:Small --data idx:digits --resume --out a --until 0.9", "expected either --resume or --until"),
        ("small.py:Small --data idx:digits --until 2", "expected confidence between 0 and 1, found 2"),
        ("small.py:Small --data idx:digits --zero-tolerance -1", "zero_tolerance: expected a share"),
        ("small.py:Small", "Missing option '--data'"),
    ],
)
def test_a_mistake_in_a_profile_is_one_message(small: list[str], arguments: str, expected: str) -> None:
    assert re.search(expected, refused("profile", *arguments.split()))


def test_an_error_of_ours_that_comes_late_is_a_message_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise TorchtrimError("the loss is not finite")

    monkeypatch.setattr(_job, "run", fail)
    assert refused("demo") == "error: the loss is not finite\n"


def test_a_programming_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_job, "run", lambda *_, **__: {}["x"])
    assert isinstance(call("demo").exception, KeyError)


# The real thing

RUN = "run small.py:Small --data idx:digits --train-epochs 1 --retrain-epochs 0.3 --batch-size 16 --layers conv2,fc1"


def test_profile_prints_and_writes(small: list[str]) -> None:
    result = call("profile", *small, "--examples", "30", "--out", "profile.safetensors")
    assert result.exit_code == 0, result.output
    assert "APoZ over 30 examples" in result.stdout
    assert "Trim first, as their mean APoZ is highest: " in result.stdout
    assert "The profile is in profile.safetensors." in result.stdout
    assert max(map(len, result.stdout.splitlines())) < 200
    assert Path("profile.safetensors").is_file()


def test_profile_draws_and_tells_classes_apart(small: list[str]) -> None:
    result = call("profile", *small, "--examples", "30", "--plot", "apoz.png", "--per-class")
    assert result.exit_code == 0, result.output
    assert "By class" in result.stdout
    assert "Drawn: apoz.png, apoz-by-class.png." in result.stdout
    assert all(Path(name).read_bytes().startswith(b"\x89PNG") for name in ("apoz.png", "apoz-by-class.png"))


def test_profile_ends_once_the_plan_is_settled(small: list[str]) -> None:
    line = "--examples 100 --batch-size 1 --until 0.9 --rule threshold:1.5 --out p"
    result = call("profile", *small, *line.split())
    assert result.exit_code == 0, result.output
    found = re.search(r"After (\d+) of 100 examples it is settled which neurons the rule removes\.", result.stdout)
    assert found
    assert Profile.load("p").examples == int(found[1]) < 100


def test_a_bad_tolerance_leaves_an_earlier_profile(small: list[str]) -> None:
    assert call("profile", *small, "--out", "p").exit_code == 0
    kept = Path("p").read_bytes()
    refused("profile", *small, "--out", "p", "--zero-tolerance", "-1")
    assert Path("p").read_bytes() == kept


@pytest.mark.filterwarnings("default:.*zero_tolerance")
def test_profile_counts_near_zeros_and_hands_that_on(small: list[str]) -> None:
    Path("small.py").write_text(Path("small.py").read_text().replace("relu", "gelu"))
    assert "such as contribution" in call("profile", *small).stdout
    near = call("profile", *small, "--zero-tolerance", "0.5").stdout
    assert "Trim first, as their mean APoZ is highest" in near
    assert " --zero-tolerance 0.5 " in near.splitlines()[-1]


def test_sensitivity_prints_draws_and_serves_a_budget(small: list[str]) -> None:
    line = ["sensitivity", *small, "--fractions", "0.2,0.6", "--repair", "least-squares"]
    result = call(*line, "--plot", "curves.png")
    assert result.exit_code == 0, result.output
    assert re.search(r"layer +tied +− 20% +− 60% +weight", result.stdout)
    assert Path("curves.png").read_bytes().startswith(b"\x89PNG")
    kept = Path("sensitivity.json").read_bytes()
    assert call(*line, "--resume").exit_code == 0
    assert Path("sensitivity.json").read_bytes() == kept
    budget = ["--parameters", "0.6", "--sensitivity", "sensitivity.json", "--rounds", "1", "--retrain-epochs", "0"]
    result = call("run", *small, *budget)
    assert result.exit_code == 0, result.output
    assert "by apoz, parameters 60 %" in result.stdout
    assert "out of reach" in call("run", *small, "--parameters", "0.01", "--overwrite").stderr


def test_a_mistake_in_a_sensitivity_is_one_message(small: list[str]) -> None:
    assert "expected shares with commas between, found 'half'" in refused("sensitivity", *small, "--fractions", "half")
    assert "expected a share of at least 0 and below 1" in refused("sensitivity", *small, "--fractions", "1.5")
    assert "which look at them, found 4 alone" in refused("sensitivity", *small, "--repair-positions", "4")
    assert call("sensitivity", *small, "--fractions", "0.5").exit_code == 0
    kept = Path("sensitivity.json").read_bytes()
    refused("sensitivity", *small, "--fractions", "1.5")
    assert "expected an ending such as .png" in refused("sensitivity", *small, "--plot", "curves.xyz")
    assert Path("sensitivity.json").read_bytes() == kept
    Path("sensitivity.json").write_text("mine")
    assert "expected a sensitivity" in refused("sensitivity", *small)
    assert Path("sensitivity.json").read_text() == "mine"


@pytest.mark.filterwarnings("default:partial")
def test_an_interrupted_profile_is_printed_and_goes_on(small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["profile", *small, "--examples", "30", "--batch-size", "8", "--out", "profile.safetensors"]
    whole = call(*line)
    before, batches = Path("profile.safetensors").read_bytes(), _measuring.batches

    def interrupted(*arguments: Any, **named: Any) -> Iterator[Any]:
        yield from islice(batches(*arguments, **named), 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(_measuring, "batches", interrupted)
    result = call(*line)
    assert result.exit_code == 130
    assert "APoZ over 16 examples, where it was interrupted" in result.stdout
    assert "Next: " not in result.stdout
    assert "warning: partial: measuring was interrupted after 16 examples\n" in result.stderr
    assert result.stderr.endswith("\ninterrupted; the same command with --resume goes on\n")
    assert Profile.load("profile.safetensors").partial
    monkeypatch.setattr(_measuring, "batches", batches)
    again = call(*line, "--resume")
    assert again.exit_code == 0
    assert again.stdout == whole.stdout
    assert Path("profile.safetensors").stat().st_size == len(before)
    assert call(*line, "--resume").stdout == whole.stdout


@pytest.fixture
def process(small: list[str]) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "torchtrim", *RUN.split(), "--rounds", "1000", "--rule", "fraction:0.05"]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, env=alone, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    yield running
    running.kill()
    running.communicate()


def test_an_interrupted_run_says_how_to_go_on(process: subprocess.Popen[str]) -> None:
    first = Path("runs/Small-digits/round-01/metrics.json")
    deadline = time.monotonic() + 100
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    *_, last = errors.splitlines()
    assert last == "interrupted; the same command with --resume goes on after the last whole round"
    assert re.search(r"^ +0  8-12-24-3 ", output, re.MULTILINE)

    whole = len(list(Path("runs/Small-digits").glob("round-*/metrics.json")))
    line = [*RUN.split(), "--rounds", str(whole + 1), "--rule", "fraction:0.05", "--resume"]
    result = call(*line)
    assert result.exit_code == 0, result.output
    rows = [row.split()[0] for row in result.stdout.splitlines() if re.match(r" +\d+  \d+-", row)]
    assert rows == [str(number) for number in range(whole + 2)]
    assert "Written to runs/Small-digits:" in result.stdout
