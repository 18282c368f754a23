"""Surviving weights against training from scratch: the same trimmed architecture, at equal epochs."""

from functools import partial

from torch import nn

from benchmarks.paper.common import (
    ANCESTOR_EPOCHS,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    TRIMMED,
    Experiment,
    at_compression,
    curve,
    picture,
    spread,
    table,
)
from torchtrim import Round

SIZES = (3.8, 10, 25)
KINDS = {
    "surviving": "surviving weights, round by round",
    "last": "from scratch, 1 epoch",
    "retraining": "from scratch, all retraining's epochs",
    "total": "from scratch, ancestor's and all retraining's",
}


def main() -> None:
    experiment = Experiment("benchmarks.paper.from_scratch", __doc__)
    compression: list[list[float]] = [[] for _ in SIZES]
    accuracy: dict[str, list[list[float]]] = {name: [[] for _ in SIZES] for name in KINDS}
    zeros: dict[str, list[list[float]]] = {name: [[] for _ in SIZES] for name in KINDS}
    with experiment.progress:
        for seed in experiment.seeds:
            _, rounds = experiment.iterative(seed)
            for place, size in enumerate(SIZES):
                target = at_compression(rounds, size)
                compression[place].append(target.compression)
                accuracy["surviving"][place].append(target.test.retrained)
                zeros["surviving"][place].append(silence(experiment, target.model))
                for name, epochs in (
                    ("last", 1),
                    ("retraining", target.number),
                    ("total", ANCESTOR_EPOCHS + target.number),
                ):
                    key = f"seed {seed}, {size}×, {epochs} epochs"
                    tested, silent = experiment.once(key, partial(from_scratch, experiment, target, epochs, seed, key))
                    accuracy[name][place].append(tested)
                    zeros[name][place].append(silent)
    rows = [
        [f"{spread(compression[place])}×, {label}", spread(accuracy[name][place]), spread(zeros[name][place])]
        for place in range(len(SIZES))
        for name, label in KINDS.items()
    ]

    def draw(axes) -> None:
        for (name, label), colour in zip(KINDS.items(), (BLUE, GREY, ORANGE, GREEN), strict=True):
            curve(axes[0], compression, accuracy[name], label, colour)
            curve(axes[1], compression, zeros[name], label, colour)
        axes[0].set(ylabel="test accuracy, %")
        axes[1].set(ylabel="mean APoZ, %", ylim=(50, 105))
        axes[1].legend(frameon=False, loc="upper right")

    experiment.write(
        "Surviving weights against training from scratch",
        f"""
The architectures that the iterative run reached, trained from a new random start with the same training (AdamW,
one-cycle) for one epoch, for as many epochs as all retraining took, and for as many as the ancestor and all retraining
took together. Mean APoZ is over the neurons of CONV2 and FC1, on the calibration images. The paper finds that the
same architecture from scratch ends with more zero activations and lower accuracy.

{table(["network", "test accuracy, %", "mean APoZ, %"], rows)}""",
        picture(2, draw),
    )


def from_scratch(experiment: Experiment, target: Round, epochs: int, seed: int, label: str) -> list[float]:
    widths = (target.widths["conv1"], target.widths["conv2"], target.widths["fc1"])
    model = experiment.train(experiment.fresh(100 + seed, widths), epochs, 100 + seed, label)
    return [experiment.test(model), silence(experiment, model)]


def silence(experiment: Experiment, model: nn.Module) -> float:
    """The mean APoZ of the trimmed layers' neurons, in per cent."""
    measured = experiment.profile(model)
    apoz = [value for layer in TRIMMED for value in measured[layer].apoz]
    return 100 * sum(apoz) / len(apoz)


if __name__ == "__main__":
    main()
