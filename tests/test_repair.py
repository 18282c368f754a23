"""Repair against slow, obvious NumPy on what the layers read, and what it must leave alone."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import torchtrim
from torchtrim import LayerPlan, Plan
from torchtrim._moments import Moments
from torchtrim.errors import PlanError, ProfileError, StoreError, TorchtrimError, TorchtrimWarning
from torchtrim.testing import random_plan
from toys import TOYS, Net, randomised


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
@pytest.mark.parametrize("block", [6144, 20, 1])
@pytest.mark.parametrize("ridge", [1e-6, 1.0])
def test_the_squared_error_never_rises(build: Callable[[], nn.Module], block: int, ridge: float) -> None:
    model = chain(build())
    data = data_for(model.b)
    small = torchtrim.trim(model, PLAN, data)
    repaired = torchtrim.repair(small, model, data, data.split(4), ridge=ridge, block=block)
    wanted = read_by(model, "b", data)[1]
    before, after = ((read_by(one, "b", data)[1] - wanted).square().sum() for one in (small, repaired))
    assert after < before


def test_no_digits_are_lost_to_large_means() -> None:
    """Inputs that vary by less than a millionth of what they are."""
    model = chain(nn.Linear(8, 4))
    model.a.bias.data += 1e8
    data = data_for(model.b)
    small = torchtrim.trim(model, PLAN, data)
    repaired = torchtrim.repair(small, model, data, data.split(7), ridge=1e-9)
    x, y = read_by(small, "b", data)[0].numpy(), read_by(model, "b", data)[1].numpy()
    x, wanted = x - x.mean(0), y - y.mean(0)
    best = x @ np.linalg.lstsq(x, wanted, rcond=None)[0] + y.mean(0)
    np.testing.assert_allclose(read_by(repaired, "b", data)[1].numpy(), best, atol=1e-3)


@pytest.mark.parametrize("build", CONSUMERS.values(), ids=CONSUMERS)
def test_data_that_are_all_alike(build: Callable[[], nn.Module]) -> None:
    model = chain(build())
    data = data_for(model.b)[:1].expand(30, *data_for(model.b).shape[1:])
    data = data.mean(tuple(range(2, data.ndim)), keepdim=True).expand_as(data)
    small = torchtrim.trim(model, PLAN, data)
    repaired = torchtrim.repair(small, model, data, data.split(7))
    wanted = read_by(model, "b", data)[1]
    before, after = ((read_by(one, "b", data)[1] - wanted).square().sum() for one in (small, repaired))
    assert after < before


def test_a_second_repair_sweeps_over_the_blocks_again() -> None:
    model = chain(CONSUMERS["conv"]())
    data = data_for(model.b)
    small = torchtrim.trim(model, PLAN, data)
    wanted = read_by(model, "b", data)[1]
    best = torchtrim.repair(small, model, data, [data], ridge=1e-9)
    once = torchtrim.repair(small, model, data, [data], ridge=1e-9, block=9)
    twice = torchtrim.repair(once, model, data, [data], ridge=1e-9, block=9)
    errors = [float((read_by(one, "b", data)[1] - wanted).square().sum()) for one in (small, once, twice, best)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] - errors[3] < 0.8 * (errors[1] - errors[3])


@pytest.mark.parametrize("build", [*list(CONSUMERS.values())[2:], None], ids=[*list(CONSUMERS)[2:], "tokens"])
@pytest.mark.parametrize("positions", [None, 30])
def test_rows_are_looked_at_in_pieces(build, positions, monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain(build()) if build else Tokens().double()
    data = images(6, 3, 9, 8)
    small = torchtrim.trim(model, PLAN, data)
    whole = torchtrim.repair(small, model, data, data.split(1), positions=positions)
    sizes: list[int] = []
    add = Moments.add
    monkeypatch.setattr(Moments, "add", lambda self, rows: (sizes.append(rows.numel()), add(self, rows)))
    monkeypatch.setattr("torchtrim._moments._PIECE", 200)
    parts = torchtrim.repair(small, model, data, data.split(1), positions=positions)
    assert max(sizes) <= 200
    assert positions or len(sizes) > 6
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=1e-9, atol=1e-12)


class Tokens(nn.Module):
    """A linear layer that reads rows of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu().flatten(2).mT)


@pytest.mark.parametrize("build", [*list(CONSUMERS.values())[2:], None], ids=[*list(CONSUMERS)[2:], "tokens"])
def test_few_positions_do_where_what_is_gone_can_be_made_up_for(build, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes are multiples of other neurons, so that any rows give the layer back what it lost everywhere."""
    model = chain(build()) if build else Tokens().double()
    with torch.no_grad():
        for tensor in (model.a.weight, model.a.bias):
            tensor[[1, 2]], tensor[[5, 6]] = 2 * tensor[[0, 3]], tensor[[4, 7]] / 2
    data = images(40, 3, 9, 8)
    small = torchtrim.trim(model, PLAN, data)
    added: list[int] = []
    add = Moments.add
    monkeypatch.setattr(Moments, "add", lambda self, rows: (added.append(rows.shape[1]), add(self, rows)))
    repaired = torchtrim.repair(small, model, data, data.split(10), ridge=1e-12, positions=5)
    assert added[:4] == [50] * 4
    lost, left = (read_by(one, "b", data)[1] - read_by(model, "b", data)[1] for one in (small, repaired))
    assert left.abs().max() < 1e-4 * lost.abs().max()


def test_positions_are_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one position of each batch, a layer that reads positions as channels sees several."""
    model = Tokens().double()
    data = images(1, 3, 9, 8).expand(30, 3, 9, 8)
    small = torchtrim.trim(model, PLAN, data)
    read: list[Tensor] = []
    add = Moments.add
    monkeypatch.setattr(Moments, "add", lambda self, rows: (read.append(rows), add(self, rows)))
    state = torch.random.get_rng_state()
    torchtrim.repair(small, model, data, data.split(1), positions=1)
    assert len(torch.cat(read, 1)[0].unique(dim=0)) > 10
    assert torch.equal(state, torch.random.get_rng_state())


# ------------------------------------------------------------------ mean


def constant(layer: nn.Module, neurons: list[int]) -> None:
    """Let some neurons give the same for every input."""
    layer.weight.data[neurons] = 0
    layer.bias.data[neurons] = torch.tensor([0.7, 1.3, 0.2, 0.5][: len(neurons)], dtype=layer.bias.dtype)


CONSTANTS = {
    "linear": (
        lambda net, x: net.out(net.b(net.a(x).relu()).relu()),
        {"a": lambda: nn.Linear(5, 8), "b": lambda: nn.Linear(8, 6), "out": lambda: nn.Linear(6, 2)},
        (20, 5),
    ),
    "batch norm before": (
        lambda net, x: net.out(net.b(net.norm(net.a(x)).relu()).relu().mean((2, 3))),
        {
            "a": lambda: nn.Conv2d(3, 8, 3),
            "norm": lambda: nn.BatchNorm2d(8),
            "b": lambda: nn.Conv2d(8, 6, 3),
            "out": lambda: nn.Linear(6, 2),
        },
        (6, 3, 9, 8),
    ),
    "batch norm after the activation, pooling, groups": (
        lambda net, x: net.out(net.b(F.max_pool2d(net.norm(net.a(x).relu()), 2)).relu().mean((2, 3))),
        {
            "a": lambda: nn.Conv2d(3, 8, 3),
            "norm": lambda: nn.BatchNorm2d(8),
            "b": lambda: nn.Conv2d(8, 6, 2, groups=2),
            "out": lambda: nn.Linear(6, 2),
        },
        (6, 3, 9, 8),
    ),
    "positions that are flattened": (
        lambda net, x: net.out(F.avg_pool2d(net.a(x).relu(), 2).flatten(1)),
        {"a": lambda: nn.Conv2d(3, 8, 3, padding=1), "out": lambda: nn.Linear(8 * 16, 2)},
        (6, 3, 9, 8),
    ),
    "sequences": (
        lambda net, x: net.out(net.b(net.a(x).relu()).relu()),
        {"a": lambda: nn.Linear(5, 8), "b": lambda: nn.Linear(8, 6), "out": lambda: nn.Linear(6, 2)},
        (6, 4, 5),
    ),
    "no bias": (
        lambda net, x: net.out(net.b(net.a(x).relu()).relu()),
        {"a": lambda: nn.Linear(5, 8), "b": lambda: nn.Linear(8, 6, bias=False), "out": lambda: nn.Linear(6, 2)},
        (20, 5),
    ),
    "no bias, batch norm behind": (
        lambda net, x: net.out(net.norm(net.b(net.a(x).relu())).relu().mean((2, 3))),
        {
            "a": lambda: nn.Conv2d(3, 8, 3),
            "b": lambda: nn.Conv2d(8, 6, 3, bias=False),
            "norm": lambda: nn.BatchNorm2d(6),
            "out": lambda: nn.Linear(6, 2),
        },
        (6, 3, 9, 8),
    ),
}


@pytest.mark.parametrize("how", ["mean", ("mean", "least-squares"), "least-squares"])
@pytest.mark.parametrize(("forward", "modules", "shape"), CONSTANTS.values(), ids=CONSTANTS)
def test_what_a_constant_neuron_gave_is_kept_exactly(forward, modules, shape, how) -> None:
    torch.manual_seed(0)
    model = randomised(Net(forward, {name: make() for name, make in modules.items()}))
    constant(model.a, [1, 2, 5, 6])
    data = images(*shape)
    small = torchtrim.trim(model, PLAN, data)
    if how == "least-squares" and "norm" not in modules and getattr(model, "b", model.out).bias is None:
        pytest.skip("least squares makes no bias")
    repaired = torchtrim.repair(small, model, data, data.split(4), how)
    others = images(*shape) + 1
    with torch.no_grad():
        far = (small(others) - model(others)).abs().max()
        assert far > 1e-3
        torch.testing.assert_close(repaired(others), model(others), rtol=1e-6, atol=1e-6)


def test_the_mean_of_what_varies_is_numpys() -> None:
    """Behind zero padding too: the mean over all positions, borders included."""
    model = chain(nn.Conv2d(8, 4, 3, padding=1, stride=2))
    data = images(6, 3, 9, 8)
    small = torchtrim.trim(model, PLAN, data)
    repaired = torchtrim.repair(small, model, data, data.split(4), "mean")
    x = unfolded(model.b, read_by(model, "b", data)[0])[0].reshape(-1, 8, 9)
    weight = model.b.weight.detach().numpy().reshape(4, 8, 9)
    gone = [1, 2, 5, 6]
    expected = model.b.bias.detach().numpy() + np.einsum("ocf,cf->o", weight[:, gone], x[:, gone].mean(0))
    np.testing.assert_allclose(repaired.b.bias.detach().numpy(), expected)
    assert torch.equal(repaired.b.weight, small.b.weight)


def test_batch_norms_alone_need_some() -> None:
    model = chain(nn.Linear(8, 4))
    data = data_for(model.b)
    with pytest.warns(TorchtrimWarning, match="the model has no batch norm"):
        torchtrim.repair(torchtrim.trim(model, PLAN, data), model, data, [data], "batchnorm")


@pytest.mark.parametrize("before", ["mean", "least-squares", "batchnorm"])
def test_the_mean_is_not_counted_twice(before) -> None:
    torch.manual_seed(0)
    forward, modules, shape = CONSTANTS["no bias, batch norm behind"]
    model = randomised(Net(forward, {name: make() for name, make in modules.items()}))
    data = images(*shape)
    once = torchtrim.repair(torchtrim.trim(model, PLAN, data), model, data, [data], before)
    kept = copy.deepcopy(once.state_dict())
    with pytest.raises(PlanError, match='in b the weights that `trim` left, for "mean", found others'):
        torchtrim.repair(once, model, data, [data], "mean")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in once.state_dict().items())


# ------------------------------------------------------------------ batch norm

OTHER_CHANNELS = {
    "tokens": (lambda net, x: net.norm(net.b(net.a(x).relu())), nn.Linear, 4, 6, (50, 4, 5)),
    "as many tokens": (lambda net, x: net.norm(net.b(net.a(x).relu())), nn.Linear, 6, 6, (50, 6, 5)),
    "a part": (lambda net, x: net.norm(net.b(net.a(x).relu())[:, 2:]), nn.Linear, 4, 4, (50, 5)),
    "flattened positions": (
        lambda net, x: net.norm(net.b(net.a(x).relu()).flatten(1)),
        lambda ins, outs, bias=True: nn.Conv1d(ins, outs, 3, bias=bias),
        24,
        24,
        (50, 5, 8),
    ),
}


@pytest.mark.parametrize("how", ["mean", "least-squares"])
@pytest.mark.parametrize(("forward", "layer", "channels", "last", "shape"), OTHER_CHANNELS.values(), ids=OTHER_CHANNELS)
def test_a_norm_with_other_channels_takes_no_constant(forward, layer, channels, last, shape, how) -> None:
    torch.manual_seed(0)
    modules = {"a": layer(5, 8), "b": layer(8, 6, bias=False), "norm": nn.BatchNorm1d(channels)}
    out = nn.Linear(last, 2)
    model = randomised(Net(lambda net, x: net.out(forward(net, x).relu()), {**modules, "out": out}))
    data = images(*shape)
    small = torchtrim.trim(model, PLAN, data)
    repaired = torchtrim.repair(small, model, data, data.split(10), how)
    assert torch.equal(repaired.norm.running_mean, model.norm.running_mean)
    assert (repaired.b.bias is None) == (how == "least-squares")
    wanted = read_by(model, "b", data)[1]
    before, after = ((read_by(one, "b", data)[1] - wanted).square().sum() for one in (small, repaired))
    assert after < before


@pytest.mark.parametrize("how", ["mean", "least-squares"])
@pytest.mark.parametrize("move", [lambda x: x.transpose(1, 2), lambda x: x.flatten(0, 1)])
def test_a_norm_behind_a_view_of_a_layer_takes_its_constant(move, how) -> None:
    torch.manual_seed(0)
    modules = {"a": nn.Linear(5, 8), "b": nn.Linear(8, 6, bias=False), "norm": nn.BatchNorm1d(6)}
    model = randomised(Net(lambda net, x: net.norm(move(net.b(net.a(x).relu()))).relu().flatten(1), modules))
    constant(model.a, [1, 2, 5, 6])
    data = images(20, 4, 5)
    small = torchtrim.trim(model, PLAN, data)
    repaired = torchtrim.repair(small, model, data, data.split(10), how)
    torch.testing.assert_close(repaired(data), model(data), rtol=1e-6, atol=1e-6)


def test_a_batch_of_one_is_not_normalised_by_itself() -> None:
    model, data, plan = branches()
    small = torchtrim.trim(model, plan, data)
    repaired = torchtrim.repair(small, model, data, [data[:59], data[59:]], "batchnorm")
    y = read_by(small, "norm", data)[0].numpy()
    np.testing.assert_allclose(repaired.norm.running_mean, y.mean(0))
    assert not any(module._forward_pre_hooks for module in repaired.modules())


def test_variances_do_not_fall_below_zero() -> None:
    model, data, plan = branches()
    model.twice.bias.data += 1e6
    small = torchtrim.trim(model, plan, data)
    repaired = torchtrim.repair(small, model, data, [data[:1].expand(3001, 5)], "batchnorm")
    assert (repaired.norm.running_var >= 0).all()
    assert repaired(data).isfinite().all()


def test_norms_are_measured_as_numpy_does() -> None:
    model = chain(nn.Conv2d(8, 4, 3))
    model.function = lambda net, x: net.out(net.norm(net.b(net.a(x).relu())).relu().mean((2, 3)))
    model.norm = randomised(nn.BatchNorm2d(4))
    data = images(6, 3, 9, 8)
    small = torchtrim.trim(model, PLAN, data)
    repaired = torchtrim.repair(small, model, data, data.split(4), "batchnorm")
    y = read_by(small, "norm", data)[0].numpy()
    np.testing.assert_allclose(repaired.norm.running_mean, y.mean((0, 2, 3)))
    np.testing.assert_allclose(repaired.norm.running_var, y.transpose(1, 0, 2, 3).reshape(4, -1).var(1, ddof=1))
    kept = ("norm.weight", "norm.bias", "norm.num_batches_tracked", "b.weight")
    assert all(torch.equal(repaired.state_dict()[name], small.state_dict()[name]) for name in kept)
    assert repaired.norm.momentum == small.norm.momentum
    assert not repaired.norm.training


# ------------------------------------------------------------------ several layers


class Branches(nn.Module):
    """Two layers that read the same neurons, one after them, one that is used twice, one behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 8)
        self.left = nn.Linear(8, 6, bias=False)
        self.right = nn.Linear(8, 6)
        self.twice = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = self.left(x).relu() + self.right(x).tanh()
        return self.out(self.norm(self.twice(self.twice(x).relu())).relu())


def branches() -> tuple[Branches, Tensor, Plan]:
    torch.manual_seed(0)
    plan = Plan({"a": LayerPlan(8, (1, 5, 6)), "left": LayerPlan(6, (0, 4)), "twice": LayerPlan(6, (0, 4))})
    return randomised(Branches()), images(60, 5), plan


@pytest.mark.parametrize("how", ["mean", "least-squares", "batchnorm", ("mean", "least-squares", "batchnorm")])
@pytest.mark.parametrize("block", [6144, 3])
def test_layers_are_repaired_on_what_is_repaired(how, block) -> None:
    model, data, plan = branches()
    small = torchtrim.trim(model, plan, data)
    repaired = torchtrim.repair(small, model, data, data.split(25), how, block=block)
    if how == "least-squares" and block > 3:
        for name in ("left", "right", "out"):  # in float64, the best on the inputs that it is given now
            x = read_by(repaired, name, data)[0].numpy()
            x = x if name == "left" else np.c_[x, np.ones(len(x))]
            y = read_by(model, name, data)[1].numpy()
            y = y if name == "out" else y[:, [1, 2, 3, 5]]
            best = x @ np.linalg.lstsq(x, y, rcond=None)[0]
            error = np.square(read_by(repaired, name, data)[1].numpy() - y).sum()
            assert error == pytest.approx(np.square(best - y).sum(), rel=1e-2)
    if "batchnorm" not in how:  # whose statistics are not those of the data in this model
        wanted = model(data)
        assert (repaired(data) - wanted).norm() < (small(data) - wanted).norm()


def test_layers_that_read_the_same_share_a_pass_and_its_moments() -> None:
    model, data, plan = branches()
    passes = 0

    class Counted(list):
        def __iter__(self):
            nonlocal passes
            passes += 1
            return super().__iter__()

    small = torchtrim.trim(model, plan, data)
    torchtrim.repair(small, model, data, Counted(data.split(25)))
    assert passes == 3  # left and right; twice; out
    passes = 0
    torchtrim.repair(small, model, data, Counted(data.split(25)), "mean")
    assert passes == 1


def test_layers_share_moments_only_of_the_same_input(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    added: list[Moments] = []
    usual = Moments.add
    monkeypatch.setattr(Moments, "add", lambda self, rows: (added.append(self), usual(self, rows)))

    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x).relu()
        y = net.twice(net.twice(x).tanh()) + net.b(x) + net.c(x) + net.d(x + 0)
        return net.out(y)

    modules: dict[str, nn.Module] = {name: nn.Linear(8, 8) for name in ("twice", "b", "c", "d")}
    model = randomised(Net(forward, {"a": nn.Linear(5, 8), **modules, "out": nn.Linear(8, 2)}))
    data = images(60, 5)
    small = torchtrim.trim(model, PLAN, data)
    repaired = torchtrim.repair(small, model, data, [data])
    assert len(added) == 5  # twice, twice; b, for c too; d; out
    assert len(set(map(id, added))) == 4
    assert not torch.equal(repaired.twice.weight, small.twice.weight)


@pytest.mark.parametrize("block", [2, 3, 6144])
def test_moments_are_as_small_as_asked(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    widest: list[int] = []
    usual = Moments.add

    def add(self: Moments, rows: Tensor) -> None:
        widest.append(rows.shape[2])
        usual(self, rows)

    monkeypatch.setattr(Moments, "add", add)
    model, data, plan = branches()
    small = torchtrim.trim(model, plan, data)
    torchtrim.repair(small, model, data, [data], block=block)
    assert max(widest) == min(block, 5)
    assert sum(widest) >= 5 + 4 + 4


def test_moments_of_all_groups_together_are_as_small_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain(nn.Conv2d(8, 6, 1, groups=2))
    data = images(6, 3, 9, 8)
    small = torchtrim.trim(model, PLAN, data)
    sizes: list[int] = []
    add = Moments.add
    monkeypatch.setattr(
        Moments, "add", lambda self, rows: (sizes.append(len(rows) * rows.shape[2] ** 2), add(self, rows))
    )
    torchtrim.repair(small, model, data, [data], block=2)
    assert sizes[:2] == [2, 2]  # one input of each group, then the other


def test_a_batch_of_nothing_adds_nothing() -> None:
    for build in (CONSUMERS["linear"], CONSUMERS["conv"]):
        model = chain(build())
        data = data_for(model.b)
        small = torchtrim.trim(model, PLAN, data)
        empty = data[:0]
        some, whole = (torchtrim.repair(small, model, data, batches) for batches in ([empty, data, empty], [data]))
        torch.testing.assert_close(some.state_dict(), whole.state_dict())


def test_several_trims_are_repaired_against_the_first_model() -> None:
    model, data, plan = branches()
    once = torchtrim.trim(model, plan, data)
    half = torchtrim.trim(model, Plan({"a": LayerPlan(8, (5,)), "left": LayerPlan(6, (4,))}), data)
    twice = torchtrim.trim(half, Plan({"a": LayerPlan(7, (1, 5)), "twice": LayerPlan(5, (0,))}), data)
    one, other = (torchtrim.repair(small, model, data, [data]) for small in (once, twice))
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


@pytest.mark.filterwarnings("ignore:left as they are by the repair")
@pytest.mark.parametrize("name", TOYS)
def test_repair_brings_every_toy_closer_to_its_original(name) -> None:
    torch.manual_seed(0)
    model, shape = randomised(TOYS[name].build()), TOYS[name].shape
    graph = torchtrim.trace(model, torch.randn(shape, dtype=torch.float64))
    small = torchtrim.trim(model, random_plan(graph), graph)
    data = [torch.randn(shape, dtype=torch.float64) for _ in range(8)]
    repaired = torchtrim.repair(small, model, graph, data, ("mean", "least-squares"))
    with torch.no_grad():
        before, after = (sum(float((one(x) - model(x)).square().sum()) for x in data) for one in (small, repaired))
    assert after <= before * (1 + 1e-9)


def test_heads_of_attention_are_repaired() -> None:
    """Also where PyTorch's own class computes without calling its last layer."""
    torch.manual_seed(0)
    model = randomised(Net(lambda net, x: net.mix(x, x, x)[0], {"mix": nn.MultiheadAttention(8, 4, batch_first=True)}))
    data = images(20, 5, 8)
    small = torchtrim.trim(model, Plan({"mix.in_proj_weight": LayerPlan(24, (0, 1, 8, 9, 16, 17))}), data)
    repaired = torchtrim.repair(small, model, data, [data])
    assert type(model.mix) is nn.MultiheadAttention
    assert type(repaired.mix) is type(small.mix)
    assert (repaired(data) - model(data)).norm() < 0.9 * (small(data) - model(data)).norm()


def test_layers_that_are_called_otherwise_when_trimmed_stay() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x).relu()
        for _ in range(net.often):
            y = net.b(x)
        return net.out(y)

    modules = {"a": nn.Linear(5, 8), "b": nn.Linear(8, 6), "out": nn.Linear(6, 2)}
    model, data = randomised(Net(forward, modules)), images(20, 5)
    model.often = 1
    small = torchtrim.trim(model, PLAN, data)
    model.often = 3
    with pytest.warns(TorchtrimWarning, match="b: it is not called alike in both models"):
        repaired = torchtrim.repair(small, model, data, [data])
    assert all(torch.equal(tensor, small.state_dict()[name]) for name, tensor in repaired.state_dict().items())


# ------------------------------------------------------------------ what stays


def test_what_reads_nothing_that_is_gone_stays() -> None:
    model, data, _ = branches()
    small = torchtrim.trim(model, Plan({"left": LayerPlan(6, (4,))}), data)
    repaired = torchtrim.repair(small, model, data, [data])
    changed = {
        name for name, tensor in repaired.state_dict().items() if not torch.equal(tensor, small.state_dict()[name])
    }
    assert changed == {"twice.weight", "twice.bias", "out.weight", "out.bias"}
    same = torchtrim.trim(model, Plan({"left": LayerPlan(6)}), data)
    again = torchtrim.repair(same, model, data, [data])
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_a_layer_that_lacks_nothing_stays() -> None:
    """Neurons that were silent on all the data."""
    model, data, _ = branches()
    model.a.weight.data[[1, 5]] = 0
    model.a.bias.data[[1, 5]] = -1
    small = torchtrim.trim(model, Plan({"a": LayerPlan(8, (1, 5))}), data)
    repaired = torchtrim.repair(small, model, data, data.split(25), ("mean", "least-squares"))
    for name, tensor in repaired.state_dict().items():
        torch.testing.assert_close(tensor, small.state_dict()[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("how", ["mean", "least-squares", "batchnorm"])
def test_frozen_parameters_stay(how) -> None:
    model, data, plan = branches()
    small = torchtrim.trim(model, plan, data)
    for parameter in (small.left.weight, small.right.bias, small.twice.weight, small.twice.bias, small.norm.weight):
        parameter.requires_grad = False
    with pytest.warns(TorchtrimWarning, match="frozen"):
        repaired = torchtrim.repair(small, model, data, data.split(25), how)
    frozen = {name for name, parameter in small.named_parameters() if not parameter.requires_grad}
    assert {name for name, parameter in repaired.named_parameters() if not parameter.requires_grad} == frozen
    for name in {*frozen, "norm.running_mean", "norm.running_var"}:
        assert torch.equal(repaired.state_dict()[name], small.state_dict()[name])


@pytest.mark.parametrize("how", ["mean", "least-squares"])
def test_weights_that_are_not_the_layers_own_stay(how) -> None:
    torch.manual_seed(0)
    modules = {
        "a": nn.Linear(5, 8),
        "tied": nn.Linear(8, 6),
        "other": nn.Linear(8, 6),
        "masked": prune.identity(nn.Linear(8, 6), "weight"),
        "free": nn.Linear(8, 6),
        "table": nn.Parameter(torch.randn(8, 6)),
        "out": nn.Linear(6, 2),
    }
    modules["other"].weight = modules["tied"].weight

    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x).relu()
        return net.out(net.tied(x) + net.other(x) + net.masked(x) + net.free(x) + x @ net.table)

    model, data = randomised(Net(forward, modules)), images(60, 5)
    small = torchtrim.trim(model, Plan({"a": LayerPlan(8, (1, 5, 6))}), data)
    with pytest.warns(TorchtrimWarning) as warned:
        repaired = torchtrim.repair(small, model, data, [data], how)
    message = str(warned[0].message)
    assert "tied.weight: its weight is shared: tied.weight, other.weight" in message
    assert "table: it is not the weight of a layer" in message
    assert "masked.weight_orig: it is not the weight of a layer" in message
    changed = {
        name for name, tensor in repaired.state_dict().items() if not torch.equal(tensor, small.state_dict()[name])
    }
    assert changed - {"free.weight"} == {"free.bias"}
    assert repaired.other.weight is repaired.tied.weight


@pytest.mark.parametrize("how", [("mean", "least-squares", "batchnorm")])
def test_models_data_and_random_state_are_left_as_found(how) -> None:
    model, data, plan = branches()
    model.drop = nn.Dropout()
    small = torchtrim.trim(model, plan, data).train()
    small.norm.eval()
    model.train()
    model.right.eval()
    before = copy.deepcopy((model, small))
    random = torch.random.get_rng_state()
    repaired = torchtrim.repair(small, model, data, data.split(25), how)
    assert torch.equal(torch.random.get_rng_state(), random)
    for now, then in zip((model, small), before, strict=True):
        assert all(torch.equal(tensor, then.state_dict()[name]) for name, tensor in now.state_dict().items())
        assert [one.training for one in now.modules()] == [one.training for one in then.modules()]
    assert [one.training for one in repaired.modules()] == [one.training for one in small.modules()]
    for one in (model, small, repaired):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in one.modules())
    theirs = {tensor.data_ptr() for one in (model, small) for tensor in one.state_dict().values()}
    assert theirs.isdisjoint(tensor.data_ptr() for tensor in repaired.state_dict().values())
    assert all(parameter.grad is None for parameter in repaired.parameters())


def test_a_call_with_gradients_leaves_none() -> None:
    model, data, plan = branches()
    small = torchtrim.trim(model, plan, data)

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.enable_grad():
            return model(batch)

    how = ("mean", "least-squares", "batchnorm")
    repaired, usual = (torchtrim.repair(small, model, data, [data], how, forward=call) for call in (forward, None))
    assert all(torch.equal(tensor, usual.state_dict()[name]) for name, tensor in repaired.state_dict().items())
    assert not any(buffer.requires_grad for buffer in repaired.buffers())
    assert all(parameter.is_leaf for parameter in repaired.parameters())
    with_gradients, without = (
        torchtrim.reconstruction(model, data, [data], forward=call)(torchtrim.profile(model, [data])["a"])
        for call in (forward, None)
    )
    np.testing.assert_array_equal(with_gradients, without)


def test_hooks_that_change_what_a_layer_computes_are_not_heard() -> None:
    model = chain(nn.Linear(8, 4))
    data = data_for(model.b)
    usual = torchtrim.repair(torchtrim.trim(model, PLAN, data), model, data, [data])
    model.b.register_forward_hook(lambda module, args, outputs: 2 * outputs)
    repaired = torchtrim.repair(torchtrim.trim(model, PLAN, data), model, data, [data])
    torch.testing.assert_close(repaired.b.state_dict(), usual.b.state_dict())


def test_a_repaired_model_is_saved_and_trimmed_again(tmp_path) -> None:
    """Biases that the ancestor does not have included."""
    model, data, plan = branches()
    small = torchtrim.repair(torchtrim.trim(model, plan, data), model, data, [data], "mean")
    assert "left.bias" not in model.state_dict()
    smaller = torchtrim.trim(small, Plan({"a": LayerPlan(5, (0,))}), data)
    for number, one in enumerate((small, smaller)):
        path = tmp_path / f"{number}.safetensors"
        torchtrim.save(one, path)
        loaded = torchtrim.load(Branches(), path)
        assert torch.equal(loaded.eval()(data), one(data))
        torchtrim.save(loaded, path)
        assert torch.equal(torchtrim.load(small, path)(data), one(data))
    with_bias = Branches()
    with_bias.left = nn.Linear(8, 6)
    with pytest.raises(StoreError, match=r"left\.bias: added by a repair in the file"):
        torchtrim.load(with_bias, tmp_path / "0.safetensors")
    other = Branches()
    other.left = nn.Identity()
    with pytest.raises(StoreError, match=r"left\.bias: in the file, no bias can be added"):
        torchtrim.load(other, tmp_path / "0.safetensors")


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"how": "magic"}, TorchtrimError, "expected some of 'mean', 'least-squares', 'batchnorm', found 'magic'"),
        ({"how": ()}, TorchtrimError, "found nothing"),
        ({"how": ("mean", "mean")}, TorchtrimError, "each way once"),
        ({"how": ("least-squares", "mean")}, TorchtrimError, '"mean" first'),
        ({"ridge": 0.0}, TorchtrimError, "ridge above 0"),
        ({"ridge": "small"}, TorchtrimError, "ridge above 0, found 'small'"),
        ({"block": 0}, TorchtrimError, "at least 1 input"),
        ({"block": 2.5}, TorchtrimError, "at least 1 input, found 2.5"),
        ({"positions": 0}, TorchtrimError, "at least 1 position"),
        ({"positions": 1.5}, TorchtrimError, "at least 1 position"),
        ({"batches": iter([])}, ProfileError, "read several times"),
        ({"batches": torch.zeros(2, 5)}, ProfileError, "read several times"),
        ({"batches": []}, ProfileError, "at least one batch"),
        ({"batches": [images(0, 5)]}, ProfileError, "expected batches with examples, found empty ones alone"),
        ({"batches": [images(0, 5)], "how": "mean"}, ProfileError, "expected batches with examples"),
        ({"batches": [images(60, 5), images(4, 3)]}, ProfileError, "cannot run on batch 2: RuntimeError"),
        ({"batches": [images(60, 5) * float("nan")]}, ProfileError, "not finite"),
        ({"batches": [images(2, 5)], "ridge": 1e-30}, ProfileError, "left: its inputs depend on one another"),
    ],
)
def test_what_cannot_be_done_is_said(options, error, message) -> None:
    model, data, plan = branches()
    small = torchtrim.trim(model, plan, data)
    before = copy.deepcopy(small.state_dict())
    options = {"batches": [data], **options}
    with pytest.raises(error, match=message):
        torchtrim.repair(small, model, data, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())
    assert not any(module._forward_hooks for one in (model, small) for module in one.modules())


def test_models_that_do_not_belong_together() -> None:
    model, data, plan = branches()
    small = torchtrim.trim(model, plan, data)
    with pytest.raises(PlanError, match="says nothing of it"):
        torchtrim.repair(model, model, data, [data])
    with pytest.raises(PlanError, match="says nothing of it"):
        torchtrim.repair(small, small, data, [data])
    with pytest.raises(PlanError, match="no layer 'a'"):
        torchtrim.repair(small, nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2)).double(), data, [data])


def test_a_pass_runs_models_no_further_than_it_listens() -> None:
    model = chain(nn.Linear(8, 4))
    batches = list(torch.randn(6, 10, 5, dtype=torch.float64))
    small = torchtrim.trim(model, Plan({"a": LayerPlan(8, (1, 2, 5))}), batches[0])
    calls: list[Tensor] = []
    model.get_submodule("out").register_forward_hook(lambda module, args, out: calls.append(args[0]))
    repaired = torchtrim.repair(small, model, batches[0], batches)
    ran = [one for one in calls if not one.is_meta]
    assert len(ran) == 1  # the first batch tells what is called
    whole = torchtrim.repair(small, model, batches[0], [torch.cat(batches)])
    torch.testing.assert_close(repaired.state_dict(), whole.state_dict(), rtol=1e-9, atol=1e-12)


def test_a_pass_runs_models_to_their_end_where_a_branch_is_rare() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.a(x).relu()
        return net.out(net.b(y) + (net.rare(2 * y) if x.sum() > 0 else 0))

    torch.manual_seed(0)
    layers = {"a": nn.Linear(5, 8), "b": nn.Linear(8, 4), "rare": nn.Linear(8, 4), "out": nn.Linear(4, 2)}
    model = randomised(Net(forward, layers))
    data = torch.randn(6, 10, 5, dtype=torch.float64)
    data += torch.where(torch.arange(6) == 4, 1.0, -1.0).view(-1, 1, 1) - data.mean((1, 2), keepdim=True)
    small = torchtrim.trim(model, Plan({"a": LayerPlan(8, (1, 2, 5))}), data[4])
    repaired = torchtrim.repair(small, model, data[4], list(data))
    before, after = (one.get_submodule("rare").weight for one in (small, repaired))
    assert not torch.equal(before, after)
