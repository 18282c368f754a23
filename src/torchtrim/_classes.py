"""Which class each example of a batch belongs to."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from torchtrim.errors import ProfileError

Label: TypeAlias = int | str
Labels: TypeAlias = Callable[[Any], Any]  # from a batch to a label for each example


def labels_of(batch: Any, classes: Labels | bool) -> list[Label]:
    """A label for each example. classes: how to find them; True for those of a batch (inputs, labels, ...).

    Raises ProfileError: there are none, or they are no whole numbers or words.
    """
    found = classes(batch) if callable(classes) else _usual(batch)
    if isinstance(found, (Tensor, np.ndarray)):
        found = found.tolist()
    if not isinstance(found, Iterable) or isinstance(found, str):
        raise ProfileError(f"classes: expected a label for each example, found {type(found).__name__}{_HOW}")
    labels: list[Any] = [one.item() if isinstance(one, (Tensor, np.generic)) else one for one in found]
    for label in labels:
        if not isinstance(label, (int, str)):
            raise ProfileError(f"classes: expected whole numbers or words as labels, found {label!r}{_HOW}")
    return labels


_HOW = "; pass classes=lambda batch: ... to say where they are"


def _usual(batch: Any) -> Any:
    if isinstance(batch, Mapping) and "labels" in batch:
        return batch["labels"]
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return batch[1]
    raise ProfileError(f"classes: expected batches (inputs, labels), or with 'labels' as a key, found another{_HOW}")


def rows_of(labels: Sequence[Label]) -> dict[Label, Tensor]:
    """By class, which examples of the batch are its own: int64 [examples]."""
    places: dict[Label, list[int]] = {}
    for place, label in enumerate(labels):
        places.setdefault(label, []).append(place)
    return {label: torch.tensor(rows) for label, rows in places.items()}


def in_order(label: Label) -> tuple[bool, Label]:
    """A key by which numbers come before words, each in their order."""
    return isinstance(label, str), label
