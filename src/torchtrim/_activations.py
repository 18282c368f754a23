"""Which operator calls are activation functions, and how much their zeros say.

A layer's figures come from the calls of the first kind that it has. ReLU and its kin give exact zeros; smooth functions
seldom do; gates (the sigmoid of a squeeze-and-excitation block) scale what other functions activate.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

Kind = Literal["rectifier", "smooth", "gate"]
KINDS: tuple[Kind, ...] = ("rectifier", "smooth", "gate")
# Their own activations show or not, depending on the kernel that PyTorch picks; none of them counts.
RECURRENT = (nn.RNNBase, nn.RNNCellBase)

_RECTIFIERS = frozenset(["relu", "relu6", "hardswish", "hardshrink", "softshrink"])
_SMOOTH = frozenset(["leaky_relu", "prelu", "_prelu_kernel", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish",
                     "softplus", "tanh"])  # fmt: skip
_GATES = frozenset(["sigmoid", "hardsigmoid", "log_sigmoid", "log_sigmoid_forward"])
# What bounds its input from below: the arguments' names, and the default of the lower bound.
_BOUNDS: Mapping[str, tuple[str, float | None]] = {
    "clamp": ("min", None),
    "clamp_min": ("min", None),
    "hardtanh": ("min_val", -1.0),
    "threshold": ("value", None),
}
ACTIVATIONS = _RECTIFIERS | _SMOOTH | _GATES | _BOUNDS.keys()


def kind_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Kind | None:
    """The kind of activation that a call of the ATen operator `name` is; None if it is none.

    A clamp is a rectifier if it cuts at zero, and no activation otherwise: a small bound guards a division or a root.
    """
    if name in _BOUNDS:
        argument, default = _BOUNDS[name]
        place = 2 if name == "threshold" else 1
        bound = args[place] if len(args) > place else kwargs.get(argument, default)
        if isinstance(bound, (int, float)) and bound == 0:
            return "rectifier"
        return "smooth" if name == "hardtanh" else None
    if name in _RECTIFIERS:
        return "rectifier"
    if name in _SMOOTH:
        return "smooth"
    return "gate" if name in _GATES else None
