"""Check that trimming a model is exact, before you trust it with yours, or with an operator that you registered."""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchtrim._copies import call_arguments
from torchtrim._graph import trace
from torchtrim._neurons import NeuronGraph
from torchtrim._plan import LayerPlan, Plan
from torchtrim._surgery import mask, trim
from torchtrim._without_norms import WithoutNorms
from torchtrim.errors import TorchtrimError

__all__ = ["WithoutNorms", "assert_exact", "random_plan"]


def random_plan(graph: NeuronGraph, seed: int = 0, fraction: float = 0.3) -> Plan:
    """A plan that removes a fraction of every group's free neurons at random positions, at least one of each.

    Every layer keeps one. Where a group has a single neuron, it stays.
    """
    random = np.random.default_rng(seed)
    decided, gone = np.zeros((2, len(graph.root)), bool)
    for layer in graph.layers.values():
        units = np.unique(layer.roots[layer.removable])
        units = units[~decided[units]]
        if len(units) > 1:
            gone[random.choice(units, max(1, int(len(units) * fraction)), replace=False)] = True
        decided[units] = True
    for layer in graph.layers.values():
        if gone[layer.roots].all():
            gone[layer.roots[0]] = False
    for mixture in graph.mixtures:
        gone[mixture.lacking(~gone)] = False
    positions = {name: np.flatnonzero(gone[layer.roots]) for name, layer in graph.layers.items()}
    layers = {n: LayerPlan(graph.layers[n].width, tuple(p.tolist())) for n, p in positions.items() if p.size}
    return Plan(layers, through_norms=graph.through_norms, experts=graph.experts)


def assert_exact(
    model: nn.Module,
    example: Any,
    *others: Any,
    fraction: float = 0.3,
    seeds: Sequence[int] = (0,),
    rtol: float = 1e-6,
    through_norms: bool = False,
    experts: bool = False,
) -> Plan:
    """Trim a model at random and compare with the same model masked, in double precision; returns the last plan.

    The model is copied, in evaluation mode, and its floating-point inputs are converted. example: as for `trace`;
    others: further inputs to compare on, such as another batch size. fraction: how much of every group goes.
    through_norms: as for `trace`; both are then compared without norms, see `WithoutNorms`. experts: as for `trace`.

    Raises AssertionError with the largest difference, relative to the largest output; TorchtrimError when nothing can
    be trimmed.
    """
    double = copy.deepcopy(model).double().eval()
    inputs = [pytree.tree_map(_double, one) for one in (example, *others)]
    graph = trace(double, inputs[0], through_norms=through_norms, experts=experts)
    plan = Plan({})
    for seed in seeds:
        plan = random_plan(graph, seed, fraction)
        if not plan.layers:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in graph.locked.items())
            raise TorchtrimError(f"expected a model with layers that can be trimmed, found none: {reasons}")
        trimmed, silent = trim(double, plan, inputs[0]), mask(double, plan, inputs[0])
        for one in inputs:
            args, kwargs = call_arguments(one)
            with torch.no_grad(), WithoutNorms() if through_norms else nullcontext():
                found, expected = _tensors(trimmed(*args, **kwargs)), _tensors(silent(*args, **kwargs))
            assert len(found) == len(expected), f"{len(found)} outputs after trimming, {len(expected)} before"
            for index, (new, old) in enumerate(zip(found, expected, strict=True)):
                assert new.shape == old.shape, f"output {index}: shape {tuple(new.shape)}, not {tuple(old.shape)}"
                difference = float((new.double() - old.double()).abs().max()) if old.numel() else 0.0
                scale = float(old.double().abs().max()) if old.numel() else 1.0
                assert difference <= rtol * max(scale, 1e-30), (
                    f"output {index} differs by {difference:.2g}, of at most {scale:.2g}, after trimming "
                    f"{', '.join(plan.removed)} (seed {seed})"
                )
    return plan


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
