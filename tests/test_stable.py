"""Measuring that ends when it is settled what goes."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchtrim import Fraction, MeanPlusStd, Profile, Stable, Threshold, profile, select
from torchtrim._select import Booleans
from torchtrim._stable import Judge
from torchtrim.criteria import Floats
from torchtrim.errors import PlanError


def neurons(shares: list[float]) -> nn.Module:
    """Neurons of which these shares of standard normal inputs are silent, each with an input of its own."""
    model = nn.Sequential(nn.Linear(len(shares), len(shares)), nn.ReLU(), nn.Linear(len(shares), 2)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(len(shares)))
        model[0].bias.copy_(-torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(shares, dtype=torch.float64)))
    return model


def normal(examples: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(examples, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SHARES = [0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.85, 0.9, 0.95]


@pytest.mark.parametrize("rule", ["mean+1std", "threshold:0.55", "fraction:0.25"])
def test_a_clear_choice_takes_little_data(rule) -> None:
    model, data = neurons(SHARES), normal(20_000, len(SHARES))
    whole = select(profile(model, data.split(50)), rule=rule)
    found = profile(model, data.split(50), until=Stable(rule, in_doubt=0.001))
    assert found.examples < 5_000
    assert found.in_doubt == {}
    assert select(found, rule=rule).layers == whole.layers
    assert "settled for all neurons" in str(found)


def test_what_is_close_to_the_limit_stays_in_doubt(tmp_path) -> None:
    shares = [0.2] * 5 + [0.55] + [0.9] * 5
    model, data = neurons(shares), normal(2_000, len(shares))
    found = profile(model, data.split(50), until=Stable("threshold:0.55", layers=["0"]))
    assert found.examples == 2_000
    assert found.in_doubt == {"0": (5,)}
    assert "settled for all neurons but 1, see in_doubt" in str(found)
    enough = profile(model, data.split(50), until=Stable("threshold:0.55", in_doubt=0.1))
    assert enough.examples < 2_000
    assert enough.in_doubt == {"0": (5,)}
    enough.save(tmp_path / "profile.safetensors")
    assert Profile.load(tmp_path / "profile.safetensors").in_doubt == {"0": (5,)}
    assert profile(model, data.split(500)).in_doubt is None


@dataclass(frozen=True)
class Ever(Stable):
    """Remembers what was ever settled."""

    def begin(self) -> Judge:
        settled = EVER

        class Remembering(Judge):
            def look(self, so_far: Profile, latest: Profile) -> bool:
                super().look(so_far, latest)
                if self._looks >= 16:
                    doubtful = set(self.in_doubt.get("0", ()))
                    settled.append({neuron for neuron in range(so_far["0"].width) if neuron not in doubtful})
                return False

        return Remembering(self)


EVER: list[set[int]] = []


@pytest.mark.parametrize("correlated", [False, True])
def test_looking_often_does_not_settle_what_is_not(correlated) -> None:
    """Of neurons right at the limit, no more than 1 - confidence are ever settled, however often one looks."""
    width, wrong, passes = 16, 0, 12
    model = neurons([0.5] * width)
    for seed in range(passes):
        data = normal(2_500, width, seed)
        if correlated:
            data = data + 2 * normal(2_500, 1, seed + 1_000)
        EVER.clear()
        profile(model, data.split(20), until=Ever("threshold:0.5", confidence=0.9))
        assert len(EVER) > 100
        wrong += len(set().union(*EVER))
    assert 0 < wrong <= 0.1 * width * passes


@pytest.mark.parametrize("rule", [MeanPlusStd(1), MeanPlusStd(0.5), Threshold(0.4), Fraction(0.3)])
def test_the_derivative_of_the_limit(rule) -> None:
    scores = np.random.default_rng(0).random(20)
    limit, slope = rule.limit(scores)
    steps = [rule.limit(scores + 1e-6 * unit)[0] - limit for unit in np.eye(20)]
    np.testing.assert_allclose(slope, np.array(steps) / 1e-6, atol=1e-5)
    np.testing.assert_array_equal(rule.choose(scores), scores > limit)


def test_a_rule_that_chooses_nothing_is_settled_at_once() -> None:
    model, data = neurons(SHARES), normal(2_000, len(SHARES))
    found = profile(model, data.split(50), until=Stable(Fraction(0), in_doubt=0.001))
    assert found.in_doubt == {}
    assert found.examples < 1_000


@pytest.mark.parametrize("every", [1, 100])
def test_nothing_is_settled_before_enough_looks(every) -> None:
    model, data = neurons(SHARES), normal(200, len(SHARES))
    found = profile(model, data.split(50), until=Stable("threshold:0.55", every=every))
    assert found.in_doubt == {"0": tuple(range(len(SHARES)))}
    assert f"settled for all neurons but {len(SHARES)}" in str(found)


def test_looks_may_be_rare() -> None:
    model, data = neurons(SHARES), normal(20_000, len(SHARES))
    found = profile(model, data.split(50), until=Stable("threshold:0.55", every=7))
    assert found.examples % 350 == 0


class Odd:
    def choose(self, scores: Floats, /) -> Booleans:
        return scores > 0.5


def test_what_cannot_be_asked() -> None:
    with pytest.raises(PlanError, match="cannot say where its limit is"):
        Stable(Odd())
    with pytest.raises(PlanError, match="expected confidence between 0 and 1, found 99"):
        Stable("mean+1std", confidence=99.0)
    with pytest.raises(PlanError, match="every=0"):
        Stable("mean+1std", every=0)
    with pytest.raises(PlanError, match="unknown rule"):
        Stable("mean")
    model = neurons(SHARES)
    with pytest.raises(PlanError, match="unknown layer 'fc'"):
        profile(model, [normal(5, len(SHARES))], until=Stable("mean+1std", layers=["fc"]))
    assert not model[0]._forward_hooks
