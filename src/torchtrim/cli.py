"""The command line: parses, calls, and prints. What is done is in `_job.py`.

PyTorch takes a second to import, so that what needs it is imported inside the commands.
"""

import json
import os
import shutil
import sys
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer

from torchtrim import _options as option
from torchtrim._terminal import display, reported

app = typer.Typer(
    help="Make trained neural networks smaller and faster by removing the neurons that stay silent.",
    epilog="Begin with: torchtrim demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

_GOES_ON = "; the same command with --resume goes on"


@app.callback(invoke_without_command=True)
def _options(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if show_version:
        typer.echo(f"torchtrim {version('torchtrim')}")
        raise typer.Exit


@app.command()
def demo(
    fast: Annotated[
        bool, typer.Option("--fast", help="Train less, and trim two rounds.", rich_help_panel=option.RUN)
    ] = False,
    seed: option.Seed = 0,
    device: option.Device = "auto",
    threads: option.Threads = 1,
    out: Annotated[
        Path, typer.Option(help="The run directory; an earlier demo there is replaced.", rich_help_panel=option.RUN)
    ] = Path("runs/lenet-mnist"),
    resume: option.Resume = False,
) -> None:
    """Train LeNet on MNIST and trim its layers conv2 and fc1 four times, as the paper does: a minute or two."""
    with reported(f"{_GOES_ON} after the last whole round"):
        from torchtrim import _job, _settings

        settings = _settings.demo_settings(out, fast=fast, seed=seed, device=device)
        say, progress = display(threads)
        with progress:
            _job.run(settings, say, progress, resume=resume, overwrite=not resume and _settings.is_demo(out))


@app.command()
def run(
    model: option.ModelName,
    data: option.DataName,
    weights: option.Weights = None,
    calibration: option.Calibration = None,
    resize: option.Resize = 256,
    crop: option.Crop = 224,
    layers: option.Layers = None,
    progressive: option.ProgressiveStart = None,
    step: option.ProgressiveStep = None,
    rule: option.RuleText = None,
    parameters: option.Parameters = None,
    flops: option.Flops = None,
    weight_bytes: option.Bytes = None,
    latency: option.Latency = None,
    floor: option.Floor = None,
    cap: option.Cap = None,
    multiple_of: option.MultipleOf = None,
    sensitivity: option.SensitivityFile = None,
    criterion: option.Criterion = "apoz",
    zero_tolerance: option.ZeroTolerance = 0.0,
    through_norms: option.ThroughNorms = False,
    repair: option.Repair = None,
    repair_positions: option.RepairPositions = None,
    rounds: option.Rounds = None,
    compression: option.Compression = None,
    smallest_accuracy: option.SmallestAccuracy = None,
    max_drop: option.MaxDrop = None,
    guard: option.GuardDrop = None,
    retries: option.Retries = None,
    train_epochs: option.TrainEpochs = 0,
    retrain_epochs: option.RetrainEpochs = 1,
    distill: option.Distill = None,
    temperature: option.Temperature = None,
    patience: option.Patience = None,
    keep_best: option.KeepBest = False,
    optimizer: option.OptimizerName = None,
    lr: option.LearningRate = None,
    schedule: option.ScheduleName = None,
    batch_size: option.BatchSize = None,
    weight_decay: option.WeightDecay = None,
    label_smoothing: option.LabelSmoothing = None,
    shift: option.Shift = None,
    mixed_precision: option.MixedPrecision = None,
    workers: option.Workers = 0,
    device: option.Device = "auto",
    threads: option.Threads = None,
    seed: option.Seed = 0,
    out: option.RunPlace = None,
    resume: option.Resume = False,
    overwrite: option.Overwrite = False,
) -> None:
    """Trim a model round by round: measure, remove the silent neurons, retrain, and again."""
    with reported(f"{_GOES_ON} after the last whole round"):
        from torchtrim import _job, _settings
        from torchtrim._source import Source

        optimisation: dict[str, Any] = {
            "optimizer": optimizer,
            "lr": lr,
            "schedule": schedule,
            "batch_size": batch_size,
            "weight_decay": weight_decay,
            "label_smoothing": label_smoothing,
            "shift": shift,
            "mixed_precision": mixed_precision,
            "workers": workers,
            "seed": seed,
        }
        settings = _settings.Settings(
            source=Source(model, data, weights, calibration, resize, crop, device, seed),
            out=out or _settings.usual_directory(model, data),
            stop=_settings.stop_at(rounds, compression, smallest_accuracy, max_drop),
            retraining=_settings.retraining_for(
                data,
                epochs=retrain_epochs,
                distill=distill,
                temperature=temperature,
                patience=patience,
                keep_best=keep_best,
                **optimisation,
            ),
            training=_settings.training_for(data, epochs=train_epochs, **optimisation) if train_epochs else None,
            layers=_settings.layers_named(layers or (), progressive, step),
            rule=_settings.rule_asked(
                rule,
                parameters=parameters,
                flops=flops,
                bytes=weight_bytes,
                latency=latency,
                floor=floor or (),
                cap=cap or (),
                multiple_of=multiple_of,
                sensitivity=sensitivity,
            ),
            criterion=criterion,
            through_norms=through_norms,
            zero_tolerance=zero_tolerance,
            repair=_settings.ways_named(repair),
            repair_positions=repair_positions,
            guard=_settings.guard_at(guard, retries),
        )
        say, progress = display(threads)
        with progress:
            _job.run(settings, say, progress, resume=resume, overwrite=overwrite)


@app.command()
def profile(
    model: option.ModelName,
    data: option.DataName,
    weights: option.Weights = None,
    calibration: option.Calibration = None,
    resize: option.Resize = 256,
    crop: option.Crop = 224,
    rule: option.RuleText = None,
    criterion: option.Score = "apoz",
    zero_tolerance: option.ZeroTolerance = 0.0,
    through_norms: option.ThroughNorms = False,
    until: Annotated[
        float | None,
        typer.Option(
            metavar="CONFIDENCE",
            help="End as soon as it is settled, with this confidence, which neurons the rule removes, such as 0.99.",
            rich_help_panel=option.TRIM,
        ),
    ] = None,
    batch_size: option.BatchSize = None,
    workers: option.Workers = 0,
    device: option.Device = "auto",
    threads: option.Threads = None,
    seed: option.Seed = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the profile there (.safetensors), every now and then.",
            rich_help_panel=option.RUN,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the interrupted profile in the file --out.", rich_help_panel=option.RUN
        ),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw the neurons' silence there, layer by layer (.png, .pdf).",
            rich_help_panel=option.RUN,
        ),
    ] = None,
    per_class: Annotated[
        bool,
        typer.Option("--per-class", help="Measure the examples of each class apart too.", rich_help_panel=option.RUN),
    ] = False,
) -> None:
    """Measure how often every neuron is silent, and say where to begin trimming."""
    with reported(_GOES_ON if out and until is None else ""):
        from torchtrim import _measuring, _settings
        from torchtrim._select import parse_rule
        from torchtrim._source import Source

        source = Source(model, data, weights, calibration, resize, crop, device, seed)
        reading = _settings.training_for(data, batch_size=batch_size, workers=workers, seed=seed)
        say, progress = display(threads)
        with progress:
            parts = _measuring.silence(
                source,
                parse_rule("mean+1std" if rule is None else rule),
                criterion,
                reading,
                progress,
                out,
                through_norms=through_norms,
                zero_tolerance=zero_tolerance,
                until=until,
                resume=resume,
                plot=plot,
                per_class=per_class,
            )
            for part in parts:
                say(part)


@app.command()
def sensitivity(
    model: option.ModelName,
    data: option.DataName,
    weights: option.Weights = None,
    calibration: option.Calibration = None,
    resize: option.Resize = 256,
    crop: option.Crop = 224,
    layers: option.Layers = None,
    fractions: Annotated[
        str,
        typer.Option(metavar="SHARES", help="What each layer loses, with commas.", rich_help_panel=option.TRIM),
    ] = "0.1,0.3,0.5,0.7,0.9",
    criterion: option.Score = "apoz",
    through_norms: option.ThroughNorms = False,
    repair: option.Repair = None,
    repair_positions: option.RepairPositions = None,
    batch_size: option.BatchSize = None,
    workers: option.Workers = 0,
    device: option.Device = "auto",
    threads: option.Threads = None,
    seed: option.Seed = 0,
    out: Annotated[
        Path,
        typer.Option(metavar="FILE", help="Write it there, as it is found (.json).", rich_help_panel=option.RUN),
    ] = Path("sensitivity.json"),
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with what is in the file --out.", rich_help_panel=option.RUN),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw a curve for each layer there.", rich_help_panel=option.RUN),
    ] = None,
) -> None:
    """Trim each layer alone, by several fractions, and say what accuracy is left without retraining."""
    with reported(_GOES_ON):
        from torchtrim import _measuring, _settings
        from torchtrim._source import Source

        source = Source(model, data, weights, calibration, resize, crop, device, seed)
        reading = _settings.training_for(data, batch_size=batch_size, workers=workers, seed=seed)
        single = _settings.layers_named(layers or (), None)
        say, progress = display(threads)
        with progress:
            parts = _measuring.fall(
                source,
                criterion,
                single if isinstance(single, tuple) else None,
                _settings.fractions_named(fractions),
                reading,
                progress,
                out,
                repair=_settings.ways_named(repair),
                repair_positions=repair_positions,
                through_norms=through_norms,
                resume=resume,
                plot=plot,
            )
            for part in parts:
                say(part)


@app.command()
def inspect(
    model: option.ModelName,
    weights: option.Weights = None,
    inputs: Annotated[
        str | None,
        typer.Option(
            "--input",
            metavar="SIZES",
            help="What the model is called with: 1x3x224x224; with a type if not float32, 8x128:int64 (zeros, as token "
            "numbers); several with commas, by place or by name, ids=8x128:int64,mask=8x128:bool. Without: what the "
            "model was made for; models from files need it.",
            rich_help_panel=option.DATA,
        ),
    ] = None,
    classes: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="How many the model tells apart. Without: 1,000, LeNet 10.",
            rich_help_panel=option.DATA,
        ),
    ] = None,
    through_norms: option.ThroughNorms = False,
    experts: Annotated[
        bool,
        typer.Option(
            "--experts",
            help="Trim whole experts of mixtures too, as neurons of their router.",
            rich_help_panel=option.TRIM,
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print it all as JSON, for programs.", rich_help_panel=option.RUN)
    ] = False,
    device: option.Device = "auto",
) -> None:
    """Show what can be trimmed of a model and what is locked, and why; it needs neither data nor weights."""
    with reported():
        from torchtrim import _inspect

        found = _inspect.inspect(
            model,
            inputs=inputs,
            weights=weights,
            classes=classes,
            device=device,
            through_norms=through_norms,
            experts=experts,
        )
        if as_json:
            typer.echo(json.dumps(found.described(), indent=2))
        else:
            columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 100
            typer.echo(found.text(min(max(columns, 40), 100)))


def main() -> None:
    """Run the command line; the entry point of `torchtrim`."""
    # Threads that wait should sleep, not spin: on a processor that others use too, this is several times faster.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # × and → on a terminal that knows no Unicode
    app(prog_name="torchtrim")
