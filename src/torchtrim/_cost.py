"""What a model costs: parameters, bytes, floating-point operations, and the time of one call."""

import random
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from torchtrim._copies import call_arguments, named_tensors, rebuild
from torchtrim.errors import TraceError


@dataclass(frozen=True)
class Cost:
    """The cost of a model, and of one call of it on an example.

    parameters: how many, each shared one once. flops: of one call; a multiplication with its addition counts as two.
    bytes: of parameters and buffers. latency: seconds of one call, the median of several.
    """

    parameters: int
    flops: int
    bytes: int
    latency: float


def measure(model: nn.Module, example: Any) -> Cost:
    """Parameters, FLOPs, bytes and latency of a model in evaluation mode, called with `example`.

    Of a shared machine only a ratio of latencies measured side by side says something: `measure_beside` gives both.
    Raises TraceError when the model cannot run on the example. The model is left as it was found.
    """
    return measure_beside([model], example)[0]


def measure_beside(models: Sequence[nn.Module], example: Any, seconds: float = 0.3) -> list[Cost]:
    """The costs of several models, whose calls are timed in turns, for about `seconds` each and five times at least."""
    flops = [flops_of(model, example) for model in models]
    return [
        Cost(
            parameters_of(model),
            operations,
            bytes_of(model),
            latency,
        )
        for model, operations, latency in zip(models, flops, latencies_beside(models, example, seconds), strict=True)
    ]


def parameters_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def bytes_of(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in named_tensors(model).values())


def flops_of(model: nn.Module, example: Any) -> int:
    """Of one call, counted on the meta device, which computes nothing, where the model's control flow allows it."""
    for device in ("meta", None):
        tensors = {
            name: tensor.detach().to("meta") if device else tensor.detach().clone()
            for name, tensor in named_tensors(model).items()
        }
        try:
            with FlopCounterMode(display=False) as counter:
                _called(rebuild(model, tensors).eval(), example, device)
            return counter.get_total_flops()
        except Exception as error:
            if device is None:
                first = str(error).partition("\n")[0]
                raise TraceError(
                    f"{type(model).__name__} cannot run on the example: {type(error).__name__}: {first}"
                ) from error
    raise AssertionError


def _called(model: nn.Module, example: Any, device: str | torch.device | None) -> None:
    args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().to(device), call_arguments(example))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model(*args, **kwargs)


def latencies_beside(models: Sequence[nn.Module], example: Any, seconds: float = 0.3) -> list[float]:
    """Seconds of one call of each, the median of its own; models and seconds as for `measure_beside`."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    device = next((tensor.device for model in models for tensor in named_tensors(model).values()), torch.device("cpu"))
    args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().to(device), call_arguments(example))
    times: list[list[float]] = [[] for _ in models]
    order = random.Random(0)
    guard = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad(), guard:
            for model in models:
                model.eval()
                model(*args, **kwargs)  # the first call allocates and chooses kernels
            begun = time.perf_counter()
            while len(times[0]) < 5 or time.perf_counter() - begun < seconds * len(models):
                # in another order each turn, since a model finds the caches as the one before left them
                for index in order.sample(range(len(models)), len(models)):
                    start = now(device)
                    models[index](*args, **kwargs)
                    times[index].append(now(device) - start)
    finally:
        for module, mode in modes:
            module.training = mode
    return [statistics.median(found) for found in times]


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
