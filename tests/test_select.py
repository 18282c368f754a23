import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from torchtrim import criteria
from torchtrim._select import Fraction, MeanPlusStd, Threshold, parse_rule, select
from torchtrim.criteria import LayerProfile
from torchtrim.errors import PlanError


def layer(name, zeros, *, group=None, unit=None, locked=None, positions=100):
    """A layer that saw each neuron `positions` times, `zeros` of them zero: the APoZ is zeros / 100."""
    zeros = np.array(zeros)
    ones = np.ones(zeros.size)
    return LayerProfile(
        name=name,
        zeros=zeros,
        positions=np.full(zeros.size, positions),
        mean=ones,
        mean_square=ones,
        standard_error=ones / 100,
        examples=np.full(zeros.size, positions),
        incoming_l1=ones,
        incoming_l2=ones,
        outgoing_l1=ones,
        outgoing_l2=ones,
        unit=np.arange(zeros.size) if unit is None else np.array(unit),
        group=group or name,
        locked=locked,
    )


def profile(*layers):
    return {item.name: item for item in layers}


def chosen(rule, scores):
    return np.flatnonzero(rule.choose(np.array(scores, dtype=float))).tolist()


# --- rules


def test_mean_plus_std_is_strict():
    assert chosen(MeanPlusStd(), [0, 0, 0, 1]) == [3]
    # Two halves: mean + 1 std is the upper half itself.
    assert chosen(MeanPlusStd(), [0, 0, 1, 1]) == []
    assert chosen(MeanPlusStd(0.5), [0, 0, 1, 1]) == [2, 3]
    assert chosen(MeanPlusStd(), []) == []


@given(st.floats(-1e300, 1e300), st.integers(1, 300), st.sampled_from([0.0, 0.5, 1.0]))
def test_equal_scores_lose_nothing(value, count, k):
    assert chosen(MeanPlusStd(k), [value] * count) == []


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 50))
def test_two_halves_lose_nothing_at_one_std(low, high, count):
    assert chosen(MeanPlusStd(), [low] * count + [high] * count) == []


def test_threshold_is_strict():
    assert chosen(Threshold(0.9), [0.9, 0.91, 0.2]) == [1]


@given(st.integers(0, 99), st.integers(0, 400))
@example(29, 100)  # 0.29 * 100 is 28.999999999999996
def test_fraction_counts_exactly(percent, count):
    assert len(chosen(Fraction(percent / 100), range(count))) == percent * count // 100


@given(st.integers(1, 60).flatmap(lambda b: st.tuples(st.integers(0, b - 1), st.just(b))), st.integers(1, 60))
def test_fraction_counts_exactly_for_any_quotient(quotient, count):
    a, b = quotient
    assert len(chosen(Fraction(a / b), range(count))) == a * count // b


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.floats(0, 0.99))
def test_fraction_takes_the_highest_and_of_ties_the_lowest_index(scores, p):
    taken = chosen(Fraction(p), scores)
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    assert taken == sorted(order[: len(taken)])


@pytest.mark.parametrize(
    "make",
    [
        lambda: MeanPlusStd(-1),
        lambda: MeanPlusStd(float("nan")),
        lambda: Threshold(float("inf")),
        lambda: Fraction(1.0),
        lambda: Fraction(-0.1),
        lambda: Fraction(float("nan")),
    ],
)
def test_rules_are_validated(make):
    with pytest.raises(PlanError, match="expected"):
        make()


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("mean+1std", MeanPlusStd(1.0)),
        ("mean+0.5std", MeanPlusStd(0.5)),
        (" Mean + std ", MeanPlusStd(1.0)),
        ("threshold:0.9", Threshold(0.9)),
        ("threshold:-1e-3", Threshold(-0.001)),
        ("fraction: 0.3", Fraction(0.3)),
    ],
)
def test_parse_rule(text, rule):
    assert parse_rule(text) == rule
    assert parse_rule(str(rule)) == rule


@pytest.mark.parametrize("text", ["", "mean", "mean+xstd", "threshold", "fraction:", "fraction:0.3.1", "top:3"])
def test_parse_rule_refuses(text):
    with pytest.raises(PlanError, match="unknown rule"):
        parse_rule(text)


# --- select


def test_select_by_apoz():
    plan = select(profile(layer("a", [10, 10, 10, 99]), layer("b", [50, 50])), rule=MeanPlusStd())
    assert plan.removed == {"a": (3,)}
    assert {name: item.width for name, item in plan.layers.items()} == {"a": 4, "b": 2}
    assert plan.source == "apoz, mean + 1.0 std"
    assert plan.notes == ()


def test_a_rule_may_be_named() -> None:
    measured = profile(layer("a", [10, 20, 90]))
    assert select(measured, rule="threshold:0.5") == select(measured, rule=Threshold(0.5))
    with pytest.raises(PlanError, match="unknown rule 'mean'"):
        select(measured, rule="mean")


def test_select_by_another_criterion():
    layers = profile(layer("a", [10, 20, 30]))
    plan = select(layers, rule=Fraction(0.4), criterion=lambda item: -item.apoz)
    assert plan.removed == {"a": (0,)}
    assert select(layers, rule=Fraction(0.4), criterion="random:1").source == "random(1), fraction:0.4"


def test_layers_by_name_and_pattern():
    layers = profile(layer("f.0", [0, 99]), layer("f.1", [0, 99]), layer("head", [0, 99]))
    assert set(select(layers, rule=Threshold(0.9), layers=["f.*"]).layers) == {"f.0", "f.1"}
    assert set(select(layers, rule=Threshold(0.9), layers=["head", "f.1"]).layers) == {"f.1", "head"}
    assert select(layers, rule=Threshold(0.9), layers=[]).layers == {}


def test_unknown_layers_are_all_listed():
    layers = profile(layer("conv1", [0, 99]), layer("conv2", [0, 99]))
    with pytest.raises(PlanError, match=r"(?s)'conv3'; did you mean 'conv2'.*'x\.\*'"):
        select(layers, rule=Threshold(0.9), layers=["conv1", "conv3", "x.*"])
    with pytest.raises(PlanError, match=r"pass \['conv1'\]"):
        select(layers, rule=Threshold(0.9), layers="conv1")


def test_locked_layers():
    layers = profile(layer("a", [0, 99]), layer("out", [0, 99], unit=[-1, -1], locked="its outputs are results"))
    assert set(select(layers, rule=Threshold(0.9)).layers) == {"a"}
    assert set(select(layers, rule=Threshold(0.9), layers=["*"]).layers) == {"a"}
    with pytest.raises(PlanError, match="'out' cannot be trimmed: its outputs are results"):
        select(layers, rule=Threshold(0.9), layers=["out"])


def test_a_layer_tied_to_a_locked_one_is_locked():
    layers = profile(layer("a", [0, 99], group="a"), layer("b", [0, 99], group="a", locked="why"))
    with pytest.raises(PlanError, match="tied to 'b': why"):
        select(layers, rule=Threshold(0.9), layers=["a"])
    with pytest.raises(PlanError, match=r"no layer that can be trimmed:\n  a: it is tied to 'b': why\n  b: why"):
        select(layers, rule=Threshold(0.9))
    free = profile(layer("c", [0, 99]), *layers.values())
    assert list(select(free, rule=Threshold(0.9)).layers) == ["c"]


def test_tied_layers_go_together_by_their_mean_score():
    layers = profile(
        layer("a", [100, 0, 90], group="a"),
        # Two neurons to a unit, in another order, and one neuron that must stay.
        layer("b", [80, 100, 0, 20, 40, 60, 100], group="a", unit=[2, 2, 0, 0, 1, 1, -1]),
    )
    # Units: 0 is (1.0 + 0.1) / 2, 1 is (0 + 0.5) / 2, 2 is (0.9 + 0.9) / 2.
    for names in (None, ["b"]):
        assert select(layers, rule=Threshold(0.58), layers=names).removed == {"a": (2,), "b": (0, 1)}
    assert select(layers, rule=Threshold(0.4)).removed == {"a": (0, 2), "b": (0, 1, 2, 3)}


def test_neurons_that_must_stay_do_not_count():
    layers = profile(layer("a", [0, 0, 0, 99, 100], unit=[0, 1, 2, 3, -1]))
    assert select(layers, rule=Threshold(0.9)).removed == {"a": (3,)}
    whole = profile(layer("a", [99, 100], unit=[-1, -1]))
    assert select(whole, rule=MeanPlusStd()).removed == {}


def test_the_last_neuron_stays():
    plan = select(profile(layer("a", [99, 95, 95, 98])), rule=Threshold(0.5))
    assert plan.removed == {"a": (0, 2, 3)}
    assert plan.notes == ("a: the rule chose every neuron; the lowest score stays",)


def test_the_last_neuron_of_each_layer_of_a_group_stays():
    layers = profile(layer("whole", [0, 98, 99], group="whole"), layer("part", [98, 99], group="whole", unit=[1, 2]))
    assert select(layers, rule=Threshold(0.5)).removed == {"whole": (2,), "part": (1,)}


def test_layers_that_were_not_observed():
    layers = profile(layer("a", [0, 99]), layer("b", [0, 0], positions=0))
    plan = select(layers, rule=Threshold(0.9))
    assert plan.removed == {"a": (1,)}
    assert set(plan.layers) == {"a"}
    assert plan.notes == ("b: no activation was observed; left whole",)
    with pytest.raises(PlanError, match="'b': no activation was observed"):
        select(layers, rule=Threshold(0.9), layers=["a", "b"])
    assert select(layers, rule=Threshold(0.9), layers=["b"], criterion=criteria.l1_norm).removed == {}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_must_be_finite(value):
    with pytest.raises(PlanError, match="'a': expected finite scores"):
        select(profile(layer("a", [0, 1])), rule=Threshold(0), criterion=lambda item: np.array([0, value]))


def test_criterion_and_rule_must_answer_one_each():
    class Wrong:
        def choose(self, scores):
            return np.array([True])

    with pytest.raises(PlanError, match="expected 2 scores"):
        select(profile(layer("a", [0, 1])), rule=Threshold(0), criterion=lambda item: np.zeros(3))
    with pytest.raises(PlanError, match="for 2 scores"):
        select(profile(layer("a", [0, 1])), rule=Wrong())
