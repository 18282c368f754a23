"""How much of a model trimming can make smaller: its layers, weights and FLOPs within reach."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from torchtrim._copies import named_tensors
from torchtrim._flow import IS_OUTPUT
from torchtrim._labels import Ledger
from torchtrim._neurons import NeuronGraph
from torchtrim._proof import on_device
from torchtrim._run import run


@dataclass(frozen=True)
class Share:
    """`within`: what is within reach. `all`: of the whole model. `outputs`: of its output layers, which do not count
    as within reach though some of them, `inputs`, can lose what they read."""

    within: int
    all: int
    outputs: int
    inputs: int

    @property
    def part(self) -> float:
        return self.within / self.all if self.all else 0.0


@dataclass(frozen=True)
class Reach:
    """How much of a model trimming can make smaller.

    A weight is within reach if neurons can go along one of its axes; FLOPs are if they are those of such a weight.
    `parameters`: the weights of convolutions and matrix products, without biases and norms. `flops`: of one call;
    `weightless` of them multiply activations with each other, as attention does. `outputs`: the layers that are locked
    because they give the model's outputs.
    """

    layers: Share
    parameters: Share
    flops: Share
    weightless: int
    outputs: tuple[str, ...]


def reach(model: nn.Module, graph: NeuronGraph, example: Any) -> Reach:
    """How much of a traced model is within reach; the FLOPs are those of one call on the example."""
    outputs = [layer for layer in graph.layers.values() if layer.locked == IS_OUTPUT]
    reachable = _reachable(graph)
    flops = _flops_of_weights(model, graph, example)
    parameters = dict(model.named_parameters())
    products = {name for weights in flops for name in weights} & parameters.keys() | _weights(model)
    last = frozenset(layer.parameter for layer in outputs)
    trimmable = len(graph.layers) - len(graph.locked)
    return Reach(
        Share(trimmable, len(graph.layers), len(outputs), 0),
        _share({frozenset([name]): parameters[name].numel() for name in products}, reachable, last),
        _share(flops, reachable, last),
        flops.get(frozenset(), 0),
        tuple(layer.name for layer in outputs),
    )


def _reachable(graph: NeuronGraph) -> frozenset[str]:
    """The tensors that lose something along an axis when all goes that can."""
    free = np.zeros(len(graph.root), bool)
    for layer in graph.layers.values():
        free[layer.roots[layer.removable]] = True
    free[0] = False
    return frozenset(name for name, axes in graph.axes.items() if any(free[roots].any() for roots in axes))


def _share(amounts: Mapping[frozenset[str], int], reachable: frozenset[str], outputs: frozenset[str]) -> Share:
    within = sum(amount for names, amount in amounts.items() if names & reachable and not names & outputs)
    last = sum(amount for names, amount in amounts.items() if names & outputs)
    inputs = sum(amount for names, amount in amounts.items() if names & outputs and names & reachable)
    return Share(within, sum(amounts.values()), last, inputs)


def _weights(model: nn.Module) -> set[str]:
    """The weights of linear layers and convolutions, those that this mode or input does not reach among them."""
    known = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Linear, _ConvNd))}
    return {name for name, parameter in model.named_parameters() if id(parameter) in known}


def _flops_of_weights(model: nn.Module, graph: NeuronGraph, example: Any) -> dict[frozenset[str], int]:
    """The FLOPs of one call, by the weights that they multiply with."""
    moved = on_device(model, graph.device)
    with FlopCounterMode(display=False) as counter, _Attribution(moved, counter) as attributed:
        run(moved, example, {}, Ledger(), training=False, device=graph.device)
    return attributed.flops


class _Attribution(TorchDispatchMode):
    """Which weights the FLOPs belong to that a counter counts.

    By operand rather than by module: attention reads its `out_proj.weight` without calling `out_proj`. What is computed
    of weights alone, as by weight norm, belongs to them too.
    """

    def __init__(self, model: nn.Module, counter: FlopCounterMode) -> None:
        super().__init__()
        self.flops: dict[frozenset[str], int] = {}
        self._counter = counter
        self._tensors = named_tensors(model)
        self._names = {_memory(tensor): frozenset([name]) for name, tensor in self._tensors.items()}
        self._held: list[Tensor] = []  # memory that is freed is given to other tensors

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = self._counter.get_total_flops()
        result = func(*args, **kwargs)
        flops = self._counter.get_total_flops() - before
        operands = _leaves((args, kwargs))
        names = [self._names.get(_memory(tensor), frozenset[str]()) for tensor in operands]
        if flops:
            weights = frozenset(name for some in names for name in some if self._tensors[name].ndim > 1)
            self.flops[weights] = self.flops.get(weights, 0) + flops
        if operands and all(names):
            for tensor in _leaves(result):
                self._names.setdefault(_memory(tensor), frozenset[str]().union(*names))
                self._held.append(tensor)
        return result


def _leaves(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor) and leaf.layout == torch.strided]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
