"""What all pictures have in common: colours, fonts, and how they become bytes. Needs matplotlib, which is optional."""

import io
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchtrim.errors import ProfileError

BLUE, ORANGE, INK, FAINT = "#4477aa", "#ee7733", "#333333", "#999999"  # told apart by all kinds of eyes


def form_of(path: str | Path) -> str:
    """The form of the picture in a file, by its ending, such as "png". Raises ProfileError: it cannot be drawn."""
    try:
        from matplotlib import backend_bases
    except ImportError as error:
        raise ProfileError(f"plot: {error}; run pip install 'torchtrim[report]'") from error
    form, known = Path(path).suffix.removeprefix(".").lower() or "png", sorted(backend_bases.FigureCanvasBase.filetypes)
    if form not in known:
        raise ProfileError(
            f"plot: {path}: expected an ending such as .png or .pdf, found .{form}; known: {', '.join(known)}"
        )
    return form


@contextmanager
def canvas(width: float, height: float) -> Generator[Any]:
    """A figure of so many inches, with our fonts inside. Raises ImportError where there is no matplotlib."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {"font.size": 9, "axes.edgecolor": FAINT, "text.color": INK, "axes.labelcolor": INK}
    with mpl.rc_context(style):
        figure: Any = Figure(figsize=(width, height), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.06, rect=(0, 0, 0.99, 1))
        FigureCanvasAgg(figure)
        yield figure


def packed(figure: Any, form: str = "png") -> bytes:
    """The figure as a file of that form, such as "png" or "pdf"; within `canvas`."""
    file = io.BytesIO()
    figure.savefig(file, format=form, dpi=160, facecolor="white")
    return file.getvalue()
