"""What the benchmarks of larger networks share: Fashion-MNIST, and the trained network of each seed."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import nn

import torchtrim
from benchmarks.paper.common import Experiment
from torchtrim._data import Data, batches, load_data
from torchtrim._training import Training, train
from torchtrim.errors import DataError

FASHION = "idx:data/fashion-mnist"
_MISSING = (
    "Fashion-MNIST is not part of this repository. torchvision.datasets.FashionMNIST('DIR', download=True) puts its "
    "files into DIR/FashionMNIST/raw, Debian's package dataset-fashion-mnist puts them into "
    "/usr/share/datasets/fashion-mnist; copy them to data/fashion-mnist, or pass --data idx:DIR"
)


class Fashion(Experiment):
    """An experiment on Fashion-MNIST: 55,000 images train, 5,000 calibrate and decide, 10,000 are only reported."""

    def __init__(self, module: str, description: str, *, seeds: int = 1, epochs: int = 6) -> None:
        super().__init__(module, description, seeds=seeds, runs="runs/accuracy", data=FASHION)
        self.epochs = epochs
        torch.set_num_threads(1)

    @cached_property
    def data(self) -> Data:
        try:
            return load_data(self.source)
        except DataError as error:
            raise SystemExit(f"{error}\n{_MISSING}") from error

    @cached_property
    def calibration(self) -> list[torch.Tensor]:
        """Images without labels, in batches: float [250, 1, 28, 28] each."""
        return [images for images, _ in batches(self.data.calibration, 250)]

    def trained(
        self, name: str, build: Callable[[], nn.Module], seed: int, data: Data | None = None, **training: Any
    ) -> nn.Module:
        """The network of a seed, trained once and kept."""
        path = self.runs / f"{name}-{seed}.safetensors"
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            model = build()
        if path.exists():
            return torchtrim.load(model, path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.retrain(model, training.pop("epochs", self.epochs), seed, f"{name} {seed}", data, **training)
        torchtrim.save(model, path)
        return model

    def retrain(
        self,
        model: nn.Module,
        epochs: float,
        seed: int,
        label: str,
        data: Data | None = None,
        teacher: nn.Module | None = None,
        **training: Any,
    ) -> nn.Module:
        """Train a model in place, on these data or Fashion-MNIST; training: what is unusual of `Training`."""
        settings = Training(epochs=epochs, **training)
        with self.progress:
            train(
                model,
                (data or self.data).train,
                settings,
                seed=seed,
                teacher=teacher,
                progress=self.progress,
                label=label,
            )
        return model
