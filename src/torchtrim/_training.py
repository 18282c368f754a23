"""The built-in retraining, and the accuracy of a model: what the command line uses between two trims.

Training runs on Hugging Face Accelerate: on a CPU, a GPU, or many of them under `accelerate launch`, in
mixed precision where the hardware has it. The model is trained in place and stays an ordinary module.
"""

import itertools
import math
from collections.abc import Callable, Generator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import Dataset

from torchtrim._best_epoch import BestEpoch
from torchtrim._data import batches
from torchtrim._losses import cross_entropy, distillation, logits_of
from torchtrim._progress import shown
from torchtrim._training_state import gpus_of, modes_kept, own_forward, put_back, random_state, teaching
from torchtrim.errors import TorchtrimError

OptimizerName = Literal["adamw", "sgd"]
ScheduleName = Literal["onecycle", "cosine"]
Precision = Literal["auto", "no", "bf16", "fp16"]

_FITTING: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    *((name, "≥ 0", lambda x: 0 <= x < math.inf) for name in ("epochs", "lr", "weight_decay")),
    *((name, "≥ 0 and < 1", lambda x: 0 <= x < 1) for name in ("momentum", "label_smoothing")),
    ("distill", "≥ 0 and ≤ 1", lambda x: 0 <= x <= 1),
    ("temperature", "> 0", lambda x: 0 < x < math.inf),
    ("patience", "None, or whole and ≥ 1", lambda x: x is None or (type(x) is int and x >= 1)),
    *((name, "whole and ≥ 0", lambda x: isinstance(x, int) and x >= 0) for name in ("shift", "workers")),
    ("seed", "whole, ≥ 0 and below 2³²", lambda x: isinstance(x, int) and 0 <= x < 2**32),
    ("batch_size", "whole and ≥ 1", lambda x: isinstance(x, int) and x >= 1),
    ("optimizer", "'adamw' or 'sgd'", lambda x: x in get_args(OptimizerName)),
    ("schedule", "'onecycle' or 'cosine'", lambda x: x in get_args(ScheduleName)),
    ("mixed_precision", "'auto', 'no', 'bf16' or 'fp16'", lambda x: x in get_args(Precision)),
)
_READ_EVERY = 20  # batches between two readings of the loss, as each one waits until a GPU has finished


@dataclass(frozen=True)
class Training:
    """How a model is trained. The defaults suit LeNet on MNIST, from scratch and after a trim.

    epochs           passes over the data; fractions are allowed, 0 trains nothing
    lr               the highest learning rate of the schedule
    momentum         of `sgd`; `adamw` does not use it
    schedule         "onecycle" warms up for 30 % of the steps, then falls to zero; "cosine" only falls
    batch_size       examples per step, over all processes
    mixed_precision  "auto" takes bfloat16 where the hardware computes in it, else float32
    shift            images [batch, channels, height, width] are moved by up to ± this many pixels
    workers          processes that read images; data in memory needs none
    distill          share of the loss that is the distance to a teacher's outputs; the rest is the cross entropy
    temperature      by which both outputs are softened for that
    patience         epochs in a row without a better accuracy on the calibration data, after which training ends early
                     and the best is restored; fewer than `epochs`, for it would end nothing
    keep_best        restore the best without ending early

    Accuracy on the calibration data is looked at before training, after every whole epoch, and at the end. The best
    are the weights and the statistics of batch norms, of equal accuracies the last; they may be those of the beginning.
    The first epoch of "onecycle", whose rate rises, can be worse than that: little patience then ends with it.
    """

    epochs: float = 4
    optimizer: OptimizerName = "adamw"
    lr: float = 5e-3
    weight_decay: float = 0.05
    momentum: float = 0.9
    schedule: ScheduleName = "onecycle"
    batch_size: int = 128
    label_smoothing: float = 0.05
    mixed_precision: Precision = "auto"
    channels_last: bool = True
    shift: int = 2
    workers: int = 0
    seed: int = 0
    distill: float = 0
    temperature: float = 4
    patience: int | None = None
    keep_best: bool = False

    def __post_init__(self) -> None:
        faults = [
            f"{name} must be {expected}, found {getattr(self, name)!r}"
            for name, expected, fits in _FITTING
            if not fits(getattr(self, name))
        ]
        if not faults and self.patience is not None and self.patience >= self.epochs:
            faults.append(f"patience must be below epochs, {self.epochs:g}, found {self.patience}; train for longer")
        if faults:
            raise TorchtrimError("Training: " + "; ".join(faults))

    @property
    def looks_for_best(self) -> bool:
        """Whether accuracy is looked at after each epoch."""
        return self.keep_best or self.patience is not None


def train(
    model: nn.Module,
    dataset: Dataset[Any],
    training: Training,
    *,
    seed: int | None = None,
    teacher: nn.Module | None = None,
    calibration: Dataset[Any] | None = None,
    progress: Progress | None = None,
    label: str = "training",
) -> None:
    """Train `model` in place, where it is, to classify `dataset`, which yields (input, label) pairs.

    `seed` replaces `training.seed`. teacher: the model that `distill` learns from; it is left as it is. calibration:
    the data whose accuracy `patience` and `keep_best` look at. Modes, gradients and the random state are left as they
    were, and so are frozen parameters. The optimizer is made anew.

    Raises TorchtrimError: nothing to train, no teacher or no calibration data where they are asked for, or a loss that
    is not finite (the weights are then spoilt).
    """
    _check_helpers(model, training, teacher, calibration, label)
    seed = training.seed if seed is None else seed
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    examples = len(cast(Sized, dataset))
    if not parameters or not examples:
        raise TorchtrimError(
            f"{label}: expected parameters that require gradients and at least one example, "
            f"found {len(parameters)} such parameters and {examples} examples"
        )
    with (
        _accelerator(training, parameters[0].device) as accelerator,
        put_back(model, channels_last=training.channels_last),
        random_state(seed + accelerator.process_index, accelerator.device),
        teaching(teacher if training.distill else None, accelerator.device) as taught,
    ):
        loader = batches(
            dataset,
            training.batch_size,
            shuffle=True,
            drop_last=examples >= training.batch_size,  # batch normalisation cannot train on a rest of one
            generator=torch.Generator().manual_seed(seed),
            workers=training.workers,
        )
        model.train()
        wrapped, optimizer, loader = accelerator.prepare(model, _optimizer(parameters, training), loader)
        steps = round(training.epochs * len(loader)) or math.ceil(training.epochs)
        shifts = torch.Generator().manual_seed(seed + accelerator.process_index)
        best = BestEpoch(model, training.patience) if training.looks_for_best else None

        def look() -> bool:
            """Whether training ends here."""
            if best is None or calibration is None:
                return False
            with own_forward(model), torch.random.fork_rng(gpus_of(accelerator.device)):
                found = evaluate(model, calibration, batch_size=training.batch_size, workers=training.workers)
            if accelerator.num_processes > 1:  # each has batch norms of its own, and all must end together
                found = accelerator.reduce(torch.tensor(found, device=accelerator.device), "mean").item()
            return best.look(found)

        look()
        with shown(progress, label, steps) as show:
            meter = _Meter(label, len(loader), show)
            endless = itertools.chain.from_iterable(itertools.repeat(loader))
            for step, (inputs, labels) in enumerate(itertools.islice(endless, steps)):
                for group in optimizer.param_groups:
                    group["lr"] = training.lr * _schedule(training.schedule, (step + 0.5) / steps)
                images = _shifted(inputs, training.shift, shifts)
                if training.channels_last and images.ndim == 4:
                    images = images.to(memory_format=torch.channels_last)
                loss, logits = cross_entropy(wrapped(images), labels, training.label_smoothing)
                if taught is not None:
                    with torch.no_grad(), accelerator.autocast():
                        soft = logits_of(taught(images))
                    apart = distillation(logits, soft, training.temperature)
                    loss = (1 - training.distill) * loss + training.distill * apart
                optimizer.zero_grad()
                accelerator.backward(loss)
                optimizer.step()
                meter.add(loss, logits, labels)
                if best is not None and ((step + 1) % len(loader) == 0 or step + 1 == steps):
                    meter.read()
                    if look():
                        break
            meter.read()
        if best is not None:
            best.restore()


def evaluate(
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    batch_size: int = 250,
    workers: int = 0,
    progress: Progress | None = None,
    label: str = "testing",
) -> float:
    """The accuracy of `model`, in per cent, computed where the model is and in its own precision."""
    examples = len(cast(Sized, dataset))
    if not examples:
        raise TorchtrimError(f"{label}: expected a data set with examples, found an empty one")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    loader = batches(dataset, batch_size, workers=workers)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    with torch.no_grad(), modes_kept(model), shown(progress, label, len(loader)) as show:
        model.eval()
        for inputs, labels in loader:
            correct += (logits_of(model(inputs.to(device))).argmax(1) == labels.to(device)).sum()
            show("")
    return 100 * int(correct) / examples


def check_logits(model: nn.Module, example: Tensor) -> int:
    """How many classes the model tells apart, called with `example`. Raises TorchtrimError: it returns no logits."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with torch.no_grad(), modes_kept(model):
        return logits_of(model.eval()(example.to(device))).shape[1]


class _Meter:
    """Loss and accuracy since the epoch began, read from the device once in a while and shown."""

    def __init__(self, label: str, batches_per_epoch: int, show: Callable[[str], None]) -> None:
        self._label = label
        self._batches_per_epoch = batches_per_epoch
        self._show = show
        self._unread: list[Tensor] = []
        self._done, self._loss, self._accuracy = 0, 0.0, 0.0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        accuracy = 100 * (logits.detach().argmax(1) == labels).float().mean()
        self._unread.append(torch.stack((loss.detach().float(), accuracy)))
        if len(self._unread) == _READ_EVERY:
            self.read()

    def read(self) -> None:
        for loss, accuracy in (pair.tolist() for pair in self._unread):
            epoch, batch = divmod(self._done, self._batches_per_epoch)
            if not math.isfinite(loss):
                raise TorchtrimError(
                    f"{self._label}: expected a finite loss, found {loss} in epoch {epoch + 1}, batch "
                    f"{batch + 1}; look for such values in the data, try a lower lr or mixed_precision='no'"
                )
            self._loss += (loss - self._loss) / (batch + 1)  # the mean; a new epoch's first batch replaces it
            self._accuracy += (accuracy - self._accuracy) / (batch + 1)
            self._done += 1
            self._show(f", epoch {epoch + 1}: loss {self._loss:.3f}, accuracy {self._accuracy:.1f} %")
        self._unread.clear()


def _check_helpers(
    model: nn.Module, training: Training, teacher: nn.Module | None, calibration: Dataset[Any] | None, label: str
) -> None:
    """Raise TorchtrimError unless those are there that the training asks for."""
    if training.distill and (teacher is None or teacher is model):
        found = "none" if teacher is None else "the model that is trained"
        raise TorchtrimError(f"{label}: expected a teacher to distill from, found {found}")
    if training.looks_for_best and not (calibration is not None and len(cast(Sized, calibration))):
        raise TorchtrimError(f"{label}: expected calibration data to find the best epoch with, found none")


def _optimizer(parameters: list[nn.Parameter], training: Training) -> Optimizer:
    if training.optimizer == "adamw":
        return AdamW(parameters, training.lr, weight_decay=training.weight_decay)
    return SGD(parameters, training.lr, training.momentum, weight_decay=training.weight_decay)


def _schedule(name: ScheduleName, done: float) -> float:
    """The factor of the learning rate when the fraction `done` of all steps is done."""
    if name == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    if done < 0.3:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * done / 0.3)) / 2
    return (1 + math.cos(math.pi * (done - 0.3) / 0.7)) / 2


def _shifted(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Every image moved by its own random offset; its border is repeated where nothing is left to show."""
    if not pixels or images.ndim != 4:
        return images
    height, width = images.shape[2:]
    padded = F.pad(images, (pixels, pixels, pixels, pixels), mode="replicate")
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # [batch, channels, down, right, height, width]
    down, right = torch.randint(2 * pixels + 1, (2, len(images)), generator=generator).to(images.device)
    return windows[torch.arange(len(images), device=images.device), :, down, right]


def _precision(asked: Precision, device: torch.device) -> str:
    if asked == "fp16" and device.type == "cpu":
        raise TorchtrimError("Training: mixed_precision 'fp16' needs a model on a GPU, found one on the CPU")
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private: another PyTorch may lack them
    native = device.type == "cpu" and any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return "bf16" if native else "no"


@contextmanager
def _accelerator(training: Training, device: torch.device) -> Generator[Any]:
    """An Accelerator of our own; what is global in Accelerate is as before at the end."""
    try:
        from accelerate import Accelerator, DataLoaderConfiguration
        from accelerate.state import AcceleratorState, GradientState, PartialState
    except ImportError as error:
        raise TorchtrimError(f"training: {error}; run pip install 'torchtrim[train]'") from error
    states = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in states]
    try:
        AcceleratorState._shared_state.clear()
        GradientState._shared_state.clear()
        processes = PartialState(cpu=device.type == "cpu")
        if processes.num_processes == 1:  # else Accelerate gives every process a device of its own
            processes.device = device
        precision = _precision(training.mixed_precision, device)
        sharing = DataLoaderConfiguration(split_batches=True)
        accelerator = Accelerator(mixed_precision=precision, dataloader_config=sharing)
        kind, count = accelerator.distributed_type.value, accelerator.num_processes
        if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM") or training.batch_size % count:
            raise TorchtrimError(
                "training: expected data parallel processes and a batch size that they can share equally, "
                f"found {count} processes of kind {kind} and {training.batch_size}"
            )
        yield accelerator
    finally:
        for state, content in zip(states, before, strict=True):
            state.clear()
            state.update(content)
