"""Counting against the obvious: one element after the other."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchtrim._counting import count


def slowly(values: torch.Tensor, kept: tuple[int, ...]) -> dict[str, np.ndarray]:
    shape = [size if axis in kept else 1 for axis, size in enumerate(values.shape)]
    zeros, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    total, square = np.zeros(shape), np.zeros(shape)
    for place in itertools.product(*map(range, values.shape)):
        where = tuple(index if axis in kept else 0 for axis, index in enumerate(place))
        value = float(values[place])
        zeros[where] += value == 0
        positions[where] += 1
        total[where] += value
        square[where] += value * value
    return {"zeros": zeros, "positions": positions, "total": total, "square": square}


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.data(),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
)
def test_equals_counting_one_by_one(shape, data, dtype) -> None:
    kept = tuple(sorted(data.draw(st.sets(st.integers(0, len(shape) - 1)))))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    values = torch.randn(shape, generator=generator).clamp_min(0).to(dtype)
    found, expected = count(values, kept), slowly(values, kept)
    assert found.zeros.dtype == torch.int64
    np.testing.assert_array_equal(found.zeros.numpy(), expected["zeros"])
    assert found.positions == expected["positions"].flat[0]
    np.testing.assert_allclose(found.total.numpy(), expected["total"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.square.numpy(), expected["square"], rtol=1e-5, atol=1e-6)


def test_half_precision_sums_do_not_overflow() -> None:
    values = torch.full((4, 2, 100), 1000.0, dtype=torch.float16)
    found = count(values, (1,))
    assert found.total.flatten().tolist() == [400_000, 400_000]
    assert found.square.flatten().tolist() == [4e8, 4e8]


def test_squares_that_single_precision_cannot_hold() -> None:
    found = count(torch.tensor([[1e30, 0.0, torch.finfo(torch.float32).min]]), ())
    assert found.finite
    assert found.square.item() == pytest.approx(1e60 + torch.finfo(torch.float32).min ** 2, rel=1e-6)


def test_minus_zero_and_subnormals() -> None:
    values = torch.tensor([[0.0, -0.0, 1e-45, 1.0]])
    assert count(values, ()).zeros.item() == 2


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_noticed(bad) -> None:
    values = torch.zeros(3, 4)
    assert count(values, (1,)).finite
    values[1, 2] = bad
    assert not count(values, (1,)).finite


def test_batches_add_up() -> None:
    values = torch.relu(torch.randn(10, 3, 5))
    whole = count(values, (1,))
    parts = count(values[:7], (1,)) + count(values[7:], (1,))
    assert torch.equal(whole.zeros, parts.zeros)
    assert whole.positions == parts.positions == 50
    torch.testing.assert_close(whole.total, parts.total)
