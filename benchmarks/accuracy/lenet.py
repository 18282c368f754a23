"""How accurate a LeNet is that is cut to a tenth, a 25th and a 50th at once, repaired, and retrained for a while."""

import copy
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product

from torch import nn

import torchtrim
from benchmarks.accuracy.common import Fashion
from benchmarks.accuracy.grid import RATE, Cuts, Widths, compression
from benchmarks.paper.common import spread, table
from torchtrim import Budget
from torchtrim._data import Data, load_data
from torchtrim._training import evaluate

FIXED: tuple[Widths, ...] = (15, 139), (10, 70), (7, 37)  # of CONV2 and FC1; CONV1 stays
TIMES = (10, 25, 50)  # fewer parameters, by a budget over all layers
EPOCHS = 5
DISTILL = 0.5


@dataclass
class Study:
    """The trained LeNet of a seed, and what is cut out of it."""

    experiment: Fashion
    data: Data
    seed: int

    @cached_property
    def cuts(self) -> Cuts:
        return Cuts(self.experiment, "MNIST", self.data, self.seed)

    @cached_property
    def criterion(self) -> torchtrim.criteria.Criterion:
        return torchtrim.reconstruction(self.cuts.ancestor, self.data.example, self.cuts.batches)

    def small(self, size: Widths | int) -> nn.Module:
        if not isinstance(size, int):
            return copy.deepcopy(self.cuts.repaired("reconstruction", "least squares", size)[0])
        cuts, example = self.cuts, self.data.example
        plan = Budget(parameters=1 / size).plan(cuts.ancestor, example, cuts.profile, criterion=self.criterion)
        trimmed = torchtrim.trim(cuts.ancestor, plan, example)
        return torchtrim.repair(trimmed, cuts.ancestor, example, cuts.batches)

    def test(self, size: Widths | int, epochs: float, distill: float) -> list[float]:
        """Test accuracy, and the widths of all layers but the last."""
        small = self.small(size)
        widths = [float(len(small.get_submodule(name).weight)) for name in ("conv1", "conv2", "fc1")]  # pyright: ignore
        if epochs:
            teacher = self.cuts.ancestor if distill else None
            self.experiment.retrain(
                small, epochs, 100 + self.seed, "retraining", self.data, teacher, lr=RATE, distill=distill
            )
        return [evaluate(small, self.data.test), *widths]


Rows = dict[Widths | int, list[list[float]]]  # accuracies, by size, column and seed


def main() -> None:
    experiment = Fashion("benchmarks.accuracy.lenet", __doc__ or "", seeds=3)
    data = load_data("mnist")
    columns = (0, 0.0), (EPOCHS, 0.0), (EPOCHS, DISTILL)
    whole: list[float] = []
    rows: Rows = {size: [[] for _ in columns] for size in (*FIXED, *TIMES)}
    widths: dict[Widths | int, list[str]] = {size: [] for size in rows}
    for seed in experiment.seeds:
        study = Study(experiment, data, seed)
        whole += experiment.once(f"seed {seed}, whole", study.cuts.whole)
        for size, (place, (epochs, distill)) in product(rows, enumerate(columns)):
            if distill and not isinstance(size, int):
                continue
            key = f"seed {seed}, {size}, {epochs} epochs, distill {distill:g}"
            accuracy, *found = experiment.once(key, partial(study.test, size, epochs, distill))
            print(f"{key}: {accuracy:.2f} %", flush=True)
            rows[size][place].append(accuracy)
            if not place:
                widths[size].append("-".join(f"{width:.0f}" for width in found))
        write(experiment, whole, rows, widths)


def write(experiment: Fashion, whole: list[float], rows: Rows, widths: dict[Widths | int, list[str]]) -> None:
    head = ["parameters", "CONV1-CONV2-FC1", "0 epochs", f"{EPOCHS} epochs", f"{EPOCHS} epochs, distilled"]
    cells = [
        [
            f"{size}×, budget" if isinstance(size, int) else f"{compression(size):.1f}×, fixed",
            ", ".join(dict.fromkeys(widths[size])),
            *(spread(values) if values else "–" for values in row),
        ]
        for size, row in rows.items()
    ]
    experiment.write(
        "LeNet, repaired and then retrained",
        f"""
LeNet on MNIST, cut once to fixed widths or by `Budget(parameters=...)` over all its layers. `reconstruction` chose, and
least squares repaired, from the 5,000 calibration images. Retrained at a rate of {RATE:g}, or not; *distilled*: half of
the loss is the distance to the whole network's outputs. The whole network is at {spread(whole)}. Test accuracy, %.

{table(head, cells)}""",
        seeds=range(len(whole)),
    )


if __name__ == "__main__":
    main()
