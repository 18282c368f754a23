"""The label algebra: reshapes as PyTorch does them, and demands resolved to bodies."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchtrim._labels import Factor, Labels, Ledger, canonical, components, compress, fit, reshape

SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(SIZES, st.data())
def test_reshape_is_that_of_the_expanded_array(old: list[int], data: st.DataObject) -> None:
    """Labels of a reshaped tensor are the reshaped labels, whichever axes they vary along."""
    varying = data.draw(st.lists(st.booleans(), min_size=len(old), max_size=len(old)))
    sizes = [size if varies else 1 for size, varies in zip(old, varying, strict=True)]
    atoms = np.arange(1, np.prod(sizes) + 1).reshape(sizes)
    primes = [factor for size in old for factor in ((2, 2) if size == 4 else (size,))]
    cuts = sorted(data.draw(st.sets(st.integers(1, len(primes)), max_size=3)) | {len(primes)})
    new = [int(np.prod(primes[a:b])) for a, b in zip([0, *cuts], cuts, strict=False)]
    found = reshape(atoms, tuple(old), tuple(new))
    assert found.ndim == len(new)
    expected = np.broadcast_to(atoms, old).reshape(new)
    assert np.array_equal(np.broadcast_to(found, new), expected)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=20))
def test_components_are_the_smallest_partition(pairs: list[tuple[int, int]]) -> None:
    root = components(10, [np.array([a for a, _ in pairs], int)], [np.array([b for _, b in pairs], int)])
    assert all(root[a] == root[b] for a, b in pairs)
    groups = {value: {value} for value in range(10)}
    for a, b in pairs:
        merged = groups[a] | groups[b]
        for value in merged:
            groups[value] = merged
    assert [min(groups[value]) for value in range(10)] == root.tolist()


def test_what_meets_a_fixed_position_is_pinned() -> None:
    ledger = Ledger()
    ledger.unite(np.array([1, 2, 3]), np.array([0, 4, 5]), "met a fixed one")
    root, pinned = ledger.resolve(6)
    assert root.tolist() == [0, 1, 2, 3, 2, 3]
    assert pinned == {0: "fixed by construction", 1: "met a fixed one"}


def test_a_tied_body_is_pinned_with_all_of_it() -> None:
    ledger = Ledger()
    ledger.pin(np.array([5]), "read")
    ledger.unite(np.array([2]), np.array([5]), "combined")
    _, pinned = ledger.resolve(6)
    assert pinned[2] == "read"


def test_ties_along_an_axis() -> None:
    ledger = Ledger()
    assert ledger.tie(np.arange(1, 7).reshape(2, 3), 0, "tied").tolist() == [[1, 2, 3]]
    assert ledger.resolve(7)[0].tolist() == [0, 1, 2, 3, 1, 2, 3]


def test_what_was_cut_goes_in_whole_lines() -> None:
    """By default the same positions of every part; where rows are tied already, whole rows."""
    cut = np.arange(1, 7).reshape(2, 3)
    ledger = Ledger()
    ledger.keep_rectangular(cut, "cut")
    assert ledger.resolve(7)[0].tolist() == [0, 1, 2, 3, 1, 2, 3]
    ledger = Ledger()
    ledger.keep_rectangular(cut, "cut")
    ledger.tie(cut, 1, "tied")
    assert ledger.resolve(7)[0].tolist() == [0, 1, 1, 1, 4, 4, 4]


def test_demands_that_a_choice_breaks() -> None:
    ledger = Ledger()
    ledger.unite(np.array([1, 2]), np.array([3, 4]), "combined")
    ledger.pin(np.array([5]), "read")
    kept = np.ones(6, bool)
    assert ledger.broken_by(kept).size == 0
    kept[[1, 3]] = False
    assert ledger.broken_by(kept).size == 0
    kept[[2, 5]] = False
    assert ledger.broken_by(kept).tolist() == [2, 4, 5]


def test_a_run_counts_once_it_is_absorbed() -> None:
    first, second = Ledger(), Ledger()
    second.unite(np.array([1]), np.array([2]), "combined")
    second.pin(np.array([3]), "read")
    second.keep_rectangular(np.array([[4, 5], [6, 7]]), "cut")
    assert not first.touched(8).any()
    first.absorb(second)
    assert np.flatnonzero(first.touched(8)).tolist() == [1, 2, 3]
    root, pinned = first.resolve(8)
    assert root.tolist() == [0, 1, 1, 3, 4, 5, 4, 5]
    assert pinned[3] == "read"


@pytest.mark.parametrize(
    ("atoms", "short"),
    [
        ([[1, 1], [2, 2]], [[1], [2]]),
        ([[1, 2], [1, 2]], [[1, 2]]),
        ([[1, 2], [2, 1]], [[1, 2], [2, 1]]),
        ([[3, 3]], [[3]]),
    ],
)
def test_compress(atoms: list[list[int]], short: list[list[int]]) -> None:
    assert compress(np.array(atoms)).tolist() == short


def test_canonical_forgets_what_does_not_vary() -> None:
    root = np.array([0, 1, 1, 3])
    assert canonical(np.array([1, 2]), root) is None
    assert canonical(np.array([[2, 3]]), root).tolist() == [[1, 3]]


def test_factors() -> None:
    factor = fit(Factor(np.array([1, 2, 3]), zero=False), 3)
    assert factor.atoms.shape == (1, 1, 3)
    assert factor.axes() == (2,)
    assert not factor.zero
    labels = Labels((factor,), static=True).with_factors([])
    assert labels.static
    assert not labels.varies(2)
