"""The picture of a run: which neurons were silent and went, round by round, and what that did to the accuracy."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from torchtrim import criteria
from torchtrim._budget import Budget
from torchtrim._drawing import BLUE, FAINT, INK, ORANGE, canvas, packed
from torchtrim._rounds import Round
from torchtrim._select import MeanPlusStd, Rule, Threshold
from torchtrim.criteria import Criterion, Floats, LayerProfile
from torchtrim.errors import TorchtrimWarning

_KEPT, _REMOVED = BLUE, ORANGE
_BEHIND = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
_BINS = np.linspace(0, 100, 41)
_LAYERS, _ROUNDS = 6, 8  # shown at most
_ACROSS = 3  # layers beside each other
_TICKS = (100, 99.9, 99.8, 99.7, 99.6, 99.5, 99.4, 99.3, 99.2, 99.1, 99, 98.5, 98, 97, 96, 95, 93, 90, 85, 80, 70, 50,
          20, 0)  # fmt: skip


def picture(
    rounds: Sequence[Round],
    ancestor_accuracy: float,
    *,
    rule: Rule | Budget,
    criterion: Criterion | str = criteria.apoz,
    title: str = "",
) -> bytes | None:
    """A PNG: the APoZ of each trimmed layer's neurons before every round, and accuracy against compression.

    None, with a warning, when matplotlib is not installed; and without rounds.
    """
    if not rounds:
        return None
    layers = _most_trimmed(rounds)
    shown = _spread(rounds, _ROUNDS)
    across = min(_ACROSS, max(1, len(layers)))
    down = max(1, math.ceil(len(layers) / across))
    try:
        with canvas(2.9 * across + 5.2, max(4.2, down * (1.3 + 0.55 * len(shown)))) as figure:
            left, right = figure.subfigures(1, 2, width_ratios=(2.9 * across, 5.2))
            _silence(left, shown, layers, across, down, _limits(rule, criterion))
            axes = right.subplots()
            _accuracy(axes, rounds, ancestor_accuracy)
            handles = axes.get_legend_handles_labels()
            right.legend(*handles, loc="outside upper left", ncols=3, frameon=False, fontsize=8.5)
            if title:
                figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
            return packed(figure)
    except ImportError as error:
        warnings.warn(
            f"no picture was drawn: {error}; run pip install 'torchtrim[report]'", TorchtrimWarning, stacklevel=2
        )
        return None


def _most_trimmed(rounds: Sequence[Round]) -> list[str]:
    """The layers that lost most neurons, in order of execution; those whose APoZ is unknown left out."""
    lost: dict[str, int] = {}
    for done in rounds:
        for name, neurons in done.plan.removed.items():
            lost[name] = lost.get(name, 0) + len(neurons)
    most = sorted(lost, key=lambda name: -lost[name])[:_LAYERS]
    return [name for name, layer in rounds[0].profile.items() if name in most and layer.positions.any()]


def _spread(rounds: Sequence[Round], most: int) -> list[Round]:
    """All rounds, or evenly spread ones when there are too many to show."""
    places = np.unique(np.linspace(0, len(rounds) - 1, min(most, len(rounds))).round().astype(int))
    return [rounds[place] for place in places]


def _limits(rule: Rule | Budget, criterion: Criterion | str) -> Any:
    """From a layer to the APoZ in per cent above which the rule removes, where there is one such limit."""

    def limit(layer: LayerProfile) -> float | None:
        scores = layer.apoz[layer.unit >= 0]
        if criteria.resolve(criterion) is not criteria.apoz or not scores.size:
            return None
        if isinstance(rule, MeanPlusStd):
            return 100 * float(scores.mean() + rule.k * scores.std())
        return 100 * rule.t if isinstance(rule, Threshold) else None

    return limit


# Left: how silent the neurons are -----------------------------------------------------------------------


def _silence(panel: Any, rounds: Sequence[Round], layers: Sequence[str], across: int, down: int, limit: Any) -> None:
    """A ridge of histograms for each layer, one above another as the rounds go down."""
    grid = panel.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
    if not layers:
        panel.text(0.5, 0.5, "no activation of the trimmed\nlayers was observed", ha="center", color=FAINT)
    heights = [h.max() for name in layers for done in rounds for h in _shares(done, name)[:1]]
    scale = 0.74 / (max(heights, default=0) or 1)
    for axes, name in zip(grid, layers, strict=False):
        for row, done in enumerate(rounds):
            _ridge(axes, done, name, len(rounds) - 1 - row, scale, limit)
        axes.set_title(name, loc="left", fontsize=10, fontweight="bold")
        axes.set_xlim(0, 100)
        axes.set_ylim(-0.08, len(rounds) + 0.05)
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.tick_params(axis="y", length=0)
        axes.spines[["left", "top", "right"]].set_visible(False)
        axes.tick_params(axis="x", labelbottom=True)
        axes.set_yticks(range(len(rounds)), [f"round {done.number}" for done in reversed(rounds)], va="bottom")
    for axes in grid[len(layers) :]:
        axes.set_visible(False)
    panel.supxlabel("APoZ of the neurons before the round (%)", fontsize=9)
    panel.legend(handles=_legend(), loc="outside upper left", ncols=3 if across > 1 else 1, frameon=False, fontsize=8.5)


def _ridge(axes: Any, done: Round, name: str, base: float, scale: float, limit: Any) -> None:
    layer = done.profile[name]
    both, kept = _shares(done, name)
    bottom = np.full(kept.size, base)
    axes.stairs(base + scale * both, _BINS, baseline=base + scale * kept, fill=True, color=_REMOVED, linewidth=0)
    axes.stairs(base + scale * kept, _BINS, baseline=bottom, fill=True, color=_KEPT, linewidth=0)
    axes.axhline(base, color=FAINT, linewidth=0.6)
    whole = name in done.plan.removed and not done.rejected  # else less went than the rule says
    above = limit(layer) if whole else None
    if above is not None and above <= 100:
        axes.plot([above, above], [base, base + 0.78], color=INK, linewidth=1, linestyle=(0, (3, 2)))
    plan = done.plan.layers.get(name)
    change = f"{layer.width} → {plan.remaining}" if plan and plan.removed else f"{layer.width}"
    axes.text(1.5, base + 0.92, change, fontsize=8, va="top", color=INK)


def _shares(done: Round, name: str) -> tuple[Floats, Floats]:
    """Neurons by APoZ, as shares of the layer: all of them, and those that stay. float64 [bins]."""
    layer = done.profile[name]
    percent = 100 * layer.apoz
    stays = np.ones(layer.width, dtype=bool)
    stays[list(done.plan.removed.get(name, ()))] = False
    seen = ~np.isnan(percent)
    both = np.histogram(percent[seen], _BINS)[0] / layer.width
    return both, np.histogram(percent[seen & stays], _BINS)[0] / layer.width


def _legend() -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    return [
        Patch(color=_KEPT, label="neurons that stay"),
        Patch(color=_REMOVED, label="neurons removed"),
        Line2D([], [], color=INK, linewidth=1, linestyle=(0, (3, 2)), label="the rule's limit"),
    ]


# Right: accuracy against compression --------------------------------------------------------------------


def _accuracy(axes: Any, rounds: Sequence[Round], ancestor: float) -> None:
    """Accuracy before and after retraining, on a scale that opens towards 100 %."""
    told = [done.test or done.accuracy for done in rounds]
    compression = [done.compression for done in rounds]
    trimmed, retrained = [accuracy.trimmed for accuracy in told], [accuracy.retrained for accuracy in told]
    axes.set_yscale("function", functions=(_opened, lambda z: 100.1 - 10.0**-z))
    axes.axhline(ancestor, color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)), label=f"ancestor, {ancestor:.2f} %")
    axes.plot(compression, trimmed, "s--", color=_REMOVED, markerfacecolor="white", label="before retraining")
    axes.plot([1, *compression], [ancestor, *retrained], "o-", color=_KEPT, label="after retraining")
    for x, low, high in zip(compression, trimmed, retrained, strict=True):
        for value, up in ((low, low > high), (high, low <= high)):
            place = {"xytext": (0, 8 if up else -15), "textcoords": "offset points", "ha": "center"}
            axes.annotate(f"{value:.2f}", (x, value), fontsize=8, **place, bbox=_BEHIND)
    _limit_accuracy(axes, [ancestor, *trimmed, *retrained])
    reach = max(compression) - 1
    axes.set_xlim(1 - 0.05 * reach, 1 + 1.1 * reach)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}×")
    axes.set_xlabel("compression (parameters of the ancestor / parameters left)")
    axes.set_ylabel(f"{'test ' if rounds[0].test else ''}accuracy (%), finer towards 100")
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _opened(accuracy: Any) -> Any:
    return -np.log10(np.maximum(100.1 - accuracy, 1e-3))


def _limit_accuracy(axes: Any, values: Sequence[float]) -> None:
    """Limits with room for the labels, and ticks that do not crowd."""
    low, high = float(_opened(min(values))), float(_opened(max(values)))
    margin = max(0.12 * (high - low), 0.05)
    bottom, top = (100.1 - 10.0**-edge for edge in (low - 1.3 * margin, high + margin))
    axes.set_ylim(max(bottom, -20), min(top, 100.05))
    ticks: list[float] = []
    for tick in _TICKS:
        apart = not ticks or _opened(ticks[-1]) - _opened(tick) > 0.07 * (high - low + 2 * margin)
        if bottom <= tick <= top and apart:
            ticks.append(tick)
    if len(ticks) < 2:
        ticks = sorted({round(value, 2) for value in (min(values), max(values))})
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
