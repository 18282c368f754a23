"""Sweep the zoo: every model in a process of its own, then a page of what was found."""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.zoo.models import LIBRARIES, families, installed
from benchmarks.zoo.report import page
from torchtrim._files import write_whole


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument("--family", choices=(*LIBRARIES, "all"), default="all", help="whose models (default all)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models alone, such as timm:resnet18")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results/zoo.md"), help="the page; its results lie beside"
    )
    parser.add_argument("--resume", action="store_true", help="keep what an earlier run found, and go on with the rest")
    parser.add_argument("--seconds", type=float, default=120, help="time limit of a model (default %(default)s)")
    parser.add_argument("--gibibytes", type=float, default=8, help="memory limit of a model (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="where the models compute, cpu or cuda (default %(default)s)")
    parser.add_argument(
        "--through-norms", action="store_true", help="trim what norms average over, compare without them"
    )
    options = parser.parse_args(arguments)
    chosen = LIBRARIES if options.family == "all" else (options.family,)
    if options.only:
        chosen = [library for library in chosen if any(name.startswith(f"{library}:") for name in options.only)]
    for library in (absent := [one for one in chosen if not installed(one)]):
        print(f"{library} is not installed, and its models are left out", flush=True)
    found = families(library for library in chosen if library not in absent)
    unknown = sorted(set(options.only or ()) - found.keys())
    if unknown:
        parser.error(f"no such model: {', '.join(unknown)}")
    names = [name for name in found if not options.only or name in options.only]
    store = Results(options.out.with_suffix(".jsonl"), keep=options.resume)
    todo = [name for name in names if name not in store.found]

    def work(place: int) -> None:
        name = todo[place]
        record = {"family": found[name], **examine(name, options)}
        store.add(record)
        print(f"{place + 1}/{len(todo)} {name}: {record['status']} {record.get('error', '')}".strip(), flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(work, range(len(todo))))
    command = " ".join(["python -m benchmarks.zoo", *_changed(options)])
    write_whole(options.out, page(store.ordered(), command))


def _changed(options: argparse.Namespace) -> list[str]:
    """The options that decide what is found, where they are not the usual ones."""
    family = [] if options.family == "all" else ["--family", options.family]
    device = [] if options.device == "cpu" else ["--device", options.device]
    norms = ["--through-norms"] if options.through_norms else []
    return [*family, *device, *norms, *(["--only", *options.only] if options.only else [])]


def examine(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own finds of a model, within limits of time and memory."""
    norms = ["through-norms"] if options.through_norms else []
    command = [sys.executable, "-m", "benchmarks.zoo.examine", name, str(options.gibibytes), options.device, *norms]
    record, error = last_record(command, options.seconds)
    return (
        {"name": name, "status": "failed", "stage": "start"}
        | record
        | ({"status": "failed", "error": error} if error else {})
    )


def last_record(command: Sequence[str], seconds: float) -> tuple[dict[str, Any], str]:
    """The last line of JSON that a process prints within a limit of time, and what ended it early, if anything did."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        lines, errors, status = run.stdout, run.stderr, run.returncode
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout or b""
        lines, errors, status = output.decode() if isinstance(output, bytes) else output, "", None
    whole = [line for line in lines.splitlines() if line.startswith("{") and line.endswith("}")]
    record: dict[str, Any] = json.loads(whole[-1]) if whole else {}
    if status is None:
        return record, f"took longer than {seconds:g} s"
    last = errors.strip().splitlines()
    return record, f"ended with status {status}: {last[-1] if last else ''}"[:400] if status else ""


class Results:
    """The file of results: a line of JSON for every model, appended when it is known. `found`: by name."""

    def __init__(self, path: Path, *, keep: bool) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if keep and path.exists() else []
        records: list[dict[str, Any]] = [json.loads(line) for line in lines if line.strip()]
        self.found = {record["name"]: record for record in records}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in self.found.values()), encoding="utf-8")

    def add(self, record: dict[str, Any]) -> None:
        self.found[record["name"]] = record
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def ordered(self) -> list[dict[str, Any]]:
        """By family, each in the order of its list; names that are in no list any more come last."""
        place = {name: index for index, name in enumerate(families())}
        return sorted(self.found.values(), key=lambda one: place.get(one["name"], len(place)))


if __name__ == "__main__":
    main()
