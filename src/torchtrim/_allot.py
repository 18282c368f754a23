"""One choice over all layers: which groups lose how many of their units for a cost."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torchtrim.criteria import Floats, Integers
from torchtrim.errors import PlanError

TOLERANCE = 0.01  # how far below a target a choice may end, as a share of it


@dataclass(frozen=True, eq=False)
class Queue:
    """The units of a group in the order in which they go, as far as floors allow.

    units: int64 [units that can go]. importance: float64 [units that can go], comparable between groups, ascending.
    steps: int64, how many may be gone, ascending: what caps and multiples allow.
    """

    units: Integers
    importance: Floats
    steps: Integers
    odd: bool = False

    @classmethod
    def of(
        cls,
        importance: Floats,
        places: Mapping[str, NDArray[np.intp]],
        widths: Mapping[str, int],
        least: Mapping[str, int],
        most: Mapping[str, int],
        multiple: int,
    ) -> "Queue":
        """importance: float64 [units]. places: by layer, which unit each neuron is of that can go. widths, least, most:
        by layer, how many neurons there are, and must and may stay at the end. `odd`: no width is a multiple.

        Raises PlanError where a cap cannot be reached.
        """
        members = np.stack([np.bincount(place, minlength=importance.size) for place in places.values()])
        floors = np.array([least[layer] for layer in places])
        left = np.array([widths[layer] for layer in places])
        gone: list[int] = []
        history = [left]
        for unit in np.argsort(importance, kind="stable"):
            after = left - members[:, unit]
            # where a layer has no neuron of the unit, its floor does not matter
            if ((after >= floors) | (members[:, unit] == 0)).all():
                gone.append(int(unit))
                history.append(left := after)
        after = np.stack(history)  # [gone, layers]
        within = (after <= np.array([most[layer] for layer in places])).all(1)
        if not within.any():
            over = next(layer for layer, width in zip(places, left, strict=True) if width > most[layer])
            raise PlanError(
                f"layer {over!r}: at least {left[[*places].index(over)]} of its neurons stay, for floors or what is "
                f"locked; the cap of {most[over]} cannot be met"
            )
        fits = ((after % multiple == 0) | (after == after[0])).all(1)
        steps = np.flatnonzero(within & fits)
        odd = multiple > 1 and not fits[1:].any()
        return cls(
            np.array(gone, np.int64),
            np.maximum.accumulate(importance[gone]) if gone else np.zeros(0),
            steps if steps.size else np.flatnonzero(within),
            odd,
        )

    def nearest(self, count: int) -> int:
        """The place of the step that is nearest to so many gone."""
        return int(np.abs(self.steps - count).argmin())


def allot(queues: Sequence[Queue], excess: Callable[[Integers], float]) -> tuple[Integers, float]:
    """How many units each queue loses, int64 [queues], and the excess that is left.

    excess: of numbers of units gone, the largest ratio of a cost to its target; it falls as more are gone. The units go
    in the order of their importance over all queues until it is at most 1; what is too much is given back, the most
    important first. Where the unit at the limit is too large for that, it stays, and smaller ones after it go.
    """
    at = np.zeros(len(queues), np.int64)

    def costs(places: Integers) -> float:
        return excess(np.array([queue.steps[place] for queue, place in zip(queues, places, strict=True)]))

    owners = np.concatenate([np.full(queue.units.size, index) for index, queue in enumerate(queues)])
    order = np.argsort(np.concatenate([queue.importance for queue in queues]), kind="stable")
    owners = owners[order]

    def prefix(length: int) -> Integers:
        counts = np.bincount(owners[:length], minlength=len(queues))
        return np.array([queue.nearest(count) for queue, count in zip(queues, counts, strict=True)])

    low, high = 0, owners.size  # the excess is above 1 at `low`, where it is anywhere, and at most 1 at `high`
    if costs(at) > 1:
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if costs(prefix(middle)) <= 1 else (middle, high)
        at = _given_back(queues, prefix(high), costs)
        if costs(at) < 1 - TOLERANCE:
            counts = np.bincount(owners[:low], minlength=len(queues))
            other = _further(queues, prefix(low), counts, owners[low:], costs)
            other = _given_back(queues, other, costs) if costs(other) <= 1 else at
            at = other if costs(at) < costs(other) <= 1 else at
    return np.array([queue.steps[place] for queue, place in zip(queues, at, strict=True)]), costs(at)


def _given_back(queues: Sequence[Queue], at: Integers, costs: Callable[[Integers], float]) -> Integers:
    """Steps back while the excess stays at most 1, those first that win back the most important unit."""
    open_to = {index for index, place in enumerate(at) if place}
    while open_to:
        index = max(open_to, key=lambda one: float(queues[one].importance[queues[one].steps[at[one]] - 1]))
        fewer = at.copy()
        fewer[index] -= 1
        if costs(fewer) <= 1:
            at = fewer
        if not (fewer == at).all() or not at[index]:
            open_to.discard(index)  # what is too much now is so later, when others have got more back
    return at


def _further(
    queues: Sequence[Queue], at: Integers, counts: Integers, owners: Integers, costs: Callable[[Integers], float]
) -> Integers:
    """On in this order of queues, past those whose next step is too large, until the excess is at most 1.

    counts: how many units of each the order had before.
    """
    refused: set[int] = set()
    for index in owners.tolist():
        counts[index] += 1
        more = at.copy()
        more[index] = max(at[index], queues[index].nearest(counts[index]))
        if index in refused or more[index] == at[index]:
            continue
        now = costs(more)
        if now < 1 - TOLERANCE:
            refused.add(index)
            continue
        at = more
        if now <= 1:
            break
    return at
