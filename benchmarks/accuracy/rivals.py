"""Torch-Pruning, told of a model as its own examples do, pruning to a given number of FLOPs."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtrim._cost import flops_of

IMPORTANCES = ("magnitude L1", "magnitude L2", "Taylor", "LAMP", "BN scale")
_HALVINGS = 14  # of the interval of pruning ratios: finer than one channel


def gradients(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> nn.Module:
    """A copy of the model with the gradients of the loss over labelled batches, which Taylor's importance reads."""
    model = copy.deepcopy(model).eval()
    for images, labels in batches:
        (F.cross_entropy(model(images), labels) / len(batches)).backward()
    return model


def local(model: nn.Module, example: Tensor, importance: str, shares: Mapping[str, float], head: str) -> nn.Module:
    """Pruned to the given share of each layer; `model` has gradients and stays as it is."""
    model = _copy(model)
    ratios = {model.get_submodule(name): share for name, share in shares.items()}
    _pruner(model, example, importance, head, pruning_ratio=0.0, pruning_ratio_dict=ratios).step()
    return model


def everywhere(model: nn.Module, example: Tensor, importance: str, times: float, head: str) -> nn.Module:
    """Pruned by one threshold for all layers, which is found by halving the interval of pruning ratios."""
    whole = flops_of(model, example)
    low, high, best, error = 0.0, 1.0, model, float("inf")
    for _ in range(_HALVINGS):
        ratio = (low + high) / 2
        pruned = _copy(model)
        _pruner(pruned, example, importance, head, pruning_ratio=ratio, global_pruning=True).step()
        reached = whole / flops_of(pruned, example)
        if abs(reached / times - 1) < error:
            best, error = pruned, abs(reached / times - 1)
        low, high = (ratio, high) if reached < times else (low, ratio)
    return best


def _copy(model: nn.Module) -> nn.Module:
    """A copy with its gradients, which `deepcopy` leaves out."""
    result = copy.deepcopy(model)
    for new, old in zip(result.parameters(), model.parameters(), strict=True):
        new.grad = None if old.grad is None else old.grad.clone()
    return result


def _pruner(model: nn.Module, example: Tensor, importance: str, head: str, **options: Any) -> Any:
    import torch_pruning

    found = torch_pruning.importance
    score = {
        "magnitude L1": lambda: found.GroupMagnitudeImportance(p=1),
        "magnitude L2": lambda: found.GroupMagnitudeImportance(p=2),
        "Taylor": found.GroupTaylorImportance,
        "LAMP": lambda: found.LAMPImportance(p=2),
        "BN scale": found.BNScaleImportance,
    }[importance]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch_pruning.pruner.MetaPruner(
            model,
            example,
            importance=score,
            ignored_layers=[model.get_submodule(head)],
            num_heads={},  # its defaults are shared by all pruners
            in_channel_groups={},
            out_channel_groups={},
            **options,
        )


def measure_norms(model: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
    """A copy whose batch norms have the mean and variance of these batches, as training would measure them."""
    model = copy.deepcopy(model)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    with torch.no_grad():
        for images in batches:
            model(images)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()
