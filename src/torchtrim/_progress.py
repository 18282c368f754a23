"""How far long work has come, in a line of the terminal; and its interruption, where that must wait."""

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn


def training_progress(console: Console | None = None) -> Progress:
    """A display for long work, to be used in a `with`; silent where there is no terminal."""
    console = console or Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress("{task.description}", *columns, console=console, disable=not console.is_terminal)


@contextmanager
def displayed(progress: Progress | bool) -> Generator[Progress]:
    """The display that was passed, or one of its own; a silent one for False."""
    if isinstance(progress, Progress):
        yield progress
        return
    with training_progress() if progress else Progress(disable=True) as own:
        yield own


@contextmanager
def shown(progress: Progress | None, label: str, batches: int | None) -> Generator[Callable[[str], None]]:
    """How to show that one more batch is done, and a note on it; the line vanishes at the end.

    batches: how many there are, None if that is unknown.
    """
    progress = progress or Progress(disable=True)
    task = progress.add_task(label, total=batches)
    try:
        yield lambda note: progress.update(task, advance=1, description=f"{label}{note}")
    finally:
        progress.remove_task(task)


@contextmanager
def uninterrupted() -> Generator[None]:
    """An interrupt (Ctrl-C) waits until the end of the block; other threads than the main one see none anyway."""
    before = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    if not callable(before):
        yield
        return
    came: list[FrameType | None] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            before(signal.SIGINT, came[0])
