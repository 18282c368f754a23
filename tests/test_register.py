"""Operators of users' own, and the helper that tells whether their rows are right."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchtrim
from torchtrim._flow import TABLE
from torchtrim.operators import Call, Labels
from torchtrim.testing import assert_exact, random_plan
from toys import Net


@torch.library.custom_op("torchtrim_test::halved", mutates_args=())
def halved(x: Tensor) -> Tensor:
    return x / 2


@halved.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("torchtrim_test::backwards", mutates_args=())
def backwards(x: Tensor) -> Tensor:
    return x.flip(1)


@backwards.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


EXAMPLE = torch.randn(4, 6)


@pytest.fixture(autouse=True)
def rows_of_this_test() -> Iterator[None]:
    before = dict(TABLE)
    yield
    TABLE.clear()
    TABLE.update(before)


def model(operator) -> nn.Module:
    torch.manual_seed(0)
    return Net(lambda net, x: net.out(operator(net.a(x))), {"a": nn.Linear(6, 8), "out": nn.Linear(8, 3)})


def test_an_operator_is_unknown_until_it_is_registered() -> None:
    assert "no rule is known" in torchtrim.trace(model(halved), EXAMPLE).locked["a"]
    torchtrim.register_operator("torchtrim_test::halved", "pointwise")
    assert assert_exact(model(halved), EXAMPLE, torch.randn(2, 6), seeds=range(3)).removed.keys() == {"a"}


def reversed_neurons(call: Call) -> Labels:
    labels = call.labels_of(call.args[0])
    return labels.with_factors(factor.map(np.flip(factor.atoms, 1)) for factor in labels.factors)


def test_a_row_of_ones_own() -> None:
    torchtrim.register_operator("torchtrim_test::backwards", reversed_neurons)
    assert_exact(model(backwards), EXAMPLE, seeds=range(3))


def test_a_wrong_row_is_found_out() -> None:
    torchtrim.register_operator("torchtrim_test::backwards", "pointwise")
    with pytest.raises(AssertionError, match=r"output 0 differs by .* after trimming a \(seed 0\)"):
        assert_exact(model(backwards), EXAMPLE)


def test_a_model_of_which_nothing_can_go() -> None:
    with pytest.raises(torchtrim.TorchtrimError, match=r"found none: a: no rule is known.*; out: it is an output"):
        assert_exact(model(halved), EXAMPLE)


def test_the_model_is_left_alone() -> None:
    one = model(torch.relu).train()
    assert_exact(one, EXAMPLE)
    assert one.training
    assert one.a.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("halved", "pointwise", "expected a name such as"),
        ("torchtrim_test::halved", "elementwise", "expected a function of a Call"),
        ("aten::convolution", "pointwise", "has a row already"),
    ],
)
def test_mistakes(name: str, row: str, message: str) -> None:
    with pytest.raises(torchtrim.TorchtrimError, match=message):
        torchtrim.register_operator(name, row)


def test_a_random_plan_takes_its_fraction_of_every_group() -> None:
    plan = random_plan(torchtrim.trace(model(torch.relu), EXAMPLE), seed=1, fraction=0.5)
    assert len(plan.removed["a"]) == 4
