"""What is left of a model in another that was trimmed from it, and whether that is all that happened to it."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchtrim._consumers import Consumer
from torchtrim._copies import named_tensors
from torchtrim._graph import untried
from torchtrim._history import history
from torchtrim._neurons import Kept, NeuronGraph
from torchtrim._trial import tried
from torchtrim.errors import PlanError


def what_is_left(original: nn.Module, trimmed: nn.Module, example: Any) -> tuple[NeuronGraph, Kept]:
    """What is known of the original, and what of it the trimmed model has kept.

    Raises PlanError: the models do not belong together.
    """
    before, after = history(original).plans, history(trimmed).plans
    if len(after) <= len(before) or after[: len(before)] != before:
        raise PlanError(
            "repair: expected a model that `trim` made of the original, found one that says nothing of it; pass the "
            "model that was trimmed, and the one that it was made of"
        )
    plans = after[len(before) :]
    left: dict[str, Any] = {}
    gone: dict[str, list[int]] = {}
    for plan in plans:
        for name, layer in plan.layers.items():
            places = left.setdefault(name, np.arange(layer.width))
            gone.setdefault(name, []).extend(places[list(layer.removed)].tolist())
            left[name] = np.delete(places, list(layer.removed))
    known = isinstance(example, NeuronGraph)
    through_norms = any(plan.through_norms for plan in plans)
    graph = example if known else untried(original, example, through_norms=through_norms)
    for again in (False, True):
        graph = tried(original, graph) if again else graph
        unknown = [name for name in gone if name not in graph.layers]
        if unknown:
            raise PlanError(f"repair: the original has no layer {unknown[0]!r}; pass the model that was trimmed")
        kept = graph.bodies(gone)
        fault = _difference(trimmed, graph, kept)
        if fault is None:
            return graph, kept
    raise PlanError(f"repair: the trimmed model is not the original without what was removed: {fault}")


def _difference(trimmed: nn.Module, graph: NeuronGraph, kept: Kept) -> str | None:
    """The first tensor whose shape is not what is left of the original when only this is kept; None if all are."""
    expected = {
        name: tuple(int(kept[roots].sum()) if roots.size > 1 else roots.size for roots in axes)
        for name, axes in graph.axes.items()
    }
    found = {name: tuple(tensor.shape) for name, tensor in named_tensors(trimmed).items()}
    odd = [name for name, shape in expected.items() if found.get(name) != shape]
    return f"{odd[0]}: expected {expected[odd[0]]}, found {found.get(odd[0])}" if odd else None


def check_as_trimmed(consumers: Iterable[Consumer], theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise PlanError where weights are no longer what `trim` left: what is gone may be made up for already.

    theirs, ours: the modules of the original and of the trimmed model.
    """
    for consumer in consumers:
        outputs, inputs = torch.from_numpy(consumer.outputs), torch.from_numpy(consumer.inputs)
        old, new = theirs[consumer.name], ours[consumer.name]
        pairs = [(old.weight[outputs][:, inputs], new.weight), (_rows(old.bias, outputs), new.bias)]
        if consumer.norm is not None:
            pairs.append((_rows(theirs[consumer.norm].running_mean, outputs), ours[consumer.norm].running_mean))
        if not all(_equal(left, found) for left, found in pairs):
            raise PlanError(
                f'repair: expected in {consumer.name} the weights that `trim` left, for "mean", found others; repair '
                "what `trim` made, before it is retrained or repaired otherwise, of the very model that was trimmed"
            )


def _rows(values: Tensor | None, stay: Tensor) -> Tensor | None:
    return None if values is None else values[stay]


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one.to(other).nan_to_num(), other.nan_to_num())
