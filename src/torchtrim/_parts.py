"""What activation calls counted, entry by entry, and what that makes of the neurons of a layer."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any, NamedTuple

import numpy as np

from torchtrim._activations import KINDS, Kind
from torchtrim._counting import Counts
from torchtrim.criteria import Floats, Integers, LayerProfile


@dataclass(frozen=True, eq=False)
class SiteProfile:
    """What one activation call contributed to a layer; zeros, positions: int64 [neurons].

    index: the how-manieth activation call of a forward pass. operator, module: what was called, and where.
    kind: "rectifier" (ReLU and its kin, which give exact zeros), "smooth" or "gate".
    """

    index: int
    operator: str
    module: str
    kind: Kind
    zeros: Integers
    positions: Integers


@dataclass(frozen=True, eq=False)
class Part:
    """What one activation call counted, entry by entry: of a channel, or of each of its positions behind a flatten.

    factor: which of the labels of its tensor. roots: int64 [entries], the neuron of each. counts: tensors [entries].
    """

    index: int
    operator: str
    module: str
    kind: Kind
    factor: int
    roots: Integers
    counts: Counts

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for parts that can be added up."""
        return self.index, self.operator, self.module, self.kind, self.factor, self.roots.tobytes()

    @cached_property
    def _unique(self) -> tuple[Any, Any]:
        return np.unique(self.roots, return_inverse=True)

    @cached_property
    def _share(self) -> "_Share":
        counts = self.counts
        zeros, total, square = (one.numpy() for one in (counts.zeros, counts.total, counts.square))
        positions = np.full(zeros.size, counts.positions)
        return _Share(zeros, positions, total, square, _deviation(counts), np.full(zeros.size, counts.examples))

    def of(self, roots: Integers) -> "_Share | None":
        """What was counted of a layer's neurons; None if it has none here."""
        if np.array_equal(self.roots, roots):
            return self._share  # neurons that only go together still keep counts of their own
        unique, inverse = self._unique
        place = np.searchsorted(unique, roots).clip(max=unique.size - 1)
        here = (unique[place] == roots) & (roots > 0)
        if not here.any():
            return None
        gathered: list[Any] = []
        for name, array in self._share._asdict().items():
            sums = np.zeros(unique.size, array.dtype)
            (np.maximum if name == "examples" else np.add).at(sums, inverse, array)
            gathered.append(np.where(here, sums[place], 0))
        return _Share(*gathered)


def _deviation(counts: Counts) -> Floats:
    """How far the zeros of an entry are from their share of its positions, example by example: float64 [entries].

    The root of the sum over examples of (zeros - share · positions)², times examples / (examples - 1). Over all
    positions it is the standard error of the share, a ratio of sums over examples (Cochran, "Sampling Techniques",
    1977, equation 6.13). Infinite of one example.
    """
    if counts.examples < 2:
        return np.full(counts.zeros.numel(), np.inf)
    share = 1 - counts.zeros.double() / counts.positions  # of what is not zero, which deviates as much
    squares = counts.nonzero_square - 2 * share * counts.nonzero_positions + share.square() * counts.positions_square
    return (squares.clamp_min(0) * (counts.examples / (counts.examples - 1))).sqrt().numpy()


class _Share(NamedTuple):
    """The counts of some neurons: int64 or float64, [neurons] each.

    Deviations add up as if they all went the same way, so that the standard error of a neuron with several entries or
    sites is an upper bound.
    """

    zeros: Integers
    positions: Integers
    total: Floats
    square: Floats
    deviation: Floats
    examples: Integers

    def plus(self, other: "_Share") -> "_Share":
        sums: list[Any] = [mine + theirs for mine, theirs in zip(self, other, strict=True)]
        return _Share(*sums)._replace(examples=np.maximum(self.examples, other.examples))


def since(before: Iterable[Part], parts: Iterable[Part]) -> tuple[Part, ...]:
    """What came to the parts `before`."""
    known = {part.key: part.counts for part in before}
    came = [replace(part, counts=part.counts - known[part.key]) if part.key in known else part for part in parts]
    return tuple(part for part in came if part.counts.examples)


def added_up(parts: Iterable[Part]) -> tuple[Part, ...]:
    """One part for each call and factor; a call that was traced at several sizes is one."""
    found: dict[tuple[Any, ...], Part] = {}
    for part in parts:
        before = found.get(part.key)
        found[part.key] = part if before is None else replace(part, counts=before.counts + part.counts)
    return tuple(found.values())


def measured_layer(layer: LayerProfile, roots: Integers, parts: Sequence[Part]) -> LayerProfile:
    """The layer with the figures of the first kind of activation that it has."""
    reached = [(part, share) for part in parts if (share := part.of(roots)) is not None]
    best = min((KINDS.index(part.kind) for part, _ in reached), default=0)
    share = _total([share for part, share in reached if KINDS.index(part.kind) == best], layer.width)
    return replace(
        layer,
        zeros=share.zeros,
        positions=share.positions,
        mean=_ratio(share.total, share.positions),
        mean_square=_ratio(share.square, share.positions),
        standard_error=_ratio(share.deviation, share.positions),
        examples=share.examples,
    )


def _total(shares: Sequence[_Share], width: int) -> _Share:
    none = np.zeros(width, np.int64)
    floats = none.astype(np.float64)
    return reduce(_Share.plus, shares, _Share(none, none, floats, floats, floats, none))


def sites_of(parts: Sequence[Part], roots: Integers) -> tuple[SiteProfile, ...]:
    """One entry per activation call."""
    found: dict[int, tuple[Part, list[_Share]]] = {}
    for part in parts:
        share = part.of(roots)
        if share is not None:
            found.setdefault(part.index, (part, []))[1].append(share)
    totals = [(part, _total(shares, roots.size)) for _, (part, shares) in sorted(found.items(), key=lambda one: one[0])]
    return tuple(
        SiteProfile(part.index, part.operator, part.module, part.kind, share.zeros, share.positions)
        for part, share in totals
    )


def _ratio(total: Floats, positions: Integers) -> Floats:
    return np.divide(total, positions, out=np.full(total.size, np.nan), where=positions > 0)
