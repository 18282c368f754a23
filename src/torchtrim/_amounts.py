"""What the numbers of a budget mean for a model: amounts and shares of costs, and limits of its layers' widths."""

import math
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any, TypeAlias

from torchtrim.errors import PlanError, nearest

PerLayer: TypeAlias = float | Mapping[str, float]

_SECONDS = re.compile(r"(\d+\.?\d*|\.\d+)\s*(s|ms|us|µs)")
_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}


def amount(value: float | str, own: float) -> float:
    """A target in the unit of what is counted. own: what the model has."""
    if isinstance(value, str):
        found = _SECONDS.fullmatch(value.strip())
        assert found
        return float(found[1]) * _UNITS[found[2]]
    return value * own if value < 1 else value


def amount_text(name: str, amount: float) -> str:
    if name == "latency":
        return f"{1000 * amount:.3g} ms"
    return f"{amount:,.0f}" if amount >= 10 else f"{amount:g}"


def amount_asked(name: str, value: float | str) -> str:
    return value if isinstance(value, str) else f"{100 * value:g} %" if value < 1 else amount_text(name, value)


def out_of_reach(
    targets: Mapping[str, float], smallest: Mapping[str, float], own: Mapping[str, float], notes: Iterable[str]
) -> str:
    """What to say of a budget that cannot be met. notes: of what was left whole."""
    reached = [
        f"{name}: expected at most {amount_text(name, target)}, but the smallest that can be reached is "
        f"{amount_text(name, smallest[name])}, {smallest[name] / own[name]:.1%} of the model's own"
        for name, target in targets.items()
        if smallest[name] > target
    ]
    return "\n  ".join(["the budget is out of reach:", *reached, *notes]) + (
        "\nlower the floors, trim more layers, or allow more; what is locked is said by print(trace(model, example)), "
        "or `torchtrim inspect`"
    )


def limits(floor: PerLayer, cap: PerLayer | None, widths: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """By layer, how many neurons must stay at least, and may at most."""
    floors, caps = per_layer("floor", floor, widths, 0.0), per_layer("cap", cap or {}, widths, math.inf)
    least, most, faults = dict[str, int](), dict[str, int](), list[str]()
    for name, width in widths.items():
        low, high = floors[name], caps[name]
        least[name] = min(max(1, math.ceil(low * width - 1e-9 if low < 1 else low)), width)
        most[name] = max(1, math.floor(high * width + 1e-9)) if high < 1 else int(min(high, width))
        if least[name] > most[name]:
            faults.append(f"layer {name!r}: the floor of {least[name]} neurons is above the cap of {most[name]}")
    if faults:
        raise PlanError("\n".join([*faults, "lower the floor, or raise the cap"]))
    return least, most


def per_layer(what: str, given: PerLayer, names: Iterable[str], default: float) -> dict[str, float]:
    """A number for each layer. Raises PlanError for names and patterns that fit none."""
    names = list(names)
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, given)
    unknown = [one for one in given if not any(one == name or fnmatchcase(name, one) for name in names)]
    if unknown:
        raise PlanError("\n".join(f"{what}: unknown layer {one!r}{nearest(one, names)}" for one in unknown))
    return {
        name: next((value for one, value in given.items() if one == name or fnmatchcase(name, one)), default)
        for name in names
    }


def per_layer_faults(floor: Any, cap: Any, weights: Any) -> list[str]:
    """What is wrong with these, whatever the layers are."""
    faults: list[str] = []
    for name, given in (("floor", floor), ("cap", cap), ("weights", weights)):
        if given is None and name != "floor":
            continue
        if name == "weights" and not isinstance(given, Mapping):
            faults.append(f"weights: expected factors by layer, found {given!r}")
            continue
        by_layer: Mapping[Any, Any] = given if isinstance(given, Mapping) else {"*": given}
        for layer, value in by_layer.items():
            if not isinstance(layer, str):
                faults.append(f"{name}: expected names or patterns of layers, found {layer!r}")
            if not (positive(value) or (name == "floor" and value == 0)):
                least = "of at least" if name == "floor" else "above"
                faults.append(f"{name}: expected numbers {least} 0, found {value!r}")
    return faults


def positive(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real):  # numbers of NumPy are real too
        return False
    return math.isfinite(number := float(value)) and number > 0


def is_latency(value: Any) -> bool:
    if isinstance(value, str):
        found = _SECONDS.fullmatch(value.strip())
        return found is not None and float(found[1]) > 0
    return positive(value) and value < 1
