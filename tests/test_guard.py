"""The guard of the loop, with accuracies by a table: which rounds hold, what is tried again, and what is left of it."""

import copy
import itertools
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchtrim
from torchtrim import Fraction, Guard, Round, Stop, TorchtrimError, TorchtrimWarning, _loop, iterate
from torchtrim._guard import Attempt, fell, part_of, smaller_plans
from torchtrim.errors import StoreError

INPUTS = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def short_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_loop, "measure_beside", partial(_loop.measure_beside, seconds=0))


def network() -> nn.Module:
    """Two hidden layers of 16; inputs [batch, 4] → [batch, 3]."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


class Scripted:
    """A loop whose accuracies follow from a table alone.

    table: after each retraining, in order; the model's own is 90, and 50 after trimming. interrupt: the retraining in
    which the user loses patience.
    """

    def __init__(self, *table: float, interrupt: int | None = None) -> None:
        self.table = table
        self.interrupt = interrupt
        self.starts: list[nn.Module] = []  # what `retrain` was given
        self.ends: list[nn.Module] = []
        self.rejected: list[Attempt] = []
        self.evaluated: list[nn.Module] = []

    def retrain(self, model: nn.Module) -> None:
        self.starts.append(copy.deepcopy(model))
        if len(self.starts) == self.interrupt:
            raise KeyboardInterrupt
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        self.ends.append(model)

    def evaluate(self, model: nn.Module) -> float:
        self.evaluated.append(model)
        if self.ends and model is self.ends[-1]:
            return self.table[len(self.ends) - 1]
        return 90.0 if not self.starts and len(self.evaluated) == 1 else 50.0

    def rounds(self, model: nn.Module, **changes: Any) -> list[Round]:
        settings = {"rule": Fraction(0.5), "stop": Stop(rounds=2), "layers": ["0", "2"], "guard": 1.0}
        calls = {"retrain": self.retrain, "evaluate": self.evaluate, "on_rejected": self.rejected.append}
        return list(iterate(model, INPUTS[:2], [INPUTS], **(settings | calls | changes)))


def highest(apoz: np.ndarray, count: int) -> list[int]:
    """The places of the highest scores; of equal ones the first."""
    return sorted(sorted(range(apoz.size), key=lambda place: (-apoz[place], place))[:count])


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def removed(rounds: Sequence[Round | Attempt]) -> list[list[int]]:
    return [[len(one.plan.removed[name]) for name in ("0", "2")] for one in rounds]


def test_rounds_that_hold_are_as_without_a_guard() -> None:
    guarded, plain = Scripted(89.5, 89.0), Scripted(89.5, 89.0)
    found, expected = guarded.rounds(network()), plain.rounds(network(), guard=None)
    assert [one.number for one in found] == [1, 2]
    for one, other in zip(found, expected, strict=True):
        assert (one.plan, one.accuracy, one.rejected) == (other.plan, other.accuracy, ())
        assert_equal(one.model, other.model)
    assert guarded.rejected == []
    assert [one.ancestor_accuracy for one in found] == [90, 90]


def test_half_is_tried_until_it_holds_and_nothing_of_what_failed_is_left() -> None:
    model = network()
    before, work = copy.deepcopy(model), Scripted(88.9, 80.0, 89.1, 88.0, 89.0)
    found = work.rounds(model)
    assert [one.number for one in found] == [1, 2]
    assert removed(found[0].rejected) == [[8, 8], [4, 4]]
    assert removed(found) == [[2, 2], [3, 3]]  # then half of 14 is 7, and half of that 3
    assert removed(found[1].rejected) == [[7, 7]]
    assert [one.accuracy.retrained for one in found] == [89.1, 89.0]
    assert [one.accuracy.retrained for one in found[0].rejected] == [88.9, 80.0]
    assert {(one.least, one.accuracy.before, one.accuracy.trimmed) for one in found[0].rejected} == {(89, 90, 50)}
    assert [one.accuracy.before for one in found] == [90, 89.1]
    assert work.rejected == [*found[0].rejected, *found[1].rejected]
    assert [one.number for one in work.rejected] == [1, 1, 2]
    assert sum(one is model for one in work.evaluated) == 1

    last = before
    for done, start in zip(found, (work.starts[2], work.starts[4]), strict=True):
        for one in (*done.rejected, done):
            for name in ("0", "2"):
                assert list(one.plan.removed[name]) == highest(done.profile.apoz[name], len(one.plan.removed[name]))
        assert_equal(start, torchtrim.trim(last, done.plan, INPUTS[:2]))
        last = done.model
    assert_equal(model, before)
    assert "1/4 of fraction:0.5" in found[0].plan.source


def test_every_attempt_draws_the_same_random_numbers_to_retrain() -> None:
    drawn: list[Tensor] = []
    work = Scripted(0.0, 0.0, 90.0)

    def retrain(model: nn.Module) -> None:
        drawn.append(torch.rand(4))
        work.retrain(model)

    work.rounds(network(), stop=Stop(rounds=1), retrain=retrain)
    assert len(drawn) == 3
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


def test_the_loop_ends_with_the_last_round_that_holds() -> None:
    """Either the retries are used up, or nothing is left: 6 → 3 → 1 → 0."""
    for retries, tried in ((1, [[7, 7], [3, 3]]), (0, [[7, 7]]), (9, [[7, 7], [3, 3], [1, 1]])):
        work = Scripted(89.5, *[0.0] * 9)
        found = work.rounds(network(), guard=Guard(1, retries=retries), stop=Stop(rounds=9), rule=Share(2, 7))
        assert [one.number for one in found] == [1]
        assert found[0].rejected == ()
        assert removed(work.rejected) == tried


class Share:
    """The highest scores, in each round as many as told."""

    def __init__(self, *counts: int) -> None:
        self.counts = dict(zip((16, 14), counts, strict=True))

    def choose(self, scores: np.ndarray) -> np.ndarray:
        goes = np.zeros(scores.size, bool)
        goes[highest(scores, self.counts[scores.size])] = True
        return goes


def test_where_no_round_holds_there_is_none_and_a_warning_with_the_figures() -> None:
    model = network()
    before, work = copy.deepcopy(model), Scripted(88.0, 87.5)
    message = r"no round holds: .* at least 89.00 .*own is 90.00\), found 88.00 without 16 neurons, 87.50 without 8 neu"
    with pytest.warns(TorchtrimWarning, match=message):
        assert work.rounds(model, guard=Guard(1, retries=1)) == []
    assert len(work.rejected) == 2
    assert_equal(model, before)


def test_an_accuracy_that_is_no_number_does_not_hold() -> None:
    found = Scripted(math.nan, 90.0).rounds(network(), stop=Stop(rounds=1))
    assert len(found[0].rejected) == 1


@pytest.mark.parametrize("interrupt", [1, 2, 3, 4, 5])
def test_resumed_in_the_middle_of_retries_equals_an_uninterrupted_loop(tmp_path: Path, interrupt: int) -> None:
    table = (88.0, 87.0, 89.1, 88.0, 89.0)
    whole = Scripted(*table).rounds(network())

    settings = {"guard": 1.0, "stop": Stop(rounds=2)}
    with pytest.raises(KeyboardInterrupt):
        kept(Scripted(*table, interrupt=interrupt), tmp_path, **settings)
    done = 0 if interrupt <= 3 else 1
    assert len(list(tmp_path.glob("round-*/metrics.json"))) == done
    rest = Scripted(*table[3 * done :])
    rest.evaluated += [nn.Identity()] * done  # the model's own accuracy is known from the first round
    found = kept(rest, tmp_path, resume=True, **settings)
    assert len(rest.starts) == (5, 2)[done]
    for one, other in zip(found, whole, strict=True):
        assert (one.plan, one.accuracy, one.rejected) == (other.plan, other.accuracy, other.rejected)
        assert one.ancestor_accuracy == 90
        assert_equal(one.model, other.model)


def kept(work: Scripted, directory: Path, **changes: Any) -> list[Round]:
    calls = {"retrain": work.retrain, "evaluate": work.evaluate}
    settings = {"rule": Fraction(0.5), "stop": Stop(rounds=3), "layers": ["0", "2"], "guard": Guard(1, retries=1)}
    return torchtrim.run(network(), INPUTS[:2], [INPUTS], directory=directory, **(settings | calls | changes))


def test_a_run_that_the_guard_ended_says_so_and_has_nothing_left_to_do(tmp_path: Path) -> None:
    found = kept(Scripted(88.0, 89.5, 88.9, 70.0), tmp_path)
    assert [len(one.rejected) for one in found] == [1]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [one["accuracy"]["retrained"] for one in metrics["rounds"][0]["rejected"]] == [88.0]
    assert [(one["number"], one["accuracy"]["retrained"], one["least"]) for one in metrics["closed"]] == [
        (2, 88.9, 89.0),
        (2, 70.0, 89.0),
    ]
    idle = Scripted()
    again = kept(idle, tmp_path, resume=True)
    assert idle.evaluated == idle.starts == []
    assert (again[0].plan, again[0].rejected) == (found[0].plan, found[0].rejected)
    with pytest.raises(StoreError, match=r'guard: asked \{"max_drop": 2, "retries": 1\}, found \{"max_drop": 1'):
        kept(Scripted(), tmp_path, resume=True, guard=Guard(2, retries=1))
    kept(Scripted(90.0), tmp_path, overwrite=True, stop=Stop(rounds=1))
    assert not (tmp_path / "closed.json").exists()


def test_a_run_of_which_no_round_held_says_so_again(tmp_path: Path) -> None:
    for work, how in ((Scripted(0.0, 1.0), {}), (Scripted(), {"resume": True})):
        with pytest.warns(TorchtrimWarning, match="no round holds: .* found 0.00 without 16 neurons, 1.00 without 8"):
            assert kept(work, tmp_path, **how) == []


def test_a_run_of_before_there_were_guards_and_steps_goes_on(tmp_path: Path) -> None:
    options = {"guard": None, "layers": torchtrim.Progressive(1)}
    kept(Scripted(89.0), tmp_path, stop=Stop(rounds=1), **options)
    asked = json.loads((tmp_path / "run.json").read_text())["settings"]
    assert asked == {
        "rule": "Fraction(p=0.5)",
        "layers": "Progressive(start=1)",
        "criterion": "torchtrim.criteria.apoz",
        "seed": 0,
    }
    assert not {"rejected", "ancestor_accuracy"} & json.loads((tmp_path / "round-01/metrics.json").read_text()).keys()
    work = Scripted(88.0)
    work.evaluated.append(nn.Identity())
    found = kept(work, tmp_path, resume=True, stop=Stop(rounds=2), **options)
    assert [(one.ancestor_accuracy, one.rejected) for one in found] == [(90, ()), (90, ())]
    with pytest.raises(StoreError, match="step=2"):
        kept(Scripted(), tmp_path, resume=True, guard=None, layers=torchtrim.Progressive(1, step=2))


def test_the_test_set_decides_nothing() -> None:
    def drawing(value: float) -> Callable[[nn.Module], float]:
        def test(_: nn.Module) -> float:
            torch.rand(3)
            return value

        return test

    class Drawn:
        """Data drawn anew each time."""

        def __iter__(self) -> Any:
            return iter([torch.randn(32, 4)])

    def found(**how: Any) -> list[Round]:
        work = Scripted(88.0, 89.0, 70.0, 89.0)
        settings = {"rule": Fraction(0.5), "stop": Stop(rounds=2), "guard": 1.0, "repair": "mean"}
        return list(
            iterate(network(), INPUTS[:2], Drawn(), retrain=work.retrain, evaluate=work.evaluate, **settings, **how)
        )

    low, high, none = found(test=drawing(0.0)), found(test=drawing(100.0)), found()
    assert [len(one.rejected) for one in none] == [1, 1]
    for one, other, third in zip(low, high, none, strict=True):
        assert (one.plan, one.rejected) == (other.plan, other.rejected) == (third.plan, third.rejected)
        assert_equal(one.model, other.model)
        assert_equal(one.model, third.model)
        assert (one.test.retrained, other.test.retrained) == (0, 100)
        assert third.test is None


def test_rooms_that_are_tied_lose_the_same_half() -> None:
    """Two layers whose outputs are added: their neurons go together, by the mean of their scores."""

    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.last = nn.Linear(4, 12), nn.Linear(4, 12), nn.Linear(12, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.last(torch.relu(self.one(inputs)) + torch.relu(self.other(inputs)))

    torch.manual_seed(0)
    found = Scripted(0.0, 90.0).rounds(Added(), layers=None, stop=Stop(rounds=1))[0]
    scores = (found.profile.apoz["one"] + found.profile.apoz["other"]) / 2
    for one, count in ((found.rejected[0], 6), (found, 3)):
        assert list(one.plan.removed["one"]) == list(one.plan.removed["other"]) == highest(scores, count)


def test_a_rule_that_chooses_all_is_halved_to_something_smaller() -> None:
    """Of two neurons one must stay, whatever the rule says; half of both is that same one, which is not tried again."""
    model = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3))
    measured = torchtrim.profile(model, [INPUTS])

    def choose(part: int) -> torchtrim.Plan:
        return torchtrim.select(measured, rule=part_of(torchtrim.Threshold(-1), part), layers=["0"])

    plans = list(smaller_plans(choose, 5))
    assert [len(plan.removed["0"]) for plan in plans] == [1]


@pytest.mark.parametrize(
    ("accuracy", "ancestor", "drop", "low"),
    [
        (99.1, 99.3, 0.2, False),  # the difference is 0.2000000000000028
        (99.0999, 99.3, 0.2, True),
        (99.4, 99.3, 0, False),
        (99.3, 99.3, 0, False),
        (0.97, 0.98, 0.005, True),
        (math.nan, 99.3, 50, True),
    ],
)
def test_how_far_an_accuracy_fell(accuracy: float, ancestor: float, drop: float, low: bool) -> None:
    assert fell(accuracy, ancestor, drop) is low


def test_a_stop_at_a_drop_ends_with_the_round_that_fell() -> None:
    found = Scripted(89.5, 89.0, 88.9, 90.0).rounds(network(), guard=None, stop=Stop(max_drop=1), rule=Fraction(0.1))
    assert [one.accuracy.retrained for one in found] == [89.5, 89.0, 88.9]
    assert [Stop(max_drop=1).keeps(one) for one in found] == [True, True, False]
    found = Scripted(89.5, 88.0).rounds(network(), guard=None, stop=Stop(rounds=1, max_drop=1))
    assert len(found) == 1
    rest = Scripted(88.0)
    rest.evaluated.append(nn.Identity())
    more = rest.rounds(network(), guard=None, stop=Stop(max_drop=1), done=found)
    assert [one.number for one in more] == [2]
    assert more[0].ancestor_accuracy == 90


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Guard(-0.5), "Guard: max_drop must be a finite number of at least 0, found -0.5"),
        (lambda: Guard(math.nan, retries=-1), "found nan; retries must be a whole number of at least 0, found -1"),
        (lambda: Guard(1, retries=1.5), "found 1.5"),  # type: ignore[arg-type]
        (lambda: Stop(max_drop=math.inf), "max_drop must be a finite number of at least 0, found inf"),
        (lambda: Scripted().rounds(network(), guard=True), "found True"),
        (lambda: Scripted().rounds(network(), guard="1"), "found '1'"),
    ],
)
def test_guards_and_drops_that_cannot_be(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TorchtrimError, match=message):
        make()


def test_a_step_says_how_many_neighbours_join() -> None:
    torch.manual_seed(0)
    widths = [4, *[8] * 9, 3]
    layers = [(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(widths)]
    model = nn.Sequential(*[module for pair in layers for module in pair][:-1])
    measured = torchtrim.profile(model, [INPUTS])
    assert torchtrim.Progressive(1, step=2).choose(measured, ("8",)) == ("4", "6", "8", "10", "12")
    assert torchtrim.Progressive(1, step=3).choose(measured, ("2", "16")) == tuple(
        str(2 * place) for place in (0, 1, 2, 3, 4, 5, 6, 7, 8)
    )
    assert torchtrim.Progressive(1).choose(measured, ("8",)) == ("6", "8", "10")
    with pytest.raises(TorchtrimError, match=r"a whole start of at least 1, found 1\.5; expected a whole step"):
        torchtrim.Progressive(1.5, step=0)  # type: ignore[arg-type]
