"""What an error of layers becomes at the outputs, against models that are trimmed and repaired."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchtrim
from test_repair import CONSUMERS, chain, data_for, images, read_by
from torchtrim import Budget, LayerPlan, Plan
from torchtrim._calibration import Calibration
from torchtrim._gains import _EXAMPLES
from torchtrim._reconstruction import _DAMAGE, _measured, _refitted
from toys import Net, randomised


def gain_of_a(model: nn.Module, data: Tensor) -> float:
    """Of layer `a` without as many neurons as cost its readers `_DAMAGE`, by `trim` and `repair`."""
    criterion = torchtrim.reconstruction(model, data, [data], ["a"], ridge=1e-10)
    costs = criterion.costs["a"]
    order = costs.argsort()
    error = costs[order][costs[order] >= _DAMAGE][0]
    gone = np.flatnonzero(costs <= error)
    small = torchtrim.trim(model, Plan({"a": LayerPlan(costs.size, tuple(gone.tolist()))}), data)
    repaired = torchtrim.repair(small, model, data, [data], ridge=1e-10)
    with torch.no_grad():
        whole = model.eval()(data)
        return float((repaired.eval()(data) - whole).square().sum() / whole.square().sum() / error)


@pytest.mark.parametrize("build", CONSUMERS.values(), ids=CONSUMERS)
def test_a_gain_is_that_of_the_repaired_model(build) -> None:
    model = chain(build())
    data = data_for(model.b)
    found = torchtrim.reconstruction(model, data, data.split(4), ["a"], ridge=1e-10).gains
    assert found == {"a": pytest.approx(gain_of_a(model, data), rel=1e-4)}


def test_norms_make_up_for_means_and_readers_go_together() -> None:
    torch.manual_seed(0)

    def forward(net: Net, x: Tensor) -> Tensor:
        hidden = net.a(x).relu()
        return net.out((net.norm(net.b(hidden)) + net.c(hidden)).relu().mean((2, 3)))

    modules = {"a": nn.Conv2d(3, 8, 3, padding=1), "b": nn.Conv2d(8, 4, 3, bias=False), "norm": nn.BatchNorm2d(4)}
    model = randomised(Net(forward, modules | {"c": nn.Conv2d(8, 4, 3), "out": nn.Linear(4, 2)})).double()
    data = images(6, 3, 9, 8)
    found = torchtrim.reconstruction(model, data, [data], ["a"], ridge=1e-10).gains
    assert found == {"a": pytest.approx(gain_of_a(model, data), rel=1e-4)}


def test_blocks_are_put_together() -> None:
    model = chain(nn.Conv2d(8, 4, 3))
    data = data_for(model.b)
    graph = torchtrim.trace(model, data)
    readers = _measured(model, graph, {"a": graph.layers["a"]}, Calibration([data]), 1e-3, 36, None)
    assert len(readers) == 2
    (same,) = _refitted(readers)
    assert torch.equal(same.weight, model.b.weight)
    assert not same.constant.any()
    for reader in readers:
        reader.remove(np.array([min(reader.inputs)]))  # one input channel of each block
    (other,) = _refitted(readers)
    gone = other.weight.abs().amax((0, 2, 3)) < 1e-12
    assert gone.tolist() == [True, False, False, False] * 2
    with torch.no_grad():
        given = read_by(model, "b", data)[0]
        moved = (other(given) - model.b(given)).mean((0, 2, 3))
    torch.testing.assert_close(moved, torch.zeros(4).double())  # the mean of each output is as before


def test_an_error_that_the_outputs_do_not_see_has_no_gain() -> None:
    torch.manual_seed(0)
    parts = {name: nn.Linear(8, 8) for name in ("first", "blind")}
    model = randomised(
        Net(
            lambda net, x: net.out(net.first(x).relu()) + 0 * net.other(net.blind(x).relu()),
            parts | {"out": nn.Linear(8, 3), "other": nn.Linear(8, 3)},
        )
    )
    data = images(100, 8)
    criterion = torchtrim.reconstruction(model, data, [data])
    assert criterion.gains["blind"] == 0
    assert criterion.gains["first"] > 0.1
    plan = Budget(parameters=0.7, floor=0).plan(model, data, torchtrim.profile(model, [data]), criterion=criterion)
    assert plan.removed["blind"]
    assert "first" not in plan.removed


def test_a_few_hundred_examples_are_enough() -> None:
    model, data = chain(nn.Linear(8, 4)), images(20 + _EXAMPLES, 5)
    calls: list[int] = []

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        calls.append(len(batch))
        return model(batch)

    batches = [data[:10], data[10:_EXAMPLES], data[_EXAMPLES:]]
    torchtrim.reconstruction(model, data, batches, ["a"], forward=forward)
    assert calls == [10, _EXAMPLES - 10, 20, 10, 10, _EXAMPLES - 10, _EXAMPLES - 10]


@pytest.mark.parametrize(
    "returned",
    [
        lambda out: None,
        lambda out: out.argmax(1),
        lambda out: out[(out[:, 0] * 1000).long() % 2 == 0],  # as many as there are, like the boxes of a detector
    ],
    ids=["nothing", "integers", "another number"],
)
def test_where_outputs_cannot_be_compared_a_plan_says_so(returned) -> None:
    model, data = chain(nn.Linear(8, 4)), images(61, 5)
    criterion = torchtrim.reconstruction(model, data, [data], forward=lambda model, batch: returned(model(batch)))
    assert criterion.gains is None
    profile = torchtrim.profile(model, [data])
    plan = Budget(parameters=0.7).plan(model, data, profile, criterion=criterion)
    assert "the model's outputs cannot be compared; errors count alike in all layers" in plan.notes


def test_several_outputs_and_infinite_ones() -> None:
    model, data = chain(nn.Linear(8, 4)), images(60, 5)
    plain = torchtrim.reconstruction(model, data, [data], ["a"]).gains["a"]

    def forward(model: nn.Module, batch: Tensor) -> object:
        out = model(batch)
        barred = torch.cat([out, torch.full_like(out, -torch.inf)], 1)
        return {"logits": 100 * out, "more": [barred, out.argmax(1)], "same": torch.ones(3)}

    found = torchtrim.reconstruction(model, data, [data], ["a"], forward=forward).gains["a"]
    assert found == pytest.approx(plain * 2 / 3)  # the mean over three, of which one stays
