"""The numbers that a model's own code hands to an operator, which a trimmed model must repeat."""

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from torchtrim._marks import mark_of
from torchtrim._operators import FACTORIES


def constants_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The numbers in an operator's arguments that a trimmed model must repeat; those that are widths may change."""
    if name in FACTORIES or name.startswith("new_"):
        values: list[Any] = [value for value in args if isinstance(value, (int, float))] + [kwargs.get("generator")]
    elif name == "convolution":
        values = list(args[:8])
    elif name == "native_group_norm":
        values = [args[-1]]
    elif name in ("native_layer_norm", "_fused_rms_norm"):
        values = [len(args[1]), *args[2:], *kwargs.values()]
    else:
        values = [*args, *kwargs.values()]
    return tuple(_constant(leaf) for leaf in pytree.tree_leaves(values))


def _constant(value: Any) -> Any:
    """A number or a text as it is; where a tensor is, or nothing; what seeds a generator, and what kind the rest is."""
    if value is None or isinstance(value, (int, float, complex, str)):
        return value
    if isinstance(value, torch.Generator):
        return "generator", value.initial_seed()
    return "tensor" if isinstance(value, Tensor) else type(value).__name__


def held_by_code(operands: list[Tensor]) -> tuple[Any, ...]:
    """The values of tensors that no operator made: numbers that the model's own code holds."""
    held = [t for t in operands if t.device.type == "cpu" and mark_of(t) is None]
    with _disable_current_modes():
        return tuple(value for t in held for value in _values(t.detach()))


def _values(tensor: Tensor) -> list[Any]:
    """A few numbers as they are; many, or of another kind, by their bytes."""
    if tensor.layout != torch.strided:
        return []
    if tensor.numel() <= _FEW and not tensor.is_complex():
        return [float(value) for value in tensor.flatten().tolist()]
    return [hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()]


_FEW = 64
