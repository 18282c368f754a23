"""Trimming every layer at once against a few layers first, in one step."""

import statistics
from collections.abc import Sequence
from functools import partial

from torch import nn

import torchtrim
from benchmarks.paper.common import BLUE, ORANGE, TRIMMED, Experiment, picture, spread, table
from torchtrim import Fraction, MeanPlusStd

ALL = ("conv1", *TRIMMED)
RULES = (MeanPlusStd(1), Fraction(0.5), Fraction(0.75))


def main() -> None:
    experiment = Experiment("benchmarks.paper.all_at_once", __doc__)
    cases = [(rule, layers) for rule in RULES for layers in (TRIMMED, ALL)]
    found: list[list[list[float]]] = [[] for _ in cases]  # by case and seed: compression, before, after
    with experiment.progress:
        for seed in experiment.seeds:
            ancestor, _ = experiment.iterative(seed)
            for place, (rule, layers) in enumerate(cases):
                key = f"seed {seed}, {rule}, {len(layers)} layers"
                found[place].append(
                    experiment.once(key, partial(one_step, experiment, ancestor, rule, layers, seed, key))
                )
    columns = [[list(values) for values in zip(*entries, strict=True)] for entries in found]
    rows = [
        [f"{rule}: {', '.join(layers)}", *map(spread, column)]
        for (rule, layers), column in zip(cases, columns, strict=True)
    ]

    def draw(axes) -> None:
        for axis, which, title in ((axes[0], 1, "before retraining"), (axes[1], 2, "after one epoch")):
            for layers, colour, marker in ((TRIMMED, BLUE, "o"), (ALL, ORANGE, "s")):
                chosen = [column for (_, some), column in zip(cases, columns, strict=True) if some == layers]
                sizes = [statistics.mean(column[0]) for column in chosen]
                means = [statistics.mean(column[which]) for column in chosen]
                spreads = [statistics.stdev(column[which]) if len(column[which]) > 1 else 0 for column in chosen]
                label = "conv2, fc1" if layers == TRIMMED else "all hidden layers"
                axis.errorbar(sizes, means, spreads, fmt=f"{marker}-", c=colour, ms=5, capsize=3, label=label)
            axis.set(xscale="log", xlabel="compression (parameters)", ylabel="test accuracy, %", title=title)
            axis.set_xticks([1.5, 4, 12], ["1.5", "4", "12"])
            axis.set_xticks([], minor=True)
        axes[0].legend(frameon=False)

    experiment.write(
        "All layers at once against a few layers first",
        f"""
One step from the same ancestor: the layers of the paper's run, or all hidden layers; then one epoch of retraining. The
paper's case is VGG-16, whose CONV4, CONV5, FC6 and FC7 in one step leave 46.65 % top-5 before retraining, CONV5-3 and
FC6 alone 85.90 % (from 88.44 %). Test accuracy.

{table(["rule: layers", "compression", "before retraining, %", "after 1 epoch, %"], rows)}""",
        picture(2, draw),
    )


def one_step(
    experiment: Experiment,
    ancestor: nn.Module,
    rule: MeanPlusStd | Fraction,
    layers: Sequence[str],
    seed: int,
    label: str,
) -> list[float]:
    plan = torchtrim.select(experiment.profile(ancestor), rule=rule, layers=layers)
    small = torchtrim.trim(ancestor, plan, experiment.data.example)
    compression = parameters(ancestor) / parameters(small)
    trimmed = experiment.test(small)
    experiment.train(small, 1, seed, label)
    return [compression, trimmed, experiment.test(small)]


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()
