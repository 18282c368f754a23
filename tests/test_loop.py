"""Rounds on small networks and random data."""

import copy
import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchtrim
from torchtrim import Budget, Fraction, Progressive, Round, Stop, TorchtrimError, _loop, iterate
from torchtrim._guard import Accuracy
from torchtrim.errors import PlanError, TraceError


@pytest.fixture(autouse=True)
def short_timings(monkeypatch) -> None:
    monkeypatch.setattr(_loop, "measure_beside", partial(_loop.measure_beside, seconds=0))


class Chain(nn.Module):
    """Five hidden layers of 12; inputs [batch, 4] → [batch, 3]. Layers with a large bias are silent less often."""

    def __init__(self) -> None:
        super().__init__()
        widths = [4, 12, 12, 12, 12, 12, 3]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, inputs: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            inputs = F.relu(layer(inputs))
        return self.layers[-1](inputs)


INPUTS = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
LABELS = INPUTS[:, 0].gt(0).long()


def chain(seed: int = 0) -> Chain:
    torch.manual_seed(seed)
    return Chain()


def retrain(model: nn.Module) -> None:
    """Noisy steps, so that the seed around them matters."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(5):
        loss = F.cross_entropy(model(INPUTS + 0.1 * torch.randn_like(INPUTS)), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def accuracy(model: nn.Module) -> float:
    with torch.no_grad():
        return 100 * float((model(INPUTS).argmax(1) == LABELS).float().mean())


def rounds(model: nn.Module, **changes) -> list[Round]:
    settings = {"rule": Fraction(0.25), "stop": Stop(rounds=3), "retrain": retrain, "evaluate": accuracy}
    return list(iterate(model, INPUTS[:2], [INPUTS], **(settings | changes)))


def test_a_round_says_what_happened() -> None:
    model = chain()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = rounds(model, layers=["layers.1", "layers.3"])
    assert [done.number for done in found] == [1, 2, 3]
    assert [list(done.widths.values()) for done in found] == [
        [12, 9, 12, 9, 12, 3],
        [12, 7, 12, 7, 12, 3],
        [12, 6, 12, 6, 12, 3],
    ]
    for done, earlier in zip(found, [None, *found], strict=False):
        assert done.layers == ("layers.1", "layers.3")
        assert done.cost.parameters == sum(parameter.numel() for parameter in done.model.parameters())
        assert done.compression == sum(p.numel() for p in model.parameters()) / done.cost.parameters
        assert done.accuracy.before == (earlier.accuracy.retrained if earlier else accuracy(model))
        assert done.accuracy.retrained == accuracy(done.model)
        start = torchtrim.trim(earlier.model if earlier else model, done.plan, INPUTS[:2])
        assert done.accuracy.trimmed == accuracy(start)
        assert set(done.seconds) == {"profile", "select", "trim", "retrain", "evaluate", "measure"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_retraining_starts_from_the_surviving_weights() -> None:
    model, seen = chain(), []
    rounds(
        model,
        retrain=lambda small: seen.append(small.layers[1].weight.clone()),
        stop=Stop(rounds=1),
        layers=["layers.1"],
    )
    plan = rounds(model, stop=Stop(rounds=1), layers=["layers.1"])[0].plan
    kept = np.setdiff1d(np.arange(12), plan.removed["layers.1"])
    assert torch.equal(seen[0], model.layers[1].weight[kept])


def test_decisions_ignore_the_test_set() -> None:
    model = chain()
    one = rounds(model, test=lambda _: 1.0)
    other = rounds(model, test=lambda _: 99.0)
    assert [done.plan for done in one] == [done.plan for done in other]
    assert {done.test.retrained for done in one} == {1.0}
    assert rounds(model)[0].test is None


def test_seeded_and_the_global_random_state_restored() -> None:
    one, other = rounds(chain()), rounds(chain())
    different = rounds(chain(), seed=1)
    for done, again, else_ in zip(one, other, different, strict=True):
        for a, b in zip(done.model.parameters(), again.model.parameters(), strict=True):
            assert torch.equal(a, b)
        assert any(
            a.shape != b.shape or not torch.equal(a, b)
            for a, b in zip(done.model.parameters(), else_.model.parameters(), strict=True)
        )
    torch.manual_seed(5)
    model = Chain()
    state = torch.get_rng_state()
    rounds(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_goes_on_after_what_is_done() -> None:
    model = chain()
    whole = rounds(model)
    rest = rounds(model, done=whole[:1])
    assert [done.number for done in rest] == [2, 3]
    for done, again in zip(whole[1:], rest, strict=True):
        assert done.plan == again.plan
        assert done.accuracy == again.accuracy
        for a, b in zip(done.model.parameters(), again.model.parameters(), strict=True):
            assert torch.equal(a, b)
    assert rounds(model, done=whole) == []


def test_random_batches_do_not_depend_on_what_came_before() -> None:
    """Data drawn anew each round, and an `evaluate` that draws too, as a DataLoader does."""

    class Drawn:
        def __iter__(self):
            return iter([torch.randn(8, 4)])

    def drawing(model: nn.Module) -> float:
        torch.rand(1)
        return accuracy(model)

    model = chain()
    settings = {"retrain": retrain, "evaluate": drawing, "rule": Fraction(0.25), "stop": Stop(3)}
    whole = list(iterate(model, INPUTS[:2], Drawn(), **settings))
    torch.rand(5)
    rest = list(iterate(model, INPUTS[:2], Drawn(), **settings, done=whole[:1]))
    assert [done.plan for done in whole[1:]] == [done.plan for done in rest]


@pytest.mark.parametrize(
    ("stop", "reached"),
    [
        (Stop(rounds=2), lambda done: done.number == 2),
        (Stop(compression=2), lambda done: done.compression >= 2),
        (Stop(rounds=9, compression=1.5), lambda done: done.compression >= 1.5),
        (Stop(accuracy=101.0), lambda done: done.number == 1),
    ],
)
def test_stops(stop, reached) -> None:
    found = rounds(chain(), stop=stop)
    assert [reached(done) for done in found] == [False] * (len(found) - 1) + [True]


def test_ends_when_nothing_is_removed() -> None:
    assert rounds(chain(), rule=torchtrim.Threshold(2), stop=Stop(compression=100)) == []
    found = rounds(chain(), rule=Fraction(0.5), stop=Stop(compression=1e6))
    assert set(found[-1].widths.values()) == {1, 3}


@pytest.mark.parametrize("layers", [None, ["0"]])
def test_a_criterion_that_needs_no_data_trims_layers_without_activations(layers) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 12), nn.Linear(12, 3))
    found = rounds(model, layers=layers, criterion="l1_norm")
    assert [done.widths["0"] for done in found] == [9, 7, 6]
    with pytest.raises(PlanError, match="no activation was observed"):
        rounds(model, layers=["0"])


def test_progressive_spreads_from_the_most_silent_layers() -> None:
    model = chain()
    with torch.no_grad():
        model.layers[3].bias -= 0.5  # the most silent layer
        for place in (0, 1, 2, 4):
            model.layers[place].bias += 0.3
    found = rounds(model, layers=Progressive(start=1))
    assert [done.layers for done in found] == [
        ("layers.3",),
        ("layers.2", "layers.3", "layers.4"),
        ("layers.1", "layers.2", "layers.3", "layers.4"),
    ]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layers": ["layers.9"]}, PlanError, r"unknown layer 'layers.9'; did you mean"),
        ({"layers": ["layers.5"]}, PlanError, "output of the model"),
        ({"criterion": "apos"}, PlanError, "unknown criterion 'apos'"),
        ({"layers": []}, PlanError, "layers: expected at least one name, found none"),
        ({"layers": iter(["layers.0"])}, TorchtrimError, "layers: expected a sequence of names, found <list_iterator"),
        ({"rule": 0.5}, PlanError, r"rule: expected such as Fraction\(0.3\) or .*, found 0.5"),
        ({"repair": 3}, TorchtrimError, "repair: expected some of .*, found 3"),
        (
            {"stop": 3, "test": 4, "seed": "one"},
            TorchtrimError,
            r"test: expected a function, found 4\nstop: expected such as Stop\(rounds=4\), found 3\nseed: .*'one'",
        ),
    ],
)
def test_bad_requests_end_before_any_work(changes, error, message) -> None:
    def never(*_):
        raise AssertionError("work has begun")

    with pytest.raises(error, match=message):
        rounds(chain(), evaluate=never, retrain=never, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"evaluate": lambda model: None},
            "one number, the accuracy of the model to begin with, found None",
        ),
        ({"evaluate": lambda model: math.nan}, "expected a finite accuracy of the model to begin with, found nan"),
        ({"test": lambda model: "good"}, "test: expected one number, the accuracy of the model, found 'good'"),
    ],
)
def test_an_accuracy_that_is_no_number_ends_the_loop_before_it_trains(changes, message) -> None:
    with pytest.raises(TorchtrimError, match=message):
        rounds(chain(), retrain=lambda model: pytest.fail("trained"), **changes)


def test_accuracies_are_numbers_whatever_the_function_gives() -> None:
    (done,) = rounds(chain(), evaluate=lambda model: torch.tensor([90]), stop=Stop(1))
    assert done.accuracy == Accuracy(90.0, 90.0, 90.0)
    assert type(done.accuracy.retrained) is float


def test_an_accuracy_that_becomes_no_number_is_too_low() -> None:
    scripted = iter([90.0, 90.0, math.nan])
    assert len(rounds(chain(), evaluate=lambda model: next(scripted), stop=Stop(accuracy=1.0))) == 1


def test_bad_requests_do_not_wait_for_the_first_round() -> None:
    settings = {"retrain": retrain, "evaluate": accuracy, "rule": Fraction(0.1), "stop": Stop(1)}
    with pytest.raises(PlanError, match="unknown layer"):
        iterate(chain(), INPUTS, [INPUTS], layers=["x"], **settings)
    with pytest.raises(TraceError, match="Chain cannot run on the example"):
        iterate(chain(), INPUTS.T, [INPUTS], **settings)
    with pytest.raises(TorchtrimError, match="iterator generator"):
        iterate(chain(), INPUTS, (x for x in [INPUTS]), **settings)


def test_a_round_repairs_against_the_model_that_it_trims() -> None:
    model = chain()
    options = {"layers": ["layers.1", "layers.3"], "stop": Stop(rounds=2), "rule": Fraction(0.5)}
    seen: list[nn.Module] = []
    found = rounds(model, retrain=lambda one: seen.append(copy.deepcopy(one)), repair="least-squares", **options)
    before = model
    for done, repaired in zip(found, seen, strict=True):
        small = torchtrim.trim(before, done.plan, INPUTS[:2])
        expected = torchtrim.repair(small, before, INPUTS[:2], [INPUTS])
        torch.testing.assert_close(repaired(INPUTS), expected(INPUTS))
        wanted = before(INPUTS)
        assert (repaired(INPUTS) - wanted).norm() < (small(INPUTS) - wanted).norm()
        assert done.accuracy.trimmed == accuracy(repaired)
        assert done.seconds["repair"] > 0
        before = done.model
    with pytest.raises(TorchtrimError, match="expected some of"):
        iterate(
            chain(), INPUTS, [INPUTS], retrain=retrain, evaluate=accuracy, rule=Fraction(0.1), stop=Stop(1), repair="x"
        )


def test_positions_go_to_the_repair_and_to_reconstruction_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int | None]] = []
    for name in ("repair", "reconstruction"):
        usual = getattr(torchtrim, name)

        def spy(*args, name=name, usual=usual, **options):
            seen.append((name, options["positions"]))
            return usual(*args, **options)

        monkeypatch.setattr(f"torchtrim._loop.{name}", spy)
    options = {"stop": Stop(rounds=1), "criterion": "reconstruction", "repair": "least-squares"}
    rounds(chain(), repair_positions=3, **options)
    rounds(chain(), **options)
    assert seen == [("reconstruction", 3), ("repair", 3), ("reconstruction", None), ("repair", None)]
    usual = {"retrain": retrain, "evaluate": accuracy, "rule": Fraction(0.1), "stop": Stop(1)}
    with pytest.raises(TorchtrimError, match="at least 1 position"):
        iterate(chain(), INPUTS, [INPUTS], repair="least-squares", repair_positions=0, **usual)
    for repair in (None, "mean"):
        with pytest.raises(TorchtrimError, match="expected a repair by least-squares or the criterion reconstruction"):
            iterate(chain(), INPUTS, [INPUTS], repair=repair, repair_positions=4, **usual)


def test_reconstruction_is_measured_of_each_rounds_model() -> None:
    model, layers = chain(), ["layers.1", "layers.3"]
    options = {"layers": layers, "stop": Stop(rounds=2), "criterion": "reconstruction", "repair": "least-squares"}
    before = model
    for done in rounds(model, **options):
        criterion = torchtrim.reconstruction(before, INPUTS[:2], [INPUTS], layers)
        expected = torchtrim.select(done.profile, rule=Fraction(0.25), layers=layers, criterion=criterion)
        assert done.plan.removed == expected.removed
        assert done.plan.source == "reconstruction, fraction:0.25"
        before = done.model


def test_a_model_without_trimmable_layers_says_why() -> None:
    with pytest.raises(PlanError, match=r"no layer that can be trimmed:\n.*output of the model"):
        rounds(nn.Linear(4, 3))


def test_stop_needs_a_condition() -> None:
    with pytest.raises(TorchtrimError, match="at least one of"):
        Stop()
    with pytest.raises(
        TorchtrimError, match=r"rounds must be a whole number of at least 1, found 0; compression must be above 1"
    ):
        Stop(rounds=0, compression=1)
    for value in (math.nan, math.inf, "3", "three", 2.5, True):
        with pytest.raises(TorchtrimError, match="rounds must be a whole number of at least 1, found"):
            Stop(rounds=value)  # type: ignore[arg-type]
    with pytest.raises(TorchtrimError, match="compression must be above 1, found '2'; accuracy must be"):
        Stop(compression="2", accuracy="90")  # type: ignore[arg-type]
    with pytest.raises(TorchtrimError, match="start of at least 1"):
        Progressive(0)


def test_a_budget_is_met_in_equal_factors() -> None:
    model = chain()
    whole = sum(parameter.numel() for parameter in model.parameters())
    found = rounds(model, rule=Budget(parameters=0.4))
    assert [done.number for done in found] == [1, 2, 3]
    for done in found:
        aim = whole * 0.4 ** (done.number / 3)
        assert aim * 0.93 <= done.cost.parameters <= aim  # one neuron here is up to 7 % of what is left
    assert rounds(model, rule=Budget(parameters=0.4), done=found[:1])[0].plan == found[1].plan


def test_a_budget_counts_from_the_ancestor_and_keeps_its_floors() -> None:
    model = chain()
    found = rounds(model, rule=Budget(parameters=0.25, floor={"layers.0": 0.75}), stop=Stop(rounds=4))
    widths = [done.widths["layers.0"] for done in found]
    assert widths[-1] == 9  # of twelve; the floor is of the ancestor's neurons, not of what a round finds
    assert widths == sorted(widths, reverse=True)
    assert len(rounds(model, rule=Budget(parameters=0.3), stop=Stop(compression=9))) == 1


def test_a_budget_that_is_too_small_says_so_in_the_first_round() -> None:
    trained: list[nn.Module] = []
    with pytest.raises(PlanError, match="the budget is out of reach"):
        rounds(chain(), rule=Budget(parameters=0.3, floor=0.8), retrain=trained.append, stop=Stop(rounds=9))
    assert not trained


def test_a_budget_that_no_choice_can_reach_is_refused_before_any_work() -> None:
    settings = {"retrain": retrain, "evaluate": accuracy, "stop": Stop(rounds=2), "layers": ["layers.0"]}
    with pytest.raises(PlanError, match=r"parameters: expected at most \d+, but the smallest that can be reached is"):
        iterate(chain(), INPUTS[:2], [INPUTS], rule=Budget(parameters=0.1), **settings)


def test_progressive_layers_reach_a_budget_that_the_first_of_them_cannot() -> None:
    found = rounds(chain(), rule=Budget(parameters=0.3), layers=Progressive(1), stop=Stop(rounds=4))
    assert found[-1].cost.parameters <= 0.3 * found[0].ancestor.parameters
    assert len(found[0].layers) == 1
    with pytest.raises(PlanError, match="out of reach"):
        rounds(chain(), rule=Budget(parameters=0.3), layers=found[0].layers)


def test_the_guard_halves_the_way_to_a_budget() -> None:
    model = chain()
    attempts: list[torchtrim.Plan] = []
    scripted = iter([90.0, 90.0, 50.0, 90.0, 90.0])  # the ancestor; trimmed, retrained; trimmed, retrained
    found = rounds(
        model,
        rule=Budget(parameters=0.4),
        stop=Stop(rounds=1),
        guard=1.0,
        evaluate=lambda _: next(scripted),
        on_rejected=lambda attempt: attempts.append(attempt.plan),
    )
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert len(attempts) == 1
    assert 0.93 * 0.4**0.5 <= found[0].cost.parameters / whole <= 0.4**0.5
    assert sum(map(len, attempts[0].removed.values())) > sum(map(len, found[0].plan.removed.values()))


def test_near_zeros_count_in_every_round() -> None:
    class Smooth(Chain):
        def forward(self, inputs: Tensor) -> Tensor:
            for layer in self.layers[:-1]:
                inputs = F.gelu(layer(inputs))
            return self.layers[-1](inputs)

    torch.manual_seed(0)
    with pytest.warns(torchtrim.TorchtrimWarning, match="zero_tolerance"):
        plain = rounds(Smooth(), stop=Stop(rounds=1))[0].profile
    near = rounds(Smooth(), stop=Stop(rounds=1), zero_tolerance=0.1)[0].profile
    assert not any(layer.zeros.any() for layer in plain.values())
    assert all(layer.zeros.any() for layer in near.values() if layer.locked is None)


def test_a_budget_outlives_layers_of_which_one_neuron_is_left() -> None:
    """Such a layer is none any more, though floors and weights were given for it."""
    weights = dict.fromkeys(["layers.0", "layers.2"], 0.001)
    budget = Budget(parameters=0.15, floor={"layers.2": 1, "*": 1}, weights=weights)
    found = rounds(chain(), rule=budget, stop=Stop(rounds=6))
    assert found[-1].cost.parameters <= 0.15 * found[0].ancestor.parameters
    assert any(width == 1 for done in found[:-1] for width in done.widths.values())


def test_a_budget_of_unknown_layers_ends_before_any_work() -> None:
    with pytest.raises(PlanError, match=r"weights: unknown layer 'layers\.9'"):
        iterate(
            chain(),
            INPUTS[:2],
            [INPUTS],
            rule=Budget(parameters=0.5, weights={"layers.9": 2.0}),
            stop=Stop(rounds=1),
            retrain=retrain,
            evaluate=accuracy,
        )
