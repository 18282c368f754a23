"""Copies of a model in which the parameters and buffers are other tensors, and what it is called with."""

import copy
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cache
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Every distinct module once, as `nn.Module.modules` but without its recursion, whose cost grows with the depth."""
    found: dict[int, nn.Module] = {}
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            waiting += reversed(module._modules.values())
    return list(found.values())


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every distinct module once, under its first name, in the same order."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if id(module) not in seen:
            seen.add(id(module))
            found[name] = module
            if module._modules:
                inside = f"{name}." if name else ""
                children = [(inside + key, child) for key, child in module._modules.items() if child is not None]
                waiting += reversed(children)
    return found


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every distinct parameter, then every distinct buffer, once, under its first name."""
    return tensors_of(named_modules(model))


def tensors_of(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """As `named_tensors`, of these modules."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for kind in ("_parameters", "_buffers"):
        for name, module in modules.items():
            for key, tensor in module.__dict__[kind].items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[f"{name}.{key}" if name else key] = tensor
    return found


def rebuild(model: nn.Module, replace: Mapping[str, Tensor]) -> nn.Module:
    """A deep copy of the model in which the named parameters and buffers are other tensors."""
    memo: dict[int, Any] = {}
    names = named_modules(model)
    modules = list(names.values())
    for value in (value for module in modules for name, value in vars(module).items() if name not in _OF_MODULES):
        if type(value) in _ATOMIC:
            continue
        several: Any = value.values() if type(value) is dict else value if isinstance(value, (list, tuple)) else [value]
        for one in several:
            if isinstance(one, Tensor) and not one.is_leaf:  # deepcopy refuses what a graph produced
                memo[id(one)] = one.detach().clone()
    for name, old in tensors_of(names).items():
        new = replace[name]
        memo[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        if marks := vars(old):  # that users leave on parameters, such as `no_weight_decay`
            vars(memo[id(old)]).update(marks)
    return _copied(model, modules, memo)


def contract(model: nn.Module, lists: Mapping[str, Sequence[int]]) -> None:
    """Leave of these lists of modules, or dictionaries, the entries at these places, numbered anew; in place."""
    for name, places in lists.items():
        entries = model.get_submodule(name)._modules
        keys, values = list(entries), list(entries.values())
        entries.clear()
        entries.update(zip(keys, (values[place] for place in places), strict=False))


def contracted_name(name: str, lists: Mapping[str, Sequence[int]]) -> str | None:
    """What a module or tensor is called once lists are contracted; None where it is gone."""
    for entries, places in lists.items():
        key, dot, rest = name.removeprefix(f"{entries}.").partition(".")
        if name.startswith(f"{entries}.") and (number := NUMBER.search(key)):
            place = int(number[0])
            return f"{entries}.{NUMBER.sub(str(places.index(place)), key)}{dot}{rest}" if place in places else None
    return name


NUMBER = re.compile(r"\d+$")  # of an entry in a list, or in a dictionary that numbers its own


def compacted(model: nn.Module) -> nn.Module:
    """With the weights of recurrent layers in one piece of memory each, as cuDNN wants them; in place."""
    for module in modules_of(model):
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()
    return model


def without_caches(model: nn.Module) -> nn.Module:
    """With nothing in what modules keep by device, such as biases that they computed of parameters; in place.

    What has run without data has filled these by itself, and will do so again.
    """
    for module in modules_of(model):
        for name, value in vars(module).items():
            if type(value) is not dict or name in ("_parameters", "_buffers", "_modules"):
                continue
            if all(isinstance(one, Tensor) and _is_device(key) for key, one in value.items()):
                value.clear()
    return model


def _is_device(key: Any) -> bool:
    try:
        return isinstance(key, torch.device) or (isinstance(key, str) and bool(torch.device(key).type))
    except RuntimeError:
        return False


# The dictionaries in which PyTorch keeps what belongs to a module, and its hooks.
_OF_MODULES = frozenset(vars(nn.Module())) - {"training"}
# What `copy.deepcopy` hands on as it is.
_ATOMIC = frozenset([bool, int, float, str, type(None), type, FunctionType, BuiltinFunctionType,
                     torch.dtype, torch.device, torch.Size])  # fmt: skip


def _copied(model: nn.Module, modules: Sequence[nn.Module], memo: dict[int, Any]) -> nn.Module:
    """`copy.deepcopy`, which would spend most of its time on the dictionaries of modules."""
    plain = [module for module in modules if _is_plain(type(module))]
    for module in plain:
        memo[id(module)] = object.__new__(type(module))
    for module in plain:
        new = vars(memo[id(module)])
        new.update(vars(module))
        new.pop("_compiled_call_impl", None)  # `torch.compile` left it; PyTorch's own copies go without it too
        for name, value in new.items():
            kind = type(value)
            if kind is OrderedDict and not value:  # its hooks
                new[name] = kind()
            elif kind not in _ATOMIC:
                new[name] = _copy_of(value, memo)
    return copy.deepcopy(model, memo)


def _copy_of(value: Any, memo: dict[int, Any]) -> Any:
    """`copy.deepcopy` of a value, quickly where it is a plain container."""
    kind = type(value)
    if kind in (OrderedDict, set) and not value:
        return kind()
    if id(value) in memo:
        return memo[id(value)]
    if kind is dict:
        new = memo[id(value)] = {}
        for key, one in value.items():
            place = key if type(key) in _ATOMIC else _copy_of(key, memo)
            new[place] = one if type(one) in _ATOMIC else _copy_of(one, memo)
        return new
    if kind is tuple and _ATOMIC.issuperset(map(type, value)):
        return value
    return copy.deepcopy(value, memo)


@cache
def _is_plain(kind: type) -> bool:
    """Whether all that is to be copied of such a module is in its dictionary."""
    return (
        not hasattr(kind, "__deepcopy__")
        and kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__getstate__ in (object.__getstate__, getattr(nn.Module, "__getstate__", None))
        and (kind.__setstate__ is nn.Module.__setstate__ or kind.__module__.startswith("torch.nn."))
        and not any("__slots__" in vars(parent) for parent in kind.__mro__)
    )


def call_arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An example is a tensor, a tuple of positional inputs, or a dict of keyword inputs."""
    if isinstance(example, dict):
        return (), dict(example)
    return (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}
