"""The choice over all groups, against all choices there are."""

from itertools import product

import numpy as np
import pytest

from torchtrim._allot import TOLERANCE, Queue, _slopes, allot, by_savings
from torchtrim.errors import PlanError


def queue(importance, *, least=1, most=99, multiple=1):
    importance = np.array(importance, float)
    places = {"a": np.arange(importance.size)}
    return Queue.of(importance, places, {"a": importance.size}, {"a": least}, {"a": most}, multiple)


def test_a_queue_is_in_the_order_of_importance_up_to_the_floor() -> None:
    found = queue([3, 1, 2, 0], least=2)
    assert found.units.tolist() == [3, 1]
    assert found.importance.tolist() == [0, 1]
    assert found.steps.tolist() == [0, 1, 2]


def test_caps_and_multiples_leave_steps_out() -> None:
    assert queue(range(12), most=9).steps.tolist() == [3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert queue(range(12), multiple=4).steps.tolist() == [0, 4, 8]
    assert queue(range(10), multiple=4).steps.tolist() == [0, 2, 6]
    assert queue(range(12), multiple=4, most=9, least=5).steps.tolist() == [4]
    whole = queue(range(3), multiple=8)
    assert whole.steps.tolist() == [0]
    assert whole.odd


def test_a_layer_that_shares_some_units_keeps_its_floor_too() -> None:
    places = {"wide": np.arange(4), "narrow": np.array([0, 1])}  # the second has neurons of units 0 and 1 alone
    widths = {"wide": 4, "narrow": 2}
    found = Queue.of(np.arange(4.0), places, widths, {"wide": 1, "narrow": 1}, widths, 1)
    assert found.units.tolist() == [0, 2, 3]


def test_a_cap_below_what_must_stay_is_refused() -> None:
    with pytest.raises(PlanError, match=r"layer 'a': at least 3 of its neurons stay.*cap of 2"):
        Queue.of(np.zeros(2), {"a": np.array([0, 1])}, {"a": 4}, {"a": 3}, {"a": 2}, 1)


@pytest.mark.parametrize("seed", range(20))
def test_it_ends_at_most_one_step_from_the_threshold(seed: int) -> None:
    """Small units: what is gone is what is least important, and the end is within the tolerance."""
    random = np.random.default_rng(seed)
    queues = [queue(random.random(40)) for _ in range(3)]
    costs, target = random.uniform(0.5, 1.5, 3), 60.0

    def excess(gone):
        return float(((40 - gone) * costs).sum() / target)

    gone, left = allot(queues, excess)
    assert 1 - 2 * TOLERANCE <= left <= 1
    assert left == excess(gone)
    limits = [
        (one.importance[count - 1], one.importance[count]) for one, count in zip(queues, gone, strict=True) if count
    ]
    # a threshold between the groups, but for those that were given back
    assert max(low for low, _ in limits) < min(high for _, high in limits) + 0.1


@pytest.mark.parametrize("seed", range(20))
def test_of_few_large_units_it_comes_near_the_best_there_is(seed: int) -> None:
    random = np.random.default_rng(seed)
    queues = [queue(random.random(5)) for _ in range(3)]
    costs = np.array([10.0, 3.0, 1.0])
    target = 0.5 * 5 * costs.sum()

    def excess(gone):
        return float(((5 - gone) * costs).sum() / target)

    gone, left = allot(queues, excess)
    best = max(value for some in product(range(5), repeat=3) if (value := excess(np.array(some))) <= 1)
    assert min(best, 1 - TOLERANCE) - 0.035 <= left <= 1  # the smallest unit is 3 % of the target
    # nothing that is gone could come back
    for index in np.flatnonzero(gone):
        assert excess(gone - (np.arange(3) == index)) > 1


def test_out_of_reach_is_told_by_what_is_left() -> None:
    gone, left = allot([queue(range(4), least=3)], lambda gone: float(4 - gone[0]) / 2)
    assert gone.tolist() == [1]
    assert left == 1.5


def test_nothing_goes_where_nothing_needs_to() -> None:
    assert allot([queue(range(4))], lambda gone: 0.5)[0].tolist() == [0]
    assert allot([queue(range(4), most=3)], lambda gone: 0.5)[0].tolist() == [1]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("chained", [False, True], ids=["sums", "products"])
def test_what_is_lost_for_what_is_saved_is_near_the_least_there_is(seed: int, chained: bool) -> None:
    """Against all choices: where each group costs by itself, and where layers multiply, inputs times outputs."""
    random = np.random.default_rng(seed)
    sizes = (12, 9, 7)
    queues = [queue(np.arange(float(size))) for size in sizes]
    # convex curves of other heights and bends, with a little noise on them
    losses = [
        np.cumsum(np.sort(random.random(size - 1)) ** random.uniform(1, 4)) * random.uniform(0.2, 5) for size in sizes
    ]
    costs = random.uniform(0.5, 4, 4)

    def excess(gone):
        left = np.array(sizes) - gone
        widths = np.array([3, *left, 5])
        found, whole = (
            (widths[:-1] * widths[1:] * costs).sum() if chained else (left * costs[:3]).sum(),
            (np.array([3, *sizes]) * np.array([*sizes, 5]) * costs).sum() if chained else (sizes * costs[:3]).sum(),
        )
        return float(found / (0.5 * whole))

    def lost(gone):
        return sum(loss[count - 1] for loss, count in zip(losses, gone, strict=True) if count)

    gone, left = allot(by_savings(queues, losses, excess), excess)
    assert left <= 1
    choices = [np.array(some) for some in product(*(range(size) for size in sizes))]
    least = min(lost(some) for some in choices if excess(some) <= 1)
    worst = max(lost(some) for some in choices if 0.9 <= excess(some) <= 1)
    assert lost(gone) <= least + 0.25 * (worst - least)  # a dear unit may go, to end within the tolerance


def test_units_that_save_nothing_stay() -> None:
    queues = [queue(range(6)), queue(range(6))]
    losses = [np.arange(1.0, 6), np.arange(1.0, 6) * 100]
    gone, left = allot(by_savings(queues, losses, lambda gone: float(6 - gone[1]) / 3), lambda gone: (6 - gone[1]) / 3)
    assert gone.tolist() == [0, 3]
    assert left == 1


def test_slopes_are_of_the_largest_convex_curve_below() -> None:
    assert _slopes(np.array([1.0, 2, 6])).tolist() == [1, 1, 4]
    assert _slopes(np.array([3.0, 4, 6])).tolist() == [2, 2, 2]
    assert _slopes(np.array([5.0, 5, 5, 9])).tolist() == [5 / 3, 5 / 3, 5 / 3, 4]
    assert _slopes(np.zeros(3)).tolist() == [0, 0, 0]
    assert _slopes(np.zeros(0)).tolist() == []
