"""How accurate a LeNet is right after one large cut, without retraining, by how it was chosen and repaired."""

import statistics
import time
from functools import cached_property, partial
from typing import Any

import numpy as np
from torch import nn

import torchtrim
from benchmarks.paper.common import ANCESTOR_EPOCHS, TRIMMED, Experiment, spread, table
from torchtrim import LayerPlan, Plan, criteria
from torchtrim._data import batches
from torchtrim._lenet import LeNet

WIDTHS = ((31, 349), (24, 252), (15, 139), (10, 70))  # of CONV2 and FC1; the first two are the paper's
CRITERIA = ("apoz", "contribution", "l1_norm", "random:0", "reconstruction")
WAYS = {"none": None, "mean": "mean", "least squares": "least-squares"}


def main() -> None:
    experiment = Experiment("benchmarks.accuracy.repair", __doc__, runs="runs/accuracy")
    accuracies: dict[tuple[str, str], list[list[float]]] = {}
    seconds: dict[str, list[float]] = {}
    whole: list[float] = []
    for seed in experiment.seeds:
        cuts = Cuts(experiment, seed)
        whole += experiment.once(f"seed {seed}, whole", cuts.whole)
        for criterion in CRITERIA:
            chosen = experiment.once(f"seed {seed}, {criterion}, seconds", partial(cuts.seconds_to_score, criterion))
            seconds.setdefault(criterion, []).extend(chosen)
            for way in WAYS:
                row = accuracies.setdefault((criterion, way), [[] for _ in WIDTHS])
                for place, widths in enumerate(WIDTHS):
                    key = f"seed {seed}, {criterion}, {widths}, {way}"
                    accuracy, taken = experiment.once(key, partial(cuts.test, criterion, widths, way))
                    print(f"{key}: {accuracy:.2f} %, {taken:.1f} s", flush=True)
                    row[place].append(accuracy)
                    seconds.setdefault(way, []).append(taken)
    head = ["chosen by", "repair", *(f"{compression(widths):.2f}×" for widths in WIDTHS)]
    rows = [[criterion, way, *map(spread, accuracies[criterion, way])] for criterion in CRITERIA for way in WAYS]
    experiment.write(
        "Repair without retraining",
        f"""
LeNet on MNIST, cut once to fixed widths of CONV2 and FC1, by several criteria, and then repaired from the 5,000
calibration images, or not; none of the networks is retrained. `reconstruction` removes, one by one, the neuron without
which the next layer can be refitted best; least squares is that refitting. The whole network is at {spread(whole)}.
Test accuracy, %.

{table(head, rows)}
Processor time in seconds: to score the neurons, {listed(seconds, ("apoz", "reconstruction"))}
(that of APoZ holds for all that are taken from one profile); to repair,
{listed(seconds, ("mean", "least squares"))}.""",
    )


class Cuts:
    """The ancestor of a seed, trained once and kept, and what is cut out of it."""

    def __init__(self, experiment: Experiment, seed: int) -> None:
        self.experiment, self.seed = experiment, seed
        self.batches = batches(experiment.data.calibration, 250)
        self._scores: dict[str, dict[str, Any]] = {}

    @cached_property
    def ancestor(self) -> nn.Module:
        path = self.experiment.runs / f"ancestor-{self.seed}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            label = f"ancestor {self.seed}"
            with self.experiment.progress:
                model = self.experiment.train(self.experiment.fresh(self.seed), ANCESTOR_EPOCHS, self.seed, label)
            torchtrim.save(model, path)
        return torchtrim.load(LeNet(), path)

    def whole(self) -> list[float]:
        return [self.experiment.test(self.ancestor)]

    def seconds_to_score(self, criterion: str) -> list[float]:
        begun = time.process_time()
        self.scores(criterion)
        return [time.process_time() - begun]

    def scores(self, criterion: str) -> dict[str, Any]:
        """By layer, float64 [neurons]."""
        if criterion not in self._scores:
            if criterion == "reconstruction":
                example = self.experiment.data.example
                function = torchtrim.reconstruction(self.ancestor, example, self.batches, TRIMMED)
            else:
                function = criteria.resolve(criterion)
            self._scores[criterion] = {name: function(self.profile[name]) for name in TRIMMED}
        return self._scores[criterion]

    @cached_property
    def profile(self) -> torchtrim.Profile:
        return self.experiment.profile(self.ancestor)

    def test(self, criterion: str, widths: tuple[int, int], way: str) -> list[float]:
        """Test accuracy, and the seconds that the repair took."""
        example = self.experiment.data.example
        layers: dict[str, LayerPlan] = {}
        for name, left in zip(TRIMMED, widths, strict=True):
            order = np.argsort(-self.scores(criterion)[name], kind="stable")
            layers[name] = LayerPlan(order.size, tuple(sorted(order[: order.size - left].tolist())))
        small = torchtrim.trim(self.ancestor, Plan(layers, criterion), example)
        begun = time.process_time()
        if (how := WAYS[way]) is not None:
            small = torchtrim.repair(small, self.ancestor, example, self.batches, how)
        taken = time.process_time() - begun
        return [self.experiment.test(small), taken]


def compression(widths: tuple[int, int]) -> float:
    """Parameters of the whole network over those of one of these widths."""
    whole, small = (sum(p.numel() for p in LeNet(sizes).parameters()) for sizes in ((20, 50, 500), (20, *widths)))
    return whole / small


def listed(seconds: dict[str, list[float]], names: tuple[str, ...]) -> str:
    return ", ".join(f"{name} {statistics.mean(seconds[name]):.1f}" for name in names)


if __name__ == "__main__":
    main()
