"""Learning from a teacher, stopping early, and going back to the best epoch."""

import copy
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from torchtrim import _training
from torchtrim._best_epoch import BestEpoch
from torchtrim._losses import distillation
from torchtrim._training import Training, train
from torchtrim.errors import TorchtrimError

PLAIN = Training(epochs=4, batch_size=8, mixed_precision="no", shift=0, label_smoothing=0.1, lr=0.05)


def changed(**changes: Any) -> Training:
    return Training(**{**vars(PLAIN), **changes})


def points(count: int = 24) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(count, 5, generator=generator), torch.arange(count) % 3)


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 3))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# A teacher


def test_the_distance_to_a_teacher_number_by_number() -> None:
    logits, taught = torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    for temperature in (1.0, 4.0, 0.5):
        total = 0.0
        for student, teacher in zip(logits.tolist(), taught.tolist(), strict=True):
            q, p = ([math.exp(z / temperature) for z in row] for row in (student, teacher))
            q, p = [x / sum(q) for x in q], [x / sum(p) for x in p]
            total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
        expected = temperature**2 * total / 7
        assert float(distillation(logits, taught, temperature)) == pytest.approx(expected, rel=1e-5)
    assert float(distillation(logits, logits, 2.0)) == pytest.approx(0, abs=1e-6)
    with pytest.raises(TorchtrimError, match=r"teacher of as many classes, found logits \(7, 3\)"):
        distillation(logits, taught[:, :3], 2.0)


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_weights_are_those_of_a_plain_loop_with_a_teacher(weight: float) -> None:
    """All examples in one batch, so that their order does not matter."""
    dataset, teacher = points(), nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    with torch.no_grad():
        teacher[1].running_mean.add_(0.5)
    model = nn.Linear(5, 3)
    expected = copy.deepcopy(model)
    training = changed(epochs=3, batch_size=24, optimizer="sgd", schedule="cosine", momentum=0, weight_decay=0)
    train(model, dataset, Training(**{**vars(training), "distill": weight, "temperature": 3}), teacher=teacher)
    inputs, labels = dataset.tensors
    with torch.no_grad():
        target = (copy.deepcopy(teacher).eval()(inputs) / 3).softmax(1)
    for factor in (math.cos(math.pi / 12) ** 2, 0.5, math.sin(math.pi / 12) ** 2):
        logits = expected(inputs)
        soft = (target * (target.log() - (logits / 3).log_softmax(1))).sum(1).mean()
        loss = (1 - weight) * F.cross_entropy(logits, labels, label_smoothing=0.1) + weight * 9 * soft
        expected.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in expected.parameters():
                parameter.sub_(0.05 * factor * parameter.grad)
    torch.testing.assert_close(model.weight, expected.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.bias, expected.bias, rtol=1e-5, atol=1e-6)


def test_a_teacher_is_left_as_it_was() -> None:
    teacher, seen = network(1).train(), []
    teacher[1].eval()
    teacher[0].weight.grad = torch.ones(6, 5)
    before, modes = state(teacher), [module.training for module in teacher.modules()]
    teacher.register_forward_hook(lambda module, *_: seen.append((module.training, torch.is_grad_enabled())))
    train(network(), points(), changed(distill=0.5), teacher=teacher)
    assert set(seen) == {(False, False)}
    assert len(seen) == 12
    assert [module.training for module in teacher.modules()] == modes
    assert_same(state(teacher), before)
    assert torch.equal(teacher[0].weight.grad, torch.ones(6, 5))
    assert [parameter.requires_grad for parameter in teacher.parameters()] == [True] * 6
    assert teacher[4].weight.grad is None


def test_without_a_weight_the_teacher_is_not_asked() -> None:
    model, other = network(), network()
    teacher = network(1)
    teacher.register_forward_hook(lambda *_: pytest.fail("the teacher was asked"))
    train(model, points(), PLAIN, teacher=teacher)
    train(other, points(), PLAIN)
    assert_same(state(model), state(other))


def test_a_student_comes_closer_to_its_teacher() -> None:
    dataset, teacher = points(120), network(1).eval()
    inputs = dataset.tensors[0]

    def distance(training: Training) -> float:
        model = network()
        train(model, dataset, training, teacher=teacher)
        with torch.no_grad():
            return float(distillation(model.eval()(inputs), teacher(inputs), 1.0))

    assert distance(changed(epochs=10, distill=0.9)) < 0.5 * distance(changed(epochs=10))


# The best epoch


class Scripted:
    """Accuracies by a table, in place of `evaluate`; what the model was each time it was looked at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *table: float) -> None:
        self._left = iter(table)
        self.states: list[dict[str, Tensor]] = []
        self.labels: list[Any] = []
        monkeypatch.setattr(_training, "evaluate", self._evaluate)

    def _evaluate(self, model: nn.Module, dataset: Any, **_: Any) -> float:
        torch.rand(3)  # as a DataLoader draws
        self.states.append(state(model))
        self.labels.append(dataset)
        return next(self._left)


@pytest.mark.parametrize(
    ("table", "looks", "best"),
    [
        ((10, 20, 30, 40, 50), 5, 4),  # better each time: all four epochs, the last
        ((10, 20, 15, 40, 50), 3, 1),
        ((10, 9, 50, 50, 50), 2, 0),  # the beginning
        ((10, 20, 20, 50, 50), 3, 2),  # of equal ones the last, but no better
    ],
)
def test_training_stops_early_and_goes_back(
    monkeypatch: pytest.MonkeyPatch, table: tuple[float, ...], looks: int, best: int
) -> None:
    scripted, model, data = Scripted(monkeypatch, *table), network(), points(6)
    train(model, points(), changed(patience=1), calibration=data)
    assert len(scripted.states) == looks
    assert_same(state(model), scripted.states[best])
    assert all(one is data for one in scripted.labels)
    assert not all(torch.equal(scripted.states[0][name], scripted.states[1][name]) for name in scripted.states[0])


def test_more_patience_waits_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted, model = Scripted(monkeypatch, 10, 20, 15, 12, 60), network()
    train(model, points(), changed(patience=2), calibration=points(6))
    assert len(scripted.states) == 4
    assert_same(state(model), scripted.states[1])
    scripted, model = Scripted(monkeypatch, 10, 20, 15, 30, 25), network()
    train(model, points(), changed(patience=2), calibration=points(6))
    assert len(scripted.states) == 5
    assert_same(state(model), scripted.states[3])


def test_keeping_the_best_changes_nothing_but_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout draws as without; statistics of batch norms go back too; a rest of an epoch counts at the end."""
    plain, model = network(), network()
    train(plain, points(), changed(epochs=2.7))
    scripted = Scripted(monkeypatch, 1, 2, 3, 4)
    train(model, points(), changed(epochs=2.7, keep_best=True), calibration=points(6))
    assert_same(state(model), state(plain))
    assert len(scripted.states) == 4
    scripted, model = Scripted(monkeypatch, 1, 9, 3, 4), network()
    train(model, points(), changed(epochs=2.7, keep_best=True), calibration=points(6))
    assert_same(state(model), scripted.states[1])
    assert int(model[1].num_batches_tracked) == 3
    assert int(plain[1].num_batches_tracked) == 8


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_accuracy_is_that_of_the_model_as_it_is_used(monkeypatch: pytest.MonkeyPatch, precision: Any) -> None:
    """In its own precision and in evaluation mode, though it is trained in another."""
    model, usual, found = network(), _training.evaluate, []
    seen: list[tuple[bool, bool]] = []
    model[0].register_forward_pre_hook(
        lambda module, _: seen.append((module.training, torch.is_autocast_enabled("cpu")))
    )

    def noted(*arguments: Any, **named: Any) -> float:
        found.append(usual(*arguments, **named))
        return found[-1]

    monkeypatch.setattr(_training, "evaluate", noted)
    train(model, points(), changed(keep_best=True, mixed_precision=precision), calibration=points(9))
    looked = [mode for mode in seen if not mode[0]]
    assert looked == [(False, False)] * 10  # two batches, five times
    assert sum(mode[0] for mode in seen) == 12
    assert usual(model, points(9)) == max(found)
    assert "forward" not in vars(model)


def test_frozen_and_shared_tensors_go_back_too() -> None:
    model = network()
    model[4].weight.requires_grad_(False)
    best = BestEpoch(model, None)
    before = state(model)
    assert not best.look(1.0)
    with torch.no_grad():
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            tensor.add_(1)
    assert not best.look(0.5)
    best.restore()
    assert_same(state(model), before)
    assert not model[4].weight.requires_grad


def test_an_accuracy_that_is_no_number_is_never_best() -> None:
    model = network()
    best = BestEpoch(model, 2)
    assert [best.look(value) for value in (math.nan, 1.0, math.nan, math.nan)] == [False, False, False, True]


# Mistakes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: changed(distill=1.5), "distill must be ≥ 0 and ≤ 1, found 1.5"),
        (lambda: changed(temperature=0), "temperature must be > 0, found 0"),
        (lambda: changed(patience=0), "patience must be None, or whole and ≥ 1, found 0"),
        (lambda: changed(patience=1.5), "patience must be None, or whole and ≥ 1, found 1.5"),
        (lambda: changed(patience=4), "patience must be below epochs, 4, found 4; train for longer"),
        (lambda: train(network(), points(), changed(distill=0.5)), "expected a teacher to distill from, found none"),
        (lambda: train(network(), points(), changed(keep_best=True)), "expected calibration data .* found none"),
        (
            lambda: train(network(), points(), changed(patience=1), calibration=points(0)),
            "expected calibration data .* found none",
        ),
        (
            lambda: train(network(), points(), changed(distill=0.5), teacher=nn.Linear(5, 4)),
            "teacher of as many classes",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TorchtrimError, match=message):
        make()


def test_a_model_does_not_teach_itself() -> None:
    model = network()
    with pytest.raises(TorchtrimError, match="found the model that is trained"):
        train(model, points(), changed(distill=0.5), teacher=model)


# Many processes

SCRIPT = """
import sys, torch
from torch import nn
from torch.utils.data import TensorDataset
from torchtrim import _training
from torchtrim._training import Training, train
torch.set_num_threads(1)
torch.manual_seed(0)
dataset = TensorDataset(torch.randn(64, 5), torch.arange(64) % 3)
model, teacher = (nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)) for _ in range(2))
looks, usual = [], _training.evaluate
def evaluate(*arguments, **named):  # each process sees another accuracy, and alone would end at another time
    looks.append(usual(*arguments, **named))
    return [50.0, 60.0, 10.0, 80.0, 90.0][len(looks) - 1] if torch.distributed.get_rank() else 40.0
_training.evaluate = evaluate
training = Training(epochs=4, batch_size=8, mixed_precision="no", distill=0.5, patience=1)
train(model, dataset, training, teacher=teacher, calibration=dataset)
rank = torch.distributed.get_rank()
torch.save((dict(model.named_parameters()), len(looks)), f"{sys.argv[1]}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_that_train_together_end_together(tmp_path: Path) -> None:
    """The mean of what they see is 45, 50, 25: all end after two epochs, and go back to the first."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launch, str(script), str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=300)
    (first, looks), (second, others) = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    assert looks == others == 3
    assert all(torch.equal(parameter, second[name]) for name, parameter in first.items())
