import numpy as np
import pytest

from torchtrim import criteria
from torchtrim.criteria import LayerProfile
from torchtrim.errors import PlanError, ProfileError


def profile(name="fc1", **changes):
    """Three neurons: the first silent and weak, the last always active and strong."""
    values = {
        "zeros": np.array([10, 5, 0]),
        "positions": np.array([10, 10, 10]),
        "mean": np.array([0.0, 1.0, 2.0]),
        "mean_square": np.array([0.0, 2.0, 5.0]),
        "standard_error": np.array([0.0, 0.15, 0.0]),
        "examples": np.array([10, 10, 10]),
        "incoming_l1": np.array([1.0, 2.0, 3.0]),
        "incoming_l2": np.array([0.5, 1.5, 2.5]),
        "outgoing_l1": np.array([1.0, 1.0, 1.0]),
        "outgoing_l2": np.array([4.0, 5.0, 6.0]),
        "unit": np.array([0, 1, 2]),
    }
    return LayerProfile(name=name, group=name, **values | changes)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("apoz", [1.0, 0.5, 0.0]),
        ("mean_activation", [0.0, -1.0, -2.0]),
        ("l1_norm", [-1.0, -2.0, -3.0]),
        ("l2_norm", [-0.5, -1.5, -2.5]),
        ("contribution", [0.0, -5.0, -12.0]),
    ],
)
def test_each_criterion_lets_the_weakest_go_first(name, expected):
    scores = criteria.resolve(name)(profile())
    assert scores.dtype == np.float64
    assert scores.tolist() == expected


@pytest.mark.parametrize("name", ["apoz", "mean_activation", "contribution"])
def test_a_neuron_that_was_not_observed_has_no_score(name):
    scores = criteria.resolve(name)(profile(positions=np.array([10, 0, 10])))
    assert np.isnan(scores).tolist() == [False, True, False]


@pytest.mark.parametrize("name", ["l1_norm", "l2_norm", "random"])
def test_weights_and_chance_need_no_data(name):
    assert np.isfinite(criteria.resolve(name)(profile(positions=np.zeros(3, int)))).all()


def test_random_follows_from_the_seed_and_the_layer_alone():
    first = criteria.random(3)(profile("a"))
    assert np.array_equal(first, criteria.random(3)(profile("a")))
    assert np.array_equal(first, criteria.resolve("random:3")(profile("a")))
    assert not np.array_equal(first, criteria.random(3)(profile("b")))
    assert not np.array_equal(first, criteria.random(4)(profile("a")))


def test_resolve_returns_functions_as_they_are():
    def own(layer):
        return -layer.mean_square

    assert criteria.resolve(own) is own


@pytest.mark.parametrize("name", ["apos", "random:x", "random:", ""])
def test_resolve_refuses_unknown_names(name):
    with pytest.raises(PlanError, match="unknown criterion"):
        criteria.resolve(name)


def test_resolve_suggests_the_nearest_name():
    with pytest.raises(PlanError, match="did you mean 'apoz'"):
        criteria.resolve("apos")


def test_reconstruction_needs_more_than_a_profile():
    with pytest.raises(PlanError, match=r"pass what torchtrim\.reconstruction\(model, example, batches\) returns"):
        criteria.resolve("reconstruction")(profile())


def test_random_without_a_seed_is_refused():
    with pytest.raises(PlanError, match=r"criteria\.random\(0\)"):
        criteria.resolve(criteria.random)
    with pytest.raises(PlanError, match="seed >= 0"):
        criteria.random(-1)


def test_a_profile_names_every_array_of_another_length():
    with pytest.raises(ProfileError, match=r"'fc1'.*zeros \(2,\), mean \(4,\)"):
        profile(zeros=np.zeros(2, int), mean=np.zeros(4))
