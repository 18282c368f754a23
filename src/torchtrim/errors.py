"""Every error that torchtrim raises on purpose.

A message says where, what was expected, what was found, and what to do.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class TorchtrimError(Exception):
    """The base of all errors of this library; catch it to catch them all."""


class TraceError(TorchtrimError):
    """The model could not be run on the example, or has nothing that can be trimmed."""


class ProfileError(TorchtrimError):
    """The data cannot be measured: an empty loader, NaN in an activation, inputs of the wrong kind."""


class PlanError(TorchtrimError):
    """A plan, a rule or a layer name does not fit the model."""


class DataError(TorchtrimError):
    """A data set is missing, damaged, or of another form than its name says."""


class ModelError(TorchtrimError):
    """A model cannot be built as named, or its weights do not fit it."""


class StoreError(TorchtrimError):
    """A file or run directory cannot be read or written, or belongs to another model."""


class TorchtrimWarning(UserWarning):
    """Something that works, but that the user should know."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'conv2', 'conv1'?`, or an empty string when nothing is close."""
    matches = get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(map(repr, matches))}?" if matches else ""
