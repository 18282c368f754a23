"""A small vision transformer without some of its hidden units, and without some of its heads of attention."""

import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from itertools import product

from torch import Tensor, nn

import torchtrim
from benchmarks.accuracy.common import Fashion
from benchmarks.paper.common import spread, table
from torchtrim import Budget, Fraction, Plan, TorchtrimWarning
from torchtrim._cost import flops_of
from torchtrim._neurons import NeuronGraph
from torchtrim.criteria import Criterion

UNITS, HEADS = "blocks.*.mlp.fc1", "blocks.*.attn.qkv"
PARTS = {"units": [UNITS], "heads": [HEADS], "both": [UNITS, HEADS]}
FEW = ("reconstruction", "l1_norm", "random:0")  # a head has no activation that APoZ could count
BUDGET = "reconstruction, budget"
CRITERIA = {
    "units": ("reconstruction", "contribution", "apoz", "l1_norm", "random:0"),
    "heads": FEW,
    "both": (BUDGET, *FEW),
}
SHARES = (0.5, 0.75)
WAYS = {"none": None, "least squares": "least-squares"}
IMAGES = 1000
NEAR_ZERO = 0.01  # GELU is never zero
EPOCHS = (0, 0.5)
RETRAINED = {"both": (BUDGET, "reconstruction", "l1_norm")}  # the other parts are not
RATE = 1e-3  # in single precision: bfloat16 takes five times as long here on a CPU that computes in it


class Study:
    """The trained transformer of a seed, and what is cut out of it."""

    def __init__(self, experiment: Fashion, seed: int) -> None:
        self.experiment, self.seed = experiment, seed
        self.example = experiment.data.example[:1]

    @cached_property
    def model(self) -> nn.Module:
        return self.experiment.trained("transformer", transformer, self.seed, lr=RATE, mixed_precision="no")

    def whole(self) -> list[float]:
        return [self.experiment.test(self.model)]

    @cached_property
    def images(self) -> list[Tensor]:
        return self.experiment.calibration[: IMAGES // 250]

    @cached_property
    def graph(self) -> NeuronGraph:
        return torchtrim.trace(self.model, self.example)

    @cached_property
    def profile(self) -> torchtrim.Profile:
        return torchtrim.profile(self.model, self.images, zero_tolerance=NEAR_ZERO)

    @cached_property
    def reconstruction(self) -> Criterion:
        return torchtrim.reconstruction(self.model, self.graph, self.images)

    def plan(self, part: str, share: float, criterion: str) -> Plan:
        if criterion == BUDGET:  # as many FLOPs as with one share for all
            even = flops_of(
                torchtrim.trim(self.model, self.plan(part, share, "reconstruction"), self.graph), self.example
            )
            budget = Budget(flops=even)
            return budget.plan(self.model, self.graph, self.profile, criterion=self.reconstruction, layers=PARTS[part])
        score = self.reconstruction if criterion == "reconstruction" else criterion
        return torchtrim.select(self.profile, rule=Fraction(share), criterion=score, layers=PARTS[part])

    def cut(self, part: str, share: float, criterion: str, way: str) -> nn.Module:
        small = torchtrim.trim(self.model, self.plan(part, share, criterion), self.graph)
        how = WAYS[way]
        return small if how is None else torchtrim.repair(small, self.model, self.graph, self.images, how)

    def test(self, part: str, share: float, criterion: str, way: str, epochs: float) -> list[float]:
        """FLOPs, as so many times fewer, and test accuracy."""
        small = self.cut(part, share, criterion, way)
        if epochs:
            self.experiment.retrain(small, epochs, 100 + self.seed, "retraining", lr=RATE, mixed_precision="no")
        return [flops_of(self.model, self.example) / flops_of(small, self.example), self.experiment.test(small)]


def transformer() -> nn.Module:
    """Sixteen patches of 7 × 7 pixels, four blocks of 64 features, four heads and 128 hidden units each."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=28, patch_size=7, in_chans=1, num_classes=10, embed_dim=64, depth=4, num_heads=4, mlp_ratio=2
    )


Cells = dict[tuple[str, str, str, float, float], list[float]]  # by part, criterion, way, share and epochs


def main() -> None:
    experiment = Fashion("benchmarks.accuracy.transformer", __doc__ or "", seeds=3)
    warnings.simplefilter("ignore", TorchtrimWarning)
    whole: list[float] = []
    cells: Cells = {}
    fewer: dict[tuple[str, float], float] = {}
    for seed in experiment.seeds:
        study = Study(experiment, seed)
        whole += experiment.once(f"seed {seed}, whole", study.whole)
        for epochs, part in product(EPOCHS, PARTS):
            criteria = RETRAINED.get(part, ()) if epochs else CRITERIA[part]
            for criterion, way, share in product(criteria, WAYS, SHARES):
                key = f"seed {seed}, {part}, {share:g}, {criterion}, {way}, {epochs:g} epochs"
                work = partial(study.test, part, share, criterion, way, epochs)
                fewer[part, share], accuracy = experiment.once(key, work)
                print(f"{key}: {accuracy:.2f} %", flush=True)
                cells.setdefault((part, criterion, way, share, epochs), []).append(accuracy)
        write(experiment, range(seed + 1), whole, cells, fewer)


def write(
    experiment: Fashion,
    seeds: Sequence[int],
    whole: Sequence[float],
    cells: Cells,
    fewer: Mapping[tuple[str, float], float],
) -> None:
    text = f"""
A vision transformer for Fashion-MNIST (16 patches, four blocks of 64 features, four heads and 128 hidden units, trained
for {experiment.epochs} epochs) without a half and without three quarters of its hidden units, of its heads, or of both;
what its norms average over stays. Of every layer the same share goes, or, by a *budget* over all of them, as many
FLOPs. Chosen and repaired with {IMAGES:,} calibration images, and, some where both go, retrained alike for
{EPOCHS[1]:g} epochs. APoZ counts what is within {NEAR_ZERO:.0%} of zero. Test accuracy, %; the whole network is at
{spread(whole)}.
"""
    for part, criteria in CRITERIA.items():
        columns = [*product(SHARES, EPOCHS if part in RETRAINED else EPOCHS[:1])]
        heads = [f"{fewer[part, share]:.2f}× fewer FLOPs" + ", retrained" * (epochs > 0) for share, epochs in columns]
        rows = [
            [criterion, way, *(_cell(cells.get((part, criterion, way, *column))) for column in columns)]
            for criterion, way in product(criteria, WAYS)
        ]
        title = "units and heads" if part == "both" else part
        text += f"\n## Without {title}\n\n" + table(["chosen by", "repair", *heads], rows)
    experiment.write("A vision transformer", text, seeds=seeds)


def _cell(values: Sequence[float] | None) -> str:
    return spread(values) if values else "–"


if __name__ == "__main__":
    main()
