import io
import math
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from torchtrim._data import load_data
from torchtrim._lenet import LeNet
from torchtrim._losses import cross_entropy
from torchtrim._progress import training_progress
from torchtrim._training import Training, _schedule, _shifted, evaluate, train
from torchtrim.errors import TorchtrimError

PLAIN = Training(epochs=2, batch_size=8, mixed_precision="no", shift=0, label_smoothing=0, lr=0.01)


def changed(training: Training, **changes: Any) -> Training:
    return Training(**{**vars(training), **changes})


def images(count: int = 40, seed: int = 0) -> TensorDataset:
    """Noise in [count, 1, 28, 28], brighter above (class 0) or below (class 1)."""
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = torch.randn(count, 1, 28, 28, generator=generator), torch.arange(count) % 2
    inputs[labels == 0, :, :14] += 0.5
    inputs[labels == 1, :, 14:] += 0.5
    return TensorDataset(inputs, labels)


def points(count: int = 24, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, 5, generator=generator), torch.arange(count) % 3)


def lenet(seed: int = 0) -> LeNet:
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        return LeNet((3, 4, 8), classes=2)


class Recorder(nn.Module):
    """A linear classifier that notes what each call looks like, and fails on demand."""

    def __init__(self, fail_at: int = 0, exception: Exception | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.calls: list[bool] = []
        self.modes: list[bool] = []
        self.fail_at, self.exception = fail_at, exception

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls.append(torch.is_autocast_enabled("cpu"))
        self.modes.append(self.training)
        if len(self.calls) == self.fail_at:
            if self.exception is not None:
                raise self.exception
            return self.linear(inputs) * torch.nan
        return self.linear(inputs)


# What is asked


def test_all_faults_of_a_training_are_named_at_once() -> None:
    with pytest.raises(TorchtrimError) as caught:
        Training(epochs=-1, optimizer="adam", lr=math.nan, momentum=1, batch_size=0, shift=1.5, seed=-1)  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.startswith("Training: epochs must be ≥ 0, found -1; lr must be ≥ 0, found nan; ")
    for part in ("momentum must be ≥ 0 and < 1, found 1", "shift must be whole and ≥ 0, found 1.5"):
        assert part in message
    for part in ("seed must be", "batch_size must be", "optimizer must be 'adamw' or 'sgd', found 'adam'"):
        assert part in message
    assert "weight_decay" not in message


def test_half_precision_needs_a_gpu() -> None:
    with pytest.raises(TorchtrimError, match="'fp16' needs a model on a GPU"):
        train(lenet(), images(), changed(PLAIN, mixed_precision="fp16"))


def test_nothing_to_train() -> None:
    with pytest.raises(TorchtrimError, match=r"tuning: .*found 2 such parameters and 0 examples"):
        train(nn.Linear(5, 3), points(0), PLAIN, label="tuning")
    frozen = lenet().requires_grad_(False)
    with pytest.raises(TorchtrimError, match="found 0 such parameters and 40 examples"):
        train(frozen, images(), PLAIN)


def test_without_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(TorchtrimError, match=r"pip install 'torchtrim\[train\]'"):
        train(lenet(), images(), PLAIN)


# What training does


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_weights_are_those_of_a_plain_loop(name: str) -> None:
    """All examples in one batch, so that their order does not matter: three steps of the cosine schedule."""
    dataset, model, expected = points(), nn.Linear(5, 3), nn.Linear(5, 3)
    expected.load_state_dict(model.state_dict())
    training = Training(
        epochs=3,
        optimizer=name,  # type: ignore[arg-type]
        schedule="cosine",
        lr=0.1,
        weight_decay=0.2,
        momentum=0.7,
        batch_size=24,
        label_smoothing=0.1,
        mixed_precision="no",
    )
    train(model, dataset, training)

    if name == "sgd":
        optimizer: Any = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.7, weight_decay=0.2)
    else:
        optimizer = torch.optim.AdamW(expected.parameters(), lr=0.1, weight_decay=0.2)
    inputs, labels = dataset.tensors
    for factor in (math.cos(math.pi / 12) ** 2, 0.5, math.sin(math.pi / 12) ** 2):
        optimizer.param_groups[0]["lr"] = 0.1 * factor
        loss = F.cross_entropy(expected(inputs), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(model.weight, expected.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.bias, expected.bias, rtol=1e-5, atol=1e-6)


def test_one_cycle_rises_then_falls() -> None:
    assert _schedule("onecycle", 0) == pytest.approx(1 / 25)
    assert _schedule("onecycle", 0.15) == pytest.approx((1 + 1 / 25) / 2)
    assert _schedule("onecycle", 0.3) == 1
    assert _schedule("onecycle", 0.65) == pytest.approx(0.5)
    assert _schedule("onecycle", 1) == pytest.approx(0)


def test_training_learns() -> None:
    model = lenet()
    before = evaluate(model, images(200, seed=1))
    train(model, images(200), Training(epochs=4, batch_size=20, shift=1))
    assert before < 75
    assert evaluate(model, images(200, seed=1)) > 95


def test_training_learns_digits() -> None:
    data = load_data("mnist")
    model = LeNet((8, 16, 64))
    train(model, Subset(data.train, range(3000)), Training(epochs=2, batch_size=50))
    assert evaluate(model, Subset(data.test, range(1000))) > 88


@pytest.mark.parametrize(("epochs", "steps"), [(0, 0), (0.01, 1), (1, 3), (1.67, 5), (2, 6)])
def test_epochs_may_be_fractions(epochs: float, steps: int) -> None:
    model = Recorder()
    weight = model.linear.weight.clone()
    train(model, points(), changed(PLAIN, epochs=epochs))
    assert len(model.calls) == steps
    assert torch.equal(weight, model.linear.weight) == (steps == 0)


def test_a_rest_of_one_example_is_left_out() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    train(model, points(9), PLAIN)  # 8 and 1: a batch of one would be an error
    assert int(model[1].num_batches_tracked) == 2


def test_a_data_set_smaller_than_a_batch() -> None:
    model = Recorder()
    train(model, points(6), PLAIN)
    assert len(model.calls) == 2


def test_frozen_parameters_stay() -> None:
    model = lenet()
    model.conv1.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    train(model, images(), PLAIN)
    same = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    assert same == {"conv1.weight", "conv1.bias"}
    assert not model.conv1.weight.requires_grad
    assert model.conv2.weight.requires_grad


def test_auxiliary_classifiers_count_three_tenths() -> None:
    outputs = namedtuple("outputs", ["logits", "aux_logits2", "aux_logits1"])  # as torchvision's GoogLeNet
    labels = torch.tensor([0, 2])
    logits, first, second = torch.randn(3, 2, 3)
    loss, returned = cross_entropy(outputs(logits, first, None), labels, 0)
    assert returned is logits
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels) + 0.3 * F.cross_entropy(first, labels))
    both, _ = cross_entropy(outputs(logits, first, second), labels, 0)
    torch.testing.assert_close(both, loss + 0.3 * F.cross_entropy(second, labels))

    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.side = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, inputs: Tensor) -> Any:
            return outputs(self.main(inputs), self.side(inputs), None) if self.training else self.main(inputs)

    model = Auxiliary()
    side = model.side.weight.clone()
    train(model, points(), changed(PLAIN, mixed_precision="bf16"))
    assert not torch.equal(side, model.side.weight)
    assert 0 <= evaluate(model, points()) <= 100


@pytest.mark.parametrize("output", [torch.zeros(8, 3, 2), "text"])
def test_outputs_that_are_no_logits(output: Any) -> None:
    class Wrong(nn.Linear):
        def forward(self, inputs: Tensor) -> Any:
            return output

    with pytest.raises(TorchtrimError, match=r"logits \[batch, classes\].*found (\(8, 3, 2\)|str)"):
        train(Wrong(5, 3), points(), PLAIN)
    with pytest.raises(TorchtrimError, match=r"logits \[batch, classes\]"):
        evaluate(Wrong(5, 3), points())


@pytest.mark.parametrize(
    ("call", "place"), [(1, "epoch 1, batch 1"), (5, "epoch 2, batch 2"), (29, "epoch 10, batch 2")]
)
def test_a_loss_that_is_not_finite(call: int, place: str) -> None:
    model = Recorder(fail_at=call).eval()
    with pytest.raises(TorchtrimError, match=f"fit: expected a finite loss, found nan in {place}; .*lower lr"):
        train(model, points(), changed(PLAIN, epochs=12), label="fit")
    assert len(model.calls) < call + 20  # it is noticed soon
    assert not model.training


def test_shifts_are_random_whole_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    originals = torch.randn(300, 2, 6, 7)
    moved = _shifted(originals, 2, generator)
    assert moved.shape == originals.shape
    seen: set[tuple[int, int]] = set()
    for original, image in zip(originals, moved, strict=True):
        fitting = []
        for down in range(-2, 3):
            for right in range(-2, 3):
                rows = [min(max(row + down, 0), 5) for row in range(6)]
                columns = [min(max(column + right, 0), 6) for column in range(7)]
                if torch.equal(image, original[:, rows][:, :, columns]):
                    fitting.append((down, right))
        assert len(fitting) == 1
        seen.update(fitting)
    assert len(seen) == 25
    assert _shifted(originals, 0, generator) is originals
    assert _shifted(originals[:, 0], 2, generator).ndim == 3


# What training leaves as it was


def test_the_same_seed_gives_the_same_weights() -> None:
    def weights(seed: int, state: int) -> list[Tensor]:
        torch.manual_seed(5)
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 2))
        torch.manual_seed(state)  # which must not matter
        train(model, images(), Training(epochs=2, batch_size=8, seed=77), seed=seed)
        return list(model.parameters())

    first, again, other = weights(1, 8), weights(1, 9), weights(2, 8)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_seed_of_the_training_is_the_default() -> None:
    models = [lenet() for _ in range(3)]
    train(models[0], images(), changed(PLAIN, seed=4))
    train(models[1], images(), PLAIN, seed=4)
    train(models[2], images(), PLAIN)
    assert torch.equal(models[0].fc1.weight, models[1].fc1.weight)
    assert not torch.equal(models[0].fc1.weight, models[2].fc1.weight)


def test_the_global_random_state_is_untouched() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    before = torch.get_rng_state()
    train(model, images(), Training(epochs=1, batch_size=8))
    evaluate(model, images())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_model_stays_an_ordinary_module(precision: str) -> None:
    model = lenet().eval()
    model.fc1.train()
    attributes, strides = set(vars(model)), [parameter.stride() for parameter in model.parameters()]
    parameters = list(model.parameters())
    gradient = parameters[0].grad = torch.ones_like(parameters[0])
    train(model, images(), changed(PLAIN, mixed_precision=precision))

    assert set(vars(model)) == attributes
    assert model.forward.__func__ is LeNet.forward
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [parameter.stride() for parameter in parameters] == strides
    assert [module.training for module in model.modules()] == [False, False, False, True, False]
    assert parameters[0].grad is gradient
    assert torch.equal(gradient, torch.ones_like(gradient))
    assert all(parameter.grad is None for parameter in parameters[1:])


def test_a_forward_of_the_users_own_stays() -> None:
    model = lenet()
    calls: list[int] = []

    def forward(inputs: Tensor) -> Tensor:
        calls.append(len(inputs))
        return LeNet.forward(model, inputs)

    model.forward = forward  # type: ignore[method-assign]
    train(model, images(), changed(PLAIN, mixed_precision="bf16"))
    assert model.forward is forward
    assert calls == [8] * 10


def test_all_is_put_back_after_an_exception() -> None:
    model = Recorder(fail_at=3, exception=ZeroDivisionError("ours"))
    model.linear.eval()
    attributes, state = set(vars(model)), torch.get_rng_state()
    progress = Progress(console=Console(file=io.StringIO()))
    with pytest.raises(ZeroDivisionError, match="ours"):
        train(model, points(), changed(PLAIN, mixed_precision="bf16"), progress=progress)
    assert model.modes == [True, True, True]
    assert (model.training, model.linear.training) == (True, False)
    assert set(vars(model)) == attributes
    assert torch.equal(state, torch.get_rng_state())
    assert not progress.tasks


def test_convolutions_train_in_channels_last() -> None:
    seen: list[tuple[bool, bool]] = []

    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(2, 4, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            tensors = (inputs, self.convolution.weight)
            seen.append(tuple(t.is_contiguous(memory_format=torch.channels_last) for t in tensors))  # type: ignore[arg-type]
            return self.convolution(inputs).mean((2, 3))

    model, dataset = Convolution(), TensorDataset(torch.randn(8, 2, 6, 6), torch.arange(8) % 4)
    train(model, dataset, changed(PLAIN, epochs=1))
    assert model.convolution.weight.is_contiguous()
    train(model, dataset, changed(PLAIN, epochs=1, channels_last=False))
    model.to(memory_format=torch.channels_last)
    train(model, dataset, changed(PLAIN, epochs=1))
    assert model.convolution.weight.is_contiguous(memory_format=torch.channels_last)
    assert seen == [(True, True), (False, False), (True, True)]


def test_precisions_may_change_and_the_users_accelerator_lives_on() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    own = Accelerator(mixed_precision="no", cpu=True, gradient_accumulation_steps=3)
    own.gradient_state.sync_gradients = False  # as between two steps of an accumulation
    try:
        for precision in ("bf16", "no", "bf16"):
            model = Recorder()
            weight = model.linear.weight.clone()
            train(model, points(), changed(PLAIN, mixed_precision=precision))
            assert model.calls == [precision == "bf16"] * 6
            assert model.linear.weight.dtype is torch.float32
            assert not torch.equal(model.linear.weight, weight)
        assert own.mixed_precision == "no"
        assert own.gradient_accumulation_steps == 3
        assert not own.sync_gradients
        assert Accelerator(cpu=True).mixed_precision == "no"
    finally:
        for state in (PartialState, AcceleratorState, GradientState):
            state._shared_state.clear()
    train(Recorder(), points(), PLAIN)
    assert not any(state._shared_state for state in (PartialState, AcceleratorState, GradientState))


# Accuracy


@pytest.mark.parametrize("batch_size", [1, 7, 24, 100])
def test_accuracy_is_counted_example_by_example(batch_size: int) -> None:
    model, dataset = nn.Linear(5, 3), points()
    right = sum(int(model(inputs[None])[0].argmax()) == int(label) for inputs, label in dataset)
    assert evaluate(model, dataset, batch_size=batch_size) == 100 * right / 24
    assert 0 < right < 24


def test_evaluation_uses_eval_mode_and_puts_the_modes_back() -> None:
    model = Recorder()
    model.linear.eval()
    evaluate(model, points())
    assert model.modes == [False]
    assert (model.training, model.linear.training) == (True, False)
    failing = Recorder(fail_at=1, exception=ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        evaluate(failing, points())
    assert failing.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluation_of_nothing() -> None:
    with pytest.raises(TorchtrimError, match="with examples, found an empty one"):
        evaluate(nn.Linear(5, 3), points(0))


# Progress


class Shown(Progress):
    """A display that remembers what it was told."""

    def __init__(self) -> None:
        super().__init__(console=Console(file=io.StringIO()), disable=True)
        self.descriptions: list[str] = []
        self.totals: list[Any] = []

    def add_task(self, description: str, *arguments: Any, **options: Any) -> Any:
        self.totals.append((description, options.get("total")))
        return super().add_task(description, *arguments, **options)

    def update(self, task_id: Any, **options: Any) -> None:
        self.descriptions.append(options["description"])
        super().update(task_id, **options)


def test_progress_shows_batches_loss_and_accuracy() -> None:
    class Late(nn.Linear):
        calls = 0

        def forward(self, inputs: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(inputs) * (self.calls > 3)  # nothing in the first epoch

    progress, model, dataset = Shown(), Late(5, 3), points()
    loss = F.cross_entropy(F.linear(dataset.tensors[0], model.weight, model.bias), dataset.tensors[1]).item()
    train(model, dataset, changed(PLAIN, lr=0), progress=progress, label="round 1")
    accuracy = evaluate(model, dataset, progress=progress, batch_size=10)
    assert progress.totals == [("round 1", 6), ("testing", 3)]
    assert len(progress.descriptions) == 9
    # An epoch's last description is the mean of its three batches; a learning rate of zero changes nothing.
    assert progress.descriptions[2] == f"round 1, epoch 1: loss {math.log(3):.3f}, accuracy {100 / 3:.1f} %"
    assert progress.descriptions[5] == f"round 1, epoch 2: loss {loss:.3f}, accuracy {accuracy:.1f} %"
    assert not progress.tasks


def test_the_display_is_silent_without_a_terminal() -> None:
    for terminal in (True, False):
        file = io.StringIO()
        with training_progress(Console(file=file, force_terminal=terminal, width=100)) as progress:
            train(nn.Linear(5, 3), points(), PLAIN, progress=progress, label="fitting")
            progress.refresh()
        assert bool(file.getvalue()) == terminal


# Many processes

SCRIPT = """
import sys, torch
from torch.utils.data import TensorDataset
from torchtrim._losses import cross_entropy
from torchtrim._progress import training_progress
from torchtrim._training import Training, train
torch.set_num_threads(1)
torch.manual_seed(0)
dataset = TensorDataset(torch.randn(64, 5), torch.arange(64) % 3)
model = torch.nn.Linear(5, 3)
train(model, dataset, Training(epochs=2, batch_size=8, mixed_precision="no"))
assert isinstance(model.weight, torch.nn.Parameter) and "forward" not in vars(model)
rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else "alone"
torch.save(model.state_dict(), f"{sys.argv[1]}/{rank}.pt")
if rank != "alone":
    assert torch.distributed.get_world_size() == 2
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for arguments in ([], launch):
        command = [sys.executable, *arguments, str(script), str(tmp_path)]
        subprocess.run(command, check=True, env=environment, capture_output=True, timeout=300)
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("alone", 0, 1))
    assert torch.equal(first["weight"], second["weight"])
    torch.testing.assert_close(first, alone)
