"""Rows of the operators that compare or average: normalisations, softmax, reductions."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from torchtrim._labels import UNKNOWN, Factor, Labels, Ledger
from torchtrim._operators import (
    Call,
    Flags,
    Operand,
    Table,
    merge,
    operand,
    pointwise,
    tensors,
    with_indices,
)
from torchtrim._operators_products import NORM, squeezed, summed

ROWS = Table()


def _along(call: Call, vector: Tensor, axis: int, ndim: int) -> Operand:
    """A vector as an operand that lies along one axis of a tensor."""
    factors, _, uniform = operand(call, vector)
    shape = [1] * ndim
    shape[axis] = -1
    laid = [f.map(f.atoms.reshape(shape)) for f in factors]
    shape[axis] = vector.numel()
    return laid, tuple(shape), uniform


@ROWS.of("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "batch_norm",
     "_native_batch_norm_legit", "_native_batch_norm_legit_no_training")  # fmt: skip
def _batch_norm(call: Call) -> Sequence[Labels]:
    """In training, batches are averaged; else a neuron has statistics of its own."""
    inputs = call.args[0]
    x = call.labels_of(inputs)
    vectors = [vector for vector in call.args[1:5] if isinstance(vector, Tensor)]
    scaled, shifted = (isinstance(vector, Tensor) for vector in call.args[1:3])
    training = any(value is True for value in (*call.args[3:6], call.kwargs.get("training")))
    operands = [operand(call, inputs), *(_along(call, vector, 1, inputs.ndim) for vector in vectors)]

    def zero(flags: Flags) -> bool:
        """Without a shift; and scaled by zero, or zero itself, as is then its mean over the batch."""
        return bool((not shifted or flags[1 + scaled]) and ((scaled and flags[1]) or (training and flags[0])))

    factors = merge(call, operands, zero)
    if training:
        factors = call.fix_axes(factors, (axis for axis in range(inputs.ndim) if axis != 1), "normalised over")
    saved = [f.map(f.atoms.reshape(-1)) for f in factors if f.axes() == (1,)]
    return [
        Labels(tuple(factors), x.static),
        *(Labels(tuple(saved)) if t.numel() == inputs.shape[1] else UNKNOWN for t in call.result[1:]),
    ]


@ROWS.of("native_layer_norm", "_fused_rms_norm")
def _layer_norm(call: Call) -> Sequence[Labels]:
    """Scale and shift of a silent neuron are zero. Means and deviations have the axes that are not averaged over."""
    inputs, shape = call.args[0], call.args[1]
    vectors = [vector for vector in call.args[2:4] if isinstance(vector, Tensor)]

    def zero(flags: Flags) -> bool:
        return bool(vectors) and all(flags[1:])

    factors = merge(call, [operand(call, tensor) for tensor in (inputs, *vectors)], zero)
    axes = range(inputs.ndim - len(shape), inputs.ndim)
    if call.ledger.through_norms:
        note_normalized(call.ledger, call.where, factors, inputs.ndim, shape)
    else:
        factors = call.fix_axes(factors, axes, "normalised over")
    saved = Labels(tuple(Factor(f.atoms, False) for f in factors if not any(map(f.varies, axes))))
    return [Labels(tuple(factors)), *(saved for _ in call.result[1:])]


def note_normalized(ledger: Ledger, where: str, factors: Iterable[Factor], ndim: int, shape: Sequence[int]) -> None:
    """A norm was told the sizes of the last axes, which are an attribute of its module."""
    first = ndim - len(shape)
    for factor in factors:
        for axis in (axis for axis in factor.axes() if axis >= first):
            ledger.note_size(where, axis, shape[axis - first], factor.atoms, tuple(shape), axis - first)


@ROWS.of("native_group_norm")
def _group_norm(call: Call) -> Sequence[Labels]:
    """What is normalised together goes together: whole groups; of a single one also some, where norms may change."""
    inputs, groups = call.args[0], call.args[6]
    vectors = [vector for vector in call.args[1:3] if isinstance(vector, Tensor)]
    operands = [operand(call, inputs), *(_along(call, vector, 1, inputs.ndim) for vector in vectors)]

    def zero(flags: Flags) -> bool:
        return len(vectors) == 2 and bool(flags[1] and flags[2])

    factors = call.fix_axes(merge(call, operands, zero), range(2, inputs.ndim), "normalised over")
    saved: list[Factor] = []
    for factor in factors:
        if factor.varies(1) and not (call.ledger.through_norms and groups == 1):
            cut = factor.atoms.reshape(factor.atoms.shape[0], groups, -1)
            saved.append(factor.map(call.ledger.tie(cut, 2, call.reason("normalised together"))[:, :, 0]))
    return [Labels(tuple(factors)), Labels(tuple(saved)), Labels(tuple(saved))]


@ROWS.of("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax", "cumsum", "logcumsumexp")
def _softmax(call: Call) -> Labels:
    inputs = call.args[0]
    labels = call.labels_of(inputs)
    factors = call.fix_axes(labels.factors, [call.args[1] % max(inputs.ndim, 1)], "compared with each other")
    return labels.with_factors(Factor(f.atoms, False) for f in factors)


_AVERAGES = frozenset(["mean", "std", "var", "var_mean", "std_mean"])
_KEEP_ZERO = frozenset(["sum", "linalg_vector_norm", "mean", "amax", "amin", "max", "min", "prod", "std", "var",
                        "var_mean", "std_mean", "any"])  # fmt: skip


def _reduced(call: Call, dims: int | Sequence[int] | None, summing: bool) -> Labels | Sequence[Labels]:
    inputs = call.args[0]
    labels = call.labels_of(inputs)
    chosen = range(inputs.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    axes = [axis % max(inputs.ndim, 1) for axis in chosen]
    if summing and labels.static:
        factors = call.fix_axes(labels.factors, axes, NORM)
    elif summing or (call.name in _AVERAGES and call.ledger.through_norms):
        factors = summed(call, labels.factors, axes)
    else:
        factors = call.fix_axes(labels.factors, axes, "reduced over all its values")
    if call.name not in _KEEP_ZERO:
        factors = [Factor(f.atoms, False) for f in factors]
    first = call.result[0] if isinstance(call.result, (tuple, list)) else call.result
    if first.ndim < inputs.ndim:
        factors = squeezed(factors, axes)
    found = Labels(tuple(factors), labels.static)
    return with_indices(call, found) if call.name in ("max", "min") else found


@ROWS.of("sum")
def _sum(call: Call) -> Labels | Sequence[Labels]:
    return _reduced(call, call.argument(1, "dim"), True)


@ROWS.of("linalg_vector_norm")
def _vector_norm(call: Call) -> Labels | Sequence[Labels]:
    """Zeros add nothing to a norm of positive order."""
    return _reduced(call, call.argument(2, "dim"), call.argument(1, "ord", 2) > 0)


@ROWS.of("mean", "amax", "amin", "max", "min", "argmax", "argmin", "prod", "std", "var", "var_mean", "std_mean",
     "logsumexp", "any", "all")  # fmt: skip
def _reduce(call: Call) -> Labels | Sequence[Labels]:
    if len(tensors(call.args)) == 2:  # max(x, y)
        return pointwise(call)
    return _reduced(call, call.argument(1, "dim"), False)
