"""Prove that a trimmed model computes the masked original.

By induction over the operators: the trimmed model runs the same ones, and at each of them every label is the original
label without the removed elements, in the same order, on a tensor of the size that follows. What the operators
demanded of the labels was settled by the trace, so that equal labels mean equal values.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from torchtrim._attention import generalise
from torchtrim._copies import compacted, named_tensors, rebuild
from torchtrim._flow import OUTPUT, Step
from torchtrim._labels import Atoms, Factor, Labels, Ledger, Shape, Unheard, canonical
from torchtrim._neurons import Kept, NeuronGraph, cut, memory_of, silence
from torchtrim._origins import Look, Piece
from torchtrim._run import RunError, run
from torchtrim._without_norms import WithoutNorms


class Failure(NamedTuple):
    """The roots to blame, and why. `where`: the module whose own code failed, if it was that.

    `reached`: how many operators ran.
    """

    blamed: set[int]
    reason: str
    where: str | None = None
    reached: int = 0


def prove(
    model: nn.Module,
    graph: NeuronGraph,
    trimmed: nn.Module,
    kept: Kept,
    expected: Mapping[str, Tensor] | None = None,
    *,
    keep: bool = True,
) -> Failure | None:
    """None if `trimmed` computes the masked model; else the roots to blame, and why.

    expected: what `cut` makes of the model's tensors, where it is at hand. keep: whether `trimmed` must stay as it is.
    """
    misplaced = _misplaced(graph, trimmed, kept, expected or cut(graph, named_tensors(model), kept))
    if misplaced is not None:
        return misplaced
    settled = _settled(graph)
    labels = numbered(model, _left(graph, kept))
    reached = 0
    for training, steps, demands in _references(model, graph, kept):
        broken = demands.broken_by(kept[graph.root])
        if broken.size:
            return Failure(
                _cut_layers(graph, kept, set(graph.root[broken].tolist())), "its data decides what goes together"
            )
        try:
            example = graph.training_example if training else graph.example
            own = not keep and len(graph.recordings) == 1 and graph.device == "meta"
            copy = generalise(trimmed) if own else on_device(trimmed, graph.device)
            ledger = Unheard(settled, through_norms=graph.through_norms)
            with _comparable(graph):
                flow = run(copy, example, labels, ledger, training=training, device=graph.device)
        except RunError as error:
            return _blame_error(graph, kept, steps, error)._replace(reached=reached + len(error.flow.steps))
        reached += len(flow.steps)
        failure = _compare_steps(graph, kept, settled, steps, flow.steps)
        if failure is not None:
            return failure._replace(reached=reached)
    return None


def _misplaced(graph: NeuronGraph, trimmed: nn.Module, kept: Kept, originals: Mapping[str, Tensor]) -> Failure | None:
    """Whether some tensor is not the original without what was removed; on meta tensors only sizes tell."""
    tensors = named_tensors(trimmed)
    for name, expected in originals.items():
        found = tensors[name]
        equal = found.shape == expected.shape
        if equal and found.device == expected.device and not found.is_meta and memory_of(found) != memory_of(expected):
            equal = torch.equal(found, expected) or torch.equal(found.nan_to_num(), expected.nan_to_num())
        if not equal:
            roots = {value for axis in graph.axes[name] for value in axis.tolist()}
            return Failure(_cut_layers(graph, kept, roots), f"{name} is not the original without the removed neurons")
    return None


def on_device(model: nn.Module, device: str) -> nn.Module:
    """A copy to run under labels."""
    tensors = {n: t.detach().to(device, copy=device != "meta") for n, t in named_tensors(model).items()}
    return compacted(generalise(rebuild(model, tensors)))


def numbered(model: nn.Module, axes: Mapping[str, tuple[Atoms, ...]]) -> dict[str, Labels]:
    """The labels of parameters and buffers. A silent neuron's parameters are zero; its buffers are what they were."""
    labels: dict[str, Labels] = {}
    for name, tensor in named_tensors(model).items():
        zero, last = isinstance(tensor, nn.Parameter), tensor.ndim - 1
        factors = [
            Factor(atoms.reshape(*(1,) * axis, -1, *(1,) * (last - axis)), zero)
            for axis, atoms in enumerate(axes[name])
            if atoms.size > 1
        ]
        labels[name] = Labels(tuple(factors), static=True)
    return labels


def _left(graph: NeuronGraph, kept: Kept) -> dict[str, tuple[Atoms, ...]]:
    """The atoms of every axis of every tensor that are left."""
    return {
        name: tuple(a[kept[roots]] if roots.size > 1 else a for a, roots in zip(graph.atoms[name], axes, strict=True))
        for name, axes in graph.axes.items()
    }


def _settled(graph: NeuronGraph) -> Atoms:
    """For each atom its root, or 0 where that is a whole axis, which can never go and is as good as unlabelled."""
    every = [roots for axes in graph.axes.values() for roots in axes if roots.size > 1]
    whole = np.array([roots[0] for roots in every if (roots == roots[0]).all()], np.int64)
    return np.where(np.isin(graph.root, whole), 0, graph.root)


def _references(model: nn.Module, graph: NeuronGraph, kept: Kept) -> Iterable[tuple[bool, Sequence[Step], Ledger]]:
    """What to compare with: the trace, whose demands are met, or where data decides what runs, the masked model."""
    if graph.device == "meta":
        yield from ((training, steps, Ledger()) for training, steps in graph.recordings)
        return
    silent = silence(model, graph, kept)
    for training, _ in graph.recordings:
        copy = on_device(silent, graph.device)
        ledger = graph.ledger(_settled(graph))
        example = graph.training_example if training else graph.example
        with _comparable(graph):
            flow = run(copy, example, numbered(model, graph.atoms), ledger, training=training, device=graph.device)
        yield training, flow.steps, ledger


def _comparable(graph: NeuronGraph) -> AbstractContextManager[Any]:
    """Where data decide what runs, both models run without norms that average over fewer neurons in one."""
    return WithoutNorms() if graph.through_norms and graph.device != "meta" else nullcontext()


def _compare_steps(
    graph: NeuronGraph, kept: Kept, settled: Atoms, steps: Sequence[Step], trimmed: Sequence[Step]
) -> Failure | None:
    """Blame all that disagrees, each group by the neurons that do; the reason is the first one's."""
    expectations = _Expectations(settled, kept)
    blamed: set[int] = set()
    reason = ""
    for index, step in enumerate(steps):
        new = trimmed[index] if index < len(trimmed) else None
        if new is not None and new.name == step.name and not step.live:
            continue
        if new is None or new.name != step.name or len(new.tensors) != len(step.tensors):
            found = _roots(graph, (labels for _, labels in step.tensors))
            blamed |= _cut_layers(graph, kept, found)
            reason = reason or f"another operator runs in place of {_place(step)}"
            break
        if not _same_constants(step.constants, new.constants, exact=graph.device == "meta"):
            found = _roots(graph, (labels for _, labels in step.tensors))
            reason = reason or f"a number depends on the width at {_place(step)}"
        elif (found := expectations.disagreeing(step, new)) is not None:
            reason = reason or f"trimmed labels disagree at {_place(step)}"
        elif (misread := expectations.misread(step, new)) is not None:
            found = _roots(graph, misread)
            reason = reason or f"what is read depends on the width at {_place(step)}"
        if found is not None:
            blamed |= _cut_layers(graph, kept, found)
    return Failure(blamed, reason) if reason else None


def _place(step: Step) -> str:
    return "the outputs" if step.name == OUTPUT else f"aten::{step.name} in {step.where or 'the model itself'}"


def _same_constants(old: tuple[Any, ...], new: tuple[Any, ...], *, exact: bool) -> bool:
    return len(old) == len(new) and all(
        one == other or (isinstance(one, float) and isinstance(other, float) and _close(one, other, exact))
        for one, other in zip(old, new, strict=True)
    )


def _close(one: float, other: float, exact: bool) -> bool:
    """Numbers that the model read from its data differ by rounding."""
    if math.isnan(one) or math.isnan(other) or exact:
        return math.isnan(one) and math.isnan(other)
    return math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-7)


def _blame_error(graph: NeuronGraph, kept: Kept, steps: Sequence[Step], error: RunError) -> Failure:
    """The model's own code failed on the new widths: blame what it read there."""
    blamed = _cut_layers(graph, kept, _roots(graph, error.flow.blamed))
    if not blamed:
        position = min(len(error.flow.steps), len(steps) - 1)
        blamed = _cut_layers(graph, kept, _roots(graph, (labels for _, labels in steps[position].tensors)))
    return Failure(blamed, f"the model's own code in {error.where} holds its width ({error})", error.module)


def _roots(graph: NeuronGraph, labels: Iterable[Labels]) -> set[int]:
    return {value for one in labels for f in one.factors for value in np.unique(graph.root[f.atoms]).tolist()}


def _cut_layers(graph: NeuronGraph, kept: Kept, found: set[int]) -> set[int]:
    """All roots of the layers that lost neurons and have one of these roots."""
    blamed: set[int] = set()
    for layer in graph.layers.values():
        roots = set(layer.roots.tolist())
        if roots & found and not kept[layer.roots].all():
            blamed |= roots
    return blamed


_Content = tuple[Shape, bytes]  # tells factors apart: by atoms, not roots, since positions of one neuron have an order


@dataclass(frozen=True, eq=False)
class _Part:
    """What one factor must be after the cut. `lines`: which positions are kept along axes counted from the end.

    `left`: the remaining atoms, if no other factor cuts along the same axes. `lines` is None where what is removed is
    not rectangular, so that no tensor can be left.
    """

    atoms: Atoms
    lines: Mapping[int, NDArray[np.bool_]] | None
    left: Atoms


@dataclass(frozen=True, eq=False)
class _Expected:
    """What a label must be after the cut. `lines` as of a part; `counts`: how many positions are kept in each.

    `factors`: each remaining factor's content, with the atoms it speaks of. None where no tensor can be left.
    """

    lines: Mapping[int, NDArray[np.bool_]]
    counts: Mapping[int, int]
    factors: Mapping[_Content, Atoms] | None


@dataclass(eq=False)
class _Expectations:
    """Compares labels of the original with those of the trimmed model, each pair once.

    Whatever is remembered by its identity is kept beside, so that no other takes its place.
    """

    root: Atoms
    kept: Kept
    parts: dict[int, tuple[_Part | None, Atoms]] = field(default_factory=dict)
    contents: dict[int, tuple[dict[_Content, Atoms], Atoms]] = field(default_factory=dict)
    expected: dict[int, tuple[_Expected, Labels]] = field(default_factory=dict)
    differences: dict[tuple[int, int], tuple[set[int] | None, Labels, Labels]] = field(default_factory=dict)

    def disagreeing(self, old: Step, new: Step) -> set[int] | None:
        """The roots that disagree between two steps; None where the steps agree."""
        found: set[int] | None = None
        for (old_shape, old_labels), (new_shape, new_labels) in zip(old.tensors, new.tensors, strict=True):
            blamed = self._difference(old_labels, new_labels)
            if blamed is None and not self._fits(old_shape, old_labels, new_shape, old.loose and new.loose):
                blamed = self._roots(old_labels)
            if blamed is not None:
                found = (found or set()) | blamed
        return found

    def misread(self, old: Step, new: Step) -> list[Labels] | None:
        """The labels of operands that were computed elsewhere or read in another way; None if there are none."""
        found: list[Labels] | None = None
        for one, other, (_, labels) in zip(old.origins, new.origins, old.tensors, strict=False):
            looks = zip(one.looks, other.looks, strict=False)
            different = [look for look, new_look in looks if not self._same_look(look, new_look)]
            if one.source != other.source or len(one.looks) != len(other.looks) or different:
                found = [*(found or ()), labels, *(look.labels for look in different if isinstance(look, Piece))]
        return found

    def _same_look(self, old: Look | Piece, new: Look | Piece) -> bool:
        if isinstance(old, Piece) and isinstance(new, Piece):
            return self._same_piece(old, new)
        return (
            isinstance(old, Look)
            and isinstance(new, Look)
            and (old.kind, len(old.numbers)) == (new.kind, len(new.numbers))
            and all(one is None or one == other for one, other in zip(old.numbers, new.numbers, strict=True))
        )

    def _same_piece(self, old: Piece, new: Piece) -> bool:
        """Whether a piece holds those of the old one's positions that are kept."""
        line = self._expect(old.labels).lines.get(old.axis, np.ones(old.length, bool))
        renumbered = np.cumsum(line) - 1
        positions = np.array(old.positions, np.int64)
        expected = renumbered[positions[line[positions]]]
        return (old.axis, int(line.sum())) == (new.axis, new.length) and expected.tolist() == list(new.positions)

    def _fits(self, old_shape: Shape, labels: Labels, new_shape: Shape, loose: bool) -> bool:
        ndim = len(old_shape)
        if len(new_shape) != ndim or (labels.uniform and loose):
            return len(new_shape) == ndim
        expected = [*old_shape]
        for axis, count in self._expect(labels).counts.items():
            expected[axis] = count
        return expected == [*new_shape]

    def _difference(self, old: Labels, new: Labels) -> set[int] | None:
        key = id(old), id(new)
        if key not in self.differences:
            self.differences[key] = self._compared(old, new), old, new
        return self.differences[key][0]

    def _compared(self, old: Labels, new: Labels) -> set[int] | None:
        expected = self._expect(old)
        if expected.factors is None or old.uniform != new.uniform:
            return self._roots(old)
        found = {key: atoms for factor in new.factors for key, atoms in self._content(factor.atoms).items()}
        missing = [atoms for key, atoms in expected.factors.items() if key not in found]
        # where one body alone is left, a tensor of size 1 may have met it, which has no label
        unequal = [atoms for atoms in missing if canonical(atoms, self.root) is not None]
        unequal += [atoms for key, atoms in found.items() if key not in expected.factors]
        return {value for atoms in unequal for value in np.unique(self.root[atoms]).tolist()} if unequal else None

    def _roots(self, labels: Labels) -> set[int]:
        return {value for factor in labels.factors for value in np.unique(self.root[factor.atoms]).tolist()}

    def _expect(self, old: Labels) -> _Expected:
        if id(old) not in self.expected:
            self.expected[id(old)] = self._expectation(old), old
        return self.expected[id(old)][0]

    def _expectation(self, old: Labels) -> _Expected:
        parts = [part for factor in old.factors if (part := self._part(factor.atoms)) is not None]
        lines: dict[int, NDArray[np.bool_]] = {}
        overlap = False
        for part in parts:
            if part.lines is None:
                return _Expected({}, {}, None)
            for axis, line in part.lines.items():
                overlap = overlap or axis in lines
                lines[axis] = lines[axis] & line if axis in lines else line
        left = [_taken(part.atoms, lines) if overlap else part.left for part in parts]
        counts = {axis: int(np.count_nonzero(line)) for axis, line in lines.items()}
        return _Expected(lines, counts, {key: one for atoms in left for key, one in self._content(atoms).items()})

    def _part(self, atoms: Atoms) -> _Part | None:
        if id(atoms) not in self.parts:
            short = canonical(atoms)
            self.parts[id(atoms)] = None if short is None else self._cut(short), atoms
        return self.parts[id(atoms)][0]

    def _cut(self, atoms: Atoms) -> _Part:
        keep = self.kept[self.root[atoms]]
        axes = [axis for axis, size in enumerate(atoms.shape) if size > 1]
        if len(axes) == 1:
            lines = {axes[0] - keep.ndim: keep.ravel()}
        else:
            lines = {axis - keep.ndim: np.atleast_1d(keep.any(axis=_all_but(axis, keep.ndim))) for axis in axes}
        if np.count_nonzero(keep) != math.prod(map(np.count_nonzero, lines.values())):
            return _Part(atoms, None, atoms)
        return _Part(atoms, lines, _taken(atoms, lines))

    def _content(self, atoms: Atoms) -> dict[_Content, Atoms]:
        """What tells a factor apart, with its atoms; nothing if it does not vary."""
        if id(atoms) not in self.contents:
            short = canonical(atoms)
            content = {} if short is None else {(short.shape, short.tobytes()): short}
            self.contents[id(atoms)] = content, atoms
        return self.contents[id(atoms)][0]


def _all_but(axis: int, ndim: int) -> tuple[int, ...]:
    return tuple(other for other in range(ndim) if other != axis)


def _taken(atoms: Atoms, lines: Mapping[int, NDArray[np.bool_]]) -> Atoms:
    for axis, size in enumerate(atoms.shape):
        if size > 1:
            atoms = atoms.take(np.flatnonzero(lines[axis - atoms.ndim]), axis)
    return atoms
