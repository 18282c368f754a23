"""Pictures of a profile: how silent the neurons of each layer are, and one layer's for each class."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from torchtrim._classes import Label
from torchtrim._drawing import BLUE, FAINT, INK, ORANGE, canvas, packed
from torchtrim.criteria import Floats, LayerProfile

_BINS = np.linspace(0, 100, 41)
_LAYERS, _LABELS = 60, 40  # shown at most
_LETTERS = 34  # of a name
_COLOURS = "Blues"
_BAR: float = 4.0  # inches that the scale of colours is high at most


def layers_picture(layers: Sequence[LayerProfile], examples: int, form: str) -> bytes:
    """A row for each layer: on the left its neurons by APoZ, on the right each of them, the most silent last.

    Raises ImportError without matplotlib, ValueError for a form that it does not know.
    """
    shown = [layers[place] for place in _spread(len(layers), _LAYERS)]
    percent = [np.sort(100 * layer.apoz[layer.positions > 0]) for layer in shown]
    title = f"APoZ over {examples:,} examples"
    title += f", {len(shown)} of {len(layers)} layers" if len(shown) < len(layers) else ""
    with canvas(9.6, 1.5 + (0.42 if len(shown) <= 24 else 0.26) * max(len(shown), 3)) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        for row, values in enumerate(percent):
            _histogram(left, row, values)
        left.set_yticks(range(len(shown)), [_short(layer.name) for layer in shown])
        left.set_ylim(len(shown) - 0.45, -0.6)
        left.tick_params(axis="y", length=0)
        left.set_xlim(-1, 101)
        left.set_xticks([0, 25, 50, 75, 100])
        left.set_xlabel("APoZ (%) of the neurons, and their mean (line)")
        for row, (layer, values) in enumerate(zip(shown, percent, strict=True)):
            _heat(right, np.linspace(0, 100, values.size + 1), np.array([row - 0.4, row + 0.4]), values[None])
            right.text(101.5, row, f"{layer.width:,}", va="center", fontsize=8, color=INK)
        right.text(101.5, -0.62, "neurons", va="bottom", fontsize=8, color=INK)
        right.set_xlim(0, 100)
        right.tick_params(axis="y", length=0)
        right.set_xlabel("neurons of the layer, the most silent last (%)")
        _finish(figure, (left, right), title)
        return packed(figure, form)


def classes_picture(layer: LayerProfile, classes: Mapping[Label, LayerProfile], examples: int, form: str) -> bytes:
    """A row for each class, a column for each neuron of one layer, the most silent over all classes last.

    Raises as `layers_picture` does.
    """
    order = np.argsort(layer.apoz, kind="stable")
    labels = list(classes)
    values = 100 * np.stack([classes[label].apoz[order] for label in labels])
    title = f"APoZ of {_short(layer.name)} by class, over {examples:,} examples"
    with canvas(9.6, min(1.8 + 0.24 * max(len(labels), 4), 11.0)) as figure:
        axes = figure.subplots()
        _heat(axes, np.arange(layer.width + 1.0), np.arange(-0.5, len(labels)), values)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        ticks = _spread(len(labels), _LABELS)
        axes.set_yticks(ticks, [_short(str(labels[place])) for place in ticks])
        axes.tick_params(axis="y", length=0)
        axes.set_ylabel("class")
        axes.set_xlabel(f"the {layer.width:,} neurons, the most silent over all classes last")
        _finish(figure, (axes,), title)
        return packed(figure, form)


def _finish(figure: Any, panels: Sequence[Any], title: str) -> None:
    mesh = panels[-1].collections[0]
    shrink = min(1.0, _BAR / figure.get_figheight())
    for axes in panels:
        axes.spines[["left", "top", "right"]].set_visible(False)
    bar = figure.colorbar(mesh, ax=panels[-1], location="right", pad=0.11 if len(panels) > 1 else 0.02, aspect=24,
                          shrink=shrink, anchor=(0, 1))  # fmt: skip
    bar.set_label("APoZ (%)")
    bar.outline.set_visible(False)
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")


def _histogram(axes: Any, row: int, values: Floats) -> None:
    shares = np.histogram(values, _BINS)[0] / max(values.size, 1)
    base = row + 0.4
    heights = 0.8 * shares / (shares.max() or 1)
    axes.stairs(base - heights, _BINS, baseline=base, fill=True, color=BLUE, linewidth=0)
    axes.axhline(base, color=FAINT, linewidth=0.6)
    mean = values.mean()
    axes.plot([mean, mean], [base, base - 0.8], color=ORANGE, linewidth=1.4)


def _heat(axes: Any, across: Floats, down: Floats, values: Floats) -> None:
    """Values in per cent [down, across] as colours between these edges."""
    axes.pcolormesh(across, down, values, cmap=_COLOURS, vmin=0, vmax=100, rasterized=True)


def _spread(count: int, most: int) -> list[int]:
    """All places, or evenly spread ones when there are too many to show."""
    return sorted({math.floor(place) for place in np.linspace(0, count - 1, min(most, count))})


def _short(name: str) -> str:
    """The name, without its middle where it is long."""
    return name if len(name) <= _LETTERS else f"{name[: _LETTERS // 2 - 1]}…{name[-_LETTERS // 2 :]}"
