"""Trimming every layer at once against a few layers first, in one step."""

import torchtrim
from benchmarks.paper.common import TRIMMED, Experiment, spread, table
from torchtrim import Fraction, MeanPlusStd

ALL = ("conv1", *TRIMMED)
RULES = (MeanPlusStd(1), Fraction(0.5), Fraction(0.75))


def main() -> None:
    experiment = Experiment("benchmarks.paper.all_at_once", __doc__)
    found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    with experiment.progress:
        for seed in experiment.seeds:
            ancestor, _ = experiment.iterative(seed)
            measured = experiment.profile(ancestor)
            before = sum(parameter.numel() for parameter in ancestor.parameters())
            for rule in RULES:
                for layers in (TRIMMED, ALL):
                    plan = torchtrim.select(measured, rule=rule, layers=layers)
                    small = torchtrim.trim(ancestor, plan, experiment.data.example)
                    compression = before / sum(parameter.numel() for parameter in small.parameters())
                    trimmed = experiment.test(small)
                    experiment.train(small, 1, seed, f"seed {seed}: {rule}, {len(layers)} layers")
                    entry = compression, trimmed, experiment.test(small)
                    found.setdefault((str(rule), ", ".join(layers)), []).append(entry)
    rows = [
        [f"{rule}: {layers}", *(spread(values) for values in zip(*entries, strict=True))]
        for (rule, layers), entries in found.items()
    ]
    head = ["rule: layers", "compression", "before retraining, %", "after 1 epoch, %"]
    experiment.write(
        "All layers at once against a few layers first",
        f"""
One step from the same ancestor: the layers of the paper's run, or all hidden layers; then one epoch of retraining. The
paper's case is VGG-16, whose CONV4, CONV5, FC6 and FC7 in one step leave 46.65 % top-5 before retraining, CONV5-3 and
FC6 alone 85.90 % (from 88.44 %). Test accuracy.

{table(head, rows)}""",
    )


if __name__ == "__main__":
    main()
