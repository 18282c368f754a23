"""One large cut against many small ones: the sizes of the iterative run, reached in one step."""

from functools import cached_property, partial

from torch import nn

import torchtrim
from benchmarks.paper.common import (
    BLUE,
    GREEN,
    ORANGE,
    TRIMMED,
    Experiment,
    at_compression,
    curve,
    picture,
    spread,
    table,
)
from torchtrim import LayerPlan, Plan, Round

SIZES = (3.8, 10, 25)
KINDS = {
    "iterative": "iterative",
    "untrained": "one shot, untrained",
    "one epoch": "one shot, 1 epoch",
    "equal epochs": "one shot, as many epochs as rounds",
}


def main() -> None:
    experiment = Experiment("benchmarks.paper.one_shot", __doc__)
    compression: list[list[float]] = [[] for _ in SIZES]
    rounds_taken: list[list[float]] = [[] for _ in SIZES]
    found: dict[str, list[list[float]]] = {name: [[] for _ in SIZES] for name in KINDS}
    with experiment.progress:
        for seed in experiment.seeds:
            ancestor, rounds = experiment.iterative(seed)
            plans = Plans(experiment, ancestor)
            for place, size in enumerate(SIZES):
                target = at_compression(rounds, size)
                compression[place].append(target.compression)
                rounds_taken[place].append(target.number)
                found["iterative"][place].append(target.test.retrained)
                for name, epochs in (("untrained", 0), ("one epoch", 1), ("equal epochs", target.number)):
                    key = f"seed {seed}, {size}×, {epochs} epochs"
                    accuracy = experiment.once(key, partial(plans.cut_and_train, target, epochs, seed, key))
                    found[name][place] += accuracy
    rows = [
        [spread(compression[place]), spread(rounds_taken[place], 1), *(spread(found[name][place]) for name in KINDS)]
        for place in range(len(SIZES))
    ]

    def draw(axes) -> None:
        for name, colour in (("iterative", BLUE), ("one epoch", ORANGE), ("equal epochs", GREEN)):
            curve(axes[0], compression, found[name], KINDS[name], colour)
        axes[0].set(ylabel="test accuracy, %")
        axes[0].legend(frameon=False)

    experiment.write(
        "One-shot against iterative trimming",
        f"""
The widths that the iterative run reached (one epoch of retraining a round), cut out of its ancestor in one step: the
neurons of the highest APoZ of CONV2 and FC1 go. Retrained for one epoch, and for as many epochs as the iterative run
had rounds, in one schedule, so that both have seen the same number of images. The paper finds that one large cut does
damage that retraining does not repair. Test accuracy, %.

{table(["compression", "rounds", *KINDS.values()], rows)}""",
        picture(1, draw),
    )


class Plans:
    """The ancestor, measured once, and cut to any widths."""

    def __init__(self, experiment: Experiment, ancestor: nn.Module) -> None:
        self.experiment, self.ancestor = experiment, ancestor

    @cached_property
    def measured(self) -> torchtrim.Profile:
        return self.experiment.profile(self.ancestor)

    def cut_and_train(self, target: Round, epochs: int, seed: int, label: str) -> list[float]:
        plan = to_widths(self.measured, {layer: target.widths[layer] for layer in TRIMMED})
        small = torchtrim.trim(self.ancestor, plan, self.experiment.data.example)
        if epochs:
            self.experiment.train(small, epochs, seed, label)
        return [self.experiment.test(small)]


def to_widths(measured: torchtrim.Profile, widths: dict[str, int]) -> Plan:
    """The plan that leaves this many neurons of each layer, those of lowest APoZ."""
    layers: dict[str, LayerPlan] = {}
    for name, left in widths.items():
        order = (-measured[name].apoz).argsort(kind="stable")
        layers[name] = LayerPlan(measured[name].width, tuple(sorted(order[: measured[name].width - left].tolist())))
    return Plan(layers, "apoz, to fixed widths")


if __name__ == "__main__":
    main()
