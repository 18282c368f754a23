"""Rounds and profiles as tables: text that grows line by line, rich tables, Markdown.

Everything here returns what is to be shown; printing is the caller's.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table
from rich.text import Text

from torchtrim import criteria
from torchtrim._cost import Cost
from torchtrim._plan import LayerPlan
from torchtrim._profile import Profile
from torchtrim._rounds import Progressive, Round
from torchtrim._select import Rule, select
from torchtrim._summary import SILENT, Row
from torchtrim.criteria import Criterion, LayerProfile
from torchtrim.errors import PlanError

_ALL_WIDTHS = 6  # a model of at most so many layers is written as the widths of all of them, as 20-50-500-10
_TRIMMED_WIDTHS = 4  # a larger one as those of the layers that are trimmed, if they are at most so many


@dataclass(frozen=True)
class Ancestor:
    """The model before the first round. accuracy: in per cent. seconds: what making it took."""

    widths: Mapping[str, int]
    cost: Cost
    accuracy: float
    seconds: float


class RoundTable:
    """The paper's table of an ancestor and its rounds; its lines can be printed while the rounds go on.

    layers: those that are trimmed, if they are known. batch: how many inputs the costs are of. tested: whether the
    accuracy is that of test data. device: where latency was measured. columns: how many characters a line may have;
    the last columns make room. Hu et al., "Network Trimming", 2016.
    """

    def __init__(
        self,
        ancestor: Ancestor,
        layers: Sequence[str] | None,
        *,
        batch: int,
        tested: bool = True,
        device: str = "the CPU",
        columns: int | None = None,
    ) -> None:
        self._batch = batch
        self._layers = _shown_layers(ancestor.widths, layers)
        self.titles = (
            "round",
            "-".join(self._layers) or "neurons",
            "parameters",
            "compression",
            "test accuracy (%)" if tested else "accuracy (%)",
            "speed-up",
            "FLOPs",
            "latency",
            "time",
        )
        cost = ancestor.cost
        self.first = self._cells(0, ancestor.widths, cost, cost, f"{ancestor.accuracy:.2f}", ancestor.seconds)
        self.caption = (
            "Round 0 is the ancestor. Accuracy: before → after retraining. FLOPs: of one input, a "
            f"multiplication with its addition as two. Latency: of a batch of {batch} inputs on {device}, "
            "of the ancestor → of the trimmed model, timed in turns."
        )
        least = ("", "", "", "100.00×", "99.99 → 100.00", "10.00×", "999.99 M", "99.99 → 99.99 ms", "999.9 s")
        self._sizes = [max(map(len, column)) for column in zip(self.titles, self.first, least, strict=True)]
        while columns is not None and len(self._sizes) > 1 and sum(self._sizes) + 2 * len(self._sizes) - 2 > columns:
            self._sizes.pop()

    def cells(self, done: Round) -> tuple[str, ...]:
        """What the table says of a round, a text for each of `titles`."""
        accuracy = done.test or done.accuracy
        both = f"{accuracy.trimmed:.2f} → {accuracy.retrained:.2f}"
        return self._cells(done.number, done.widths, done.cost, done.ancestor, both, sum(done.seconds.values()))

    def line(self, cells: Sequence[str]) -> str:
        """Some cells as an aligned line of text; begin with `line(table.titles)` and `line(table.first)`."""
        aligned = [
            cell.ljust(size) if place == 1 else cell.rjust(size)
            for place, (cell, size) in enumerate(zip(cells, self._sizes, strict=False))
        ]
        return "  ".join(aligned).rstrip()

    def markdown(self, rounds: Iterable[Round]) -> str:
        """The whole table as Markdown, its caption below."""
        rows = [self.titles, tuple("---" if place == 1 else "--:" for place in range(len(self.titles))), self.first]
        rows += [self.cells(done) for done in rounds]
        return "\n".join(["| " + " | ".join(row) + " |" for row in rows] + ["", self.caption])

    def _cells(
        self, number: int, widths: Mapping[str, int], cost: Cost, ancestor: Cost, accuracy: str, seconds: float
    ) -> tuple[str, ...]:
        shown = [str(widths[name]) for name in self._layers]
        return (
            str(number),
            "-".join(shown) or f"{sum(widths.values()):,}",
            f"{cost.parameters:,}",
            f"{ancestor.parameters / cost.parameters:.2f}×",
            accuracy,
            f"{ancestor.latency / cost.latency:.2f}×",
            short_count(cost.flops / self._batch),
            f"{1e3 * ancestor.latency:.2f} → {1e3 * cost.latency:.2f} ms" if number else f"{1e3 * cost.latency:.2f} ms",
            f"{seconds:.1f} s",
        )


def _shown_layers(widths: Mapping[str, int], layers: Sequence[str] | None) -> tuple[str, ...]:
    """The layers whose widths stand for the model; none when they would be too many."""
    if len(widths) <= _ALL_WIDTHS:
        return tuple(widths)
    trimmed = tuple(name for name in widths if layers is not None and name in layers)
    return trimmed if len(trimmed) <= _TRIMMED_WIDTHS else ()


def short_count(count: float) -> str:
    """4,586,000 as "4.59 M"."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f}"


# A profile ----------------------------------------------------------------------------------------------


def profile_table(measured: Profile, rule: Rule, criterion: Criterion | str = criteria.apoz) -> Table:
    """What was measured, layer by layer as in the paper's table 1, and what the rule would remove."""
    plans, reason = _plans(measured, rule, criterion)
    shown = Table(
        title=f"APoZ over {measured.examples:,} examples" + ", where it was interrupted" * measured.partial,
        caption="APoZ: share of a neuron's activations that are zero, ± with a confidence of 95 %. "
        f"Removed: by the rule {rule}.{reason}",
        title_justify="left",
        caption_justify="left",
        caption_style="dim",
        header_style="bold",
        show_footer=True,
    )
    rows = {row.layer: row for row in measured.summary()}
    silent, dead = sum(row.above for row in rows.values()), sum(row.dead for row in rows.values())
    removed = sum(len(plan.removed) for plan in plans.values())
    neurons = sum(measured.widths.values())
    shown.add_column("layer", footer="total", no_wrap=True)
    for title, total in (
        ("neurons", f"{neurons:,}"),
        ("mean APoZ (%)", ""),
        (f"above {SILENT:.0%}", f"{silent:,}"),
        ("always zero", f"{dead:,}"),
        ("removed", f"{removed:,}"),
    ):
        shown.add_column(title, footer=total, justify="right")
    locked = any(layer.locked for layer in measured.values())
    if locked:
        shown.add_column("cannot be trimmed: why", style="dim", overflow="fold")
    for name, layer in measured.items():
        cells = _profile_cells(layer, rows.get(name), plans.get(name))
        shown.add_row(Text(name), *cells, *([Text(layer.locked or "")] if locked else []))
    return shown


def classes_table(measured: Profile) -> Table:
    """A row for each class: how many examples it has, and the neurons that are silent for it alone."""
    shown = Table(
        title="By class",
        caption=f"Silent for it alone: neurons with an APoZ above {SILENT:.0%} over its examples, and over no other's.",
        title_justify="left",
        caption_justify="left",
        caption_style="dim",
        header_style="bold",
    )
    shown.add_column("class", no_wrap=True)
    shown.add_column("examples", justify="right")
    shown.add_column("mean APoZ (%)", justify="right")
    shown.add_column("silent for it alone", overflow="fold")
    for label, one in measured.classes.items():
        means = [row.apoz for row in one.summary()]
        alone = ", ".join(f"{len(neurons):,} of {name}" for name, neurons in measured.silent_for(label).items())
        mean = f"{100 * float(np.mean(means)):.2f}" if means else "–"
        shown.add_row(Text(str(label)), f"{one.examples:,}", mean, Text(alone or "–"))
    return shown


def advice(measured: Profile, rule: Rule, criterion: Criterion | str = criteria.apoz) -> list[str]:
    """Sentences on where to begin, as the paper does: the layers of highest mean APoZ, then their neighbours."""
    plans, _ = _plans(measured, rule, criterion)
    order = Progressive()
    first = order.choose(measured, ())
    if not first:
        return ["There is nothing to trim: every layer is locked, or no activation was observed."]
    if says_nothing(measured, criterion):
        return [
            "No activation is ever exactly zero, as is usual after GELU, SiLU or tanh, so that APoZ says nothing here; "
            "choose another criterion, such as contribution."
        ]
    sentences = [f"Trim first, as their mean APoZ is highest: {', '.join(first)}."]
    for name in first:
        plan, mean = plans.get(name, LayerPlan(measured[name].width)), 100 * Row.of(measured[name]).apoz
        sentences.append(
            f"  {name}: mean APoZ {mean:.2f} %; the rule {rule} removes {len(plan.removed):,} of {plan.width:,} "
            "neurons a round."
        )
    neighbours = [name for name in order.choose(measured, first) if name not in first]
    if neighbours:
        sentences.append(f"Then, together with them, their neighbours: {', '.join(neighbours)}.")
    if not any(name in plans and plans[name].removed for name in first):
        sentences.append("The rule removes nothing there; choose a lower limit.")
    return sentences


def says_nothing(measured: Profile, criterion: Criterion | str = criteria.apoz) -> bool:
    """Whether the criterion is APoZ and no activation of the layers to begin with is ever zero."""
    first = Progressive().choose(measured, ())
    return criteria.resolve(criterion) is criteria.apoz and not any(measured[name].zeros.any() for name in first)


def _plans(measured: Profile, rule: Rule, criterion: Criterion | str) -> tuple[Mapping[str, LayerPlan], str]:
    """What the rule would remove from each layer, or why it cannot choose."""
    try:
        return select(measured, rule=rule, criterion=criterion).layers, ""
    except PlanError as error:
        if any(layer.locked is None for layer in measured.values()):
            raise
        return {}, " " + str(error).partition(":")[0].capitalize() + "."


def _profile_cells(layer: LayerProfile, row: Row | None, plan: LayerPlan | None) -> tuple[str, ...]:
    mean = row and f"{100 * row.apoz:.2f} ± {50 * (row.high - row.low):.2f}"
    return (
        f"{layer.width:,}",
        mean or "–",
        f"{row.above:,}" if row else "–",
        f"{row.dead:,}" if row else "–",
        f"{len(plan.removed):,}" if plan else "–",
    )
