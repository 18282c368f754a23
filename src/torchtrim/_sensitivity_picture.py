"""The picture of a sensitivity analysis: accuracy against the fraction that one group of layers lost."""

from collections.abc import Mapping, Sequence
from typing import Any

from torchtrim._drawing import FAINT, INK, canvas, packed

_CURVES = 30  # shown at most: of more, those that lose most
_LETTERS = 30  # of a name


def curves_picture(
    baseline: float, fractions: Sequence[float], accuracy: Mapping[str, Sequence[float]], form: str
) -> bytes:
    """A curve for each group, from dark for the first to light for the last, named beside it.

    Raises ImportError without matplotlib, ValueError for a form that it does not know.
    """
    most = sorted(accuracy, key=lambda name: sum(accuracy[name]))[:_CURVES]
    shown = [name for name in accuracy if name in most]
    title = "Accuracy when one layer, with those it is tied to, is trimmed"
    title += f"; the {len(shown)} most sensitive of {len(accuracy)}" if len(shown) < len(accuracy) else ""
    with canvas(9.6, max(4.0, 1.6 + 0.17 * len(shown))) as figure:
        from matplotlib import colormaps

        axes: Any = figure.subplots()
        axes.axhline(baseline, color=FAINT, linewidth=0.8)
        for place, name in enumerate(shown):
            colour = colormaps["viridis"](0.9 * place / max(len(shown) - 1, 1))
            axes.plot(
                [0, *(100 * one for one in fractions)],
                [baseline, *accuracy[name]],
                color=colour,
                marker="os^Dv"[place % 5],
                markersize=4,
                linewidth=1.3,
                label=name if len(name) <= _LETTERS else f"{name[: _LETTERS // 2]}…{name[-_LETTERS // 2 :]}",
            )
        axes.set_xlim(0, 100 * max(fractions) + 1)
        axes.set_xlabel("neurons removed of the layer (%)")
        axes.set_ylabel("accuracy")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
        figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left", color=INK)
        return packed(figure, form)
