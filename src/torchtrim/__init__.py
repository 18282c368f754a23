"""Make trained neural networks smaller and faster by removing the neurons that stay silent."""

from torchtrim import criteria
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
from torchtrim._plan import LayerPlan, Plan
from torchtrim._select import Fraction, MeanPlusStd, Threshold, select
from torchtrim._surgery import mask, trim

__all__ = [
    "DataError",
    "Fraction",
    "LayerPlan",
    "MeanPlusStd",
    "NeuronGraph",
    "Plan",
    "PlanError",
    "ProfileError",
    "StoreError",
    "Threshold",
    "TorchtrimError",
    "TorchtrimWarning",
    "TraceError",
    "criteria",
    "mask",
    "select",
    "trace",
    "trim",
]
