"""A small vision transformer without some of its hidden units, and without some of its heads of attention."""

import warnings
from functools import cached_property, partial
from itertools import product

import torch
from torch import Tensor, nn

import torchtrim
from benchmarks.accuracy.common import Fashion
from benchmarks.accuracy.widths import flops
from benchmarks.paper.common import spread, table
from torchtrim import Fraction, TorchtrimWarning
from torchtrim._neurons import NeuronGraph
from torchtrim.criteria import Criterion

PARTS = {"units": "blocks.*.mlp.fc1", "heads": "blocks.*.attn.qkv"}
CRITERIA = {
    "units": ("reconstruction", "contribution", "apoz", "l1_norm", "random:0"),
    "heads": ("reconstruction", "l1_norm", "random:0"),  # a head has no activation that APoZ could count
}
SHARES = (0.5, 0.75)
WAYS = {"none": None, "least squares": "least-squares"}
IMAGES = 1000
NEAR_ZERO = 0.01  # GELU is never zero
RETRAINED = (("reconstruction", "least squares"), ("reconstruction", "none"), ("l1_norm", "none"))
RETRAINING = 0.5  # epochs
RATE = 1e-3


class Study:
    """The trained transformer of a seed, and what is cut out of it."""

    def __init__(self, experiment: Fashion, seed: int) -> None:
        self.experiment, self.seed = experiment, seed
        self.example = experiment.data.example[:1]
        self._reconstruction: Criterion | None = None

    @cached_property
    def model(self) -> nn.Module:
        return self.experiment.trained("transformer", transformer, self.seed, lr=RATE)

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

    def cut(self, part: str, share: float, criterion: str, way: str) -> nn.Module:
        score: Criterion | str = criterion
        if criterion == "reconstruction":
            if self._reconstruction is None:
                self._reconstruction = torchtrim.reconstruction(self.model, self.graph, self.images)
            score = self._reconstruction
        plan = torchtrim.select(self.profile, rule=Fraction(share), criterion=score, layers=[PARTS[part]])
        small = torchtrim.trim(self.model, plan, self.graph)
        how = WAYS[way]
        return small if how is None else torchtrim.repair(small, self.model, self.graph, self.images, how)

    def test(self, part: str, share: float, criterion: str, way: str, epochs: float) -> list[float]:
        """FLOPs, as so many times fewer, and test accuracy."""
        small = self.cut(part, share, criterion, way)
        if epochs:
            self.experiment.retrain(small, epochs, 100 + self.seed, "retraining", lr=RATE)
        return [flops(self.model, self.example) / flops(small, self.example), self.experiment.test(small)]


def transformer() -> nn.Module:
    """Sixteen patches of 7 × 7 pixels, four blocks of 64 features, four heads and 128 hidden units each."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=28, patch_size=7, in_chans=1, num_classes=10, embed_dim=64, depth=4, num_heads=4, mlp_ratio=2
    )


def main() -> None:
    experiment = Fashion("benchmarks.accuracy.transformer", __doc__ or "")
    warnings.simplefilter("ignore", TorchtrimWarning)
    torch.set_num_threads(1)
    whole: list[float] = []
    cells: dict[tuple[str, str, str, float], list[list[float]]] = {}
    fewer: dict[tuple[str, float], float] = {}
    for seed in experiment.seeds:
        study = Study(experiment, seed)
        whole += experiment.once(f"seed {seed}, whole", study.whole)
        for epochs, part in product((0, RETRAINING), PARTS):
            for criterion, way in product(CRITERIA[part], WAYS):
                if epochs and (criterion, way) not in RETRAINED:
                    continue
                row = cells.setdefault((part, criterion, way, epochs), [[] for _ in SHARES])
                for place, share in enumerate(SHARES):
                    key = f"seed {seed}, {part}, {share:g}, {criterion}, {way}, {epochs:g} epochs"
                    work = partial(study.test, part, share, criterion, way, epochs)
                    fewer[part, share], accuracy = experiment.once(key, work)
                    print(f"{key}: {accuracy:.2f} %", flush=True)
                    row[place].append(accuracy)
    text = f"""
A vision transformer for Fashion-MNIST (16 patches, four blocks of 64 features, four heads and 128 hidden units, trained
for {experiment.epochs} epochs) without a half and without three quarters of its hidden units, or of its heads. What its
norms average over stays. Chosen and repaired with {IMAGES:,} calibration images, and retrained for {RETRAINING:g}
epochs, or not. APoZ counts what is within {NEAR_ZERO:.0%} of zero. Test accuracy, %; the whole network is at
{spread(whole)}.
"""
    for part in PARTS:
        head = ["chosen by", "repair", "epochs"]
        head += [f"{share:.0%} gone, {fewer[part, share]:.2f}× fewer FLOPs" for share in SHARES]
        rows = [[*key[1:], *map(spread, row)] for key, row in cells.items() if key[0] == part]
        text += f"\n## Without {part}\n\n" + table(head, rows)
    experiment.write("A vision transformer", text)


if __name__ == "__main__":
    main()
