"""Counts of many places over many batches, of which each counts as a whole or not at all."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from torchtrim._counting import Counts, count, native_room
from torchtrim._flow import Site

Place = tuple[Site, int]  # an activation call, and which of its factors
Totals = dict[Place, Counts]


class Tally(Protocol):
    """One way to keep counts."""

    def add(
        self, place: Place, values: Tensor, kept: Sequence[int], examples: int | None = None, tolerance: float = 0.0
    ) -> None:
        """Count as `count` does, for the batch in progress."""

    def drop(self) -> None:
        """Forget the batch in progress."""

    def commit(self, batch: int) -> None:
        """Add the batch in progress, whose number it is, to the totals."""

    def bad(self) -> tuple[int, Place] | None:
        """The first batch that had NaN or infinite values, and the first place in it."""

    def totals(self) -> Totals: ...


class HostTally(Tally):
    """Every tensor is counted at once."""

    def __init__(self) -> None:
        self._totals: Totals = {}
        self._pending: list[tuple[Place, Counts]] = []
        self._bad: tuple[int, Place] | None = None

    def add(
        self, place: Place, values: Tensor, kept: Sequence[int], examples: int | None = None, tolerance: float = 0.0
    ) -> None:
        self._pending.append((place, count(values, kept, examples=examples, tolerance=tolerance)))

    def drop(self) -> None:
        self._pending.clear()

    def commit(self, batch: int) -> None:
        for place, counts in self._pending:
            if self._bad is None and not counts.finite:
                self._bad = batch, place
            before = self._totals.get(place)
            self._totals[place] = counts if before is None else before + counts
        self._pending.clear()

    def bad(self) -> tuple[int, Place] | None:
        return self._bad

    def totals(self) -> Totals:
        return self._totals


class Tallies:
    """One tally for each way of counting that the values of a run need."""

    LOOK = 64  # batches from one look at a device's flags to the next, since a look waits for the device

    def __init__(self) -> None:
        self._host = HostTally()
        self._devices: dict[torch.device, Tally] = {}

    def add(
        self, place: Place, values: Tensor, kept: Sequence[int], examples: int | None = None, tolerance: float = 0.0
    ) -> None:
        """Count as `count` does, for the batch in progress."""
        native: Any = native_room("cuda") if values.device.type == "cuda" else None
        if native is None or values.dtype not in native.DTYPES:
            self._host.add(place, values, kept, examples, tolerance)
            return
        if values.device not in self._devices:
            self._devices[values.device] = native.DeviceTally(values.device)
        self._devices[values.device].add(place, values, kept, examples, tolerance)

    def drop(self) -> None:
        """Forget the batch in progress."""
        for tally in self._all():
            tally.drop()

    def commit(self, batch: int) -> None:
        """Add the batch in progress, whose number it is, to the totals."""
        for tally in self._all():
            tally.commit(batch)

    def bad(self, batch: int | None = None) -> tuple[int, Place] | None:
        """The first batch that had NaN or infinite values, and the first place in it, as far as is known.

        batch: the batch that was just committed; if it is given, devices are looked at now and then only.
        """
        tallies: list[Tally] = self._all() if batch is None or batch % self.LOOK == 0 else [self._host]
        found = [one for tally in tallies if (one := tally.bad()) is not None]
        return min(found, key=lambda bad: (bad[0], bad[1][0].index), default=None)

    def totals(self) -> Totals:
        """The totals of all places, on the CPU."""
        totals: Totals = {}
        for tally in self._all():
            for place, counts in tally.totals().items():
                here = counts.each(Tensor.cpu)
                totals[place] = totals[place] + here if place in totals else here
        return totals

    def _all(self) -> list[Tally]:
        return [self._host, *self._devices.values()]
