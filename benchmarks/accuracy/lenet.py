"""How accurate a LeNet is that is cut to a tenth, a 25th and a 50th at once, repaired, and retrained for a while."""

import time
from collections.abc import Sequence
from functools import cached_property, partial

import numpy as np
from torch import nn

import torchtrim
from benchmarks.accuracy.common import Fashion
from benchmarks.accuracy.repair import compression
from benchmarks.paper.common import ANCESTOR_EPOCHS, TRIMMED, spread, table
from torchtrim import LayerPlan, Plan
from torchtrim._data import Data, batches, load_data
from torchtrim._lenet import LeNet
from torchtrim._training import evaluate
from torchtrim.criteria import Floats

WIDTHS = (15, 139), (10, 70), (7, 37)  # of CONV2 and FC1
EPOCHS = (0, 5)
RATE = 2e-3


class Cuts:
    """The trained LeNet of a seed, and what is cut out of it."""

    def __init__(self, experiment: Fashion, data: Data, seed: int) -> None:
        self.experiment, self.data, self.seed = experiment, data, seed
        self.batches = batches(data.calibration, 250)

    @cached_property
    def ancestor(self) -> nn.Module:
        return self.experiment.trained("ancestor", LeNet, self.seed, self.data, epochs=ANCESTOR_EPOCHS)

    def whole(self) -> list[float]:
        return [evaluate(self.ancestor, self.data.test)]

    @cached_property
    def scores(self) -> dict[str, Floats]:
        profile = torchtrim.profile(self.ancestor, self.batches)
        function = torchtrim.reconstruction(self.ancestor, self.data.example, self.batches, TRIMMED)
        return {name: function(profile[name]) for name in TRIMMED}

    def test(self, widths: Sequence[int], epochs: float) -> list[float]:
        """Test accuracy, and the seconds of processor time that it took to get there."""
        begun = time.process_time()
        layers: dict[str, LayerPlan] = {}
        for name, left in zip(TRIMMED, widths, strict=True):
            order = np.argsort(-self.scores[name], kind="stable")
            layers[name] = LayerPlan(order.size, tuple(sorted(order[: order.size - left].tolist())))
        small = torchtrim.trim(self.ancestor, Plan(layers, "reconstruction"), self.data.example)
        small = torchtrim.repair(small, self.ancestor, self.data.example, self.batches)
        if epochs:
            self.experiment.retrain(small, epochs, 100 + self.seed, "retraining", self.data, lr=RATE)
        taken = time.process_time() - begun
        return [evaluate(small, self.data.test), taken]


def main() -> None:
    experiment = Fashion("benchmarks.accuracy.lenet", __doc__ or "", seeds=3)
    data = load_data("mnist")
    whole: list[float] = []
    rows: dict[tuple[int, int], list[list[float]]] = {widths: [[] for _ in EPOCHS] for widths in WIDTHS}
    for seed in experiment.seeds:
        cuts = Cuts(experiment, data, seed)
        whole += experiment.once(f"mnist, seed {seed}, whole", cuts.whole)
        for widths in WIDTHS:
            for place, epochs in enumerate(EPOCHS):
                key = f"mnist, seed {seed}, reconstruction, least squares, {widths}, {epochs} epochs"
                accuracy, seconds = experiment.once(key, partial(cuts.test, widths, epochs))
                print(f"{key}: {accuracy:.2f} %, {seconds:.1f} s", flush=True)
                rows[widths][place].append(accuracy)
    head = ["parameters", "widths of CONV2, FC1", *(f"{epochs} epochs" for epochs in EPOCHS)]
    cells = [[f"{compression(one):.1f}×", f"{one[0]}, {one[1]}", *map(spread, row)] for one, row in rows.items()]
    experiment.write(
        "LeNet, repaired and then retrained",
        f"""
LeNet on MNIST, cut once to fixed widths that `reconstruction` chose, repaired by least squares from the 5,000
calibration images, and retrained at a rate of {RATE:g}, or not. The whole network is at {spread(whole)}. Test accuracy,
%.

{table(head, cells)}""",
    )


if __name__ == "__main__":
    main()
