"""The epoch after which a model was best, to stop soon after it and to go back to it."""

import math

import torch
from torch import Tensor, nn


class BestEpoch:
    """The weights and buffers with which `model` was most accurate, the last of equal ones.

    patience: how many epochs in a row may bring no accuracy above all before; None is any number.
    """

    def __init__(self, model: nn.Module, patience: int | None) -> None:
        self._model = model
        self._patience = math.inf if patience is None else patience
        self._best = -math.inf
        self._since = 0  # epochs without a better one
        self._kept: dict[str, Tensor] = {}

    def look(self, accuracy: float) -> bool:
        """Note how accurate the model is now; whether patience is at its end."""
        accuracy = -math.inf if math.isnan(accuracy) else accuracy
        self._since = 0 if accuracy > self._best or not self._kept else self._since + 1
        if accuracy >= self._best:
            self._best = accuracy
            self._kept = {name: tensor.detach().clone() for name, tensor in self._tensors().items()}
        return self._since >= self._patience

    def restore(self) -> None:
        """Give the model what it had then, bit for bit."""
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(self._kept[name])

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
