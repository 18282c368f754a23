"""What training changes around a model, and how that is put back."""

import copy
import itertools
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def put_back(model: nn.Module, *, channels_last: bool) -> Generator[None]:
    """At the end, all but the trained weights is as before: modes, gradients, device, layout, methods."""
    patched = ("forward", "_original_forward", "_is_accelerate_prepared")  # what Accelerate sets on a model
    own = {name: model.__dict__[name] for name in patched if name in model.__dict__}
    model.__dict__.pop("_is_accelerate_prepared", None)
    found = [(parameter, parameter.grad, parameter.is_contiguous()) for parameter in model.parameters()]
    device = found[0][0].device
    for parameter, _, _ in found:
        if channels_last and parameter.ndim == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
    try:
        with modes_kept(model):
            yield
    finally:
        for name in patched:
            model.__dict__.pop(name, None)
        model.__dict__.update(own)
        model.to(device)  # processes that were launched together train on devices of their own
        for parameter, gradient, contiguous in found:
            if channels_last and contiguous and parameter.ndim == 4:
                parameter.data = parameter.data.to(memory_format=torch.contiguous_format)
            parameter.grad = gradient


@contextmanager
def modes_kept(model: nn.Module) -> Generator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def random_state(seed: int, device: torch.device) -> Generator[None]:
    """Draw from `seed` inside, as dropout and augmentation do; the global state is as before at the end."""
    gpus = gpus_of(device)
    with torch.random.fork_rng(gpus):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would reach every GPU
        for gpu in gpus:
            torch.cuda.set_rng_state(torch.Generator(gpu).manual_seed(seed).get_state(), gpu)
        yield


def gpus_of(device: torch.device) -> list[torch.device]:
    """Whose random state there is beside the CPU's."""
    return [device] if device.type == "cuda" else []


@contextmanager
def teaching(teacher: nn.Module | None, device: torch.device) -> Generator[nn.Module | None]:
    """The teacher in evaluation mode, or a copy of it where training is on another device."""
    if teacher is None:
        yield None
        return
    if any(tensor.device != device for tensor in itertools.chain(teacher.parameters(), teacher.buffers())):
        teacher = copy.deepcopy(teacher).to(device)
    with modes_kept(teacher):
        yield teacher.eval()


@contextmanager
def own_forward(model: nn.Module) -> Generator[None]:
    """Without the mixed precision that Accelerate has put around `forward`: as `evaluate` sees the model otherwise."""
    patched = model.__dict__.get("forward")
    if patched is None or "_original_forward" not in model.__dict__:
        yield
        return
    model.__dict__["forward"] = model.__dict__["_original_forward"]
    try:
        yield
    finally:
        model.__dict__["forward"] = patched
