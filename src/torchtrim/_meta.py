"""Operators without data: what their results look like is found once and remembered, for it follows from the operands.

PyTorch's own kernels for the meta device take up to milliseconds, since some are written in Python.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _len_torch_dispatch_stack

from torchtrim._origins import VIEWS


def computed(name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor | None) -> Any:
    """Run an operator, or make what it is known to give. `value`: what it gives, where that is known without data."""
    if value is not None and name == "_local_scalar_dense":
        return value.item()
    if value is not None and name == "nonzero":
        return torch.empty_like(value, device="meta")
    form = None if name in VIEWS or function in _UNLIKE else _form(function, args, kwargs)
    if form is None or _len_torch_dispatch_stack():  # others want to see the operator run
        return function(*args, **kwargs)
    recipe = _recipes.get(form)
    if recipe is None:
        result = function(*args, **kwargs)
        recipe = _recipe(function, args[0] if args else None, result)
        if recipe is None:
            _UNLIKE.add(function)
        else:
            if len(_recipes) == _MOST:
                _recipes.clear()
            _recipes[form] = recipe
        return result
    if recipe is _ITSELF:
        return args[0]
    made = [one and torch.empty_strided(one[0], one[1], dtype=one[2], device="meta") for one in recipe]
    return tuple(made) if len(made) > 1 else made[0]


_Recipe = Sequence[tuple[torch.Size, tuple[int, ...], torch.dtype] | None]  # of each result: shape, strides, type
_ITSELF: _Recipe = ()  # in place: the first operand
_recipes: dict[tuple[Any, ...], _Recipe] = {}
_MOST = 50_000
_UNLIKE: set[Any] = set()  # operators whose results do not follow from shapes alone, or share memory
_IN_PLACE = re.compile("aten::.*[^_]_")
_PLAIN = frozenset([int, float, bool, str, type(None), torch.dtype, torch.device, torch.memory_format, torch.layout])


def _form(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """All that the look of an operator's results follows from; None where it may follow from more."""
    form: list[Any] = [function]
    meta = False
    every: tuple[Any, ...] = (*args, *kwargs.items()) if kwargs else args
    for arg in every:
        several = type(arg) in (list, tuple)
        form.append(len(arg) if several else None)
        for item in arg if several else (arg,):
            kind = type(item)
            if kind in _PLAIN:
                form += (kind, item)
            elif kind not in (Tensor, nn.Parameter) or not item.is_meta or item.dtype.is_complex:
                return None
            else:
                meta = True
                form += (item.shape, item.stride(), item.dtype)
    return tuple(form) if meta else None


def _recipe(function: Any, first: Any, result: Any) -> _Recipe | None:
    schema = function._schema
    if any(one.alias_info is not None for one in schema.returns):
        in_place = _IN_PLACE.fullmatch(schema.name) and torch.Tag.inplace_view not in function.tags
        return _ITSELF if in_place and result is first else None
    results = result if isinstance(result, tuple) else (result,)
    plain = (one is None or (type(one) is Tensor and one.is_meta and not one.storage_offset()) for one in results)
    if schema.is_mutable or not results or not all(plain):
        return None
    return tuple(one if one is None else (one.shape, one.stride(), one.dtype) for one in results)
