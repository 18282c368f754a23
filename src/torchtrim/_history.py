"""What was done to a trimmed model since its ancestor; kept on the model itself, so that copies carry it too."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from torchtrim._copies import contracted_name, named_tensors
from torchtrim._plan import Plan

_ATTRIBUTE = "_torchtrim_history"


@dataclass(frozen=True)
class History:
    """plans: the plans that were carried out, oldest first. shapes: of the ancestor's parameters and buffers.

    attributes: by module, the attributes that describe widths and are not the ancestor's, such as `out_channels`.
    biases: the parameters that the ancestor does not have, which `repair` added.
    lists: which entries of the ancestor's lists of modules are left; names are those that modules have since.
    """

    plans: tuple[Plan, ...]
    shapes: Mapping[str, tuple[int, ...]]
    attributes: Mapping[str, Mapping[str, Any]]
    biases: tuple[str, ...] = ()
    lists: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def history(model: nn.Module) -> History:
    """The history of a model; one without plans if it was never trimmed."""
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
    return getattr(model, _ATTRIBUTE, History((), shapes, {}))


def set_history(model: nn.Module, past: History) -> None:
    """Note on a model what was done to it."""
    setattr(model, _ATTRIBUTE, past)


def remember(
    model: nn.Module, trimmed: nn.Module, plan: Plan, lists: Mapping[str, Sequence[int]] | None = None
) -> None:
    """Note on `trimmed` that it is `model` after this plan. lists: the entries that are left of lists of modules."""
    before, lists = history(model), lists or {}
    attributes = {name: dict(values) for name, values in _renamed(before.attributes, lists).items()}
    modules = _renamed(dict(model.named_modules()), lists)
    for (name, old), new in zip(modules.items(), trimmed.modules(), strict=True):
        changed = {
            key: copy.copy(value)
            for key, value in vars(new).items()
            if describes(value) and vars(old).get(key) != value
        }
        if changed:
            attributes[name] = attributes.get(name, {}) | changed
    left = {
        name: tuple(before.lists.get(name, range(max(places) + 1))[n] for n in places) for name, places in lists.items()
    }
    past = replace(
        before,
        plans=(*before.plans, plan),
        shapes=_renamed(before.shapes, lists),
        attributes=attributes,
        biases=tuple(_renamed(dict.fromkeys(before.biases), lists)),
        lists={**before.lists, **left},
    )
    set_history(trimmed, past)


def _renamed(named: Mapping[str, Any], lists: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Without what is gone."""
    return {new: value for name, value in named.items() if (new := contracted_name(name, lists)) is not None}


def describes(value: Any) -> bool:
    """Whether an attribute can be a width or several; sequences of anything else may not even compare."""
    return type(value) is int or (isinstance(value, (list, tuple)) and all(type(entry) is int for entry in value))
