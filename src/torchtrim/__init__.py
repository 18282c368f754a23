"""Make trained neural networks smaller and faster by removing the neurons that stay silent."""

from torchtrim import criteria
from torchtrim._cost import Cost, measure
from torchtrim._errors import (
    DataError,
    PlanError,
    ProfileError,
    StoreError,
    TorchtrimError,
    TorchtrimWarning,
    TraceError,
)
from torchtrim._graph import NeuronGraph, trace
from torchtrim._loop import Progressive, Round, Stop, iterate
from torchtrim._plan import LayerPlan, Plan
from torchtrim._profile import Profile, profile
from torchtrim._run_directory import run
from torchtrim._select import Fraction, MeanPlusStd, Threshold, select
from torchtrim._store import load, save
from torchtrim._surgery import mask, trim

__all__ = [
    "Cost",
    "DataError",
    "Fraction",
    "LayerPlan",
    "MeanPlusStd",
    "NeuronGraph",
    "Plan",
    "PlanError",
    "Profile",
    "ProfileError",
    "Progressive",
    "Round",
    "Stop",
    "StoreError",
    "Threshold",
    "TorchtrimError",
    "TorchtrimWarning",
    "TraceError",
    "criteria",
    "iterate",
    "load",
    "mask",
    "measure",
    "profile",
    "run",
    "save",
    "select",
    "trace",
    "trim",
]
