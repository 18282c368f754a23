"""The accuracy of a model, as a function of the caller's says it."""

from collections.abc import Callable
from typing import Any

from torch import nn

from torchtrim.errors import ProfileError


def accuracy_of(evaluate: Callable[[nn.Module], Any], model: nn.Module, what: str, name: str = "evaluate") -> float:
    """What `evaluate` says of a model, such as a number of NumPy's or PyTorch's. Raises ProfileError: no number.

    what: the model, in words. name: of the argument that the function was.
    """
    found = evaluate(model)
    try:
        if isinstance(found, str):
            raise TypeError
        return float(found)
    except (TypeError, ValueError, RuntimeError):  # of a tensor with several elements
        raise ProfileError(f"{name}: expected one number, the accuracy of {what}, found {found!r}") from None
