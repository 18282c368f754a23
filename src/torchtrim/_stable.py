"""When enough data was seen: a sequential test of which neurons a rule would remove."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from torchtrim import criteria
from torchtrim._profile import Profile
from torchtrim._select import Booleans, Limited, Rule, check_layers, resolve_rule, scored_groups
from torchtrim.criteria import Criterion, Floats
from torchtrim.errors import PlanError

_FIRST = 16  # looks before the first decision, as the test is asymptotic
_TIGHTEST = 30  # looks after which the bounds are narrowest beside those of a single look


@dataclass(frozen=True)
class Stable:
    """Measuring ends once it is settled which neurons a rule would remove.

    A unit is settled once its score lies above or below the rule's limit at `confidence`, whatever the number of looks
    before; measuring ends when no more than the share `in_doubt` of the units is not. rule, layers, criterion: as for
    `select`; the rule must be one of this package, or have its method `limit`. every: batches from one look to the
    next; give the data in random order, in batches of one size, and at least some dozens of them.

    The bounds are an asymptotic confidence sequence for the mean of a unit's distance to the limit, batch by batch,
    with the limit's own movement in it (linear, by its derivative) and a variance of Student's kind. Waudby-Smith,
    Arbour, Sinha, Kennedy, Ramdas, "Time-uniform central limit theory and asymptotic confidence sequences", Annals of
    Statistics, 2024, theorem 2.2.
    """

    rule: Rule | str
    layers: Sequence[str] | None = None
    confidence: float = 0.99
    criterion: Criterion | str = criteria.apoz
    in_doubt: float = 0.02
    every: int = 1

    def __post_init__(self) -> None:
        criteria.resolve(self.criterion)
        rule = resolve_rule(self.rule)
        if not isinstance(rule, Limited):
            raise PlanError(f"Stable: the rule {rule} cannot say where its limit is; give it a method `limit(scores)`")
        for name, value in (("confidence", self.confidence), ("in_doubt", self.in_doubt)):
            if not 0 < value < 1:
                raise PlanError(f"Stable: expected {name} between 0 and 1, found {value!r}")
        if self.every < 1:
            raise PlanError(f"Stable: expected to look every 1 or more batches, found every={self.every!r}")

    def begin(self) -> "Judge":
        """What looks at one pass over data."""
        return Judge(self)


class _Group(NamedTuple):
    """What was seen of a group: its scores at the last look, and how each score strays from the limit.

    squares: float64 [units], the sum over looks of what a look's distance to the limit strayed, squared.
    """

    scores: Floats
    slope: Floats
    squares: Floats


class Judge:
    """Looks at one pass over data, again and again, and says when it may end."""

    def __init__(self, stable: Stable) -> None:
        self._stable = stable
        self._rule = resolve_rule(stable.rule)
        self._groups: dict[str, _Group] = {}
        self._looks = 0
        self._in_doubt: dict[str, tuple[int, ...]] = {}

    def look(self, so_far: Profile, latest: Profile) -> bool:
        """Whether enough was seen. latest: what came since the last look."""
        stable = self._stable
        if not self._looks:
            check_layers(so_far, stable.layers)
        self._looks += 1
        now = scored_groups(latest, stable.layers, stable.criterion)
        self._in_doubt = {}
        doubtful = units = 0
        for name, (scores, places) in scored_groups(so_far, stable.layers, stable.criterion).items():
            settled = self._settled(name, scores, now[name][0] if name in now else None)
            doubtful, units = doubtful + int((~settled).sum()), units + settled.size
            for layer, place in places.items():
                neurons = np.flatnonzero(so_far[layer].unit >= 0)[~settled[place]]
                self._in_doubt |= {layer: tuple(neurons.tolist())} if neurons.size else {}
        return doubtful <= stable.in_doubt * units

    @property
    def in_doubt(self) -> dict[str, tuple[int, ...]]:
        """By layer, the neurons of which it was not settled at the last look whether they go."""
        return self._in_doubt

    def _settled(self, name: str, scores: Floats, latest: Floats | None) -> Booleans:
        """Which units lie on one side of the limit, wherever within their bounds they are."""
        rule = self._rule
        assert isinstance(rule, Limited)
        limit, slope = rule.limit(scores)
        before = self._groups.get(name)
        squares = np.zeros(scores.size) if before is None else before.squares
        if before is not None and latest is not None:
            strayed = latest - before.scores
            strayed = strayed - before.slope @ strayed
            # Recursive residuals: each has the variance of one look, although the mean so far varies too.
            squares = squares + strayed**2 * (1 - 1 / self._looks)
        self._groups[name] = _Group(scores, slope, squares)
        if self._looks < _FIRST:
            return np.zeros(scores.size, np.bool_)
        return np.abs(scores - limit) > np.sqrt(squares / (self._looks - 1)) * self._bound()

    def _bound(self) -> float:
        """Half the width of the bounds for an estimated variance of one."""
        alpha, looks = 1 - self._stable.confidence, self._looks
        tight = -2 * math.log(alpha)
        rho = (tight + math.log(tight + 1)) / _TIGHTEST
        inside = looks * rho + 1
        quantile = math.sqrt(2 * inside / (looks * rho) * math.log(math.sqrt(inside) / alpha))
        return _student(quantile, looks - 1) / math.sqrt(looks)


def _student(quantile: float, degrees: int) -> float:
    """The quantile of Student's distribution at the level of a normal one: the variance of few looks is uncertain.

    Cornish and Fisher's expansion; Abramowitz and Stegun, equation 26.7.5.
    """
    z, n = quantile, degrees
    return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
