"""How little data settles which neurons go: plans of `until=Stable(...)` beside those of the whole pass."""

import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

import torchtrim
from benchmarks.paper.common import Experiment, spread, table
from torchtrim import Stable, select
from torchtrim._lenet import LeNet

RULE = "mean+1std"
SHUFFLES = 20
BATCH = 100
# By the share of neurons in doubt at which the pass may end, in how many orders.
IN_DOUBT = {
    "LeNet": {0.05: SHUFFLES, 0.02: SHUFFLES, 0.01: SHUFFLES},
    "ResNet-18": {0.2: SHUFFLES, 0.1: SHUFFLES, 0.05: 3},
}
EPOCHS = {"LeNet": 2, "ResNet-18": 1}


def main() -> None:
    experiment = Experiment("benchmarks.certainty", __doc__, seeds=SHUFFLES)
    images = torch.stack([experiment.data.train[index][0] for index in range(len(experiment.data.train))])
    parts = []
    with experiment.progress:
        for name, build in (("LeNet", LeNet), ("ResNet-18", small_resnet)):
            network = Network(experiment, name, build(), images)
            rows = [network.row(level, orders) for level, orders in IN_DOUBT[name].items()]
            head = [
                "in doubt at most",
                "orders",
                "images used",
                "of all",
                "same neurons",
                "lowest",
                "settled, but wrong",
            ]
            parts.append(f"## {name}: {network.units:,} neurons, {len(images):,} images\n\n{table(head, rows)}")
    experiment.write("How little data settles a plan", "\n".join([TEXT, *parts]))


TEXT = f"""Networks trained on MNIST's training images are measured over all of them, and, in several random orders, in
batches of {BATCH} until `Stable("{RULE}", confidence=0.99, in_doubt=...)` ends the pass. Same neurons: those that
both plans remove, of those that either removes; the mean and the lowest of the orders. Settled, but wrong: neurons
that `Stable` took for settled and that the whole pass decides otherwise, in all orders together.
"""


class Network:
    """A trained network, its whole pass, and what shorter ones come to."""

    def __init__(self, experiment: Experiment, name: str, model: nn.Module, images: Tensor) -> None:
        self.experiment, self.name, self.model, self.images = experiment, name, model, images
        place = experiment.runs / "certainty" / f"{name}.pt"
        if place.exists():
            model.load_state_dict(torch.load(place))
        else:
            experiment.train(model, EPOCHS[name], 0, name)
            place.parent.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), place)
        whole = torchtrim.profile(model, images.split(BATCH))
        self.target = self.removed(whole)
        self.units = sum(layer.width for layer in select(whole, rule=RULE).layers.values())

    def removed(self, profile: torchtrim.Profile) -> set[tuple[str, int]]:
        layers = select(profile, rule=RULE).layers
        return {(name, neuron) for name, layer in layers.items() for neuron in layer.removed}

    def row(self, level: float, orders: int) -> list[Any]:
        found = [
            self.experiment.once(f"{self.name}, {level}, order {seed}", partial(self.measure, level, seed))
            for seed in self.experiment.seeds[:orders]
        ]
        used, same, wrong = zip(*found, strict=True)
        return [
            f"{100 * level:g} %",
            len(found),
            spread(used, 0),
            f"{100 * statistics.mean(used) / len(self.images):.1f} %",
            f"{100 * statistics.mean(same):.2f} %",
            f"{100 * min(same):.2f} %",
            sum(map(int, wrong)),
        ]

    def measure(self, level: float, seed: int) -> list[float]:
        """Images used, the share of removed neurons that are the same, and how many settled ones are wrong."""
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(seed))
        batches = (self.images[some] for some in order.split(BATCH))
        found = torchtrim.profile(self.model, batches, until=Stable(RULE, in_doubt=level))
        removed = self.removed(found)
        doubtful = {(name, neuron) for name, neurons in (found.in_doubt or {}).items() for neuron in neurons}
        same = len(removed & self.target) / len(removed | self.target)
        return [found.examples, same, len((removed ^ self.target) - doubtful)]


def small_resnet() -> nn.Module:
    """ResNet-18 for images of one colour."""
    torch.manual_seed(0)
    model = resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(1, 64, 3, stride=2, padding=1, bias=False)
    return model


if __name__ == "__main__":
    main()
