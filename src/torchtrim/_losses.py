"""What training makes small: the cross entropy, and the distance to the softened outputs of a teacher."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from torchtrim.errors import TorchtrimError

_AUXILIARY_WEIGHT = 0.3  # Szegedy et al., "Going deeper with convolutions", 2014, section 5


def cross_entropy(output: Any, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """The cross entropy, auxiliary classifiers included, and the logits: float [batch, classes]."""
    logits = logits_of(output)
    loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    outputs: dict[str, Any] = output._asdict() if hasattr(output, "_asdict") else {}
    for name, auxiliary in outputs.items():
        if name.startswith("aux") and auxiliary is not None:
            loss = loss + _AUXILIARY_WEIGHT * F.cross_entropy(auxiliary, labels, label_smoothing=smoothing)
    return loss, logits


def distillation(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(logits / T)), the mean over the batch; both float [batch, classes].

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2: T² keeps the size of the
    gradients, whatever the temperature.
    """
    if logits.shape != teacher.shape:
        raise TorchtrimError(
            f"distillation: expected a teacher of as many classes, found logits {tuple(teacher.shape)} of the teacher "
            f"for {tuple(logits.shape)} of the model"
        )
    soft, target = (F.log_softmax(one.float() / temperature, 1) for one in (logits, teacher))
    return temperature**2 * F.kl_div(soft, target, reduction="batchmean", log_target=True)


def logits_of(output: Any) -> Tensor:
    """The logits among what a model returned: float [batch, classes]. Raises TorchtrimError: there are none."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise TorchtrimError(
            "model: expected it to return logits [batch, classes], or an object with such `logits`, "
            f"found {found}; train and evaluate this model with functions of your own"
        )
    return logits
