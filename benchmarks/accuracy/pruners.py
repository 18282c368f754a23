"""How accurate networks are at half, a quarter and an eighth of their FLOPs, trimmed by torchtrim and Torch-Pruning.

Both are given the same trained network, images, number of FLOPs and retraining. Needs `pip install -e '.[compare]'`.
"""

import copy
import math
import statistics
import warnings
from collections.abc import Callable, Sized
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

import torchtrim
from benchmarks.accuracy import rivals
from benchmarks.accuracy.common import Fashion
from benchmarks.accuracy.networks import VGG, ResNet
from benchmarks.accuracy.widths import Uniform
from benchmarks.paper.common import BLUE, ORANGE, Axes, picture, spread, table
from torchtrim import Budget, Plan, TorchtrimWarning
from torchtrim._cost import flops_of
from torchtrim._data import batches
from torchtrim._training import evaluate
from torchtrim.criteria import Criterion

NETWORKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "vgg": (VGG, "classifier.2"),
    "resnet": (ResNet, "head"),
}  # and the layer that gives the logits
NAMES = {"vgg": "VGG with batch norms", "resnet": "ResNet-20"}
TIMES = (2, 4, 8)
IMAGES = 1000  # of the calibration images: what every method is given to choose and to repair with
RETRAINING = 0.5  # epochs
RETRAINED = {f"retrained at {rate:g}": rate for rate in (5e-4, 2e-3)}  # of which each is given the better rate
OURS, THEIRS = "torchtrim", "Torch-Pruning"
_WITHOUT = ("cut", "norms", "repaired")


@dataclass(frozen=True)
class Method:
    """side: whose. criterion: its name there. allocation: how the widths of the layers come about."""

    side: str
    criterion: str
    allocation: str

    def __str__(self) -> str:
        return f"{self.side}: {self.criterion}, {self.allocation}"


METHODS = (
    *(Method(OURS, name, "uniform") for name in ("reconstruction", "contribution", "apoz", "l1_norm")),
    *(Method(OURS, name, "budget") for name in ("reconstruction", "contribution")),
    *(Method(THEIRS, name, "uniform") for name in rivals.IMPORTANCES if name != "LAMP"),  # it orders as L2 does
    *(Method(THEIRS, name, "global") for name in rivals.IMPORTANCES),
)


SHORTLIST = (
    *(Method(OURS, "reconstruction", one) for one in ("uniform", "budget")),
    Method(OURS, "contribution", "uniform"),
    *(Method(THEIRS, f"magnitude {one}", "uniform") for one in ("L1", "L2")),
    Method(THEIRS, "Taylor", "uniform"),
    *(Method(THEIRS, name, "global") for name in ("magnitude L2", "Taylor")),
)  # what is retrained first
LAST = (Method(THEIRS, "LAMP", "global"), *(Method(THEIRS, "BN scale", one) for one in ("uniform", "global")))


class Study:
    """One trained network, and what is cut out of it."""

    def __init__(self, experiment: Fashion, network: str, seed: int) -> None:
        self.experiment, self.network, self.seed = experiment, network, seed
        self.example = experiment.data.example[:1]
        self._scores: dict[str, Criterion | str] = {}

    @property
    def key(self) -> str:
        return f"{self.network}, seed {self.seed}"

    @cached_property
    def model(self) -> nn.Module:
        return self.experiment.trained(self.network, NETWORKS[self.network][0], self.seed)

    def whole(self) -> list[float]:
        return [self.experiment.test(self.model), flops_of(self.model, self.example)]

    @cached_property
    def labelled(self) -> list[tuple[Tensor, Tensor]]:
        return list(batches(self.experiment.data.calibration, 250))[: IMAGES // 250]

    @cached_property
    def held_out(self) -> Subset[Any]:
        calibration = self.experiment.data.calibration
        return Subset(calibration, range(IMAGES, len(cast(Sized, calibration))))

    @cached_property
    def images(self) -> list[Tensor]:
        return [images for images, _ in self.labelled]

    @cached_property
    def graph(self) -> torchtrim._neurons.NeuronGraph:
        return torchtrim.trace(self.model, self.example)

    @cached_property
    def profile(self) -> torchtrim.Profile:
        return torchtrim.profile(self.model, self.images)

    @cached_property
    def uniform(self) -> Uniform:
        return Uniform(self.model, self.example, self.profile, self.graph)

    @cached_property
    def with_gradients(self) -> nn.Module:
        return rivals.gradients(self.model, self.labelled)

    def cut(self, method: Method, times: int) -> nn.Module:
        if method.side == OURS:
            return torchtrim.trim(self.model, self.plan(method, times), self.graph)
        head = NETWORKS[self.network][1]
        if method.allocation == "global":
            return rivals.everywhere(self.with_gradients, self.example, method.criterion, times, head)
        shares = self.uniform.shares(times)
        return rivals.local(self.with_gradients, self.example, method.criterion, shares, head)

    def plan(self, method: Method, times: int) -> Plan:
        criterion = self.scores(method.criterion)
        if method.allocation == "uniform":
            return self.uniform.plan(times, criterion)
        budget = Budget(flops=1 / times)
        return budget.plan(self.model, self.graph, self.profile, criterion=criterion)

    def scores(self, name: str) -> Criterion | str:
        if name == "reconstruction" and name not in self._scores:
            self._scores[name] = torchtrim.reconstruction(self.model, self.graph, self.images)
        return self._scores.get(name, name)

    def figures(self, method: Method, times: int) -> list[float]:
        """FLOPs and parameters, as so many times fewer; test accuracy by way, the last of which only we have."""
        cut = self.cut(method, times)
        if method.side == OURS:
            norms = torchtrim.repair(cut, self.model, self.graph, self.images, "batchnorm")
            best = torchtrim.repair(cut, self.model, self.graph, self.images, ("least-squares", "batchnorm"))
        else:
            norms = best = rivals.measure_norms(cut, self.images)
        path = self._path(method, times)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(best, path)
        fewer = flops_of(self.model, self.example) / flops_of(cut, self.example), _size(self.model) / _size(cut)
        tested = [cut, norms] if best is norms else [cut, norms, best]
        return [*fewer, *map(self.experiment.test, tested)]

    def retrained(self, method: Method, times: int, way: str) -> list[float]:
        """Accuracy after retraining from the repaired model, or where it has none from the one with new norms.

        Of test images, and of the calibration images that no method was given.
        """
        if not self._path(method, times).exists():  # the figures are of another machine's run
            self.figures(method, times)
        return self._again(torch.load(self._path(method, times), weights_only=False), f"{method}, {times}×", way)

    def whole_retrained(self, way: str) -> list[float]:
        return self._again(copy.deepcopy(self.model), "whole", way)

    def _again(self, model: nn.Module, name: str, way: str) -> list[float]:
        label = f"{self.key}, {name}, {way}"
        self.experiment.retrain(model, RETRAINING, 100 + self.seed, label, lr=RETRAINED[way])
        return [self.experiment.test(model), evaluate(model, self.held_out)]

    def _path(self, method: Method, times: int) -> Path:
        name = "-".join(f"{self.network} {self.seed} {method.side} {method.criterion} {method.allocation}".split())
        return self.experiment.runs / "pruners" / f"{name}-{times}.pt"


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


Results = dict[tuple[str, Method, int], dict[str, list[float]]]


class Comparison:
    """What has been measured so far."""

    def __init__(self, experiment: Fashion) -> None:
        self.experiment = experiment
        self.whole: dict[str, dict[str, list[float]]] = {}
        self.found: Results = {}

    def measure(self, seed: int, network: str) -> None:
        """What is not kept from an earlier run, or measured by another process, is measured now."""
        study = Study(self.experiment, network, seed)
        whole = self.whole.setdefault(network, {})
        retrained = [(f"whole, {way}", partial(study.whole_retrained, way)) for way in RETRAINED]
        for way, work in (("whole", study.whole), *retrained):
            whole.setdefault(way, []).append(self.experiment.once(f"{study.key}, {way}", work)[0])
        rest = [method for method in METHODS if method not in SHORTLIST]
        for way, methods in (
            ("figures", SHORTLIST),
            *((way, SHORTLIST) for way in RETRAINED),
            ("figures", rest),
            *((way, LAST) for way in RETRAINED),
        ):
            again = way in RETRAINED
            columns = (way, _held_out(way)) if again else ("flops", "parameters", *_WITHOUT)
            for method, times in product(methods, TIMES):
                key = f"{study.key}, {method}, {times}x, {way}"
                work = partial(study.retrained, method, times, way) if again else partial(study.figures, method, times)
                values = self.experiment.once(key, work)
                print(key, *(f"{value:.2f}" for value in values), flush=True)
                cell = self.found.setdefault((network, method, times), {})
                for column, value in zip(columns, values, strict=False):
                    cell.setdefault(column, []).append(value)


def _held_out(way: str) -> str:
    return f"{way}, held out"


def experiment_of_pruners() -> Fashion:
    warnings.simplefilter("ignore", TorchtrimWarning)
    return Fashion("benchmarks.accuracy.pruners", __doc__ or "")


def fill(seed: int, network: str) -> None:
    """Measure in a process of its own."""
    Comparison(experiment_of_pruners()).measure(seed, network)


def main() -> None:
    experiment = experiment_of_pruners()
    comparison = Comparison(experiment)
    for seed, network in experiment.spread_out(fill, [*product(experiment.seeds, NETWORKS)]):
        comparison.measure(seed, network)
        write(experiment, comparison.whole, comparison.found)


# The page ---------------------------------------------------------------------------------------------------


def write(experiment: Fashion, whole: dict[str, dict[str, list[float]]], found: Results) -> None:
    counts = sorted({len(values) for cell in whole.values() for values in cell.values()})
    parts = [
        f"""
Two networks for Fashion-MNIST, cut once to a half, a quarter and an eighth of their FLOPs, by torchtrim and by
Torch-Pruning {_version()}. Each was trained for {experiment.epochs} epochs on 55,000 images. To choose and to repair,
every method is given the same {IMAGES:,} calibration images (of which Taylor's importance reads the labels too), and
every cut network is retrained alike for {RETRAINING:g} epochs, which is short on purpose. Test accuracy, %, on 10,000
images that decide nothing. Networks trained of each: {" or ".join(map(str, counts))}; with one, differences below half
a point say little. A dash: there is no such way, or it was not measured; only some methods are retrained.

- *cut*: nothing else is done. *norms*: the statistics of batch norms are measured anew. *repaired*: least squares, then
  the norms, which Torch-Pruning does not have.
- *retrained*: from the last of these, by AdamW in one cycle up to a learning rate, of which there are two, since a
  network that lost little is best retrained gently. The best of each, and the picture, have for each method and size
  the one that leaves the most accuracy on the 4,000 calibration images that nothing was chosen or repaired with.
- *uniform*: every group of layers loses the same share, and both cut to the same widths. *global*: one threshold of
  Torch-Pruning for all layers. *budget*: torchtrim's `Budget(flops=...)`, over all layers at once.
- LAMP chooses within a layer as magnitude L2 does, so that its uniform row is left out. Nothing was trained with a
  penalty on the scales of batch norms, which "BN scale" asks for.
"""
    ]
    present = [network for network in whole if any(key[0] == network for key in found)]
    for network in present:
        again = " and ".join(f"{spread(whole[network][f'whole, {way}'])} {way}" for way in RETRAINED)
        parts.append(f"## {NAMES[network]}\n\nThe whole network is at {spread(whole[network]['whole'])}; {again}.\n")
        parts += [_table(found, network, times) for times in TIMES]
    parts.append("## The best of each\n\n" + _best(found, present))
    figure = picture(2 * len(present), lambda axes: _draw(axes, found, present))
    experiment.write("Beside other pruners, at equal FLOPs", "\n".join(parts), figure, range(counts[-1]))


def _table(found: Results, network: str, times: int) -> str:
    rows = []
    ways = (*_WITHOUT, *RETRAINED)
    for method in METHODS:
        if cell := found.get((network, method, times)):
            fewer = [f"{statistics.mean(cell[name]):.2f}×" for name in ("flops", "parameters")]
            rows.append([str(method), *fewer, *(_cell(cell, way) for way in ways)])
    return table([f"{times}× fewer FLOPs", "FLOPs", "parameters", *ways], rows)


def _cell(cell: dict[str, list[float]], way: str) -> str:
    values = cell.get(way, [])
    return spread(values) if values else "–"


def _without(cell: dict[str, list[float]]) -> float:
    """The best that there is without retraining."""
    return max(statistics.mean(cell[way]) for way in _WITHOUT if way in cell)


def _with(cell: dict[str, list[float]]) -> float:
    """At the learning rate that is best on images held out."""
    ways = [way for way in RETRAINED if way in cell]
    best = max(ways, key=lambda way: statistics.mean(cell[_held_out(way)]), default=None)
    return math.nan if best is None else statistics.mean(cell[best])


def _best(found: Results, networks: list[str]) -> str:
    """The most accurate of either side, picked by the test images, which favours the side with more rows."""
    rows = []
    for network in networks:
        for times in TIMES:
            for title, value in (("without retraining", _without), ("retrained", _with)):
                sides = []
                for side in (OURS, THEIRS):
                    cells = {
                        m: value(found[network, m, times])
                        for m in METHODS
                        if m.side == side and (network, m, times) in found
                    }
                    cells = {method: one for method, one in cells.items() if not math.isnan(one)}
                    sides.append(max(cells.items(), key=lambda item: item[1]) if cells else None)
                if all(sides):
                    (ours, mine), (theirs, other) = sides  # pyright: ignore[reportGeneralTypeIssues]
                    names = [f"{one.criterion}, {one.allocation}" for one in (ours, theirs)]
                    rows.append(
                        [
                            f"{NAMES[network]}, {times}×, {title}",
                            f"{mine:.2f}",
                            names[0],
                            f"{other:.2f}",
                            names[1],
                            f"{mine - other:+.2f}",
                        ]
                    )
    return table(["", OURS, "by", THEIRS, "by", "difference"], rows)


def _draw(axes: list[Axes], found: Results, networks: list[str]) -> None:
    for place, network in enumerate(networks):
        for axis, title, value in zip(
            axes[2 * place :], ("without retraining", "retrained"), (_without, _with), strict=False
        ):
            for method in METHODS:
                points = [(t, value(found[network, method, t])) for t in TIMES if (network, method, t) in found]
                ours = method.side == OURS
                best = method.criterion == "reconstruction"
                if not points or math.isnan(points[0][1]):
                    continue
                look = {"c": BLUE if ours else ORANGE, "alpha": 1 if best else 0.5, "lw": 1.8 if best else 1}
                axis.plot(*zip(*points, strict=True), "o-", ms=3, label=method.side, **look)
            handles = {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
            axis.legend(handles.values(), handles.keys(), fontsize=8, loc="lower left")
            axis.set(
                xscale="log", xlabel="times fewer FLOPs", ylabel="test accuracy (%)", title=f"{NAMES[network]}, {title}"
            )
            axis.set_xticks(TIMES, [f"{t}×" for t in TIMES])
            axis.set_xticks([], minor=True)


def _version() -> str:
    from importlib.metadata import version

    return version("torch-pruning")


if __name__ == "__main__":
    main()
