"""What the command line prints: results, a display of progress, and errors and warnings in a line each."""

import sys
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from torchtrim.errors import TorchtrimError, TorchtrimWarning

if TYPE_CHECKING:
    from rich.progress import Progress


def display(threads: int | None) -> tuple[Callable[[Any], None], "Progress"]:
    """How to print to standard output, and a progress display that does not get in its way; sets the threads too."""
    import torch

    from torchtrim._progress import training_progress

    if threads is not None:
        torch.set_num_threads(threads)
    terminal = sys.stdout.isatty()
    output = Console(file=sys.stdout, width=None if terminal else 200, highlight=False)

    def say(part: Any) -> None:
        output.print(part, markup=False, soft_wrap=isinstance(part, str))

    return say, training_progress(output if terminal else None)


@contextmanager
def reported(hint: str = "") -> Generator[None]:
    """Errors and warnings of this library in a line each, without a traceback; the hint after an interrupt."""

    def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
        if issubclass(category, TorchtrimWarning):
            typer.echo(f"warning: {message}", err=True)
        else:
            usual(message, category, *place)

    with warnings.catch_warnings():
        usual, warnings.showwarning = warnings.showwarning, show
        try:
            yield
        except TorchtrimError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            typer.echo(f"interrupted{hint}", err=True)
            raise typer.Exit(130) from error
