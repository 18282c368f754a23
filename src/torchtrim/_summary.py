"""What a profile says layer by layer, as the paper's table 1 does."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from torchtrim.criteria import Floats, LayerProfile

SILENT = 0.9  # the paper counts the neurons whose APoZ is above
_TITLES = ("layer", "neurons", "mean APoZ", "95 % interval", "a neuron's ±", "above 90 %", "always zero")


@dataclass(frozen=True)
class Row:
    """What a profile says of one layer; shares are in [0, 1].

    apoz: the mean over its neurons. low, high: the means of the bounds of their 95 % intervals. plus_minus: half of the
    median neuron's interval. above, dead: how many neurons have an APoZ above 0.9, and how many were always zero.
    """

    layer: str
    neurons: int
    apoz: float
    low: float
    high: float
    plus_minus: float
    above: int
    dead: int

    @classmethod
    def of(cls, layer: LayerProfile) -> "Row":
        low, high = (float(np.nanmean(bound)) for bound in layer.interval())
        dead = (layer.positions > 0) & (layer.zeros == layer.positions)
        median = float(np.median(half_widths(layer)))
        apoz, above = float(np.nanmean(layer.apoz)), int((layer.apoz > SILENT).sum())
        return cls(layer.name, layer.width, apoz, low, high, median, above, int(dead.sum()))

    @property
    def cells(self) -> tuple[str, ...]:
        """A text for each column."""
        return (
            self.layer,
            f"{self.neurons:,}",
            f"{100 * self.apoz:.2f} %",
            f"{100 * self.low:.2f}–{100 * self.high:.2f} %",
            f"{100 * self.plus_minus:.2f} %",
            f"{self.above:,}",
            f"{self.dead:,}",
        )


@dataclass(frozen=True)
class Summary:
    """The rows of the layers that were seen, in the order of execution; prints as a table."""

    rows: tuple[Row, ...]

    @classmethod
    def of(cls, layers: Iterable[LayerProfile]) -> "Summary":
        return cls(tuple(Row.of(layer) for layer in layers if layer.positions.any()))

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        table = [_TITLES, *(row.cells for row in self.rows)]
        first, *others = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join("  ".join([cells[0].ljust(first), *map(str.rjust, cells[1:], others)]) for cells in table)


def half_widths(layer: LayerProfile) -> Floats:
    """Half of the 95 % interval of every neuron that was seen: float64 [neurons]."""
    low, high = layer.interval()
    return ((high - low) / 2)[layer.positions > 0]
