"""Widths that meet a number of FLOPs: every group of layers loses the same share, as nearly as whole units allow."""

from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

import torchtrim
from torchtrim import Fraction, LayerPlan, Plan
from torchtrim._cost import flops_of
from torchtrim._neurons import NeuronGraph
from torchtrim._select import scored_groups
from torchtrim.criteria import Criterion


def nearest_size(sizes: Callable[[int], float], steps: int, target: float) -> int:
    """The number of steps, from 0 to `steps`, whose size is nearest to a target; sizes fall with steps."""
    below = bisect_left(range(steps), True, key=lambda step: sizes(step) <= target)
    return min((step for step in (below - 1, below) if step >= 0), key=lambda step: abs(sizes(step) - target))


def uniform(profile: Mapping[str, Any], units: Mapping[str, int], removed: int) -> dict[str, int]:
    """How many units each group loses, of `removed` in all, taken so that their shares rise together."""
    ladder = sorted((lost / width, group) for group, width in units.items() for lost in range(1, width))
    counts = dict.fromkeys(units, 0)
    for _, group in ladder[:removed]:
        counts[group] += 1
    return counts


class Uniform:
    """Plans with one share for all groups of a model, for given FLOPs."""

    def __init__(self, model: nn.Module, example: torch.Tensor, profile: torchtrim.Profile, graph: NeuronGraph) -> None:
        self.model, self.example, self.profile, self.graph = model, example, profile, graph
        groups = scored_groups(profile, None, "l1_norm")
        self.units = {group: scores.size for group, (scores, _) in groups.items()}
        self.whole = flops_of(model, example)
        self._counts: dict[float, dict[str, int]] = {}

    def counts(self, times: float) -> dict[str, int]:
        """Units that each group loses for so many times fewer FLOPs, whichever they are."""
        if times in self._counts:
            return self._counts[times]
        steps = sum(self.units.values()) - len(self.units)

        def size(step: int) -> float:
            plan = self._plan(uniform(self.profile, self.units, step), "l1_norm")
            return flops_of(torchtrim.trim(self.model, plan, self.graph), self.example)

        found = self._counts[times] = uniform(self.profile, self.units, nearest_size(size, steps, self.whole / times))
        return found

    def plan(self, times: float, criterion: Criterion | str) -> Plan:
        return self._plan(self.counts(times), criterion)

    def shares(self, times: float) -> dict[str, float]:
        """By layer, the share that goes; half a unit less, so that rounding up gives the count."""
        counts = self.counts(times)
        return {
            name: max(counts[layer.group] - 0.5, 0) / self.units[layer.group]
            for name, layer in self.graph.layers.items()
            if layer.group in counts
        }

    def _plan(self, counts: Mapping[str, int], criterion: Criterion | str) -> Plan:
        layers: dict[str, LayerPlan] = {}
        for group, count in counts.items():
            rule = Fraction(count / self.units[group])
            layers |= torchtrim.select(self.profile, rule=rule, criterion=criterion, layers=[group]).layers
        return Plan(layers, f"{criterion}, uniform")
