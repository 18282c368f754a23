"""A budget over several rounds, of which each cuts by the same factor."""

from collections.abc import Collection, Mapping
from dataclasses import replace

from torchtrim._allot import TOLERANCE
from torchtrim._amounts import amount, limits, per_layer
from torchtrim._budget import Budget
from torchtrim._cost import Cost


def budget_of_round(
    budget: Budget,
    gone: float,
    ancestor: Cost,
    now: Cost,
    widths: Mapping[str, int],
    present: Collection[str],
    *,
    part: int = 1,
) -> Budget | None:
    """What a model on its way from its ancestor to a budget may keep of itself in one round; None if all of it.

    gone: how much of the way is behind the model after the round, up to 1, in equal factors: after the second of four
    rounds, the square root of the whole. ancestor, now: costs. widths: the ancestor's neurons by layer, of which floors
    and caps are shares. present: the layers that the model still has. part: the round takes one of so many equal
    factors of what it would; one that is within the tolerance of a budget is none.
    """
    shares: dict[str, float | None] = dict.fromkeys(budget.asked)
    enough = 1 if part == 1 else 1 - TOLERANCE
    for name, value in budget.asked.items():
        own = getattr(ancestor, name)
        aim = own * (amount(value, own) / own) ** gone
        share = (aim / getattr(now, name)) ** (1 / part)
        shares[name] = share if share < enough else None
    if not any(shares.values()):
        return None
    least, most = limits(budget.floor, budget.cap, widths)
    weights = per_layer("weights", budget.weights or {}, widths, 1.0)
    return replace(
        budget,
        **shares,
        floor={name: least[name] for name in present},
        cap=None if budget.cap is None else {name: most[name] for name in present},
        weights={name: weights[name] for name in present},
    )
