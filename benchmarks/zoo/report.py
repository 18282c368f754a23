"""What was found of the zoo as a page: a summary by family, what went wrong, what is locked, and every model."""

import re
import statistics
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import torch

from benchmarks.zoo.examine import FRACTION, RTOL
from benchmarks.zoo.models import LIBRARIES

Record = dict[str, Any]
_INTRODUCTION = f"""Models by other people with random weights, each in float64 and in evaluation mode. Of every group
of neurons, {FRACTION:.0%} go at random positions. **Equal** means: on examples of two batch sizes, and of two image
sizes where the model takes them, every output of the trimmed model is the masked model's within {RTOL:g}, every
parameter that got a gradient before still gets one, and the state_dict fills a copy. **Reach** is the share of the
weights of convolutions and linear layers, without output layers, that can lose neurons along an axis. The **floor** is
one forward pass without data under a dispatch mode that does nothing; trace and trim are multiples of it.
"""
_THROUGH_NORMS = """

What norms average over goes too (`through_norms`). Outputs are compared without norms: inside, they scale and shift
only, and averages are sums divided by a constant."""


def page(records: Sequence[Record], command: str) -> str:
    """The whole page; `command` made it."""
    norms = "--through-norms" in command
    parts = [
        "# The zoo, through norms" if norms else "# The zoo",
        _INTRODUCTION.strip() + (_THROUGH_NORMS if norms else ""),
        _summary(records),
        "## What went wrong",
        _faults(records) or "Nothing.",
        "## What is locked",
        "Output layers aside, by reason, without the names of modules and with N for numbers.",
        _locks(records) or "Nothing.",
        "## Every model",
        _models(records),
        f"Measured by `{command}` with PyTorch {torch.__version__.partition('+')[0]}{_versions(records)} on one CPU "
        "thread.",
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _versions(records: Sequence[Record]) -> str:
    used = {record["name"].partition(":")[0] for record in records}
    return "".join(f", {one} {version(one).partition('+')[0]}" for one in LIBRARIES if one in used)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], *, left: int = 1) -> str:
    """A Markdown table; the first columns are aligned left."""
    marks = [":--" if place < left else "--:" for place in range(len(head))]
    lines = [head, marks, *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _summary(records: Sequence[Record]) -> str:
    head = ("family", "models", "traced", "equal", "differ", "nothing to trim", "failed", "reach", "trace", "trim")
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["family"], []).append(record)
    rows = [(family, *_counts(some)) for family, some in groups.items()]
    if len(rows) > 1:
        rows.append(("all", *_counts(records)))
    together = _median(records, _together, "{:.1f}")
    return table(head, rows) + f"\n\nReach, trace and trim are medians. Trace and trim together: {together}×."


def _counts(records: Sequence[Record]) -> tuple[str, ...]:
    status = [record["status"] for record in records]
    counts = (
        len(records),
        sum("trace_s" in record for record in records),
        *(status.count(one) for one in ("equal", "differs", "nothing to trim", "failed")),
    )
    return (*map(str, counts), _median(records, _reach, "{:.1%}"), *(_median(records, one) for one in (_trace, _trim)))


def _median(records: Sequence[Record], of: Callable[[Record], float | None], form: str = "{:.0f}×") -> str:
    values = [value for record in records if (value := of(record)) is not None]
    return form.format(statistics.median(values)) if values else "–"


def _reach(record: Record) -> float | None:
    reach = record.get("reach")
    return reach["within"] / reach["all"] if reach and reach["all"] else None


def _trace(record: Record) -> float | None:
    return record["trace_s"] / record["floor_s"] if record.get("floor_s") else None


def _trim(record: Record) -> float | None:
    return record["trim_s"] / record["floor_s"] if record.get("floor_s") and "trim_s" in record else None


def _together(record: Record) -> float | None:
    trace, trim = _trace(record), _trim(record)
    return None if trace is None or trim is None else trace + trim


def _models(records: Sequence[Record]) -> str:
    head = ("model", "outcome", "parameters", "after", "layers", "locked", "reach", "error", "trace", "trim", "peak")
    return table(head, [_row(record) for record in records], left=2)


def _row(record: Record) -> tuple[str, ...]:
    after, reach, ratio = record.get("trimmed_parameters"), _reach(record), _trim(record)
    errors = [float(one) for one in record.get("errors", {}).values()]
    return (
        record["name"],
        record["status"] + (f" ({record['stage']})" if record["status"] == "failed" else ""),
        f"{record['parameters']:,}" if "parameters" in record else "–",
        f"{after:,}" if after else "–",
        str(record.get("layers", "–")),
        str(len(record["locked"])) if "locked" in record else "–",
        "–" if reach is None else f"{reach:.1%}",
        f"{max(errors):.0e}" if errors else "–",
        f"{record['trace_s']:.2f} s" if "trace_s" in record else "–",
        f"{record['trim_s']:.2f} s" + (f", {ratio:.0f}×" if ratio else "") if "trim_s" in record else "–",
        f"{record['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in record else "–",
    )


def faults(record: Record) -> list[str]:
    """What is wrong with a model, in words; nothing where all is well."""
    found: list[str] = list(record.get("differs", ()))
    if "error" in record:
        found.append(f"{record['stage']}: {record['error']}")
    if record.get("left_untrimmed"):
        found += record["left_untrimmed"]
    if record.get("without_gradient"):
        names = record["without_gradient"]
        found.append(f"without a gradient after trimming ({len(names)}): {', '.join(names[:3])}")
    if record.get("state_dict") is False:
        found.append("the state_dict does not fill a copy")
    if record.get("moved") is False:
        found.append("the outputs do not show what was removed")
    if record.get("finite") is False:
        found.append("outputs that are not finite")
    return found


def _faults(records: Sequence[Record]) -> str:
    rows = [(record["name"], record["status"], one[:300]) for record in records for one in faults(record)]
    return table(("model", "outcome", "what"), rows, left=3) if rows else ""


def cause(reason: str) -> str:
    """A reason without the names of modules and numbers, so that those of many models can be counted together."""
    reason = re.sub(r" in (the model itself|[\w.]+)(?=$|[ (])", "", reason)
    return re.sub(r"\d+", "N", reason)[:160]


def _locks(records: Sequence[Record]) -> str:
    found: dict[str, dict[str, list[str]]] = {}
    for record in records:
        for layer, reason in record.get("locked", {}).items():
            if reason != "it is an output of the model":
                found.setdefault(cause(reason), {}).setdefault(record["name"], []).append(layer)
    ranked = sorted(found.items(), key=lambda item: -len(item[1]))
    rows = [(reason, _some(models), str(sum(map(len, models.values()))), str(len(models))) for reason, models in ranked]
    return table(("reason", "for example", "layers", "models"), rows, left=2) if rows else ""


def _some(models: dict[str, list[str]]) -> str:
    """The first models, each with one of its layers."""
    first = [f"{name} `{layers[0]}`" for name, layers in list(models.items())[:3]]
    return ", ".join([*first, "…"] if len(models) > 3 else first)
