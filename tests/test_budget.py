"""Budgets: what was asked is what the trimmed model really costs, and what must stay stays."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import torchtrim
from test_price import encoder, torchvision_model
from torchtrim import Budget, LayerPlan, Plan
from torchtrim._budget import importance
from torchtrim._lenet import LeNet
from torchtrim._unmeasured import unmeasured
from torchtrim.errors import PlanError
from toys import assert_trim_equals_mask, randomised


class Locked(nn.Module):
    """A layer whose neurons must stay, since a softmax is over them, between two that are free."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.out = nn.Linear(8, 60), nn.Linear(60, 30), nn.Linear(30, 40), nn.Linear(40, 4)

    def forward(self, x):
        x = self.a(x).relu()
        x = self.b(x).softmax(1)
        return self.out(self.c(x).relu())


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


MODELS = {
    "LeNet": (LeNet, noise(4, 1, 28, 28), ("parameters", "flops", "bytes")),
    "locked": (Locked, noise(16, 8), ("parameters", "flops", "bytes")),
    "attention": (encoder, noise(2, 7, 24), ("parameters", "flops")),
    "ResNet-18": (lambda: torchvision_model("resnet18"), noise(2, 3, 32, 32), ("bytes",)),
    "MobileNet V3": (lambda: torchvision_model("mobilenet_v3_small"), noise(2, 3, 32, 32), ("flops",)),
}


def built(name: str):
    torch.manual_seed(0)
    build, example, _ = MODELS[name]
    model = randomised(build()).float()
    graph = torchtrim.trace(model, example)
    return model, example, graph, torchtrim.profile(model, [example])


@pytest.mark.parametrize("name", MODELS)
def test_the_trimmed_model_costs_what_was_asked(name: str) -> None:
    model, example, graph, profile = built(name)
    own = torchtrim.measure(model, example)
    share = 0.8
    plan = Plan({})
    for target in MODELS[name][2]:
        plan = Budget(**{target: share}).plan(model, graph, profile, criterion="l1_norm")
        cost = getattr(torchtrim.measure(torchtrim.trim(model, plan, graph), example), target)
        assert 0.99 * share <= cost / getattr(own, target) <= share
        assert any(note.startswith(f"{target}: ") and f"→ {cost:,}" in note for note in plan.notes)
    assert_trim_equals_mask(model.double(), plan, example.double())


def test_several_targets_all_hold() -> None:
    model, example, graph, profile = built("LeNet")
    plan = Budget(parameters=300_000, flops=0.4, bytes=10_000_000).plan(model, graph, profile)
    cost, own = torchtrim.measure(torchtrim.trim(model, plan, example), example), torchtrim.measure(model, example)
    assert cost.parameters <= 300_000
    assert 0.99 * 0.4 <= cost.flops / own.flops <= 0.4
    assert plan.source == "apoz, parameters 300,000, flops 40 %, bytes 10,000,000"


def test_floors_caps_and_multiples_are_kept() -> None:
    model, _, graph, profile = built("ResNet-18")
    budget = Budget(
        parameters=0.6,
        floor={"layer3.*": 200, "*": 0.25},
        cap={"layer1.0.conv1": 40, "layer2.?.conv1": 0.75},
        multiple_of=8,
    )
    plan = budget.plan(model, graph, profile)
    for name, layer in plan.layers.items():
        assert layer.remaining % 8 == 0
        assert layer.remaining >= (200 if name.startswith("layer3") else layer.width / 4)
    assert plan.layers["layer1.0.conv1"].remaining <= 40
    assert all(plan.layers[f"layer2.{block}.conv1"].remaining <= 96 for block in range(2))
    cost = torchtrim.measure(torchtrim.trim(model, plan, graph), graph.example)
    assert 0.99 * 0.6 <= cost.parameters / 11_689_512 <= 0.6


def test_what_goes_is_least_important_in_its_group_and_of_all_at_one_level() -> None:
    model, _, graph, profile = built("LeNet")
    plan = Budget(flops=0.5).plan(model, graph, profile, criterion="l2_norm")
    for name, layer in plan.layers.items():
        order = np.argsort(profile[name].incoming_l2, kind="stable")
        assert sorted(order[: len(layer.removed)]) == list(layer.removed)


def test_layers_that_are_asked_for_alone_lose_something() -> None:
    model, _, graph, profile = built("LeNet")
    plan = Budget(parameters=0.7).plan(model, graph, profile, layers=["fc1"])
    assert [*plan.layers] == ["fc1"]
    assert math.isclose(431_080 - len(plan.removed["fc1"]) * 811, 0.7 * 431_080, rel_tol=0.01)


def test_an_example_serves_as_well_as_its_graph_and_the_model_stays() -> None:
    model, example, graph, profile = built("LeNet")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert Budget(flops=0.5).plan(model, example, profile) == Budget(flops=0.5).plan(model, graph, profile)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_budget_that_the_model_meets_removes_nothing() -> None:
    model, _, graph, profile = built("LeNet")
    plan = Budget(parameters=500_000).plan(model, graph, profile)
    assert not plan.removed
    assert plan.notes[-1] == "the model met it to begin with"


def test_large_units_end_below_and_say_so() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 6), nn.ReLU(), nn.Linear(6, 50))
    profile = torchtrim.profile(model, [noise(8, 50)])
    plan = Budget(parameters=0.6).plan(model, noise(8, 50), profile)
    assert plan.layers["0"].remaining == 3  # 50 of 656 and 101 each: 4 would be 0.69, 3 are 0.54
    assert "10.3% below what was asked" in plan.notes[-1]


def test_out_of_reach_says_the_smallest_that_is_not() -> None:
    model, example, graph, profile = built("Locked".lower())
    with pytest.raises(PlanError, match=r"parameters: .* the smallest that can be reached is ([\d,]+),") as caught:
        Budget(parameters=0.05, floor=0.5).plan(model, graph, profile)
    smallest = (8 + 1) * 30 + (30 + 1) * 30 + (30 + 1) * 20 + (20 + 1) * 4
    assert f"{smallest:,}" in str(caught.value)
    plan = Budget(parameters=smallest, floor=0.5).plan(model, graph, profile)
    assert torchtrim.measure(torchtrim.trim(model, plan, graph), example).parameters == smallest


def test_a_check_without_data_knows_the_same_smallest() -> None:
    model, _, graph, _ = built("locked")
    blank = unmeasured(model, graph)
    smallest = (8 + 1) * 30 + (30 + 1) * 30 + (30 + 1) * 20 + (20 + 1) * 4
    Budget(parameters=smallest, floor=0.5, latency=0.001).check(model, graph, blank)
    with pytest.raises(PlanError, match=f"smallest that can be reached is {smallest:,},"):
        Budget(parameters=smallest - 1, floor=0.5).check(model, graph, blank)
    with pytest.raises(PlanError, match="out of reach"):
        Budget(parameters=0.8, floor=0.5).check(model, graph, blank, ["c"])


class Clever(nn.Module):
    """It hides that it computes with a width, so that only the proof finds it out. free: whether another does not."""

    def __init__(self, free: bool) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, 20), nn.Linear(20, 20) if free else nn.Identity(), nn.Linear(20, 4)

    def forward(self, x):
        return self.out(self.b(self.a(x).relu() / getattr(self.a, "out_" + "features")).relu())


def test_what_cannot_be_proved_is_made_up_for_by_others() -> None:
    torch.manual_seed(0)
    model, example = Clever(free=True), noise(4, 8)
    profile = torchtrim.profile(model, [example])
    plan = Budget(parameters=0.7).plan(model, example, profile, criterion="l1_norm")
    assert [*plan.removed] == ["b"]
    assert "a: could not be proved; left whole" in plan.notes
    own, left = (torchtrim.measure(one, example).parameters for one in (model, torchtrim.trim(model, plan, example)))
    assert 0.7 * own - 25 < left <= 0.7 * own  # a neuron of b has 25


def test_where_nothing_can_be_proved_it_says_so() -> None:
    model, example = Clever(free=False), noise(4, 8)
    profile = torchtrim.profile(model, [example])
    with pytest.raises(PlanError, match="no layer is left to choose from:\n  a: could not be proved; left whole"):
        Budget(parameters=0.7).plan(model, example, profile, criterion="l1_norm")


def test_a_profile_of_another_model_is_refused() -> None:
    profile = built("locked")[3]
    with pytest.raises(PlanError, match="does not fit the model"):
        Budget(parameters=0.5).plan(LeNet(), noise(4, 1, 28, 28), profile)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected a target"),
        ({"parameters": 0}, "parameters: expected a number above 0, found 0"),
        ({"flops": float("nan")}, "flops: expected a number above 0"),
        ({"latency": 5}, 'latency: expected a share below 1, or a time with its unit such as "12 ms", found 5'),
        ({"latency": "5"}, "a time with its unit"),
        ({"latency": "0 ms"}, "a time with its unit"),
        ({"bytes": 0.5, "floor": -1}, "floor: expected numbers of at least 0, found -1"),
        ({"bytes": 0.5, "cap": {"a": 0}}, "cap: expected numbers above 0, found 0"),
        ({"bytes": 0.5, "weights": {"a": "much"}}, "weights: expected numbers above 0, found 'much'"),
        ({"bytes": 0.5, "floor": None}, "floor: expected numbers of at least 0, found None"),
        ({"bytes": 0.5, "floor": {3: 1}}, "floor: expected names or patterns of layers, found 3"),
        ({"bytes": 0.5, "weights": 2.0}, "weights: expected factors by layer, found 2.0"),
        ({"bytes": 0.5, "multiple_of": 1.5}, "multiple_of: expected a whole number of at least 1"),
    ],
)
def test_budgets_that_make_no_sense(arguments, message) -> None:
    with pytest.raises(PlanError, match=message):
        Budget(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"floor": {"fc9": 1}}, "floor: unknown layer 'fc9'; did you mean"),
        ({"cap": {"fc9": 1}}, "cap: unknown layer"),
        ({"weights": {"fc9": 1}}, "weights: unknown layer"),
        ({"floor": 0.5, "cap": 0.25}, "layer 'conv1': the floor of 10 neurons is above the cap of 5"),
    ],
)
def test_budgets_that_do_not_fit_the_model(arguments, message) -> None:
    model, _, graph, profile = built("LeNet")
    with pytest.raises(PlanError, match=message):
        Budget(parameters=0.9, **arguments).plan(model, graph, profile)


def test_numbers_may_be_numpys() -> None:
    budget = Budget(parameters=np.int64(200_000), flops=np.float32(0.5), floor=np.float64(0.1))
    assert budget.asked == {"parameters": 200_000, "flops": 0.5}


def test_importances() -> None:
    assert importance(np.array([0.25, 1.0]), torchtrim.criteria.apoz).tolist() == [0.75, 0.0]
    found = importance(np.array([-3.0, -4.0]), torchtrim.criteria.l1_norm)
    assert found == pytest.approx(np.array([3, 4]) / math.sqrt(12.5))
    assert importance(np.zeros(2), torchtrim.criteria.l1_norm).tolist() == [0, 0]

    def positive(profile):
        return np.arange(3.0)

    assert importance(positive(None), positive) == pytest.approx(np.array([2, 1, 0]) / math.sqrt(5 / 3))
    positive.comparable = True
    assert importance(positive(None), positive).tolist() == [0, -1, -2]


def test_reconstruction_is_compared_as_it_is() -> None:
    model, example, graph, profile = built("locked")
    cheapest = torchtrim.reconstruction(model, graph, [example])
    plan = Budget(parameters=0.8, floor=0).plan(model, graph, profile, criterion=cheapest)
    assert plan.removed
    assert plan.source == "reconstruction, parameters 80 %"


def test_plans_are_plans() -> None:
    model, _, graph, profile = built("LeNet")
    plan = Budget(parameters=0.5).plan(model, graph, profile)
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.layers["conv1"] == LayerPlan(20, plan.layers["conv1"].removed)
