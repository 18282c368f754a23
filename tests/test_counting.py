"""Counting against the obvious: one element after the other, by every path that this installation has."""

import importlib.util
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchtrim import _counting
from torchtrim._counting import Counts
from torchtrim.errors import ProfileError

NATIVE = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="needs Numba")
PATHS = pytest.mark.parametrize("path", ["plain", pytest.param("native", marks=NATIVE)])


def count(values: torch.Tensor, kept: tuple[int, ...], path: str, **options: Any) -> Counts:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHTRIM_COUNTING", path)
        return _counting.count(values, kept, **options)


def slowly(
    values: torch.Tensor, kept: tuple[int, ...], examples: int | None = None, tolerance: float = 0.0
) -> dict[str, np.ndarray]:
    shape = [size if axis in kept else 1 for axis, size in enumerate(values.shape)]
    rows = values.shape[0] // (examples or 1) if values.ndim else 1
    nonzero = np.zeros([examples or 1, *shape])  # by example
    positions = np.zeros_like(nonzero)
    total, square = np.zeros(shape), np.zeros(shape)
    for place in itertools.product(*map(range, values.shape)):
        where = tuple(index if axis in kept else 0 for axis, index in enumerate(place))
        example = place[0] // rows if examples else 0
        value = float(values[place])
        nonzero[example, *where] += abs(value) > tolerance
        positions[example, *where] += 1
        total[where] += value
        square[where] += value * value
    return {
        "zeros": (positions - nonzero).sum(0),
        "positions": positions.sum(0),
        "total": total,
        "square": square,
        "nonzero_square": np.square(nonzero).sum(0),
        "nonzero_positions": (nonzero * positions).sum(0),
        "positions_square": np.square(positions).sum(0),
    }


@PATHS
@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.data(),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32]),
)
def test_equals_counting_one_by_one(path, shape, data, dtype) -> None:
    """With any order of the axes in memory, and gaps between the elements."""
    kept = tuple(sorted(data.draw(st.sets(st.integers(0, len(shape) - 1)))))
    order = data.draw(st.permutations(range(len(shape))))
    gaps = data.draw(st.sampled_from([1, 1, 2]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    memory = torch.randn([shape[axis] for axis in order], generator=generator).clamp_min(0).mul(3)
    memory = memory.repeat_interleave(gaps, -1).to(dtype)[..., ::gaps]
    values = memory.permute([order.index(axis) for axis in range(len(shape))])
    counts = [size for size in range(1, shape[0] + 1) if shape[0] % size == 0 and 0 not in kept]
    examples = data.draw(st.sampled_from([None, *counts]))
    tolerance = data.draw(st.sampled_from([0.0, 2.5]))
    found = count(values, kept, path, examples=examples, tolerance=tolerance)
    expected = slowly(values, kept, examples, tolerance)
    assert found.zeros.dtype == torch.int64
    assert found.examples == (examples or 1)
    for name in ("zeros", "nonzero_square", "nonzero_positions"):
        np.testing.assert_array_equal(getattr(found, name).numpy(), expected[name])
    for name in ("positions", "positions_square"):
        assert getattr(found, name) == expected[name].flat[0]
    np.testing.assert_allclose(found.total.numpy(), expected["total"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.square.numpy(), expected["square"], rtol=1e-5, atol=1e-6)


@PATHS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "kept"),
    [
        ((5, 9, 70, 71), (1,)),  # rows longer than a block
        ((3, 700, 7, 7), (1,)),
        ((300, 1100), (1,)),
        ((4, 301, 530), (2,)),
        ((2, 3, 50, 60), (1, 3)),
        ((3, 70000), ()),
        ((2, 1, 3, 500_000), (1,)),
    ],
)
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "sliced"])
def test_large_tensors(path, dtype, shape, kept, layout) -> None:
    """Of several blocks, tiles and units of work, on two threads."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).relu().to(dtype)
    if layout == "channels last":
        values = values.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "sliced":
        values = values[..., 1:]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        examples = None if 0 in kept else shape[0]
        found = count(values, kept, path, examples=examples)
    finally:
        torch.set_num_threads(threads)
    summed = [axis for axis in range(values.ndim) if axis not in kept]
    assert torch.equal(found.zeros, (values == 0).sum(summed, keepdim=True))
    by_example = (values != 0).double()
    by_example = by_example.sum(summed[1:], keepdim=True) if summed[1:] else by_example
    assert torch.equal(found.nonzero_square, by_example.square().sum(0, keepdim=True))
    assert found.positions == values.numel() // found.zeros.numel()
    torch.testing.assert_close(found.total, values.double().sum(summed, keepdim=True), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.square, values.double().square().sum(summed, keepdim=True), rtol=1e-5, atol=0)


@PATHS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_half_precision(path, dtype) -> None:
    values = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    values = values[values.isfinite()][None]
    found = count(values, (1,), path)
    assert torch.equal(found.zeros, (values == 0).long())
    assert torch.equal(found.total, values.double())
    for inner in (values.reshape(1, 2, -1), values.reshape(1, 2, -1).mT.contiguous().mT):
        assert count(inner, (1,), path).zeros.sum() == 2
        square = count(inner, (), path).square.item()
        assert square == pytest.approx(values.double().square().sum().item(), rel=1e-6)


@PATHS
def test_half_precision_sums_do_not_overflow(path) -> None:
    values = torch.full((4, 2, 100), 1000.0, dtype=torch.float16)
    found = count(values, (1,), path)
    assert found.total.flatten().tolist() == [400_000, 400_000]
    assert found.square.flatten().tolist() == [4e8, 4e8]


@PATHS
def test_squares_that_single_precision_cannot_hold(path) -> None:
    found = count(torch.tensor([[1e30, 0.0, torch.finfo(torch.float32).min]]), (), path)
    assert found.finite
    assert found.square.item() == pytest.approx(1e60 + torch.finfo(torch.float32).min ** 2, rel=1e-6)


@PATHS
def test_minus_zero_and_subnormals(path) -> None:
    values = torch.tensor([[0.0, -0.0, 1e-45, 1.0]])
    assert count(values, (), path).zeros.item() == 2


@PATHS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_noticed(path, bad) -> None:
    values = torch.zeros(3, 4)
    assert count(values, (1,), path).finite
    values[1, 2] = bad
    assert not count(values, (1,), path).finite


@PATHS
def test_batches_add_up(path) -> None:
    values = torch.relu(torch.randn(10, 3, 5))
    whole = count(values, (1,), path)
    parts = count(values[:7], (1,), path) + count(values[7:], (1,), path)
    assert torch.equal(whole.zeros, parts.zeros)
    assert whole.positions == parts.positions == 50
    torch.testing.assert_close(whole.total, parts.total)


def test_the_environment_forces_a_path() -> None:
    values = torch.ones(2, 3)
    with pytest.raises(ProfileError, match="TORCHTRIM_COUNTING: expected 'plain' or 'native', found 'quick'"):
        count(values, (1,), "quick")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_counting._ROOMS, "cpu", "_no_such_room")
        _counting._imported.cache_clear()
        with pytest.raises(ProfileError, match=r"needs Numba \(No module .*; pip install 'torchtrim\[fast\]'"):
            count(values, (1,), "native")
        assert count(values, (1,), "").positions == 2
    _counting._imported.cache_clear()


@PATHS
@pytest.mark.parametrize("shape", [(6, 5, 300), (6, 5, 7, 7), (6, 5, 90, 91), (6, 700)])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_sums_do_not_depend_on_the_batches(path, shape, layout) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).relu()
    if layout == "channels last":
        values = values.movedim(1, -1).contiguous().movedim(-1, 1)
    whole = count(values, (1,), path)
    for sizes in ([1] * 6, [4, 2], [3, 3]):
        parts = [count(part, (1,), path) for part in values.split(sizes)]
        together = sum(parts[1:], parts[0])
        torch.testing.assert_close(together.total, whole.total, rtol=1e-14, atol=0)
        torch.testing.assert_close(together.square, whole.square, rtol=1e-14, atol=0)
