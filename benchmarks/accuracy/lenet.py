"""LeNet on MNIST and Fashion-MNIST: how it was chosen, how it was repaired, how far it was cut, how long retrained."""

import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property, partial

import numpy as np
from torch import nn

import torchtrim
from benchmarks.accuracy.common import Fashion
from benchmarks.accuracy.repair import compression
from benchmarks.paper.common import ANCESTOR_EPOCHS, BLUE, GREEN, GREY, ORANGE, TRIMMED, Axes, picture, spread, table
from torchtrim import LayerPlan, Plan, TorchtrimWarning, criteria
from torchtrim._data import Data, batches, load_data
from torchtrim._lenet import LeNet
from torchtrim._training import evaluate
from torchtrim.criteria import Floats

SETS = {"mnist": "MNIST", "fashion": "Fashion-MNIST"}
CRITERIA = ("reconstruction", "contribution", "l1_norm", "apoz", "random:0")
WAYS = {"none": None, "mean": "mean", "least squares": "least-squares"}
WIDTHS = ((31, 349), (24, 252), (15, 139), (10, 70))  # of CONV2 and FC1; the first two are the paper's
RETRAINED = WIDTHS[1:]  # at half the size, nothing is left to tell apart
EPOCHS = (1, 3)
RATE = 2e-3
_COLOURS = dict(zip(CRITERIA, (BLUE, GREEN, "#cc79a7", ORANGE, GREY), strict=True))


class Cuts:
    """The trained LeNet of a data set and a seed, and what is cut out of it."""

    def __init__(self, experiment: Fashion, name: str, data: Data, seed: int) -> None:
        self.experiment, self.name, self.data, self.seed = experiment, name, data, seed
        self.batches = batches(data.calibration, 250)
        self._scores: dict[str, dict[str, Floats]] = {}

    @cached_property
    def ancestor(self) -> nn.Module:
        name = "ancestor" if self.name == "mnist" else f"lenet-{self.name}"  # MNIST's is that of `repair`
        return self.experiment.trained(name, LeNet, self.seed, self.data, epochs=ANCESTOR_EPOCHS)

    def whole(self) -> list[float]:
        return [evaluate(self.ancestor, self.data.test)]

    @cached_property
    def profile(self) -> torchtrim.Profile:
        return torchtrim.profile(self.ancestor, self.batches)

    def scores(self, criterion: str) -> dict[str, Floats]:
        if criterion not in self._scores:
            function = criteria.resolve(criterion)
            if criterion == "reconstruction":
                function = torchtrim.reconstruction(self.ancestor, self.data.example, self.batches, TRIMMED)
            self._scores[criterion] = {name: function(self.profile[name]) for name in TRIMMED}
        return self._scores[criterion]

    def cut(self, criterion: str, widths: Sequence[int], way: str) -> nn.Module:
        layers: dict[str, LayerPlan] = {}
        for name, left in zip(TRIMMED, widths, strict=True):
            order = np.argsort(-self.scores(criterion)[name], kind="stable")
            layers[name] = LayerPlan(order.size, tuple(sorted(order[: order.size - left].tolist())))
        small = torchtrim.trim(self.ancestor, Plan(layers, criterion), self.data.example)
        how = WAYS[way]
        return small if how is None else torchtrim.repair(small, self.ancestor, self.data.example, self.batches, how)

    def test(self, criterion: str, widths: Sequence[int], way: str, epochs: float) -> list[float]:
        """Test accuracy, and the seconds of processor time that it took to get there."""
        begun = time.process_time()
        small = self.cut(criterion, widths, way)
        if epochs:
            self.experiment.retrain(small, epochs, 100 + self.seed, "retraining", self.data, lr=RATE)
        taken = time.process_time() - begun
        return [evaluate(small, self.data.test), taken]


Key = tuple[str, str, str, tuple[int, int], float]  # data, criterion, way, widths, epochs


def main() -> None:
    experiment = Fashion("benchmarks.accuracy.lenet", __doc__ or "", seeds=3)
    warnings.simplefilter("ignore", TorchtrimWarning)
    data = {"mnist": load_data("mnist"), "fashion": experiment.data}
    whole: dict[str, list[float]] = {}
    found: dict[Key, list[float]] = {}
    for seed in experiment.seeds:
        for name in SETS:
            cuts = Cuts(experiment, name, data[name], seed)
            whole.setdefault(name, []).extend(experiment.once(f"{name}, seed {seed}, whole", cuts.whole))
            for criterion, way, widths, epochs in _cells():
                key = f"{name}, seed {seed}, {criterion}, {way}, {widths}, {epochs} epochs"
                work = partial(cuts.test, criterion, widths, way, epochs)
                accuracy, seconds = experiment.once(key, work)
                print(f"{key}: {accuracy:.2f} %, {seconds:.1f} s", flush=True)
                found.setdefault((name, criterion, way, widths, epochs), []).append(accuracy)
            write(experiment, whole, found)


def _cells() -> Iterator[tuple[str, str, tuple[int, int], float]]:
    """All without retraining, and what is retrained: from nothing repaired, and from least squares."""
    yield from ((criterion, way, widths, 0) for criterion in CRITERIA for way in WAYS for widths in WIDTHS)
    for widths in reversed(RETRAINED):
        for epochs in EPOCHS:
            yield from ((one, way, widths, epochs) for one in CRITERIA for way in ("none", "least squares"))


def write(experiment: Fashion, whole: dict[str, list[float]], found: dict[Key, list[float]]) -> None:
    parts = [
        f"""
LeNet, trained for {ANCESTOR_EPOCHS} epochs, cut once to fixed widths of CONV2 and FC1, by several criteria; repaired
from the 5,000 calibration images, or not; and retrained for 1 or 3 epochs at a rate of {RATE:g}, or not. What was
repaired by means, and what was cut to half its size, is not retrained. Test accuracy, %.
"""
    ]
    for name, values in whole.items():
        parts += [f"## {SETS[name]}\n\nThe whole network is at {spread(values)}.\n", _table(found, name)]
    figure = picture(2 * len(whole), lambda axes: _draw(axes, found, list(whole)))
    experiment.write("LeNet: choice, repair, size and retraining", "\n".join(parts), figure)


def _table(found: dict[Key, list[float]], name: str) -> str:
    head = ["chosen by", "repair", "epochs", *(f"{compression(widths):.2f}×" for widths in WIDTHS)]
    rows = []
    for criterion in CRITERIA:
        for way in WAYS:
            for epochs in (0, *EPOCHS):
                cells = [found.get((name, criterion, way, widths, epochs)) for widths in WIDTHS]
                if any(cells):
                    rows.append([criterion, way, epochs, *(spread(cell) if cell else "" for cell in cells)])
    return table(head, rows)


def _draw(axes: Sequence[Axes], found: dict[Key, list[float]], names: Sequence[str]) -> None:
    for place, name in enumerate(names):
        for axis, epochs in zip(axes[2 * place :], (0, EPOCHS[0]), strict=False):
            for criterion in CRITERIA:
                for way, style in (("none", "o:"), ("least squares", "o-")):
                    keys = [(name, criterion, way, widths, epochs) for widths in WIDTHS]
                    points = [(compression(key[3]), statistics.mean(found[key])) for key in keys if key in found]
                    label = criterion if way == "least squares" else None
                    axis.plot(*zip(*points, strict=True), style, c=_COLOURS[criterion], ms=3, lw=1.3, label=label)
            sizes = [compression(widths) for widths in WIDTHS]
            title = f"{SETS[name]}, {'not retrained' if not epochs else f'{epochs} epoch'}"
            axis.set(xscale="log", xlabel="compression (parameters)", ylabel="test accuracy (%)", title=title)
            axis.set_xticks(sizes, [f"{size:.0f}" for size in sizes])
            axis.set_xticks([], minor=True)
            best = statistics.mean(found[name, "reconstruction", "least squares", WIDTHS[1], epochs])
            axis.set_ylim(best - (25 if not epochs else 4), best + (2 if not epochs else 0.5))
    axes[0].legend(title="— repaired, ··· not", fontsize=8)


if __name__ == "__main__":
    main()
