import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchtrim._plan import LayerPlan, Plan
from torchtrim.errors import PlanError

PLAN = Plan(
    {"conv1": LayerPlan(20, (3, 7)), "classifier.fc1": LayerPlan(500, ())},
    "apoz, mean + 1.0 std",
    ("a note",),
)


@st.composite
def layer_plans(draw):
    width = draw(st.integers(1, 40))
    removed = draw(st.sets(st.integers(0, width - 1), max_size=width - 1))
    return LayerPlan(width, tuple(sorted(removed)))


@given(
    st.builds(
        Plan,
        st.dictionaries(st.text(), layer_plans(), max_size=5),
        st.text(),
        st.lists(st.text(), max_size=3).map(tuple),
    )
)
def test_json_round_trip(plan):
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)
    assert list(again.layers) == list(plan.layers)


@pytest.mark.parametrize(
    ("width", "removed", "message"),
    [
        (0, (), "width of at least 1"),
        (3, (3,), "from 0 to 2"),
        (3, (-1,), "from 0 to 2"),
        (3, (1, 0), "ascending"),
        (3, (1, 1), "ascending"),
        (2, (0, 1), "at least one must stay"),
    ],
)
def test_a_layer_plan_is_validated(width, removed, message):
    with pytest.raises(PlanError, match=message):
        LayerPlan(width, removed)


def test_numpy_indices_become_plain_ones():
    layer = LayerPlan(np.int64(4), np.array([1, 2]))
    assert layer == LayerPlan(4, (1, 2))
    assert json.loads(Plan({"a": layer}).to_json())["layers"] == {"a": {"width": 4, "removed": [1, 2]}}
    assert layer.remaining == 2


def test_a_plan_cannot_be_changed():
    layers = {"a": LayerPlan(4, (1,))}
    plan = Plan(layers)
    layers["b"] = LayerPlan(2)
    assert list(plan.layers) == ["a"]
    with pytest.raises(TypeError):
        plan.layers["b"] = LayerPlan(2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.source = "other"


def test_plans_compare_copy_and_pickle():
    assert copy.deepcopy(PLAN) == pickle.loads(pickle.dumps(PLAN)) == PLAN
    assert len({PLAN, copy.deepcopy(PLAN)}) == 1
    assert dataclasses.replace(PLAN, source="other") != PLAN


def test_removed_leaves_out_whole_layers():
    assert PLAN.removed == {"conv1": (3, 7)}


def test_table():
    assert str(PLAN).splitlines() == [
        "Plan: apoz, mean + 1.0 std",
        "layer           width     after  removed  share",
        "conv1              20  →     18        2  10.0%",
        "classifier.fc1    500  →    500        0   0.0%",
        "total             520  →    518        2   0.4%",
        "note: a note",
    ]
    assert str(Plan({})).startswith("Plan")


def test_check_accepts_a_model_that_has_more():
    PLAN.check({"conv1": 20, "classifier.fc1": 500, "conv2": 50})


def test_check_lists_every_misfit():
    with pytest.raises(PlanError) as caught:
        PLAN.check({"conv1": 18, "classifier.fc2": 500})
    message = str(caught.value)
    assert "layer 'conv1': the plan has 20 neurons, the model 18" in message
    assert "layer 'classifier.fc1' does not exist; did you mean 'classifier.fc2'?" in message


def written(**changes):
    return json.dumps(json.loads(PLAN.to_json()) | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"a": 1, "a": 2}', "occurs twice"),
        ("[]", "not a plan"),
        ("{}", "not a plan"),
        (written(version=2), "expected version 1, found 2"),
        (written(source=None), "source: expected text"),
        (written(notes="x"), "notes: expected a list"),
        (written(layers=[]), "layers: expected an object"),
        (written(layers={"a": 3}), "layer 'a': expected an object"),
        (written(layers={"a": {"width": True, "removed": []}}), "layer 'a': expected a whole width"),
        (written(layers={"a": {"width": 3, "removed": [0.5]}}), "layer 'a': expected removed to be a list"),
        (written(layers={"a": {"width": 3, "removed": [5]}}), "layer 'a': expected neurons from 0 to 2"),
    ],
)
def test_malformed_json_is_refused(text, message):
    with pytest.raises(PlanError, match=message):
        Plan.from_json(text)


def test_malformed_json_lists_every_fault():
    with pytest.raises(PlanError, match=r"(?s)source.*'a'.*'b'"):
        Plan.from_json(written(source=1, layers={"a": 1, "b": 2}))
