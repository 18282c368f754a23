"""The numbers that a model's own code hands to an operator, which a trimmed model must repeat."""

import hashlib
from typing import Any

import torch
from torch import Tensor
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
    return tuple([_constant(leaf) for value in values for leaf in _leaves(value)])


def _leaves(value: Any) -> list[Any]:
    """What lists hold: what operators are given is never nested deeper."""
    return list(value) if type(value) in (list, tuple) else [value]


def _constant(value: Any) -> Any:
    """A number or a text as it is; where a tensor is, or nothing; what seeds a generator, and what kind the rest is."""
    if value is None or isinstance(value, (int, float, complex, str)):
        return value
    if isinstance(value, Tensor):
        return "tensor"
    if isinstance(value, torch.Generator):
        return "generator", value.initial_seed()
    return type(value).__name__


def held_by_code(operands: list[Tensor]) -> tuple[Any, ...]:
    """The values of tensors that no operator made: numbers that the model's own code holds."""
    held = [one for one in operands if mark_of(one) is None and one.device.type == "cpu"]
    if not held:
        return ()
    with _disable_current_modes():
        return tuple(value for one in held for value in _values(one.detach()))


def _values(tensor: Tensor) -> list[Any]:
    """A few numbers as they are; many, or of another kind, by their bytes."""
    if tensor.layout != torch.strided:
        return []
    if tensor.numel() <= _FEW and not tensor.is_complex():
        return [float(value) for value in tensor.flatten().tolist()]
    return [hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()]


_FEW = 64
