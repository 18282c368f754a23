"""What was done to a trimmed model since its ancestor; kept on the model itself, so that copies carry it too."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from torchtrim._copies import named_tensors
from torchtrim._plan import Plan

_ATTRIBUTE = "_torchtrim_history"


@dataclass(frozen=True)
class History:
    """plans: the plans that were carried out, oldest first. shapes: of the ancestor's parameters and buffers.

    attributes: by module, the attributes that describe widths and are not the ancestor's, such as `out_channels`.
    biases: the parameters that the ancestor does not have, which `repair` added.
    """

    plans: tuple[Plan, ...]
    shapes: Mapping[str, tuple[int, ...]]
    attributes: Mapping[str, Mapping[str, Any]]
    biases: tuple[str, ...] = ()


def history(model: nn.Module) -> History:
    """The history of a model; one without plans if it was never trimmed."""
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
    return getattr(model, _ATTRIBUTE, History((), shapes, {}))


def set_history(model: nn.Module, past: History) -> None:
    """Note on a model what was done to it."""
    setattr(model, _ATTRIBUTE, past)


def remember(model: nn.Module, trimmed: nn.Module, plan: Plan) -> None:
    """Note on `trimmed` that it is `model` after this plan."""
    before = history(model)
    attributes = {name: dict(values) for name, values in before.attributes.items()}
    for (name, old), new in zip(model.named_modules(), trimmed.modules(), strict=True):
        changed = {
            key: copy.copy(value)
            for key, value in vars(new).items()
            if describes(value) and vars(old).get(key) != value
        }
        if changed:
            attributes[name] = attributes.get(name, {}) | changed
    set_history(trimmed, replace(before, plans=(*before.plans, plan), attributes=attributes))


def describes(value: Any) -> bool:
    """Whether an attribute can be a width or several; sequences of anything else may not even compare."""
    return type(value) is int or (isinstance(value, (list, tuple)) and all(type(entry) is int for entry in value))
