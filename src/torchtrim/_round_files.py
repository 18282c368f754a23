"""A round as files: its plan, its profile, its model, and its numbers, which make it count.

round-01/  plan.json, profile.safetensors, model.safetensors, metrics.json
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from torchtrim._cost import Cost
from torchtrim._files import write_whole
from torchtrim._guard import Accuracy, Attempt
from torchtrim._plan import Plan
from torchtrim._profile import Profile
from torchtrim._rounds import Round
from torchtrim._store import read_model, write_model
from torchtrim.errors import PlanError, StoreError

VERSION = 1
METRICS = "metrics.json"
OF_ROUND = ("plan.json", "profile.safetensors", "model.safetensors", METRICS)


def write_round(done: Round, place: Path) -> None:
    """Write a round into a directory that exists; the numbers come last."""
    write_whole(place / "plan.json", done.plan.to_json() + "\n")
    done.profile.save(place / "profile.safetensors")
    write_model(done.model, place / "model.safetensors", {})
    write_whole(place / METRICS, json.dumps(_metrics(done), indent=2) + "\n")


def read_round(place: Path, fresh: nn.Module, ancestor_accuracy: float | None) -> Round:
    """The round in a directory, its model on a newly built ancestor. Raises StoreError: it is damaged.

    ancestor_accuracy: None for the first round, which knows it itself.
    """
    content = read_json(place / METRICS, "torchtrim-round")
    try:
        plan = Plan.from_json((place / "plan.json").read_text(encoding="utf-8"))
        profile = Profile.load(place / "profile.safetensors")
        model, _ = read_model(fresh, place / "model.safetensors")
        accuracy = Accuracy(**content["accuracy"])
        return Round(
            content["number"],
            model,
            tuple(content["layers"]),
            plan,
            profile,
            Cost(**content["cost"]),
            Cost(**content["ancestor"]),
            accuracy,
            Accuracy(**content["test"]) if content["test"] else None,
            content["seconds"],
            accuracy.before if ancestor_accuracy is None else ancestor_accuracy,
            attempts_from(content.get("rejected", [])),
        )
    except (OSError, KeyError, TypeError, ValueError, AttributeError, PlanError) as error:
        raise StoreError(
            f"{place}: expected a whole round, found {type(error).__name__}: {error}; delete its metrics.json and "
            "later rounds, then --resume computes them again"
        ) from error


def described(attempts: Sequence[Attempt]) -> list[dict[str, Any]]:
    """Attempts that were rolled back, as JSON can hold them."""
    return [
        {
            "number": one.number,
            "plan": json.loads(one.plan.to_json()),
            "accuracy": _numbers(one.accuracy),
            "least": float(one.least),
        }
        for one in attempts
    ]


def attempts_from(content: Sequence[Mapping[str, Any]]) -> tuple[Attempt, ...]:
    """What `described` wrote. Raises KeyError, TypeError or PlanError when it is something else."""
    return tuple(
        Attempt(one["number"], Plan.from_json(json.dumps(one["plan"])), Accuracy(**one["accuracy"]), one["least"])
        for one in content
    )


def read_json(path: Path, kind: str) -> dict[str, Any]:
    """What a run wrote into a file, of this kind. Raises StoreError: something else."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: expected a file that a run wrote, found: {error}; choose another --out") from error
    if not isinstance(content, dict) or content.get("format") != kind or content.get("version") != VERSION:
        raise StoreError(f"{path}: expected {kind} of version {VERSION}, found another file; choose another --out")
    return content


def _metrics(done: Round) -> dict[str, Any]:
    before, after = done.profile.widths, done.widths
    return {
        "format": "torchtrim-round",
        "version": VERSION,
        "number": done.number,
        "source": done.plan.source,
        "layers": list(done.layers),
        "widths": {name: [before[name], after[name]] for name in before},
        "compression": done.compression,
        "speedup": done.speedup,
        "cost": asdict(done.cost),
        "ancestor": asdict(done.ancestor),
        "accuracy": _numbers(done.accuracy),
        "test": done.test and _numbers(done.test),
        "seconds": dict(done.seconds),
        **({"rejected": described(done.rejected)} if done.rejected else {}),
    }


def _numbers(accuracy: Accuracy) -> dict[str, float]:
    """Functions that users write may return NumPy's numbers or PyTorch's."""
    return {name: float(value) for name, value in vars(accuracy).items()}
