"""Make trained neural networks smaller and faster by removing the neurons that stay silent.

A name is imported when it is first used, so that the command line answers at once where it needs no PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchtrim import criteria, errors, operators, testing
    from torchtrim._budget import Budget
    from torchtrim._cost import measure
    from torchtrim._graph import trace
    from torchtrim._guard import Guard
    from torchtrim._lenet import LeNet
    from torchtrim._loop import iterate
    from torchtrim._measure import profile
    from torchtrim._plan import LayerPlan, Plan
    from torchtrim._profile import Profile
    from torchtrim._reconstruction import reconstruction
    from torchtrim._repair import repair
    from torchtrim._rounds import Progressive, Round, Stop
    from torchtrim._run_directory import run
    from torchtrim._select import Fraction, MeanPlusStd, Threshold, select
    from torchtrim._sensitivity import Sensitivity, sensitivity
    from torchtrim._stable import Stable
    from torchtrim._store import load, save
    from torchtrim._surgery import mask, trim
    from torchtrim.errors import TorchtrimError, TorchtrimWarning
    from torchtrim.operators import register_operator

__all__ = [
    "Budget",
    "Fraction",
    "Guard",
    "LayerPlan",
    "LeNet",
    "MeanPlusStd",
    "Plan",
    "Profile",
    "Progressive",
    "Round",
    "Sensitivity",
    "Stable",
    "Stop",
    "Threshold",
    "TorchtrimError",
    "TorchtrimWarning",
    "criteria",
    "errors",
    "iterate",
    "load",
    "mask",
    "measure",
    "operators",
    "profile",
    "reconstruction",
    "register_operator",
    "repair",
    "run",
    "save",
    "select",
    "sensitivity",
    "testing",
    "trace",
    "trim",
]

_ROOMS = {
    "_budget": "Budget",
    "_cost": "measure",
    "_graph": "trace",
    "_guard": "Guard",
    "_lenet": "LeNet",
    "_loop": "iterate",
    "_plan": "LayerPlan Plan",
    "_measure": "profile",
    "_profile": "Profile",
    "_reconstruction": "reconstruction",
    "_repair": "repair",
    "_rounds": "Progressive Round Stop",
    "_run_directory": "run",
    "_select": "Fraction MeanPlusStd Threshold select",
    "_sensitivity": "Sensitivity sensitivity",
    "_stable": "Stable",
    "_store": "load save",
    "_surgery": "mask trim",
    "criteria": "criteria",
    "operators": "operators register_operator",
    "testing": "testing",
    "errors": "errors TorchtrimError TorchtrimWarning",
}
_HOMES = {name: room for room, names in _ROOMS.items() for name in names.split()}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = import_module(f"{__name__}.{_HOMES[name]}")
    value = home if name == _HOMES[name] else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
