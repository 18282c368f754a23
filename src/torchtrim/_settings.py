"""What a run is asked to do, and how the words of a command line become that."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

from torchtrim._amounts import PerLayer
from torchtrim._budget import Budget
from torchtrim._guard import Guard
from torchtrim._repair import Way, checked_ways
from torchtrim._rounds import Progressive, Stop
from torchtrim._select import MeanPlusStd, Rule, parse_rule
from torchtrim._sensitivity import Sensitivity
from torchtrim._source import Source
from torchtrim._training import Training
from torchtrim.errors import StoreError, TorchtrimError

LATENCY_BATCH = 32  # inputs of the batch whose latency is measured


@dataclass(frozen=True)
class Settings:
    """What a run is to do. `training` makes the ancestor; None takes the model as it comes."""

    source: Source
    out: Path
    stop: Stop
    retraining: Training
    training: Training | None = None
    layers: tuple[str, ...] | Progressive | None = None
    rule: Rule | Budget = field(default_factory=MeanPlusStd)
    criterion: str = "apoz"
    through_norms: bool = False
    repair: tuple[Way, ...] = ()
    repair_positions: int | None = None
    guard: Guard | None = None
    zero_tolerance: float = 0.0

    @property
    def rule_of_batch(self) -> Rule | Budget:
        """The rule for a model that is called with the batch: FLOPs are asked, and told, of one input."""
        rule = self.rule
        if not isinstance(rule, Budget) or rule.flops is None or rule.flops < 1:
            return rule
        return replace(rule, flops=rule.flops * LATENCY_BATCH)

    def described(self) -> dict[str, Any]:
        """What decides the result, as JSON can hold it; not where, nor on what device, nor when it stops.

        What came later than the first version is left out unless it is asked for, so that older runs can be resumed.
        """
        layers, budget = self.layers, self.rule if isinstance(self.rule, Budget) else None
        return {
            **{key: value for key, value in vars(self.source).items() if key != "device"},
            "layers": _progressive(layers) if isinstance(layers, Progressive) else layers and list(layers),
            "rule": str(self.rule),
            "criterion": self.criterion,
            **({"through_norms": True} if self.through_norms else {}),
            **({"repair": list(self.repair)} if self.repair else {}),
            **({} if self.repair_positions is None else {"repair_positions": self.repair_positions}),
            **({"guard": asdict(self.guard)} if self.guard else {}),
            **({"budget": asdict(budget), "steps": self.stop.rounds} if budget else {}),
            **({"zero_tolerance": self.zero_tolerance} if self.zero_tolerance else {}),
            **_described("training", self.training),
            **_described("retraining", self.retraining),
        }


_LATER = ("distill", "temperature", "patience", "keep_best")


def _described(name: str, training: Training | None) -> dict[str, Any]:
    values = {} if training is None else vars(training)
    usual = {option.name: option.default for option in fields(Training)}
    return {
        f"{name}.{key}": value
        for key, value in values.items()
        if key != "workers" and not (key in _LATER and value == usual[key])
    }


def _progressive(layers: Progressive) -> str:
    return f"progressive:{layers.start}" + (f", step {layers.step}" if layers.step != 1 else "")


def usual_training(data: str) -> Training:
    """What suits the data unless it is asked otherwise: `Training()`, or fine-tuning for folders of images.

    Those are mostly for networks that were trained on ImageNet, which want small steps: SGD with a learning rate of
    0.001, momentum 0.9 and weight decay 0.0005 (Simonyan and Zisserman, 2014), on images cropped and mirrored at
    random.
    """
    if not data.startswith("imagefolder:"):
        return Training()
    return Training(
        optimizer="sgd", lr=1e-3, weight_decay=5e-4, schedule="cosine", batch_size=32, label_smoothing=0.0, shift=0
    )


def training_for(data: str, **asked: Any) -> Training:
    """The usual training for the data, changed where something is asked. Raises TorchtrimError: it is not possible."""
    changes = {name: value for name, value in asked.items() if value is not None}
    return replace(usual_training(data), **changes)


def retraining_for(
    data: str, *, distill: float | None, temperature: float | None, patience: int | None, keep_best: bool, **asked: Any
) -> Training:
    """As `training_for`, with what only retraining knows. Raises TorchtrimError: a temperature of nothing."""
    if temperature is not None and not distill:
        raise TorchtrimError("expected --temperature with --distill, whose outputs it softens; found it alone")
    later = {"distill": distill, "temperature": temperature, "patience": patience, "keep_best": keep_best or None}
    return training_for(data, **asked, **later)


def stop_at(
    rounds: int | None, compression: float | None, accuracy: float | None, max_drop: float | None = None
) -> Stop:
    """The stop that is asked for; four rounds, as in the paper, if none is. Raises TorchtrimError."""
    _check_percent("smallest accuracy", accuracy)
    _check_percent("largest drop", max_drop)
    nothing = rounds is compression is accuracy is max_drop is None
    return Stop(rounds=4 if nothing else rounds, compression=compression, accuracy=accuracy, max_drop=max_drop)


def rule_asked(
    rule: str | None,
    *,
    latency: str | None,
    floor: Sequence[str],
    cap: Sequence[str],
    multiple_of: int | None,
    sensitivity: Path | None,
    **targets: float | None,
) -> Rule | Budget:
    """The rule or the budget that is asked for; the paper's rule if neither is.

    Raises TorchtrimError: both, or what belongs to a budget without one.
    """
    found: dict[str, Any] = {name: value for name, value in targets.items() if value is not None}
    if latency is not None:
        found["latency"] = _number_or_text(latency)
    floors = amounts_named("--floor", floor, others=cast(float, Budget.floor))
    caps = amounts_named("--cap", cap, others=None)
    further = {"--floor": floors, "--cap": caps, "--multiple-of": multiple_of, "--sensitivity": sensitivity}
    if not found:
        alone = [name for name, value in further.items() if value is not None]
        if alone:
            raise TorchtrimError(
                f"expected {alone[0]} with a budget (--parameters, --flops, --bytes or --latency), found it alone"
            )
        return parse_rule("mean+1std" if rule is None else rule)
    if rule is not None:
        raise TorchtrimError(f"expected either a rule or a budget, found both --rule {rule} and --{next(iter(found))}")
    weights = None if sensitivity is None else Sensitivity.load(sensitivity).weights()
    chosen: dict[str, Any] = {"floor": floors, "cap": caps, "multiple_of": multiple_of, "weights": weights}
    return Budget(**found | {name: value for name, value in chosen.items() if value is not None})


def amounts_named(option: str, texts: Sequence[str], *, others: float | None) -> PerLayer | None:
    """An amount for all layers, "0.1", or for some, "conv*=0.5", given one by one or with commas; None without any.

    others: that of layers that are not named. Raises TorchtrimError: another text, or several amounts for all.
    """
    parts = [part.strip() for text in texts for part in text.split(",")]
    named: dict[str, float] = {}
    every: list[float] = []
    for part in parts:
        name, _, number = part.rpartition("=")
        try:
            amount = float(number)
        except ValueError:
            raise TorchtrimError(
                f"{option}: expected an amount such as 0.1, or NAME=AMOUNT with commas between, found {part!r}"
            ) from None
        if name:
            named.setdefault(name.strip(), amount)
        else:
            every.append(amount)
    if len(every) > 1:
        raise TorchtrimError(f"{option}: expected one amount for all layers, found {', '.join(map(str, every))}")
    rest = every[0] if every else others
    if not named:
        return rest if every else None
    return named if rest is None else {**named, "*": rest}


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def guard_at(max_drop: float | None, retries: int | None) -> Guard | None:
    """The guard that is asked for. Raises TorchtrimError: one that cannot be, or retries of nothing."""
    _check_percent("guard", max_drop)
    if max_drop is None:
        if retries is not None:
            raise TorchtrimError("expected --retries with --guard, which tries again; found it alone")
        return None
    return Guard(max_drop) if retries is None else Guard(max_drop, retries)


def _check_percent(name: str, value: float | None) -> None:
    if value is not None and not 0 <= value <= 100:
        raise TorchtrimError(f"{name}: expected per cent, from 0 to 100, found {value!r}")


def layers_named(
    names: Sequence[str], progressive: int | None, step: int | None = None
) -> tuple[str, ...] | Progressive | None:
    """The layers that are asked for, given one by one or with commas; None is all. Raises TorchtrimError: both."""
    single = tuple(name.strip() for text in names for name in text.split(",") if name.strip())
    if names and not single:
        raise TorchtrimError(f"layers: expected names, found {', '.join(names)!r}; leave it out to trim all layers")
    if single and progressive is not None:
        raise TorchtrimError("expected either layers or a number of progressive ones, found both")
    if progressive is None and step is not None:
        raise TorchtrimError("expected --step with --progressive, whose neighbours it counts; found it alone")
    if progressive is None:
        return single or None
    return Progressive(progressive) if step is None else Progressive(progressive, step)


def ways_named(text: str | None) -> tuple[Way, ...]:
    """The ways of repair that are asked for, with commas between; none without. Raises TorchtrimError: unknown ones."""
    return () if text is None else checked_ways(cast(Any, [way.strip() for way in text.split(",")]))


def fractions_named(text: str) -> tuple[float, ...]:
    """The fractions that are asked for, with commas between. Raises TorchtrimError."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise TorchtrimError(f"--fractions: expected shares with commas between, found {text!r}") from None


def usual_directory(model: str, data: str) -> Path:
    """`runs/MODEL-DATA`, such as `runs/vgg16-flowers`."""
    words = [re.sub(r"[^\w.-]+", "-", Path(name.rpartition(":")[2]).absolute().name) for name in (model, data)]
    return Path("runs") / "-".join(words)


def demo_settings(out: Path, *, fast: bool, seed: int, device: str) -> Settings:
    """LeNet on MNIST, conv2 and fc1 trimmed: Hu et al., "Network Trimming", 2016, its table of LeNet."""
    return Settings(
        source=Source("lenet", "mnist", device=device, seed=seed),
        out=out,
        stop=Stop(rounds=2 if fast else 4),
        training=Training(epochs=0.5 if fast else 4, seed=seed),
        retraining=Training(epochs=0.25 if fast else 1, seed=seed),
        layers=("conv2", "fc1"),
    )


def is_demo(out: Path) -> bool:
    """Whether the directory holds a run of the demo. Raises StoreError: it holds another run."""
    if not (out / "run.json").is_file():
        return False
    try:
        asked = json.loads((out / "run.json").read_text(encoding="utf-8"))["settings"]
        found = asked["model"], asked["data"], asked["layers"]
    except (OSError, ValueError, LookupError, TypeError):
        found = None
    if found != ("lenet", "mnist", ["conv2", "fc1"]):
        raise StoreError(f"{out}: expected nothing, or an earlier demo, found another run; choose another --out")
    return True
