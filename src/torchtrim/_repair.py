"""Repair a trimmed model from data, without training: what its layers lost, they make up for as well as they can.

Three ways, which compose. "mean" folds the average of what is gone into biases. "least-squares" refits the weights of
each layer that lost inputs, so that it computes what the original does there; He, Zhang and Sun, "Channel Pruning for
Accelerating Very Deep Neural Networks", 2017, section 3.1. "batchnorm" measures the statistics of batch norms anew.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal, TypeAlias, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchtrim import criteria
from torchtrim._calibration import Calibration, Listener, as_found
from torchtrim._consumers import Consumer, Reader, consumers, levels
from torchtrim._copies import named_modules, named_tensors, rebuild
from torchtrim._descent import check_as_trimmed, what_is_left
from torchtrim._forward import Forward
from torchtrim._history import history, set_history
from torchtrim._moments import (
    ChannelSums,
    InputMeans,
    Moments,
    Residuals,
    check_fit,
    check_positions,
    features,
    fit,
    groups,
    pieces,
    rows,
)
from torchtrim._neurons import Kept, NeuronGraph
from torchtrim.criteria import Criterion
from torchtrim.errors import ProfileError, TorchtrimError, TorchtrimWarning

Way: TypeAlias = Literal["mean", "least-squares", "batchnorm"]
Ways: TypeAlias = Way | Sequence[Way]
_NEVER_RUN = "it does not run as a module"


def repair(
    trimmed: nn.Module,
    original: nn.Module,
    example: Any,
    batches: Iterable[Any],
    how: Ways = "least-squares",
    *,
    forward: Forward | None = None,
    ridge: float = 1e-3,
    block: int = 6144,
    positions: int | None = None,
) -> nn.Module:
    """A new model that makes up for what `trim` removed; `trimmed` and `original` are untouched.

    trimmed: what `trim` made of `original`, at once or in several steps, not retrained since. example: as for `trim`;
    what `trace` found of the original will do. batches, forward: as for `profile`; data that the model is not
    tested on, and that can be read several times. how: one way, or several, in this order:

    - "mean": the mean of what each removed neuron gave to a layer is added to the layer's bias; without one, to the
      batch norm that follows, or else there is one from now on. Measured where the layer reads it: behind batch norms,
      pooling and flattening, by position. Exact for neurons that are constant there; where a convolution pads with
      zeros, the mean includes the border. Costs one pass of the original, and one example of what each layer reads.
    - "least-squares": the weights and bias of each layer that lost inputs are refitted to what it computes in the
      original, on inputs that are repaired already. The squared error there never rises, but where a layer that runs
      several times reads what it, or one refitted later, has computed. Costs a pass of both models for each layer
      that lies behind another; in float64, the square of its inputs (times the kernel), at most 32 · block² bytes,
      beside what the models take. Layers with more inputs than `block` are fitted by parts, a pass for each, each
      given what the others do: better than before, not the best; to repair what is repaired comes closer. Where there
      is no bias, and no batch norm that alone follows, none is made.
    - "batchnorm": the mean and variance of each batch norm are those of the data. One pass of the trimmed model, in
      which batches are normalised by themselves; so let them be as large as in training.

    ridge: how much a change of weights costs, relative to the mean variance of the inputs. positions: at how many of an
    example's output positions least squares looks, drawn at random; by default at all. The error that never rises is
    then of those.

    Parameters that are frozen stay as they are, as do the statistics of batch norms that are frozen; so do layers that
    share their weights, compute them, or are neither linear nor convolutional. A TorchtrimWarning lists those.
    Raises, before any work, PlanError: the models do not belong together, or weights were changed already and the
    "mean" is of those that `trim` left; TorchtrimError: what cannot be asked.
    Raises ProfileError: batches that do not fit, that have no examples, or values that are not finite.
    """
    ways = checked_ways(how)
    check_fit("repair", ridge, block, positions)
    data = Calibration(batches, forward)
    graph, kept = what_is_left(original, trimmed, example)
    repaired = rebuild(trimmed, {name: tensor.detach().clone() for name, tensor in named_tensors(trimmed).items()})
    work = _Work(original, repaired, graph, kept, data, positions)
    if "mean" in ways:
        check_as_trimmed(work.consumers.values(), work.theirs, work.ours)
    with as_found(original, repaired):
        for way in ways:
            match way:
                case "mean":
                    work.add_means()
                case "least-squares":
                    work.refit(ridge, block)
                case "batchnorm":
                    work.measure_norms()
    if ways == ("batchnorm",) and not any(isinstance(module, _BatchNorm) for module in work.ours.values()):
        warnings.warn("repair: the model has no batch norm to measure anew", TorchtrimWarning, stacklevel=2)
    if work.notes:
        left = "\n  ".join(f"{name}: {reason}" for name, reason in work.notes.items())
        warnings.warn(f"left as they are by the repair:\n  {left}", TorchtrimWarning, stacklevel=2)
    return repaired


def checked_ways(how: Ways) -> tuple[Way, ...]:
    """The ways that are asked for. Raises TorchtrimError: an unknown one, or an order that undoes what was done."""
    given: Any = how
    several = isinstance(given, Iterable) and not isinstance(given, str)
    ways = cast(tuple[Way, ...], tuple(given) if several else (given,))
    unknown = [way for way in ways if way not in get_args(Way)]
    if unknown or not ways:
        found = ", ".join(map(repr, unknown)) or "nothing"
        raise TorchtrimError(f"repair: expected some of {', '.join(map(repr, get_args(Way)))}, found {found}")
    if len(set(ways)) < len(ways):
        raise TorchtrimError(f"repair: expected each way once, found {ways}")
    if "mean" in ways and ways[0] != "mean":
        raise TorchtrimError(f'repair: expected "mean" first, since it is of the weights as they were, found {ways}')
    return ways


def check_repair_positions(positions: int | None, ways: Sequence[Way], criterion: Criterion) -> None:
    """Raises TorchtrimError: fewer than one position of an example, or nothing asked for that looks at them."""
    check_positions("repair positions", positions)
    if positions is not None and "least-squares" not in ways and criterion is not criteria.reconstruction:
        raise TorchtrimError(
            "repair positions: expected a repair by least-squares or the criterion reconstruction, which look at them, "
            f"found {positions} alone"
        )


class _Task:
    """One block of a layer's inputs to be fitted. `columns`: of the trimmed weights, for each group."""

    def __init__(self, consumer: Consumer, module: Reader, columns: slice) -> None:
        self.consumer, self.module, self.columns = consumer, module, columns
        self.moments = Moments()
        self.residuals = Residuals()
        self.runs = False
        self.alike = True  # called as often in both models, with as many inputs
        self.leads = True  # no other layer reads the same input in the same way, and adds up the moments for both

    @property
    def size(self) -> int:
        """How many numbers the moments are."""
        width = len(range(*self.columns.indices(self.module.weight.shape[1])))
        return groups(self.module) * (width * features(self.module)) ** 2

    def join(self, leader: "_Task") -> None:
        """Use the moments of another task."""
        self.moments, self.leads = leader.moments, False

    @property
    def reads(self) -> Any:
        """Equal for tasks that read the same numbers."""
        module = self.module
        shape = None
        if not isinstance(module, nn.Linear):
            shape = module.kernel_size, module.stride, module.padding, module.dilation, module.groups
            shape = (*shape, module.padding_mode)
        return self.consumer.reads, shape, self.columns.start, self.columns.stop


class _Work:
    """Two models and data, and what becomes of the second."""

    def __init__(
        self,
        original: nn.Module,
        repaired: nn.Module,
        graph: NeuronGraph,
        kept: Kept,
        data: Calibration,
        positions: int | None,
    ) -> None:
        self.original, self.repaired = original, repaired
        self.graph, self.data, self.positions = graph, data, positions
        found, self.notes = consumers(original, graph, kept)
        self.consumers = {consumer.name: consumer for consumer in found}
        self.theirs = cast(Mapping[str, Any], named_modules(original))
        self.ours = cast(Mapping[str, Any], named_modules(repaired))
        self.shifts: dict[str, Tensor] = {}  # what was added to what a layer computes by the norm behind it

    # -------------------------------------------------------------- mean

    def add_means(self) -> None:
        means = {name: InputMeans(self.theirs[name]) for name in self.consumers}
        for batch in self.data:
            self.data.run(self.original, batch, {self.theirs[name]: mean.add for name, mean in means.items()})
        for name, mean in means.items():
            if not mean.sums:
                self.notes[name] = _NEVER_RUN
                continue
            self._check_some(name, sum(count for count, _ in mean.sums.values()))
            consumer = self.consumers[name]
            given = mean.through(~torch.from_numpy(consumer.inputs))[torch.from_numpy(consumer.outputs)]
            self._check(name, given)
            self._add_constant(consumer, given, new=True)

    # -------------------------------------------------------------- least squares

    def refit(self, ridge: float, block: int) -> None:
        for row in levels(self.graph, self.consumers):
            waiting = [self._tasks(self.consumers[name], block) for name in row]
            while any(waiting):
                now: list[_Task] = []
                for tasks in waiting:  # of each layer one block at a time, and together no more than fits
                    if tasks and (not now or sum(task.size for task in (*now, tasks[0])) <= block**2):
                        now.append(tasks.pop(0))
                self._fit(now, ridge)

    def _tasks(self, consumer: Consumer, block: int) -> list[_Task]:
        module = self.ours[consumer.name]
        if not (module.weight.requires_grad or self._takes_constant(consumer)):
            self.notes[consumer.name] = "it is frozen"
            return []
        return [_Task(consumer, module, columns) for columns in pieces(module, block)]

    def _fit(self, tasks: Sequence[_Task], ridge: float) -> None:
        """One pass over the data; then the tasks' layers are better by their blocks."""
        leaders: dict[Any, _Task] = {}
        for task in tasks:
            if (leader := leaders.setdefault(task.reads, task)) is not task:
                task.join(leader)
        wanted = {task: _Wanted(task.consumer, task.module) for task in tasks}
        for batch in self.data:
            keep = {self.theirs[task.consumer.name]: want.keep for task, want in wanted.items()}
            compare: dict[nn.Module, Listener] = {
                task.module: self._comparer(task, want) for task, want in wanted.items()
            }
            self.data.run(self.original, batch, keep)
            self.data.run(self.repaired, batch, compare)
            for task, want in wanted.items():
                task.alike &= not want.outputs
                want.outputs.clear()
        for task in tasks:
            self._update(task, ridge)

    def _comparer(self, task: _Task, want: "_Wanted") -> Listener:
        """Adds up what a layer reads, and what it lacks of what the original computes."""
        shift = self.shifts.get(task.consumer.name)

        def compare(inputs: Tensor, outputs: Tensor) -> None:
            task.runs = True
            wanted = want.outputs.pop(0) if want.outputs else None
            task.alike &= wanted is not None and wanted.shape == outputs.shape
            if wanted is None or not task.alike:
                return
            lacking = wanted.to(outputs.device).double() - outputs.double()
            if shift is not None:
                lacking = lacking - shift.view(-1, *[1] * (lacking.ndim - 1 - want.axis(lacking)))
            seed = task.residuals.count  # so that tasks that share their moments look at the same positions
            for found, lacked in rows(task.module, inputs, lacking, task.columns, self.positions, seed):
                read = task.moments.about(found)
                if task.leads:
                    task.moments.add(read)
                task.residuals.add(read, lacked)

        return compare

    def _update(self, task: _Task, ridge: float) -> None:
        module, consumer, residuals = task.module, task.consumer, task.residuals
        if not (task.alike and task.runs and residuals.count == task.moments.count):
            self.notes[consumer.name] = _NEVER_RUN if task.alike else "it is not called alike in both models"
            return
        self._check_some(consumer.name, residuals.count)
        self._check(consumer.name, residuals.square)
        centred = self._takes_constant(consumer)
        if not module.weight.requires_grad:
            self._add_constant(consumer, (residuals.total / residuals.count).flatten())
            return
        added, constant = fit(task.moments, residuals, ridge=ridge, centred=centred, name=consumer.name)
        weight = module.weight.data.unflatten(0, (groups(module), -1))[:, :, task.columns]
        weight += added.mT.reshape(weight.shape).to(weight)
        if centred:
            self._add_constant(consumer, constant.flatten())

    # -------------------------------------------------------------- batch norm

    def measure_norms(self) -> None:
        sums: dict[_BatchNorm, ChannelSums] = {}
        for name, module in self.ours.items():
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                if _is_free(module):
                    sums[module] = ChannelSums()
                else:
                    self.notes[name] = "it is frozen"
        with ExitStack() as stack:
            for module in sums:
                stack.callback(setattr, module, "num_batches_tracked", module.num_batches_tracked)
                stack.callback(module.train, module.training)
                stack.enter_context(module.register_forward_pre_hook(_by_itself, with_kwargs=True))
                module.num_batches_tracked = None
            for batch in self.data if sums else ():
                self.data.run(self.repaired, batch, {module: one.add for module, one in sums.items()})
        for module, one in sums.items():
            if one.count > 1:
                mean = one.total / one.count
                self._check(next(name for name, other in self.ours.items() if other is module), one.square)
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.copy_(mean)
                module.running_var.copy_(((one.square - one.count * mean**2) / (one.count - 1)).clamp_min(0))

    # -------------------------------------------------------------- what they share

    def _check_some(self, name: str, count: int) -> None:
        if not count:
            raise ProfileError(f"{name}: expected batches with examples, found empty ones alone; look at the loader")

    def _check(self, name: str, values: Tensor) -> None:
        if not values.isfinite().all():
            raise ProfileError(f"{name}: what it reads or computes is not finite; look at the weights and the data")

    def _takes_constant(self, consumer: Consumer) -> bool:
        """Whether a constant can be added to what a layer computes, without a parameter that is not there."""
        bias = self.ours[consumer.name].bias
        return self._norm(consumer) is not None if bias is None else bias.requires_grad

    def _norm(self, consumer: Consumer) -> _BatchNorm | None:
        """The batch norm behind a layer, if it may be changed."""
        norm = self.ours.get(consumer.norm or "")
        return norm if isinstance(norm, _BatchNorm) and _is_free(norm) else None

    def _add_constant(self, consumer: Consumer, offset: Tensor, *, new: bool = False) -> None:
        """Add to what a layer computes, float64 [outputs]; where there is no place, perhaps in a new bias."""
        module = self.ours[consumer.name]
        if module.bias is not None:
            if module.bias.requires_grad:
                module.bias.data += offset.to(module.bias)
            else:
                self.notes[consumer.name] = "its bias is frozen"
        elif (norm := self._norm(consumer)) is not None:
            assert norm.running_mean is not None
            norm.running_mean -= offset.to(norm.running_mean)
            self.shifts[consumer.name] = self.shifts.get(consumer.name, 0) + offset
        elif new and not module.weight.requires_grad:
            self.notes[consumer.name] = "it is frozen"
        elif new and offset.any():
            module.bias = nn.Parameter(offset.to(module.weight))
            past = history(self.repaired)
            set_history(self.repaired, replace(past, biases=(*past.biases, f"{consumer.name}.bias".lstrip("."))))


def _is_free(norm: _BatchNorm) -> bool:
    return all(parameter.requires_grad for parameter in norm.parameters(recurse=False))


def _by_itself(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Let a batch be normalised by itself, unless it has but one value of a channel, as the last of an epoch may."""
    inputs: Tensor = args[0] if args else kwargs["input"]
    norm.train(inputs.numel() > inputs.shape[1])


class _Wanted:
    """What a layer of the original computed in a batch, of the outputs that are left, call by call."""

    def __init__(self, consumer: Consumer, module: Reader) -> None:
        self.consumer, self.module = consumer, module
        self.outputs: list[Tensor] = []

    def axis(self, outputs: Tensor) -> int:
        """Along which the outputs of a layer lie."""
        return outputs.ndim - 1 - (0 if isinstance(self.module, nn.Linear) else self.module.weight.ndim - 2)

    def keep(self, _: Tensor, outputs: Tensor) -> None:
        stay = torch.from_numpy(np.flatnonzero(self.consumer.outputs)).to(outputs.device)
        self.outputs.append(outputs.index_select(self.axis(outputs), stay))  # what follows may write over the outputs
