"""The order in which neurons go, against slow, obvious NumPy."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchtrim
from test_repair import CONSUMERS, chain, data_for, images, outputs_of, read_by, unfolded
from torchtrim import Fraction, LayerPlan, Plan, Threshold
from torchtrim._lenet import LeNet
from torchtrim.errors import PlanError, ProfileError, TorchtrimError
from toys import Net, randomised


def error_without(x: np.ndarray, y: np.ndarray, gone: np.ndarray, *, centred: bool) -> float:
    """The squared error of the best fit on what is left, over the variance: x [groups, rows, features]."""
    total = error = 0.0
    for some, wanted in zip(x, y, strict=True):
        left = some[:, ~gone]
        left = np.c_[left, np.ones(len(left))] if centred else left
        error += np.square(left @ np.linalg.lstsq(left, wanted, rcond=None)[0] - wanted).sum()
        total += np.square(wanted - centred * wanted.mean(0)).sum()
    return error / total


@pytest.mark.parametrize("build", CONSUMERS.values(), ids=CONSUMERS)
def test_costs_are_those_of_numpys_greedy(build) -> None:
    model = chain(build())
    data = data_for(model.b)
    criterion = torchtrim.reconstruction(model, data, data.split(4), ["a"], ridge=1e-12)
    profile = torchtrim.profile(model, [data])
    costs = -criterion(profile["a"])
    x, y = read_by(model, "b", data)
    x, y = unfolded(model.b, x), outputs_of(model.b, y)
    per_group = model.b.weight.shape[1]
    owner = np.repeat(np.arange(per_group), x.shape[2] // per_group)
    neurons = np.arange(8) % per_group  # of every group the same go together
    gone: list[int] = []
    while len(gone) < per_group:
        left = [unit for unit in range(per_group) if unit not in gone]
        errors = [error_without(x, y, np.isin(owner, [*gone, unit]), centred=model.b.bias is not None) for unit in left]
        gone.append(left[int(np.argmin(errors))])
        assert costs[neurons == gone[-1]] == pytest.approx(min(errors), abs=1e-7)


def test_a_norm_behind_a_layer_makes_up_for_means() -> None:
    model = chain(nn.Conv2d(8, 4, 3, bias=False))
    model.function = lambda net, x: net.out(net.norm(net.b(net.a(x).relu())).relu().mean((2, 3)))
    model.norm = randomised(nn.BatchNorm2d(4))
    data = data_for(model.b)
    costs = -torchtrim.reconstruction(model, data, [data], ["a"], ridge=1e-12)(torchtrim.profile(model, [data])["a"])
    x, y = read_by(model, "b", data)
    x, y = unfolded(model.b, x), outputs_of(model.b, y)
    errors = [error_without(x, y, np.repeat(np.arange(8) == unit, 9), centred=True) for unit in range(8)]
    assert costs.min() == pytest.approx(min(errors), rel=1e-6)


def test_costs_of_flattened_positions_and_of_several_readers() -> None:
    torch.manual_seed(0)
    model = randomised(
        Net(
            lambda net, x: (h := net.a(x).relu()) is not None and net.out(h.flatten(1)) + net.b(h).mean((2, 3)),
            {"a": nn.Conv2d(3, 6, 3), "b": nn.Conv2d(6, 2, 2), "out": nn.Linear(6 * 12, 2)},
        )
    )
    data = images(300, 3, 5, 6)
    costs = -torchtrim.reconstruction(model, data, data.split(50), ridge=1e-12)(torchtrim.profile(model, [data])["a"])
    errors = np.zeros(6)
    for name, size in (("out", 12), ("b", 4)):
        x, y = read_by(model, name, data)
        module = model.get_submodule(name)
        x, y = unfolded(module, x), outputs_of(module, y)
        errors += [error_without(x, y, np.repeat(np.arange(6) == unit, size), centred=True) / 2 for unit in range(6)]
    assert costs.argmin() == errors.argmin()
    assert costs.min() == pytest.approx(errors.min(), rel=1e-6)


def test_fractions_take_the_order_and_thresholds_the_error() -> None:
    model = chain(nn.Conv2d(8, 4, 3))
    data = data_for(model.b)
    profile = torchtrim.profile(model, [data])
    criterion = torchtrim.reconstruction(model, data, [data], ["a"])
    costs = -criterion(profile["a"])
    half = torchtrim.select(profile, rule=Fraction(0.5), layers=["a"], criterion=criterion)
    assert half.removed["a"] == tuple(sorted(costs.argsort()[:4].tolist()))
    cheap = torchtrim.select(profile, rule=Threshold(-float(np.sort(costs)[3])), layers=["a"], criterion=criterion)
    assert len(cheap.removed["a"]) == 3
    assert half.source == "reconstruction, fraction:0.5"


def test_a_neuron_that_others_can_stand_in_for_goes_first() -> None:
    model = chain(nn.Linear(8, 4))
    model.a.weight.data[3] = 2 * model.a.weight.data[6]
    model.a.bias.data[3] = 2 * model.a.bias.data[6]
    data = data_for(model.b)
    costs = -torchtrim.reconstruction(model, data, [data], ["a"], ridge=1e-9)(torchtrim.profile(model, [data])["a"])
    assert min(costs[3], costs[6]) == pytest.approx(0, abs=1e-6)
    assert np.sort(costs)[1] > 1e-4


@pytest.mark.parametrize("build", CONSUMERS.values(), ids=CONSUMERS)
@pytest.mark.parametrize("gives", [0.0, 3.0])
def test_a_neuron_that_never_varies_costs_nothing(build, gives) -> None:
    """Silent ones never do; what others give all the time is for a bias to make up for, where there is one."""
    model = chain(build())
    model.a.weight.data[[2, 6]] = 0
    model.a.bias.data[[2, 6]] = gives
    data = data_for(model.b)
    costs = -torchtrim.reconstruction(model, data, data.split(4), ["a"])(torchtrim.profile(model, [data])["a"])
    zeros_beside = getattr(model.b, "padding_mode", "") == "zeros" and model.b.padding not in (0, (0, 0))
    if gives and (model.b.bias is None or zeros_beside):
        assert costs[2] > 1e-6
        assert costs[0] > 1e-4  # errors are relative to all that is computed, most of which these constants make
    else:
        assert costs[2] == pytest.approx(0, abs=1e-12)
        assert costs[0] > 1e-3


@pytest.mark.parametrize("build", CONSUMERS.values(), ids=CONSUMERS)
def test_the_ridge_is_on_what_changes_alone(build) -> None:
    """As for `repair`: the weights that go are no change that it should keep small."""
    model, ridge = chain(build()), 0.1
    data = data_for(model.b)
    costs = -torchtrim.reconstruction(model, data, [data], ["a"], ridge=ridge)(torchtrim.profile(model, [data])["a"])
    x, y = read_by(model, "b", data)
    x, y = unfolded(model.b, x), outputs_of(model.b, y)
    if model.b.bias is not None:
        x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    per_group = model.b.weight.shape[1]
    owner = np.repeat(np.arange(per_group), x.shape[2] // per_group)
    weights = model.b.weight.detach().numpy().reshape(len(x), -1, x.shape[2]).transpose(0, 2, 1)
    errors = []
    for unit in range(per_group):
        gone, error = owner == unit, 0.0
        for some, weight in zip(x, weights, strict=True):
            lacking, left = some[:, gone] @ weight[gone], some[:, ~gone]
            root = np.sqrt(ridge * np.square(some).sum() / some.shape[1]) * np.eye(left.shape[1])
            left, lacking = np.r_[left, root], np.r_[lacking, np.zeros((len(root), lacking.shape[1]))]
            error += np.square(left @ np.linalg.lstsq(left, lacking, rcond=None)[0] - lacking).sum()
        errors.append(error / np.square(y).sum())
    assert costs.min() == pytest.approx(min(errors), rel=1e-6)


def test_wide_layers_go_several_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain(nn.Linear(40, 4), channels=40)
    data = images(500, 5)
    profile = torchtrim.profile(model, [data])
    exact = -torchtrim.reconstruction(model, data, [data], ["a"])(profile["a"])
    monkeypatch.setattr("torchtrim._reconstruction._EXACT", 4)
    rough = -torchtrim.reconstruction(model, data, [data], ["a"])(profile["a"])
    assert rough.max() == pytest.approx(exact.max(), rel=1e-6)  # all gone is all gone
    assert np.sort(rough)[20] < exact.max() / 10
    assert np.unique(rough).size == 40


def test_blocks_bound_the_error_from_above() -> None:
    model = chain(nn.Conv2d(8, 4, 3))
    data = data_for(model.b)
    profile = torchtrim.profile(model, [data])
    whole, blocks = (
        np.sort(-torchtrim.reconstruction(model, data, data.split(4), ["a"], block=block)(profile["a"]))
        for block in (6144, 18)
    )
    assert np.isfinite(blocks).all()
    assert (blocks[1:] > whole[1:]).all()


def test_few_positions_give_the_costs_of_all_nearly() -> None:
    model = chain(nn.Conv2d(8, 4, 3))
    data = torch.randn(400, 3, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    profile = torchtrim.profile(model, [data])
    every, few = (
        -torchtrim.reconstruction(model, data, data.split(100), ["a"], positions=positions)(profile["a"])
        for positions in (None, 6)
    )
    every, few = np.sort(every), np.sort(few)
    assert (every != few)[:-1].all()  # without any, all is lost
    np.testing.assert_allclose(few, every, rtol=0.1)


@pytest.mark.parametrize("examples", [1, 3, 30])
def test_data_that_are_all_alike_cost_nothing(examples: int) -> None:
    model = chain(nn.Linear(8, 4))
    data = images(1, 5).expand(examples, 5)
    costs = -torchtrim.reconstruction(model, data, [data], ["a"])(torchtrim.profile(model, [images(60, 5)])["a"])
    assert costs == pytest.approx(0, abs=1e-9)


def test_models_and_random_state_are_left_as_found() -> None:
    model = LeNet().train()
    data = torch.randn(20, 1, 28, 28)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.random.get_rng_state()
    torchtrim.reconstruction(model, data, [data], ["conv2", "fc1"])
    assert torch.equal(torch.random.get_rng_state(), random)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_what_cannot_be_measured_is_said() -> None:
    model, data = chain(nn.Linear(8, 4)), images(60, 5)
    with pytest.raises(PlanError, match="unknown layer 'c'"):
        torchtrim.reconstruction(model, data, [data], ["c"])
    with pytest.raises(ProfileError, match="read several times"):
        torchtrim.reconstruction(model, data, iter([data]))
    with pytest.raises(TorchtrimError, match="at least 1 position"):
        torchtrim.reconstruction(model, data, [data], positions=0)
    with pytest.raises(TorchtrimError, match="at least 1 input"):
        torchtrim.reconstruction(model, data, [data], block=0)
    for ridge in (0.0, -1.0, float("nan")):
        with pytest.raises(TorchtrimError, match="reconstruction: expected a finite ridge above 0"):
            torchtrim.reconstruction(model, data, [data], ridge=ridge)
    with pytest.raises(ProfileError, match="b: its inputs depend on one another"):
        torchtrim.reconstruction(model, data, [data[:3]], ridge=1e-30)
    with pytest.raises(ProfileError, match="not finite"):
        torchtrim.reconstruction(model, data, [data * float("nan")])
    criterion = torchtrim.reconstruction(model, data, [data], ["a"])
    profile = torchtrim.profile(model, [data])
    with pytest.raises(PlanError, match="'b' was not measured"):
        torchtrim.select(profile, rule=Fraction(0.5), layers=["b"], criterion=criterion)

    def read_by_no_module(net: Net, x: Tensor) -> Tensor:
        return net.out((net.a(x).relu() @ net.table).relu())

    modules = {"a": nn.Linear(5, 8), "table": nn.Parameter(torch.randn(8, 6)), "out": nn.Linear(6, 2)}
    other = randomised(Net(read_by_no_module, modules))
    criterion = torchtrim.reconstruction(other, data, [data], ["a"])
    with pytest.raises(PlanError, match="nothing that reads layer 'a'"):
        torchtrim.select(torchtrim.profile(other, [data]), rule=Fraction(0.5), layers=["a"], criterion=criterion)


def test_it_is_what_least_squares_leaves() -> None:
    """The error that was foreseen is the one that is left after the repair."""
    model = chain(nn.Conv2d(8, 4, 3, stride=2))
    data = data_for(model.b)
    costs = -torchtrim.reconstruction(model, data, [data], ["a"], ridge=1e-9)(torchtrim.profile(model, [data])["a"])
    order = costs.argsort()
    small = torchtrim.trim(model, Plan({"a": LayerPlan(8, tuple(sorted(order[:3].tolist())))}), data)
    repaired = torchtrim.repair(small, model, data, [data], ridge=1e-9)
    wanted = read_by(model, "b", data)[1]
    error = (read_by(repaired, "b", data)[1] - wanted).square().sum()
    variance = (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().sum()
    assert float(error / variance) == pytest.approx(costs[order[2]], rel=1e-4)
