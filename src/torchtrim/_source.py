"""A model and the data it is for: opened by name, and found to fit before any work is done on them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from torchtrim._data import Data, load_data
from torchtrim._graph import NeuronGraph, trace
from torchtrim._models import PRETRAINED, build_model, check_model_name, load_weights, needs_weights
from torchtrim._run import RunError
from torchtrim._training import check_logits
from torchtrim.errors import ModelError, TorchtrimError, TraceError


@dataclass(frozen=True)
class Source:
    """A model and the data it is for, as they are named. weights: a file, or "DEFAULT" for a library's own.

    calibration: how many examples are held out of training, to measure and decide on; None is the data's usual number.
    """

    model: str
    data: str
    weights: str | None = None
    calibration: int | None = None
    resize: int = 256
    crop: int = 224
    device: str = "auto"
    seed: int = 0

    @property
    def untrained(self) -> bool:
        """Whether the model has but random weights."""
        return self.weights is None and needs_weights(self.model)


@dataclass(frozen=True, eq=False)
class Opened:
    """What a source names. fresh: makes the model anew, as it was before any trim or training."""

    data: Data
    model: nn.Module
    graph: NeuronGraph
    device: torch.device
    fresh: Callable[[], nn.Module]


def open_source(source: Source, *, through_norms: bool = False) -> Opened:
    """Build the model, load its weights and the data, and try the one on the other.

    Raises TorchtrimError, what is cheap to find out first: an unknown name, a missing or damaged file, weights of
    another architecture, inputs or classes that do not fit.
    """
    check_model_name(source.model, source.weights)
    device = device_named(source.device)
    data = load_data(
        source.data, calibration=source.calibration, seed=source.seed, resize=source.resize, crop=source.crop
    )

    def fresh(*, pretrained: bool = False) -> nn.Module:
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(source.seed)
            return build_model(source.model, classes=len(data.classes), pretrained=pretrained)

    model = fresh(pretrained=source.weights == PRETRAINED)
    if source.weights is not None and source.weights != PRETRAINED:
        model = load_weights(model, source.weights)
    model = model.to(device)
    return Opened(data, model, _fitting(model, data, through_norms), device, fresh)


def device_named(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise TorchtrimError(f"device: expected auto, cpu or cuda, found {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise TorchtrimError("device: cuda was asked for, but PyTorch finds no GPU here; use cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _fitting(model: nn.Module, data: Data, through_norms: bool) -> NeuronGraph:
    """The model's neurons. Raises TorchtrimError unless the model takes this data and tells its classes apart."""
    try:
        graph = trace(model, data.example, through_norms=through_norms)
    except TraceError as error:
        size, cause = " × ".join(map(str, data.shape)), error.__cause__
        found = f"{cause} (in {cause.where})" if isinstance(cause, RunError) else str(error)
        raise TraceError(
            f"the inputs of {data.name}, of size {size}, do not fit the model, {type(model).__name__}: {found}; "
            "use data of the size that the model takes, or another model"
        ) from error
    classes = check_logits(model, data.example)
    if classes != len(data.classes):
        raise ModelError(
            f"the model tells {classes:,} classes apart, the data {data.name} has {len(data.classes):,}; "
            "use a model with one output for each class, in the order of the data's"
        )
    return graph
