"""How accurate a LeNet is after one large cut, by how it was chosen, repaired and retrained, on two data sets."""

import copy
import statistics
import time
from collections.abc import Sequence
from functools import cached_property, partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from torch import nn

import torchtrim
from benchmarks.accuracy.common import Fashion
from benchmarks.paper.common import ANCESTOR_EPOCHS, BLUE, GREEN, GREY, ORANGE, TRIMMED, picture, spread, table
from torchtrim import LayerPlan, Plan, criteria
from torchtrim._data import Data, batches, load_data
from torchtrim._lenet import LeNet
from torchtrim._training import evaluate
from torchtrim.criteria import Floats

Widths = tuple[int, int]
WIDTHS: tuple[Widths, ...] = ((31, 349), (24, 252), (15, 139), (10, 70))  # of CONV2, FC1; the first two are the paper's
CRITERIA = {
    "apoz": ORANGE,
    "contribution": GREEN,
    "l1_norm": "#cc79a7",
    "random:0": GREY,
    "reconstruction": BLUE,
}
WAYS = {"none": None, "mean": "mean", "least squares": "least-squares"}
RATE = 2e-3


class Stage(NamedTuple):
    """What is measured together, in both data sets, of all seeds."""

    epochs: tuple[int, ...]
    widths: tuple[Widths, ...]
    ways: tuple[str, ...]


STAGES = (
    Stage((0,), WIDTHS, tuple(WAYS)),
    *(Stage((1, 3), (WIDTHS[place],), ("none", "least squares")) for place in (3, 1, 2, 0)),
    Stage((1, 3), WIDTHS[::-1], ("mean",)),
)
EPOCHS = sorted({epochs for stage in STAGES for epochs in stage.epochs})
STYLES = {"none": ":", "least squares": "-"}


class Cell(NamedTuple):
    """A network that is measured once for each seed."""

    data: str
    criterion: str
    way: str
    widths: Widths
    epochs: int


class Cuts:
    """The trained LeNet of a seed, and what is cut out of it."""

    def __init__(self, experiment: Fashion, name: str, data: Data, seed: int) -> None:
        self.experiment, self.name, self.data, self.seed = experiment, name, data, seed
        self.batches = batches(data.calibration, 250)
        self._scores: dict[str, dict[str, Floats]] = {}
        self._repaired: tuple[Any, Any] = None, None

    @cached_property
    def ancestor(self) -> nn.Module:
        name = f"LeNet-{self.name}"
        return self.experiment.trained(name, LeNet, self.seed, self.data, epochs=ANCESTOR_EPOCHS)

    def whole(self) -> list[float]:
        return [evaluate(self.ancestor, self.data.test)]

    @cached_property
    def profile(self) -> torchtrim.Profile:
        return torchtrim.profile(self.ancestor, self.batches)

    def scores(self, criterion: str) -> dict[str, Floats]:
        """By layer, float64 [neurons]."""
        if criterion not in self._scores:
            if criterion == "reconstruction":
                function = torchtrim.reconstruction(self.ancestor, self.data.example, self.batches, TRIMMED)
            else:
                function = criteria.resolve(criterion)
            self._scores[criterion] = {name: function(self.profile[name]) for name in TRIMMED}
        return self._scores[criterion]

    def test(self, criterion: str, way: str, widths: Widths, epochs: int) -> list[float]:
        """Test accuracy; seconds of processor time that the repair took, and that retraining took."""
        small, repair = self.repaired(criterion, way, widths)
        begun = time.process_time()
        if epochs:
            small = copy.deepcopy(small)
            self.experiment.retrain(small, epochs, 100 + self.seed, "retraining", self.data, lr=RATE)
        training = time.process_time() - begun
        return [evaluate(small, self.data.test), repair, training]

    def repaired(self, criterion: str, way: str, widths: Widths) -> tuple[nn.Module, float]:
        """A cut model, and seconds of processor time; the last one is kept."""
        if self._repaired[0] != (criterion, way, widths):
            layers: dict[str, LayerPlan] = {}
            for name, left in zip(TRIMMED, widths, strict=True):
                order = np.argsort(-self.scores(criterion)[name], kind="stable")
                layers[name] = LayerPlan(order.size, tuple(sorted(order[: order.size - left].tolist())))
            small = torchtrim.trim(self.ancestor, Plan(layers, criterion), self.data.example)
            begun = time.process_time()
            if (how := WAYS[way]) is not None:
                small = torchtrim.repair(small, self.ancestor, self.data.example, self.batches, how)
            self._repaired = (criterion, way, widths), (small, time.process_time() - begun)
        return self._repaired[1]


def compression(widths: Widths) -> float:
    """Parameters of the whole network over those of one of these widths."""
    whole, small = (sum(p.numel() for p in LeNet(sizes).parameters()) for sizes in ((20, 50, 500), (20, *widths)))
    return whole / small


class Grid:
    """What has been measured so far, and the page of it."""

    def __init__(self, experiment: Fashion) -> None:
        self.experiment = experiment
        self.data = {"MNIST": load_data("mnist"), "Fashion-MNIST": experiment.data}
        self.whole: dict[str, dict[int, float]] = {name: {} for name in self.data}
        self.accuracies: dict[Cell, list[float]] = {}
        self.repairs: dict[str, list[float]] = {way: [] for way in WAYS}
        self.training: list[float] = []

    def measure(self, name: str, stage: Stage, seed: int) -> None:
        """What is not kept from an earlier run, or measured by another process, is measured now."""
        cuts = Cuts(self.experiment, name, self.data[name], seed)
        key = f"{name}, seed {seed}"
        self.whole[name][seed] = self.experiment.once(f"{key}, whole", cuts.whole)[0]
        for widths, criterion, way, epochs in product(stage.widths, CRITERIA, stage.ways, stage.epochs):
            work = partial(cuts.test, criterion, way, widths, epochs)
            label = f"{key}, {criterion}, {way}, {widths}, {epochs} epochs"
            accuracy, repair, training = self.experiment.once(label, work)
            print(f"{label}: {accuracy:.2f} %, {repair + training:.1f} s", flush=True)
            self.accuracies.setdefault(Cell(name, criterion, way, widths, epochs), []).append(accuracy)
            self.repairs[way].append(repair)
            self.training += [training / epochs] if epochs else []

    def write(self) -> None:
        """The page of what is there."""
        texts = [_INTRODUCTION.format(ancestor=ANCESTOR_EPOCHS, rate=RATE), self._seconds()]
        for name, whole in self.whole.items():
            if whole:
                texts.append(f"\n## {name}\n\nThe whole network is at {spread(list(whole.values()))}.")
            for epochs in EPOCHS:
                if any((cell.data, cell.epochs) == (name, epochs) for cell in self.accuracies):
                    texts += [self._table(name, epochs), self._against_chance(name, epochs)]
        figure = picture(2, self._draw, rows=2)
        self.experiment.write("Choosing, repairing, retraining", "\n".join(texts), figure, seeds=())

    def _table(self, name: str, epochs: int) -> str:
        """Accuracies of one data set; the best of a column is bold, and what was not measured is a dash."""
        pairs = [pair for pair in product(CRITERIA, WAYS) if any(self._along(name, *pair, epochs))]
        columns = zip(*(self._along(name, *pair, epochs) for pair in pairs), strict=True)
        rows = [[*pair, *cells] for pair, *cells in zip(pairs, *map(_column, columns), strict=True)]
        counts = {len(values) for pair in pairs for values in self._along(name, *pair, epochs) if values}
        title = f"Retrained for {epochs} epoch{'s' * (epochs > 1)}" if epochs else "Without retraining"
        seeds = " or ".join(map(str, sorted(counts)))
        return f"\n### {title}\n\nTest accuracy, %; seeds: {seeds}.\n\n" + table(["chosen by", "repair", *_SIZES], rows)

    def _against_chance(self, name: str, epochs: int) -> str:
        """How much better APoZ and `reconstruction` are than a random choice."""
        rows: list[list[str]] = []
        for criterion, way in product(("apoz", "reconstruction"), STYLES):
            both = (self._along(name, one, way, epochs) for one in (criterion, "random:0"))
            pairs = zip(*both, strict=True)
            rows.append([criterion, way, *(_gain(mine, chance) for mine, chance in pairs)])
        head = ["chosen by", "repair", *_SIZES]
        return "Points above a random choice that is repaired alike:\n\n" + table(head, rows)

    def _along(self, name: str, criterion: str, way: str, epochs: int) -> list[list[float]]:
        """Accuracies of all seeds, by size."""
        cells = (Cell(name, criterion, way, widths, epochs) for widths in WIDTHS)
        return [self.accuracies.get(cell, []) for cell in cells]

    def _seconds(self) -> str:
        mean, least_squares = (statistics.mean(self.repairs[way]) for way in ("mean", "least squares"))
        text = f"Folding means takes {mean:.1f} s of processor time, least squares {least_squares:.1f} s"
        return text + (f", an epoch of retraining {statistics.mean(self.training):.0f} s." if self.training else ".")

    def _draw(self, axes: Sequence[Axes]) -> None:
        """Above, errors without retraining by size; below, those of the smallest networks by epochs."""
        times = [compression(widths) for widths in WIDTHS]
        for name, by_size, by_epochs in zip(self.data, axes[:2], axes[2:], strict=True):
            for pair in product(CRITERIA, STYLES):
                self._line(by_size, times, [Cell(name, *pair, widths, 0) for widths in WIDTHS])
                self._line(by_epochs, EPOCHS, [Cell(name, *pair, WIDTHS[-1], epochs) for epochs in EPOCHS])
            by_size.set(xscale="log", title=name, xlabel="compression (parameters), without retraining")
            by_size.set_xticks(times, [f"{one:.0f}" for one in times])
            by_size.set_xticks([], minor=True)
            by_epochs.set_xticks(EPOCHS)
            by_epochs.set(xlabel=f"epochs of retraining, at {times[-1]:.0f}×")
            for axis in by_size, by_epochs:
                axis.set(yscale="log", ylabel="test error, %")
                low, high = axis.get_ylim()
                ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50) if low <= tick <= high]
                axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
                axis.set_yticks([], minor=True)
        marks = [Line2D([], [], c=colour, label=criterion) for criterion, colour in CRITERIA.items()]
        marks += [Line2D([], [], c="k", ls=style, label=f"repair: {way}") for way, style in STYLES.items()]
        axes[0].figure.legend(handles=marks, loc="outside upper center", ncols=len(marks), fontsize=8)

    def _line(self, axis: Axes, places: Sequence[float], cells: Sequence[Cell]) -> None:
        """Mean errors, over the seeds that all of these cells have; of one cell alone there is no line."""
        there = [(at, self.accuracies[cell]) for at, cell in zip(places, cells, strict=True) if cell in self.accuracies]
        if len(there) < 2:
            return
        seeds = min(len(values) for _, values in there)
        errors = [100 - statistics.mean(values[:seeds]) for _, values in there]
        colour, style = CRITERIA[cells[0].criterion], STYLES[cells[0].way]
        axis.plot([at for at, _ in there], errors, c=colour, ls=style, marker="o", ms=4)


_SIZES = [f"{compression(widths):.2f}×" for widths in WIDTHS]


def _column(cells: Sequence[list[float]]) -> list[str]:
    best = max((statistics.mean(values) for values in cells if values), default=0)
    texts = [spread(values) if values else "–" for values in cells]
    return [
        f"**{text}**" if one and statistics.mean(one) == best else text for one, text in zip(cells, texts, strict=True)
    ]


def _gain(mine: Sequence[float], others: Sequence[float]) -> str:
    return f"{statistics.mean(mine) - statistics.mean(others):+.2f}" if mine and others else "–"


_INTRODUCTION = """
LeNet, cut once to fixed widths of CONV2 and FC1, the first two those of the paper. Each data set has ancestors of its
own, trained for {ancestor} epochs on 55,000 images. Test accuracy, %, on 10,000 images that decide nothing; the best
of a column is bold. ± is the standard deviation over seeds, which are those from 0 on. With one seed, differences
below 0.2 points on MNIST and half a point on Fashion-MNIST say little.

- *chosen by*: `reconstruction` removes, one by one, the neuron without which the next layer can be refitted best;
  `random:0` removes the same ones of every ancestor. All look at the 5,000 calibration images alone.
- *repair*, from the same images: *mean* folds the means of what is gone into biases, *least squares* is that refitting.
- Retraining is alike for all: on the 55,000 images, at a rate of up to {rate:g}.
"""


def experiment_of_grid() -> Fashion:
    return Fashion("benchmarks.accuracy.grid", __doc__ or "", seeds=3)


def fill(stage: Stage, seed: int, name: str) -> None:
    """Measure in a process of its own."""
    Grid(experiment_of_grid()).measure(name, stage, seed)


def main() -> None:
    experiment = experiment_of_grid()
    grid = Grid(experiment)
    for stage, seed, name in experiment.spread_out(fill, [*product(STAGES, experiment.seeds, grid.data)]):
        grid.measure(name, stage, seed)
        grid.write()


if __name__ == "__main__":
    main()
