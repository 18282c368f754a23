"""One choice over all layers: which groups lose how many of their units for a cost."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, permutations, product
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from torchtrim.criteria import Floats, Integers
from torchtrim.errors import PlanError

TOLERANCE = 0.01  # how far below a target a choice may end, as a share of it
_TURNS = 6  # of looking for what units save where they go
_PARTS = 16  # of a queue; over as many of its units as one has, what they save is averaged
_EXCHANGES, _STEPS = 500, 4  # that are tried, and of fewer steps each than this
_NOTHING = 1e-12  # what a unit saves that saves nothing


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
    important first. Where the unit at the limit is too large for that, it stays, and smaller ones after it go. Where
    that does not end within the tolerance, steps of two queues are exchanged.
    """
    at = np.zeros(len(queues), np.int64)

    def costs(places: Integers) -> float:
        return excess(np.array([queue.steps[place] for queue, place in zip(queues, places, strict=True)]))

    owners = _in_order(queues)

    def prefix(length: int) -> Integers:
        counts = np.bincount(owners[:length], minlength=len(queues))
        return np.array([queue.nearest(count) for queue, count in zip(queues, counts, strict=True)])

    if costs(at) > 1:
        high = _shortest(owners.size, lambda length: costs(prefix(length)))
        low = high - 1
        at = _given_back(queues, prefix(high), costs)
        if costs(at) < 1 - TOLERANCE:
            counts = np.bincount(owners[:low], minlength=len(queues))
            other = _further(queues, prefix(low), counts, owners[low:], costs)
            other = _given_back(queues, other, costs) if costs(other) <= 1 else at
            at = other if costs(at) < costs(other) <= 1 else at
        if costs(at) < 1 - TOLERANCE:
            at = _exchanged(queues, at, costs)
    return np.array([queue.steps[place] for queue, place in zip(queues, at, strict=True)]), costs(at)


def _exchanged(queues: Sequence[Queue], at: Integers, costs: Callable[[Integers], float]) -> Integers:
    """Some steps back of one queue for some further of another: of what ends within the tolerance, the least important.

    Where nothing does, all stays.
    """
    steps = sorted(product(range(1, _STEPS), repeat=2), key=sum)
    found: list[tuple[float, Integers]] = []
    for (back, further), (one, other) in islice(product(steps, permutations(range(len(queues)), 2)), _EXCHANGES):
        moved = at.copy()
        moved[one] -= back
        moved[other] += further
        if moved[one] >= 0 and moved[other] < queues[other].steps.size and 1 - TOLERANCE <= costs(moved) <= 1:
            gone = sum(
                float(queue.importance[: queue.steps[place]].sum()) for queue, place in zip(queues, moved, strict=True)
            )
            found.append((gone, moved))
    return min(found, key=itemgetter(0))[1] if found else at


def by_savings(queues: Sequence[Queue], losses: Sequence[Floats], excess: Callable[[Integers], float]) -> list[Queue]:
    """The queues, the importance of whose units is what is lost for what is saved.

    losses: by queue, float64 [units that can go], all that is lost once each one is gone. excess: as for `allot`.
    So the sum of the losses is about the least at which the excess is 1 (Lagrange). What a unit saves depends on what
    else is gone: it is taken where the units go, and that is looked for again.
    """
    slopes = [_slopes(loss) for loss in losses]
    counts, priced = np.zeros(len(queues), np.int64), list(queues)
    savings = np.ones(len(queues))
    for turn in range(_TURNS):
        now = np.array([_saved(queues, counts, index, excess) for index in range(len(queues))])
        savings = np.sqrt(savings * now) if turn else now  # else it may go to and fro
        priced = [
            replace(queue, importance=slope / saved)
            for queue, slope, saved in zip(queues, slopes, savings, strict=True)
        ]
        owners, before = _in_order(priced), counts

        def prefix(length: int, owners: Integers = owners) -> Integers:
            return np.bincount(owners[:length], minlength=len(queues))

        counts = prefix(_shortest(owners.size, lambda length: excess(prefix(length))))
        if (counts == before).all():
            break
    return priced


def _slopes(loss: Floats) -> Floats:
    """What each unit more loses, by the largest convex curve below all that is lost: float64 [units], ascending."""
    heights, corners = np.concatenate([[0.0], loss]), [0]
    for place in range(1, heights.size):
        while len(corners) > 1:
            before, last = corners[-2:]
            if (heights[last] - heights[before]) * (place - last) < (heights[place] - heights[last]) * (last - before):
                break
            corners.pop()
        corners.append(place)
    return np.repeat(np.diff(heights[corners]) / np.diff(corners), np.diff(corners))


def _saved(queues: Sequence[Queue], counts: Integers, index: int, excess: Callable[[Integers], float]) -> float:
    """What one unit more of a queue saves, over the next few of it, or else the last few."""
    size = queues[index].units.size
    few = max(1, size // _PARTS)
    less, more = counts.copy(), counts.copy()
    more[index] = min(counts[index] + few, size)
    less[index] = more[index] - min(few, size)
    return max((excess(less) - excess(more)) / max(more[index] - less[index], 1), _NOTHING)


def _in_order(queues: Sequence[Queue]) -> Integers:
    """To which queue each unit belongs, of all units in the order of their importance."""
    owners = np.concatenate([np.full(queue.units.size, index) for index, queue in enumerate(queues)])
    return owners[np.argsort(np.concatenate([queue.importance for queue in queues]), kind="stable")]


def _shortest(length: int, costs: Callable[[int], float]) -> int:
    """The smallest number of units, of an order, that cost at most 1; all, if none does."""
    low, high = 0, length
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if costs(middle) <= 1 else (middle, high)
    return high


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
