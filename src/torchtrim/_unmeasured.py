"""The profile of a model that has seen no data: its layers, what of them is locked, and the norms of their weights."""

import numpy as np
import torch
from torch import Tensor, nn

from torchtrim._copies import named_tensors
from torchtrim._neurons import NeuronGraph
from torchtrim._profile import Profile
from torchtrim.criteria import Floats, LayerProfile


def unmeasured(model: nn.Module, graph: NeuronGraph) -> Profile:
    """The profile of a model that has seen no data: its layers, groups, locks and norms of weights."""
    incoming, outgoing = _incoming(model, graph), _outgoing(model, graph)
    layers = {
        name: LayerProfile.unmeasured(
            name,
            incoming_l1=incoming[name][0],
            incoming_l2=incoming[name][1],
            outgoing_l1=outgoing[0][layer.roots],
            outgoing_l2=outgoing[1][layer.roots],
            unit=np.where(layer.removable, layer.roots, -1),
            group=layer.group,
            locked=layer.locked,
        )
        for name, layer in graph.layers.items()
    }
    roots = {name: layer.roots for name, layer in graph.layers.items()}
    return Profile(layers, 0, roots=roots, through_norms=graph.through_norms)


# ------------------------------------------------------------------ the weights into and out of neurons


def _incoming(model: nn.Module, graph: NeuronGraph) -> dict[str, tuple[Floats, Floats]]:
    """L1 and L2 norm of the weights that produce each neuron: float64 [neurons]."""
    weights = _weights(model)
    return {
        name: (_norms(weights[layer.parameter], layer.axis, 1), _norms(weights[layer.parameter], layer.axis, 2))
        for name, layer in graph.layers.items()
    }


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, without the connections that `torch.nn.utils.prune` has taken out."""
    buffers = dict(model.named_buffers())
    masks = {name: f"{name.removesuffix('_orig')}_mask" for name, _ in model.named_parameters()}
    return {
        name: parameter * buffers[masks[name]] if masks[name] in buffers else parameter
        for name, parameter in named_tensors(model).items()
        if isinstance(parameter, nn.Parameter)
    }


def _outgoing(model: nn.Module, graph: NeuronGraph) -> tuple[Floats, Floats]:
    """L1 and L2 norm of the weights that read each root: float64 [roots]."""
    first, second = np.zeros((2, len(graph.root)))
    producing = {(layer.parameter, layer.axis) for layer in graph.layers.values()}
    for name, parameter in _weights(model).items():
        for axis, roots in enumerate(graph.axes[name] if parameter.ndim > 1 else ()):
            if (name, axis) not in producing and roots.size > 1:
                np.add.at(first, roots, _norms(parameter, axis, 1))
                np.add.at(second, roots, _norms(parameter, axis, 2) ** 2)
    return first, np.sqrt(second)


def _norms(weight: Tensor, axis: int, order: int) -> Floats:
    """The norm of each slice along an axis: float64 [slices], summed in single precision at least."""
    others = [other for other in range(weight.ndim) if other != axis]
    values = weight.detach() if weight.dtype == torch.float64 else weight.detach().float()
    powers = values.abs() if order == 1 else values.square()
    sums = (powers.sum(others) if others else powers).double().cpu().numpy()
    return sums if order == 1 else np.sqrt(sums)
