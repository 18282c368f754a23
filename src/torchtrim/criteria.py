"""Criteria: how readily each neuron of a layer may go.

A criterion is a pure function from a `LayerProfile`, which holds what was measured of one layer, to one
score per neuron; the higher the score, the sooner the neuron goes. Any function of that form will do:

    def variance(profile):
        return -(profile.mean_square - profile.mean**2)

A criterion answers NaN for a neuron of which it knows nothing.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from torchtrim.errors import PlanError, ProfileError, nearest

__all__ = [
    "Criterion",
    "LayerProfile",
    "apoz",
    "contribution",
    "l1_norm",
    "l2_norm",
    "mean_activation",
    "random",
    "reconstruction",
    "resolve",
]

Floats: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class LayerProfile:
    """What was measured of one layer; every array has one entry per neuron.

    zeros, positions: int64 [neurons], how many activations were zero, and how many were seen.
    mean, mean_square: float64 [neurons], moments of the activation.
    standard_error: float64 [neurons], of `apoz`, with each example as one observation. examples: int64 [neurons],
    how many were seen.
    incoming_l1, incoming_l2, outgoing_l1, outgoing_l2: float64 [neurons], norms of the weights into and
    out of each neuron.
    unit: int64 [neurons]; the neurons of a group that share an id go together, -1 marks one that must stay.
    group: the name of the leading layer of the group; tied layers share it, and the unit ids with it.
    locked: why the layer cannot be trimmed, or None.

    Raises ProfileError when the arrays are not all of one length.
    """

    name: str
    zeros: Integers
    positions: Integers
    mean: Floats
    mean_square: Floats
    standard_error: Floats
    examples: Integers
    incoming_l1: Floats
    incoming_l2: Floats
    outgoing_l1: Floats
    outgoing_l2: Floats
    unit: Integers
    group: str
    locked: str | None = None

    def __post_init__(self) -> None:
        arrays = {key: value for key, value in vars(self).items() if isinstance(value, np.ndarray)}
        misfits = [f"{key} {value.shape}" for key, value in arrays.items() if value.shape != (self.width,)]
        if misfits:
            raise ProfileError(
                f"profile of {self.name!r}: expected arrays of shape ({self.width},), one entry per neuron, "
                f"found {', '.join(misfits)}"
            )

    @property
    def width(self) -> int:
        """The number of neurons."""
        return self.unit.size

    @property
    def apoz(self) -> Floats:
        """Average percentage of zeros as a share in [0, 1]: float64 [neurons], NaN where nothing was seen.

        Hu et al., "Network Trimming", 2016, equation 1.
        """
        share = np.full(self.width, np.nan)
        np.divide(self.zeros, self.positions, out=share, where=self.positions > 0)
        return share

    def interval(self, confidence: float = 0.95) -> tuple[Floats, Floats]:
        """Lower and upper bounds of `apoz` over all data like those seen: float64 [neurons] each, NaN where none were.

        Wilson's interval for a share, with as many observations as would give the standard error if they were
        independent; where no example differs from another, as many as there were examples.
        Wilson, "Probable inference", 1927; Korn and Graubard, "Confidence intervals for proportions", 1998.
        """
        share, error = self.apoz, self.standard_error
        count = self.examples.astype(np.float64)
        spread = np.isfinite(error) & (error > 0)
        np.divide(share * (1 - share), error**2, out=count, where=spread)
        count[np.isinf(error)] = 0  # of one example nothing is known
        quantile = NormalDist().inv_cdf((1 + confidence) / 2)
        centre = share * count + quantile**2 / 2
        half = quantile * np.sqrt(share * (1 - share) * count + quantile**2 / 4)
        return (centre - half) / (count + quantile**2), (centre + half) / (count + quantile**2)

    @classmethod
    def unmeasured(cls, name: str, **known: Any) -> "LayerProfile":
        """A layer that has seen no data."""
        none = np.zeros(known["unit"].size, np.int64)
        nothing = np.full(none.size, np.nan)
        seen = {"zeros": none, "positions": none, "examples": none}
        return cls(name, **seen, mean=nothing, mean_square=nothing, standard_error=nothing, **known)


Criterion: TypeAlias = Callable[[LayerProfile], Floats]


def apoz(profile: LayerProfile) -> Floats:
    """The share of zeros among the activations: the most silent neuron goes first. float64 [neurons]."""
    return profile.apoz


def mean_activation(profile: LayerProfile) -> Floats:
    """The negated mean activation: the faintest neuron goes first. float64 [neurons]."""
    return _where_seen(profile, -profile.mean)


def l1_norm(profile: LayerProfile) -> Floats:
    """The negated L1 norm of the incoming weights; needs no data. float64 [neurons].

    Li et al., "Pruning Filters for Efficient ConvNets", 2017.
    """
    return -profile.incoming_l1


def l2_norm(profile: LayerProfile) -> Floats:
    """The negated L2 norm of the incoming weights; needs no data. float64 [neurons]."""
    return -profile.incoming_l2


def contribution(profile: LayerProfile) -> Floats:
    """The negated product of mean activation and outgoing L2 norm: what the next layer would miss least."""
    return _where_seen(profile, -profile.mean * profile.outgoing_l2)


def reconstruction(profile: LayerProfile) -> Floats:
    """Stands for what `torchtrim.reconstruction` measures, which `iterate` and the command line call for each round.

    Raises PlanError: a profile is not enough.
    """
    raise PlanError(
        f"layer {profile.name!r}: the criterion reconstruction needs the model and data; pass what "
        "torchtrim.reconstruction(model, example, batches) returns"
    )


def random(seed: int) -> Criterion:
    """A criterion that scores by chance, the baseline of the others.

    The scores follow from the seed and the name of the layer alone, whichever layers are asked about.
    Raises PlanError when the seed is negative.
    """
    if seed < 0:
        raise PlanError(f"criteria.random: expected a seed >= 0, found {seed!r}")

    def criterion(profile: LayerProfile) -> Floats:
        generator = np.random.default_rng([seed, zlib.crc32(profile.name.encode())])
        return generator.random(profile.width)

    criterion.__name__ = criterion.__qualname__ = f"random({seed})"
    return criterion


_NAMED: dict[str, Criterion] = {
    function.__name__: function for function in (apoz, mean_activation, l1_norm, l2_norm, contribution, reconstruction)
}


def resolve(criterion: str | Criterion) -> Criterion:
    """The criterion of that name; a function is returned as it is.

    The names are those of this module; chance is `random` (seed 0) or `random:SEED`.
    Raises PlanError for an unknown name.
    """
    if criterion is random:
        raise PlanError("criteria.random needs a seed: pass criteria.random(0)")
    if callable(criterion):
        return criterion
    if criterion in _NAMED:
        return _NAMED[criterion]
    name, _, seed = str(criterion).partition(":")
    if name == "random" and (criterion == "random" or seed.isdecimal()):
        return random(int(seed or 0))
    known = [*_NAMED, "random"]
    raise PlanError(
        f"unknown criterion {criterion!r}, expected one of {', '.join(known)}, random:SEED, or a function "
        f"of a LayerProfile{nearest(name, known)}"
    )


def _where_seen(profile: LayerProfile, scores: Floats) -> Floats:
    return np.where(profile.positions > 0, scores, np.nan)
