"""What is known of a tensor while labels are carried: labels, origin, memory, and without data perhaps its value."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchtrim._labels import UNKNOWN, Labels
from torchtrim._origins import NOWHERE, Origin

Memory = tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Mark:
    """What is known of a tensor, and how often its memory had been written to when that was so.

    memory: the storage, and which part of it where pieces count as tensors of their own. value: what a tensor without
    data would hold, where inputs and constants alone decide that.
    """

    labels: Labels
    origin: Origin
    memory: Memory
    writes: int
    value: Tensor | None = None


def mark_of(tensor: Tensor) -> Mark | None:
    return getattr(tensor, "_torchtrim_mark", None)


def labels_of(tensor: Tensor) -> Labels:
    mark = mark_of(tensor)
    return UNKNOWN if mark is None else mark.labels


def origin_of(tensor: Tensor) -> Origin:
    mark = mark_of(tensor)
    return NOWHERE if mark is None else mark.origin


def memory_among(tensor: Tensor, operands: Sequence[Tensor]) -> Memory:
    """The memory of a tensor: that of the operand whose storage it has, or a storage of its own."""
    storage = tensor.untyped_storage()._cdata
    for operand in operands:
        mark = mark_of(operand)
        if mark is not None and mark.memory[0] == storage:
            return mark.memory
    return storage, 0


def value_of(
    name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], operands: Sequence[Tensor]
) -> Tensor | None:
    """What an operator gives on tensors without data, where inputs and constants alone decide it, such as a mask.

    Code looks at such tensors (`if mask.all()`), which then needs no weights.
    """
    if any(_known(operand) is None for operand in operands) or (not operands and name not in _CONSTANTS):
        return None
    on_meta = any(one.is_meta for one in operands) or str(kwargs.get("device")) == "meta"
    if not on_meta or function._schema.is_mutable or torch.Tag.nondeterministic_seeded in function.tags:
        return None
    with suppress(Exception):  # what cannot be told so, is not
        on_cpu = {key: torch.device("cpu") if key == "device" else value for key, value in kwargs.items()}
        result = function(*pytree.tree_map_only(Tensor, _known, args), **pytree.tree_map_only(Tensor, _known, on_cpu))
        if isinstance(result, Tensor) and result.numel() <= SMALL:
            return result
        if isinstance(result, (bool, int, float)):
            return torch.tensor(result)
    return None


_CONSTANTS = frozenset(["arange", "zeros", "ones", "full", "scalar_tensor", "tril_indices", "triu_indices", "eye"])
SMALL = 1 << 18


def _known(tensor: Tensor) -> Tensor | None:
    mark = mark_of(tensor)
    if mark is not None and mark.value is not None:
        return mark.value
    return tensor if mark is None and tensor.device.type == "cpu" and tensor.numel() <= SMALL else None
