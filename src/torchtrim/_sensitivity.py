"""How the accuracy of a model falls when one group of layers alone loses its neurons, without retraining.

Li et al., "Pruning Filters for Efficient ConvNets", 2017, figure 2.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from torchtrim import criteria
from torchtrim._accuracy import accuracy_of
from torchtrim._calibration import Calibration
from torchtrim._checkpoint import digest_of
from torchtrim._copies import named_tensors
from torchtrim._drawing import form_of
from torchtrim._files import write_whole
from torchtrim._forward import Forward
from torchtrim._graph import trace
from torchtrim._measure import profile as measured
from torchtrim._neurons import NeuronGraph
from torchtrim._profile import Profile
from torchtrim._reconstruction import reconstruction
from torchtrim._repair import Ways, check_repair_positions, checked_ways
from torchtrim._repair import repair as mended
from torchtrim._select import Fraction, observed_groups, select
from torchtrim._sensitivity_picture import curves_picture
from torchtrim._surgery import trim
from torchtrim.criteria import Criterion
from torchtrim.errors import PlanError, ProfileError, StoreError

_FORMAT, _VERSION = "torchtrim-sensitivity", 1
_LEAST, _MOST = 0.1, 10.0  # a weight: no layer is free, and none is out of reach


@dataclass(frozen=True)
class Sensitivity:
    """The accuracy of a model of which one group of layers alone lost a fraction of its units.

    baseline: of the whole model. fractions: of the units that went. accuracy: by group, named by its first layer, one
    for each fraction, as `evaluate` gave them. layers: of each group. facts: what it was measured of, and how.
    """

    baseline: float
    fractions: tuple[float, ...]
    accuracy: Mapping[str, tuple[float, ...]]
    layers: Mapping[str, tuple[str, ...]]
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any], compare=False)

    @property
    def lost(self) -> dict[str, float]:
        """By group, the accuracy that is lost, the mean over the fractions; none where it rises."""
        return {
            name: float(np.mean([max(self.baseline - one, 0.0) for one in found]))
            for name, found in self.accuracy.items()
        }

    def weights(self) -> dict[str, float]:
        """Factors for `Budget(weights=...)`, by layer: what its group loses, relative to the mean of all groups.

        Between 0.1 and 10; all are 1 where no group loses anything. Raises ProfileError: some accuracies are missing.
        """
        self._check_whole("weights")
        lost = self.lost
        mean = sum(lost.values()) / max(len(lost), 1)
        weights = {name: min(max(one / mean, _LEAST), _MOST) if mean > 0 else 1.0 for name, one in lost.items()}
        return {layer: weights[name] for name, layers in self.layers.items() for layer in layers}

    def save(self, path: str | Path) -> None:
        """Write it as JSON; the file appears complete or not at all. Raises StoreError."""
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "baseline": self.baseline,
            "fractions": self.fractions,
            "accuracy": dict(self.accuracy),
            "layers": dict(self.layers),
            "facts": dict(self.facts),
        }
        write_whole(Path(path), json.dumps(content, indent=1))

    @classmethod
    def load(cls, path: str | Path) -> "Sensitivity":
        """Read what `save` wrote. Raises StoreError when the file is missing, damaged, or something else."""
        if not Path(path).is_file():
            raise StoreError(f"{path}: expected a sensitivity that `Sensitivity.save` wrote, found no such file")
        try:
            content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["format"] != _FORMAT or content["version"] != _VERSION:
                raise ValueError(f"{content['format']!r} {content['version']!r}")
            return cls(
                float(content["baseline"]),
                tuple(map(float, content["fractions"])),
                {str(name): tuple(map(float, found)) for name, found in content["accuracy"].items()},
                {str(name): tuple(map(str, layers)) for name, layers in content["layers"].items()},
                dict(content["facts"]),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"{path}: expected a sensitivity that `Sensitivity.save` wrote, found: {type(error).__name__}: {error}"
            ) from error

    def plot(self, path: str | Path) -> None:
        """Draw a curve for each group; the ending says the form, such as png. Needs `pip install 'torchtrim[report]'`.

        Raises ProfileError: no matplotlib, an unknown ending, accuracies that are missing. Raises StoreError: the file
        cannot be written.
        """
        self._check_whole("plot")
        write_whole(Path(path), curves_picture(self.baseline, self.fractions, self.accuracy, form_of(path)))

    @property
    def missing(self) -> int:
        """How many accuracies an analysis that was interrupted has not found."""
        return sum(len(self.fractions) - len(found) for found in self.accuracy.values())

    def _check_whole(self, what: str) -> None:
        if self.missing:
            raise ProfileError(
                f"{what}: expected a whole sensitivity, found one that was interrupted, without {self.missing} of its "
                "accuracies; go on with it first (checkpoint=, --resume)"
            )

    def __str__(self) -> str:
        weights = {} if self.missing else self.weights()
        rows = [("layer", "tied", *(f"− {one:.0%}" for one in self.fractions), "weight")]
        rows += [
            (
                name,
                f"+ {len(self.layers[name]) - 1}" if len(self.layers[name]) > 1 else "",
                *(f"{one:.4g}" for one in found),
                *["?"] * (len(self.fractions) - len(found)),
                f"{weights[name]:.2f}" if name in weights else "?",
            )
            for name, found in self.accuracy.items()
        ]
        first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in rows]
        return "\n".join([f"whole: {self.baseline:.4g}; by the fraction that one group of layers lost:", *lines])


def sensitivity(
    model: nn.Module,
    example: Any,
    batches: Iterable[Any],
    evaluate: Callable[[nn.Module], float],
    *,
    profile: Profile | None = None,
    fractions: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    criterion: Criterion | str = criteria.apoz,
    layers: Sequence[str] | None = None,
    repair: Ways | None = None,
    repair_positions: int | None = None,
    forward: Forward | None = None,
    through_norms: bool = False,
    checkpoint: str | Path | None = None,
) -> Sensitivity:
    """Trim one group of layers at a time, by each fraction of its units, and evaluate; nothing is retrained.

    example: as for `trim`. batches, forward: as for `profile` and `repair`. evaluate: the accuracy of a model, the
    higher the better. profile: what was measured of the model already, which spares a pass over the batches. criterion,
    layers: as for `iterate`; a layer brings in those it is tied to. repair, repair_positions: as for `iterate`, of
    every trimmed model. through_norms: as for `trace`. checkpoint: a file that holds what was found so far; a call that
    finds it goes on from there, such as after an interrupt.

    Raises PlanError: fractions that are none; layers that are unknown or locked. Raises ProfileError: batches that do
    not fit, an accuracy that is no finite number. Raises StoreError: a checkpoint of another model, or asked otherwise.
    Raises TorchtrimError: positions that nothing looks at.
    """
    rules = checked_fractions(fractions)
    function = criteria.resolve(criterion)
    ways = () if repair is None else checked_ways(repair)
    check_repair_positions(repair_positions, ways, function)
    if repair is not None or function is criteria.reconstruction:
        Calibration(batches, forward)
    graph = example if isinstance(example, NeuronGraph) else trace(model, example, through_norms=through_norms)
    facts = {
        "model": digest_of(named_tensors(model)),
        "criterion": getattr(function, "__name__", type(function).__name__),
        "repair": repair if repair is None or isinstance(repair, str) else list(repair),
        "repair_positions": repair_positions,
        "through_norms": graph.through_norms,
    }
    before = _before(checkpoint, facts, tuple(rule.p for rule in rules))
    if profile is None:
        profile = measured(model, batches, forward, through_norms=graph.through_norms)
        if profile.partial:  # an interrupt ended the pass, and ends this
            raise KeyboardInterrupt
    if function is criteria.reconstruction:
        function = reconstruction(
            model,
            graph,
            batches,
            layers,
            forward=forward,
            positions=repair_positions,
            through_norms=graph.through_norms,
        )
    groups, _ = observed_groups(profile, layers, function)
    tied = {group: tuple(places) for group, (_, places) in groups.items()}
    baseline = before.baseline if before else _evaluated(evaluate, model, "the whole model")
    found = {group: before.accuracy.get(group, ()) if before else () for group in groups}

    def result() -> Sensitivity:
        return Sensitivity(baseline, tuple(rule.p for rule in rules), dict(found), tied, facts)

    for group in groups:
        for rule in rules[len(found[group]) :]:
            plan = select(profile, rule=rule, layers=[group], criterion=function)
            trimmed = trim(model, plan, graph)
            if repair is not None:
                trimmed = mended(trimmed, model, graph, batches, repair, forward=forward, positions=repair_positions)
            found[group] = (*found[group], _evaluated(evaluate, trimmed, f"{group} without {rule.p:.0%}"))
            if checkpoint is not None:
                result().save(checkpoint)
    return result()


def checked_fractions(fractions: Sequence[float]) -> list[Fraction]:
    """A rule for each, in ascending order. Raises PlanError: none, or one that is no share."""
    if not len(fractions):
        raise PlanError(f"fractions: expected shares such as (0.1, 0.5), found {fractions!r}")
    return sorted((Fraction(one) for one in fractions), key=lambda rule: rule.p)


def _before(checkpoint: str | Path | None, facts: Mapping[str, Any], fractions: Sequence[float]) -> Sensitivity | None:
    """What an earlier call left in the file."""
    if checkpoint is None or not Path(checkpoint).exists():
        return None
    found = Sensitivity.load(checkpoint)
    differs = [name for name, value in facts.items() if found.facts.get(name) != value]
    differs += ["fractions"] if found.fractions != tuple(fractions) else []
    if differs:
        raise StoreError(
            f"{checkpoint}: expected a sensitivity of this model, asked in this way, found another "
            f"{', '.join(differs)}; delete the file to begin anew, or choose another"
        )
    return found


def _evaluated(evaluate: Callable[[nn.Module], float], model: nn.Module, what: str) -> float:
    found = accuracy_of(evaluate, model, what)
    if not math.isfinite(found):
        raise ProfileError(f"evaluate: expected a finite accuracy of {what}, found {found}")
    return found
