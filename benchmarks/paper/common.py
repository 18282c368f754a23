"""What the experiments share: the ancestor of each seed, its iterative run, and how a result becomes a page."""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock  # PyTorch depends on it
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import Progress
from torch import nn

import torchtrim
from torchtrim import MeanPlusStd, Round, Stop
from torchtrim._data import Data, batches, load_data
from torchtrim._files import write_whole
from torchtrim._lenet import LeNet
from torchtrim._progress import training_progress
from torchtrim._run_directory import RunDirectory
from torchtrim._training import Training, evaluate, train

TRIMMED = ("conv2", "fc1")
ANCESTOR_EPOCHS = 4
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#777777"  # told apart by all (Okabe, Ito, 2008)


class Experiment:
    """One run of a benchmark: its seeds, its folders, and the work that several benchmarks share."""

    def __init__(
        self, module: str, description: str, *, seeds: int = 3, runs: str = "runs/paper", data: str = "mnist"
    ) -> None:
        parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
        parser.add_argument("--seeds", type=int, default=seeds, help="how many seeds, from 0 (default %(default)s)")
        parser.add_argument("--results", type=Path, default=Path("docs/results"), help="where the page goes")
        parser.add_argument("--runs", type=Path, default=Path(runs), help="where trained models are kept")
        parser.add_argument("--data", default=data, help="another copy of the data, idx:DIR (default %(default)s)")
        parser.add_argument("--jobs", type=int, default=1, help="processes that measure, where the benchmark has parts")
        parser.add_argument(
            "--published", action="store_true", help="go on from the figures beside the page, not from none"
        )
        options = parser.parse_args()
        self.name = module.rpartition(".")[2].replace("_", "-")
        self.command = f"python -m {module}" + (f" --seeds {options.seeds}" if options.seeds != seeds else "")
        self.seeds = range(options.seeds)
        self.results: Path = options.results
        self.runs: Path = options.runs
        self.source: str = options.data
        self.jobs: int = options.jobs
        self.progress: Progress = training_progress()
        self._kept = self.runs / f"{self.name}.json"
        self._published = self.results / self._kept.name
        if options.published and self._published.exists() and not self._kept.exists():
            self._kept.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._kept, self._published.read_bytes())

    @cached_property
    def data(self) -> Data:
        return load_data(self.source)

    def train(self, model: nn.Module, epochs: float, seed: int, label: str = "training") -> nn.Module:
        train(model, self.data.train, Training(epochs=epochs), seed=seed, progress=self.progress, label=label)
        return model

    def test(self, model: nn.Module) -> float:
        return evaluate(model, self.data.test)

    def profile(self, model: nn.Module) -> torchtrim.Profile:
        return torchtrim.profile(model, batches(self.data.calibration, 250))

    def fresh(self, seed: int, widths: tuple[int, int, int] = (20, 50, 500)) -> LeNet:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return LeNet(widths)

    def iterative(self, seed: int, compression: float = 25) -> tuple[nn.Module, list[Round]]:
        """The ancestor, and the rounds of mean + 1 standard deviation on CONV2 and FC1; kept, so trained once."""
        training = Training(epochs=1)
        asked = {
            "model": "lenet",
            "ancestor_epochs": ANCESTOR_EPOCHS,
            "training": dataclasses.asdict(training),
            "layers": list(TRIMMED),
            "rule": "mean + 1 std",
            "seed": seed,
        }
        stop = {"compression": compression}
        with RunDirectory.open(self.runs / f"iterative-{seed}", asked, stop, resume=True) as directory:
            ancestor = directory.ancestor(LeNet())
            if ancestor is None:
                ancestor = self.train(self.fresh(seed), ANCESTOR_EPOCHS, seed, f"ancestor {seed}")
                directory.keep_ancestor(ancestor, {"test": self.test(ancestor)})
            done = directory.rounds(LeNet())
            going = torchtrim.iterate(
                ancestor,
                torch.zeros(32, 1, 28, 28),
                batches(self.data.calibration, 250),
                retrain=lambda model: self.train(model, 1, torch.initial_seed(), f"seed {seed}: retraining"),
                evaluate=lambda model: evaluate(model, self.data.calibration),
                test=self.test,
                rule=MeanPlusStd(1),
                layers=TRIMMED,
                stop=Stop(compression=compression),
                seed=seed,
                done=done,
            )
            return ancestor, [*done, *directory.record(going)]

    def once(self, key: str, work: Callable[[], list[float]]) -> list[float]:
        """What `work` measured under this key, now, in an earlier run that was interrupted, or in another process."""
        if (values := self._figures().get(key)) is None:
            values = work()
            self._kept.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self._kept.with_suffix(".lock")):
                write_whole(self._kept, json.dumps(self._figures() | {key: values}, indent=1, allow_nan=False))
        return values

    def _figures(self) -> dict[str, list[float]]:
        return json.loads(self._kept.read_text(encoding="utf-8")) if self._kept.exists() else {}

    def spread_out(self, work: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
        """Each task once it and all before it are done, by as many processes as asked. work: a module's function."""
        with ProcessPoolExecutor(self.jobs, get_context("spawn")) as processes:
            for task, done in [(task, processes.submit(work, *task)) for task in tasks]:
                done.result()
                yield task

    def write(self, title: str, text: str, figure: Figure | None = None, seeds: Sequence[int] | None = None) -> None:
        """The page and its picture in the folder of results. seeds: what ± is over, if not all; () if the page says."""
        self.results.mkdir(parents=True, exist_ok=True)
        head = f"# {title}\n\n"
        if figure is not None:
            figure.savefig(self.results / f"{self.name}.png", dpi=130)
            head += f"![{title}]({self.name}.png)\n\n"
        threads = torch.get_num_threads()
        foot = (
            f"\nMeasured by `{self.command}` with PyTorch {torch.__version__.partition('+')[0]} on {threads} CPU "
            f"thread{'s' * (threads > 1)}."
        )
        seeds = self.seeds if seeds is None else seeds
        if len(seeds) > 1:
            foot += f" ± is the standard deviation over seeds {', '.join(map(str, seeds))}."
        if self._kept.exists():
            write_whole(self._published, self._kept.read_bytes())
            foot += f" Every figure: [{self._published.name}]({self._published.name})."
        page = self.results / f"{self.name}.md"
        page.write_text(head + text.strip() + "\n" + foot + "\n", encoding="utf-8")
        print(page.read_text(encoding="utf-8"))


def at_compression(rounds: Sequence[Round], compression: float) -> Round:
    """The first round at this compression or beyond."""
    return next(done for done in rounds if done.compression >= compression)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± sample standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; all columns but the first are aligned right."""
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def curve(
    axis: Axes, sizes: Sequence[Sequence[float]], values: Sequence[Sequence[float]], label: str, colour: str
) -> None:
    """Mean and spread of some values over the mean compression, on a logarithmic axis."""
    spreads = [statistics.stdev(some) if len(some) > 1 else 0 for some in values]
    means = [statistics.mean(some) for some in values]
    axis.errorbar(
        [statistics.mean(some) for some in sizes], means, spreads, fmt="o-", c=colour, ms=4, capsize=3, label=label
    )
    axis.set(xscale="log", xlabel="compression (parameters)")
    axis.set_xticks([4, 10, 25], ["4", "10", "25"])
    axis.set_xticks([], minor=True)


def picture(columns: int, draw: Callable[[Sequence[Axes]], None], rows: int = 1) -> Figure:
    """Plots in the style of all pages, row by row."""
    figure = Figure(figsize=(5.2 * columns, 3.8 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.3)
    draw(axes)
    return figure
