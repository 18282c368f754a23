"""Repair against slow, obvious NumPy on what the layers read, and what it must leave alone."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchtrim
from torchtrim import LayerPlan, Plan
from torchtrim._lenet import LeNet
from torchtrim.errors import PlanError, ProfileError, TorchtrimError, TorchtrimWarning
from toys import Net, randomised

IMAGES = torch.Generator().manual_seed(0)


def images(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def chain(consumer: nn.Module, after: Callable[[Tensor], Tensor] | None = None, channels: int = 8) -> nn.Module:
    """Neurons `a`, the layer `b` that reads them, and an output that reads that."""
    torch.manual_seed(0)
    linear = isinstance(consumer, nn.Linear)
    first = nn.Linear(5, channels) if linear else nn.Conv2d(3, channels, 3, padding=1)
    outputs = consumer.weight.shape[0]

    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.b(net.a(x).relu())
        return net.out(y if linear else y.mean((2, 3)))

    return randomised(Net(forward, {"a": first, "b": consumer, "out": nn.Linear(outputs, 2)}))


def read_by(model: nn.Module, name: str, data: Tensor) -> tuple[Tensor, Tensor]:
    """What a module is given and computes."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, args, out: seen.append((args[0], out.clone())))
    with torch.no_grad():
        model(data)
    handle.remove()
    return seen[0]


CONSUMERS = {
    "linear": lambda: nn.Linear(8, 4),
    "linear without bias": lambda: nn.Linear(8, 4, bias=False),
    "conv": lambda: nn.Conv2d(8, 4, 3),
    "padded": lambda: nn.Conv2d(8, 4, 3, padding=1),
    "padded by reflection": lambda: nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect"),
    "same": lambda: nn.Conv2d(8, 4, (2, 3), padding="same"),
    "strided": lambda: nn.Conv2d(8, 4, (3, 2), stride=(2, 1), padding=(1, 0)),
    "dilated": lambda: nn.Conv2d(8, 4, 3, dilation=(2, 1), padding=2),
    "grouped": lambda: nn.Conv2d(8, 6, 3, groups=2),
    "without bias": lambda: nn.Conv2d(8, 4, 3, bias=False),
}


def data_for(consumer: nn.Module) -> Tensor:
    return images(60, 5) if isinstance(consumer, nn.Linear) else images(6, 3, 9, 8)


def unfolded(module: nn.Module, x: Tensor) -> np.ndarray:
    """What a layer multiplies by its weights, one row for each output position: [groups, rows, features]."""
    if isinstance(module, nn.Linear):
        return x.reshape(1, -1, x.shape[-1]).numpy()
    if module.padding == "same":
        x, padding = F.pad(x, module._reversed_padding_repeated_twice), 0
    elif module.padding_mode == "reflect":
        x, padding = F.pad(x, (1, 1, 1, 1), "reflect"), 0
    else:
        padding = module.padding
    parts = x.chunk(module.groups, 1)
    columns = [F.unfold(part, module.kernel_size, module.dilation, padding, module.stride) for part in parts]
    return np.stack([one.transpose(1, 2).flatten(0, 1).numpy() for one in columns])


def outputs_of(module: nn.Module, y: Tensor) -> np.ndarray:
    """[groups, rows, outputs of a group]"""
    if isinstance(module, nn.Linear):
        return y.reshape(1, -1, y.shape[-1]).numpy()
    return np.stack([part.flatten(2).transpose(1, 2).flatten(0, 1).numpy() for part in y.chunk(module.groups, 1)])


PLAN = Plan({"a": LayerPlan(8, (1, 2, 5, 6))})


@pytest.mark.parametrize("build", CONSUMERS.values(), ids=CONSUMERS)
def test_least_squares_is_numpys(build: Callable[[], nn.Module]) -> None:
    model = chain(build())
    data = data_for(model.b)
    small = torchtrim.trim(model, PLAN, data)
    repaired = torchtrim.repair(small, model, data, data.split(4), ridge=1e-12)
    rows, _ = read_by(small, "b", data)
    _, wanted = read_by(model, "b", data)
    for x, y, mine in zip(
        unfolded(small.b, rows),
        outputs_of(model.b, wanted),
        outputs_of(small.b, read_by(repaired, "b", data)[1]),
        strict=True,
    ):
        with_bias = x if model.b.bias is None else np.c_[x, np.ones(len(x))]
        best = with_bias @ np.linalg.lstsq(with_bias, y, rcond=None)[0]
        np.testing.assert_allclose(mine, best, atol=1e-6)
        assert np.abs(best - y).max() > 1e-3  # there is something that cannot be made up for


@pytest.mark.parametrize("build", CONSUMERS.values(), ids=CONSUMERS)
@pytest.mark.parametrize("block", [8192, 20, 1])
@pytest.mark.parametrize("ridge", [1e-6, 1.0])
def test_the_squared_error_never_rises(build: Callable[[], nn.Module], block: int, ridge: float) -> None:
    model = chain(build())
    data = data_for(model.b)
    small = torchtrim.trim(model, PLAN, data)
    repaired = torchtrim.repair(small, model, data, data.split(4), ridge=ridge, block=block)
    wanted = read_by(model, "b", data)[1]
    before, after = ((read_by(one, "b", data)[1] - wanted).square().sum() for one in (small, repaired))
    assert after < before
