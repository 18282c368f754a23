"""Labels: which neurons the elements of a tensor belong to, and what must go together.

An *atom* is one position along one axis of one parameter or buffer, an integer ≥ 1. A factor is an integer array
that broadcasts against its tensor: size 1 along the axes on which it does not vary. An element is removed when any
factor gives it a removed atom. Atom 0 stands for positions that can never be removed.

Operators hand labels on (`_operators.py`) and write down in a `Ledger` which atoms are one neuron (`unite`) and
which must stay (`pin`). `Ledger.resolve` turns that into one root per atom.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

Atoms = NDArray[np.int64]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """One label of a tensor. `zero`: the element is exactly 0 once its neuron's parameters are 0."""

    atoms: Atoms
    zero: bool = True

    def varies(self, axis: int) -> bool:
        return self.atoms.shape[axis] > 1

    def axes(self) -> tuple[int, ...]:
        return tuple([axis for axis, size in enumerate(self.atoms.shape) if size > 1])

    def map(self, atoms: Atoms) -> "Factor":
        return Factor(atoms, self.zero)


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """All labels of a tensor.

    `static`: computed from parameters and constants alone. `uniform`: every element is alike (zeros, ones, noise), so
    that the tensor means the same at any size. `zeros`: every element is zero.
    """

    factors: tuple[Factor, ...] = ()
    static: bool = False
    uniform: bool = False
    zeros: bool = False

    def with_factors(self, factors: Iterable[Factor]) -> "Labels":
        return Labels(tuple(factors), self.static)

    def varies(self, axis: int) -> bool:
        return any(factor.varies(axis) for factor in self.factors)


UNKNOWN = Labels()
UNIFORM = Labels(static=True, uniform=True)
ZEROS = Labels(static=True, uniform=True, zeros=True)


@dataclass(frozen=True, slots=True, eq=False)
class Size:
    """A size that a module's code gave to an axis of a label. `pieces`: of one of several, all their sizes."""

    where: str
    axis: int
    size: int
    atoms: Atoms
    pieces: Shape
    index: int


class Ledger:
    """What the operators of one or more runs demanded of the atoms. `root`: what is settled already.

    `step`: the number of the operator that is speaking; its demands can be taken back. None: they stand.
    `through_norms`: whether neurons may go that are averaged over, which changes the averages of the others.
    """

    def __init__(self, root: Atoms | None = None, *, through_norms: bool = False) -> None:
        self._root = root
        self.through_norms = through_norms
        self.step: int | None = None
        self._unions: list[tuple[int | None, Atoms, Atoms]] = []
        self._eithers: list[tuple[int | None, Atoms, Atoms, str]] = []
        self._pins: list[tuple[int | None, Atoms, str]] = []
        self._rectangles: list[tuple[int | None, Atoms, str]] = []
        self.sizes: list[Size] = []

    def unite(self, one: Atoms, other: Atoms, reason: str) -> None:
        """Make elements of two broadcastable arrays one neuron; what meets atom 0 is pinned."""
        if one is other:
            return
        if one.shape != other.shape:
            one, other = np.broadcast_arrays(one, other)
        one, other = one.ravel(), other.ravel()
        differ = one != other
        one, other = one[differ], other[differ]
        fixed = (one == 0) | (other == 0)
        if fixed.any():
            self.pin(np.maximum(one, other)[fixed], reason)
            one, other = one[~fixed], other[~fixed]
        if one.size:
            self._unions.append((self.step, one, other))

    def unite_or_fix(self, wide: Atoms, narrow: Atoms, reason: str) -> None:
        """Two labels meet, of which one varies along further axes: `resolve` says what becomes of them.

        Where what goes of the wide one are whole lines along the narrow one's axes (heads, and a table of the
        positions within a head), the narrow one stays; otherwise they are one.
        """
        self._eithers.append((self.step, wide, narrow, reason))

    def pin(self, atoms: Atoms, reason: str) -> None:
        self._pins.append((self.step, atoms[atoms > 0], reason))

    def tie(self, atoms: Atoms, axis: int, reason: str) -> Atoms:
        """Make all positions along an axis one neuron; returns the array with size 1 there."""
        first = atoms.take([0], axis)
        self.unite(first, atoms, reason)
        return first

    def tied(self, atoms: Atoms) -> Atoms:
        """The atoms with size 1 along axes on which they are known to be one neuron: in a proof, all that are."""
        return compress(atoms if self._root is None else self._root[atoms])

    def agree(self, one: Atoms, other: Atoms) -> bool:
        """Whether two labels of one shape that meet are one: in a proof, where one head is left, they need not be."""
        if self._root is None:
            return True
        one, other = self._root[one], self._root[other]
        equal = one == other
        return bool(equal.all()) or bool((equal | (one == 0) | (other == 0)).all())

    def keep_rectangular(self, atoms: Atoms, reason: str) -> None:
        """One axis was cut into several: what goes must be whole lines along one of them; `resolve` says which."""
        self._rectangles.append((self.step, atoms, reason))

    def note_size(self, where: str, axis: int, size: int, atoms: Atoms, pieces: Shape = (), index: int = 0) -> None:
        """The code of a module gave a tensor its size along an axis, perhaps from an attribute of its own."""
        self.sizes.append(Size(where, axis, size, atoms, pieces, index))

    def absorb(self, other: "Ledger") -> None:
        """Take over all that another ledger holds: a run counts once it has ended well."""
        self._unions += other._unions
        self._eithers += other._eithers
        self._pins += other._pins
        self._rectangles += other._rectangles
        self.sizes += other.sizes

    def forget(self, steps: Collection[int], weighted: Collection[int]) -> None:
        """Take back what these operators demanded: nobody reads what they compute.

        weighted: those of them that read weights, which must still fit what they meet, for the operators to run.
        """
        self._pins = [demand for demand in self._pins if demand[0] not in steps]
        steps = set(steps) - set(weighted)
        self._unions = [demand for demand in self._unions if demand[0] not in steps]
        self._eithers = [demand for demand in self._eithers if demand[0] not in steps]
        self._rectangles = [demand for demand in self._rectangles if demand[0] not in steps]

    @property
    def undecided(self) -> bool:
        """Whether `resolve` has to choose between what could go."""
        return bool(self._eithers or self._rectangles)

    def touched(self, count: int) -> NDArray[np.bool_]:
        """Which of the atoms any operator has spoken of."""
        touched = np.zeros(count, bool)
        for _, one, other in self._unions:
            touched[one] = touched[other] = True
        for _, wide, narrow, _ in self._eithers:
            touched[wide] = touched[narrow] = True
        for _, atoms, _ in self._pins:
            touched[atoms] = True
        return touched

    def broken_by(self, kept: NDArray[np.bool_]) -> Atoms:
        """The atoms whose demands do not hold when these are kept: parted from their other half, or pinned."""
        parted = [np.stack([one, other])[:, kept[one] != kept[other]] for _, one, other in self._unions]
        for _, wide, narrow, _ in self._eithers:
            if not (kept[narrow].all() and _is_whole(kept[wide], narrow)):
                one, other = np.broadcast_arrays(wide, narrow)
                parted.append(np.stack([one, other])[:, kept[one] != kept[other]])
        pinned = [atoms[~kept[atoms]] for _, atoms, _ in self._pins]
        return np.unique(np.concatenate([np.empty(0, np.int64), *(a.ravel() for a in parted), *pinned]))

    def resolve(self, count: int) -> tuple[Atoms, dict[int, str]]:
        """The root of each of `count` atoms, and the first reason why a root must stay."""
        root = self._components(count)
        for _, atoms, reason in self._rectangles:
            if (lines := canonical(atoms, root)) is not None and sum(size > 1 for size in lines.shape) > 1:
                last = max(axis for axis, size in enumerate(lines.shape) if size > 1)
                flat = np.moveaxis(lines, last, -1).reshape(-1, lines.shape[last])
                self.unite(flat[:1], flat, reason)
                root = self._components(count)
        for _, wide, narrow, reason in self._eithers:
            if _is_whole(root[wide], narrow):
                self.pin(narrow.ravel(), reason)
            else:
                self.unite(wide, narrow, reason)
                root = self._components(count)
        pinned = {0: "fixed by construction"}
        for _, atoms, reason in self._pins:
            for value in np.unique(root[atoms]).tolist():
                pinned.setdefault(value, reason)
        return root, pinned

    def _components(self, count: int) -> Atoms:
        return components(count, [one for _, one, _ in self._unions], [other for _, _, other in self._unions])


class Unheard(Ledger):
    """The ledger of a proof, which asks what is settled already; nobody reads what its operators demand."""

    def unite(self, one: Atoms, other: Atoms, reason: str) -> None:
        pass

    def unite_or_fix(self, wide: Atoms, narrow: Atoms, reason: str) -> None:
        pass

    def pin(self, atoms: Atoms, reason: str) -> None:
        pass

    def keep_rectangular(self, atoms: Atoms, reason: str) -> None:
        pass

    def note_size(self, where: str, axis: int, size: int, atoms: Atoms, pieces: Shape = (), index: int = 0) -> None:
        pass


def _is_whole(values: NDArray[Any], narrow: Atoms) -> bool:
    """Whether an array is constant along the axes along which another varies."""
    axes = [axis for axis, size in enumerate(narrow.shape) if size > 1]
    first = values[tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(values.ndim))]
    return bool((values == first).all())


def components(count: int, ones: Sequence[Atoms], others: Sequence[Atoms]) -> Atoms:
    """Smallest atom of each atom's connected component, by hooking and pointer jumping (Shiloach, Vishkin, 1982)."""
    root = np.arange(count)
    if not ones:
        return root
    one, other = np.concatenate(ones), np.concatenate(others)
    while True:
        one, other = root[one], root[other]
        live = one != other
        if not live.any():
            return root
        one, other = one[live], other[live]
        np.minimum.at(root, np.maximum(one, other), np.minimum(one, other))
        while True:
            jumped = root[root]
            if np.array_equal(jumped, root):
                break
            root = jumped


def fit(factor: Factor, ndim: int) -> Factor:
    """Prepend axes of size 1, as broadcasting does."""
    missing = ndim - factor.atoms.ndim
    return factor.map(factor.atoms.reshape((1,) * missing + factor.atoms.shape)) if missing else factor


def compress(atoms: Atoms) -> Atoms:
    """Size 1 along every axis on which the array is constant."""
    for axis, size in enumerate(atoms.shape):
        if size > 1 and not _differs_at_once(atoms, axis):
            first = atoms.take([0], axis)
            if (atoms == first).all():
                atoms = first
    return atoms


def _differs_at_once(atoms: Atoms, axis: int) -> bool:
    """Whether the first two elements along an axis differ, as they do almost always where any do."""
    second = (0,) * axis + (1,) + (0,) * (atoms.ndim - axis - 1)
    return atoms.size > 0 and atoms.item(0) != atoms.item(second)


def reshape(atoms: Atoms, old: Shape, new: Shape) -> Atoms:
    """The labels of a tensor reshaped from `old` to `new`, expanded only where axes are cut or joined."""
    if 0 in old or 0 in new:
        return np.zeros((1,) * len(new), np.int64)
    source: list[int] = []
    target: list[int] = []
    for old_axes, new_axes in segments(old, new):
        varying = any(atoms.shape[axis] > 1 for axis in old_axes)
        source += [old[axis] if varying else 1 for axis in old_axes]
        target += [new[axis] if varying else 1 for axis in new_axes]
    return compress(np.broadcast_to(atoms, source).reshape(target))


def segments(old: Shape, new: Shape) -> Iterable[tuple[range, range]]:
    """Cut two shapes of equal size into the shortest runs of axes of equal size."""
    cuts = [(0, 0)]
    i = j = 0
    left = right = 1
    while i < len(old) and j < len(new):
        if left == right == 1 and old[i] == new[j]:
            i, j = i + 1, j + 1
        else:
            left, right = left * old[i], right * new[j]
            i, j = i + 1, j + 1
            while left != right:
                if left < right:
                    left, i = left * old[i], i + 1
                else:
                    right, j = right * new[j], j + 1
        cuts.append((i, j))
        left = right = 1
    cuts.append((len(old), len(new)))
    for (a, b), (c, d) in pairwise(cuts):
        if (a, b) != (c, d):
            assert prod(old[a:c]) == prod(new[b:d])
            yield range(a, c), range(b, d)


def canonical(factor: Atoms, root: Atoms | None = None) -> Atoms | None:
    """Roots instead of atoms, compressed; None when nothing varies."""
    atoms = compress(factor if root is None else root[factor])
    return atoms if atoms.size > 1 else None
