"""What is said of a run and of a profile, and what is written of a run at its end."""

import shlex
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch

from torchtrim._amounts import amount, amount_asked
from torchtrim._budget import Budget
from torchtrim._files import write_whole
from torchtrim._guard import Attempt
from torchtrim._models import how_built
from torchtrim._picture import picture
from torchtrim._plan import Plan
from torchtrim._profile import Profile
from torchtrim._report import RoundTable, says_nothing
from torchtrim._rounds import Progressive, Round, Stop
from torchtrim._select import MeanPlusStd, Rule
from torchtrim._settings import Settings
from torchtrim._source import Opened, Source

_VARIES = 1.05  # how far above a latency may be when it is timed again, as a factor
_PICTURE, _PAGE = REPORTS = ("report.png", "report.md")


def next_run(source: Source, measured: Profile, rule: Rule, criterion: str) -> str:
    """The command that trims what was measured."""
    asked = ["--train-epochs", "4"] if source.untrained else []
    criterion = "contribution" if says_nothing(measured, criterion) else criterion
    usual = str(rule) == str(MeanPlusStd())
    asked += ["--rule", str(rule)] if not usual else []
    asked += ["--criterion", criterion] if criterion != "apoz" else []
    asked += ["--zero-tolerance", f"{measured.zero_tolerance:g}"] if measured.zero_tolerance else []
    asked += ["--through-norms"] if measured.through_norms else []
    if usual and criterion == "reconstruction":  # its errors have no limit such as that
        return command("run", source, *asked, "--repair", "least-squares", "--parameters", "0.5", "--rounds", "1")
    return command("run", source, *asked, "--layers", ",".join(Progressive().choose(measured, ())))


def settled(measured: Profile, examples: int) -> str:
    """How much of the data a pass took that ended by itself. examples: how many there are."""
    doubtful = sum(map(len, (measured.in_doubt or {}).values()))
    rest = f", but for {doubtful:,} near its limit" if doubtful else ""
    return f"After {measured.examples:,} of {examples:,} examples it is settled which neurons the rule removes{rest}."


def command(verb: str, source: Source, *more: str) -> str:
    """A command line about this source, as one would type it."""
    words = ["torchtrim", verb, source.model, "--data", source.data]
    for option in fields(source)[2:]:
        value = getattr(source, option.name)
        if value != option.default:
            words += [f"--{option.name}", str(value)]
    return shlex.join([*words, *more])


def short(path: Path) -> str:
    """The path as seen from the working directory, where it lies within."""
    absolute, here = path.absolute(), Path.cwd()
    return str(absolute.relative_to(here) if absolute.is_relative_to(here) else path)


def place_of(device: torch.device) -> str:
    """Where a model runs, in words."""
    if device.type == "cuda":
        return f"the GPU, {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"the CPU, with {threads} thread{'s' * (threads != 1)}"


def heading(settings: Settings, opened: Opened) -> str:
    """What a run says first."""
    data, layers = opened.data, settings.layers
    sizes = [len(part) for part in (data.train, data.calibration, data.test)]  # pyright: ignore[reportArgumentType]
    if isinstance(layers, Progressive):
        near = f" up to {layers.step} layers away" if layers.step > 1 else ""
        named = f"the {layers.start} most silent layers, then their neighbours{near},"
    else:
        named = ", ".join(layers or ["every layer that can be trimmed"])
    repaired = f", repairs by {' and '.join(settings.repair)}" if settings.repair else ""
    if (seen := settings.repair_positions) is not None:
        repaired += f", looks at {seen} position{'s' * (seen != 1)} of an example"
    guard = settings.guard
    guarded = f"rolls back rounds that lose more than {_points(guard.max_drop)} of accuracy\n" if guard else ""
    return (
        f"{settings.source.model} on {settings.source.data}: {sizes[0]:,} examples to train, {sizes[1]:,} to decide "
        f"on, {sizes[2]:,} to test\n"
        f"trims {named} by {settings.criterion}, {settings.rule}{repaired}\n{guarded}"
    )


def rolled_back(attempt: Attempt) -> str:
    """An attempt that the guard rejected, as a line below the table's rows."""
    return f"{attempt.number:5}  {_rejected(attempt)}"


def write_report(
    settings: Settings, table: RoundTable, rounds: Sequence[Round], closed: Sequence[Attempt], accuracy: float
) -> None:
    """`report.md`, and `report.png` where it can be drawn. closed: the attempts of the round that never held."""
    title = f"{settings.source.model} on {settings.source.data}"
    drawn = picture(rounds, accuracy, rule=settings.rule, criterion=settings.criterion, title=title)
    how = f"Trimmed by {settings.criterion}, {settings.rule}."
    if settings.guard:
        how += f" Rounds that lost more than {_points(settings.guard.max_drop)} of accuracy were rolled back."
    parts = [f"# {title}", how, table.markdown(rounds)]
    steps = [(f"{done.number}. {_changes(done.plan)}", done.rejected) for done in rounds]
    if closed:
        steps.append((f"{closed[0].number}. {_ended(closed)}", tuple(closed)))
    parts.append("\n".join("\n   - ".join([step, *map(_rejected, attempts)]) for step, attempts in steps))
    if drawn is not None:
        write_whole(settings.out / _PICTURE, drawn)
        parts.append(f"![APoZ by layer and round; accuracy against compression]({_PICTURE})")
    write_whole(settings.out / _PAGE, "\n\n".join(parts) + "\n")


def _points(drop: float) -> str:
    return f"{drop:g} percentage point{'s' * (drop != 1)}"


def _rejected(attempt: Attempt) -> str:
    return (
        f"rolled back: {_changes(attempt.plan)} gave {attempt.accuracy.retrained:.2f} % on the calibration data, below "
        f"{attempt.least:.2f} %"
    )


def _ended(closed: Sequence[Attempt]) -> str:
    number, tried = closed[0].number, f"{len(closed)} attempt{'s' * (len(closed) != 1)}"
    last = f"round {number - 1} was the last that did" if number > 1 else "none did, and nothing was trimmed"
    return f"The guard ended the run: round {number} did not hold in {tried}; {last}."


def _changes(plan: Plan) -> str:
    """What a round removed: `conv2 50 → 43, fc1 500 → 388`."""
    return ", ".join(
        f"{name} {layer.width} → {layer.remaining}" for name, layer in plan.layers.items() if layer.removed
    )


def best(rounds: Sequence[Round], stop: Stop) -> Round | None:
    """The last round that keeps the accuracy that the stop asks for."""
    return next((done for done in reversed(rounds) if stop.keeps(done)), None)


def closing(
    settings: Settings, opened: Opened, rounds: Sequence[Round], closed: Sequence[Attempt], *, complete: bool
) -> str:
    """What is said at the end. complete: whether an earlier run had left nothing to do."""
    stop = settings.stop
    lines = ["", *(["The run was complete; nothing was left to do."] * complete)]
    ended = not closed and (not rounds or not stop.reached(rounds[-1]))
    if closed:
        lines.append(_ended(closed))
    if rounds and isinstance(settings.rule, Budget):
        above = _above(settings, rounds[-1])
        lines += [f"The budget is not met: {', '.join(above)}."] if above else ["The budget is met."] * ended
    elif ended:
        lines.append("The rule removes nothing more; a lower limit or other layers would.")
    chosen = best(rounds, stop)
    if rounds and chosen is not rounds[-1]:
        last = rounds[-1]
        limit = f"the smallest accuracy, {stop.accuracy} %"
        if stop.max_drop is not None and (stop.accuracy is None or last.accuracy.retrained >= stop.accuracy):
            own = f"the ancestor's accuracy on the calibration data, {last.ancestor_accuracy:.2f} %"
            limit = f"{_points(stop.max_drop)} less than {own}"
        lines.append(f"Round {last.number} fell below {limit}.")
    out = short(settings.out)
    lines += [
        f"Written to {out}:",
        *(["  report.png       the neurons' silence by round, accuracy against compression"] * _drawn(settings)),
        "  report.md        this table",
        "  metrics.json     all figures",
        *(["  round-NN/        plan, profile and model of each round"] * bool(rounds)),
    ]
    if chosen is not None:
        built = how_built(settings.source.model, len(opened.data.classes))
        model = Path(out) / f"round-{chosen.number:02d}" / "model.safetensors"
        lines += [
            "Next:",
            f'  model = torchtrim.load({built}, "{model}")',
            "  " + command("profile", replace(settings.source, weights=str(model))),
        ]
    return "\n".join(lines)


def _above(settings: Settings, last: Round) -> list[str]:
    """What is left above the budget, where a round was halved, or the run ended early."""
    asked, of_batch = settings.rule, settings.rule_of_batch
    assert isinstance(asked, Budget)
    assert isinstance(of_batch, Budget)
    found: list[str] = []
    for name, value in of_batch.asked.items():
        own, left = getattr(last.ancestor, name), getattr(last.cost, name)
        if left > amount(value, own) * (_VARIES if name == "latency" else 1 + 1e-9):
            found.append(f"{name} at {100 * left / own:.1f} %, {amount_asked(name, asked.asked[name])} asked")
    return found


def _drawn(settings: Settings) -> bool:
    return (settings.out / _PICTURE).is_file()
