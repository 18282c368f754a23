"""How a model is called with a batch, and left as it was found."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchtrim._copies import named_tensors

Forward = Callable[[nn.Module, Any], Any]


def usual_call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def device_of(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in named_tensors(model).values()), torch.device("cpu"))


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on the device."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), batch)


@contextmanager
def left_as_found(model: nn.Module, device: torch.device) -> Generator[None]:
    """Evaluation mode inside; modes and random state are as before at the end."""
    modes = [(module, module.training) for module in model.modules()]
    fused = torch.backends.mha.get_fastpath_enabled()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            model.eval()
            torch.backends.mha.set_fastpath_enabled(False)  # it would hide the activations of a transformer layer
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for module, mode in modes:
                module.training = mode
