"""Run a model over data and measure how often each of its neurons is silent.

`profile` counts at the model's activation sites: on the tensors that the activation functions return, wherever and
however often they are called. Every site's counts go to the neurons whose labels reach it (`_graph.py`).
"""

import itertools
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchtrim import _shards
from torchtrim._checkpoint import Checkpoint, Reached, digest_of
from torchtrim._copies import named_tensors
from torchtrim._counting import native_room
from torchtrim._neurons import NeuronGraph
from torchtrim._profile import Part, Profile, added_up, since
from torchtrim._progress import displayed, shown, uninterrupted
from torchtrim._stable import Stable
from torchtrim._watch import NotFiniteError, Watch
from torchtrim.criteria import Floats, LayerProfile
from torchtrim.errors import ProfileError, TorchtrimWarning, TraceError

Forward = Callable[[nn.Module, Any], Any]


def profile(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None = None,
    *,
    through_norms: bool = False,
    zero_tolerance: float = 0.0,
    until: Stable | None = None,
    sharded: bool = True,
    checkpoint: str | Path | None = None,
    every: int = 100,
    progress: bool | Progress = False,
) -> Profile:
    """Measure every neuron of a model over data, in one pass, in evaluation mode and without gradients.

    batches: any iterable, such as a DataLoader. A batch that is a tensor is the model's input; of a tuple or list the
    first element is; a mapping holds keyword inputs. `forward=lambda model, batch: ...` calls the model otherwise.
    Tensors are moved to where the model is. Memory does not grow with the data. through_norms: as for `trace`; a plan
    that is selected from the profile has it too. zero_tolerance: after activations that give no exact zeros (GELU,
    SiLU, tanh, sigmoid), what counts as zero, as a share of the root mean square of the tensor's values in the first
    batch; such as 0.01. until: when to stop before the data end; the profile then has `in_doubt`.

    checkpoint: a file that holds the pass so far, written every `every` batches. A call with a file that is there goes
    on after the last of them, so that the data must come in the same order; it ends with the same integers, and with
    the same bits where the batches between two writes are the same. The file of a pass that ended is its profile, which
    a further call returns at once; delete it to measure anew. progress: whether to show a line in the terminal, or the
    display to show it in. An interrupt (Ctrl-C) ends the pass with the batches counted so far and marks the profile
    `partial`; without any it goes on as KeyboardInterrupt.

    In a process group of several processes (`torchrun`, `accelerate launch`) each gives its shard of the data, which
    may be empty, and gets the profile of all shards, equal to the last bit; sharded=False measures each on its own. A
    first batch is that of the first process that has one. Each keeps a checkpoint of its own, with its number at the
    end of the name; an interrupt of one is an error of all. A model in DistributedDataParallel is measured without it.

    A `TorchtrimWarning` says where the figures are uncertain or say little. The first axis of the first input is taken
    for the examples; every APoZ has a standard error, in which what happens within an example is one observation.

    The model is left as it was found: modes, gradients, hooks and random state.
    Raises ProfileError: no batches, a batch that does not fit the model, an activation that is NaN or infinite; the
    message names the batch, and the layer where there is one; and the process, on all of them. Raises StoreError: a
    checkpoint of another model, asked otherwise, or of other data; a file that cannot be written.
    """
    if isinstance(batches, Tensor):
        raise ProfileError(
            "batches: expected an iterable of batches, found a tensor, whose rows it would give; pass [it]"
        )
    if not 0 <= zero_tolerance < float("inf"):
        raise ProfileError(f"zero_tolerance: expected a share of the root mean square, found {zero_tolerance!r}")
    shared = sharded and _shards.several()
    if until and (shared or checkpoint is not None):
        other = "several processes that share a pass; pass sharded=False" if shared else "a checkpoint; leave one out"
        raise ProfileError(f"until: expected one pass from beginning to end, found {other}")
    model = _shards.unwrapped(model)
    file = None
    if checkpoint is not None:
        asked = {"through_norms": through_norms, "zero_tolerance": zero_tolerance}
        file = Checkpoint(checkpoint, every, model, **asked)
    watch = Watch(model, through_norms=through_norms, zero_tolerance=zero_tolerance)
    one = _Pass(model, forward, watch, file, until, shared=shared)
    with displayed(False if shared and _shards.rank() else progress) as display:
        found = _shards.together(lambda: one.over(batches, display)) if shared else one.over(batches, display)
    if found is None:
        raise ProfileError("expected at least one batch, found none; look at what the loader yields")
    if file and shared and not _shards.rank():
        file.write(Reached(found, 0, (0, ""), watch.limits))
    for note in found.notes:
        warnings.warn(note, TorchtrimWarning, stacklevel=2)
    return found


class _Looks:
    """Shows a pass over data to `until` every now and then."""

    def __init__(self, model: nn.Module, until: Stable) -> None:
        self.judge = until.begin()
        self._model, self._every = model, until.every
        self._blank: Profile | None = None
        self._seen: tuple[Part, ...] = ()

    def enough(self, watch: Watch) -> bool:
        """Whether the pass may end."""
        if watch.batches % self._every or watch.graph is None:
            return False
        watch.look()
        blank = self._blank = self._blank or unmeasured(self._model, watch.graph)
        before, self._seen = self._seen, _parts(watch)
        so_far, latest = (
            blank.with_parts(parts, 0, zero_tolerance=watch.zero_tolerance)
            for parts in (self._seen, since(before, self._seen))
        )
        return self.judge.look(so_far, latest)


class _Pass:
    """One pass of this process over data."""

    def __init__(
        self,
        model: nn.Module,
        forward: Forward | None,
        watch: Watch,
        file: Checkpoint | None,
        until: Stable | None,
        *,
        shared: bool,
    ) -> None:
        self._model, self._forward, self._watch, self._shared = model, forward, watch, shared
        self._file = file.of_process(*_shards.place()) if file and shared else file
        self._device = next((tensor.device for tensor in named_tensors(model).values()), torch.device("cpu"))
        self._reached: Reached | None = None  # what the file holds
        self._mark = 0, ""  # number and digest of a batch, by which the data are known again
        self._blank: Profile | None = None
        self._looks = _Looks(model, until) if until else None

    def over(self, batches: Iterable[Any], progress: Progress) -> Profile | None:
        """What they hold; None if there are none. What there is, `partial`, where an interrupt comes."""
        native_room(self._device.type)  # a way to count that is asked for and missing is known before the first batch
        watch = self._watch
        if self._file and (reached := self._file.read()):
            self._reached, self._mark = reached, reached.mark
            watch.limits, watch.batches = reached.limits, reached.batches
            if not reached.profile.partial:
                self._agree(iter(()))
                return reached.profile
        begun, before = time.perf_counter(), self._examples
        with _as_found(self._model, self._device), shown(progress, "measuring", _length(batches)) as show:
            try:
                for batch in self._agree(self._left(batches, show)):
                    self._count(batch, watch)
                    self._keep(batch)
                    del batch  # the next is made without it
                    rate = (self._examples - before) / max(time.perf_counter() - begun, 1e-9)
                    show(f", {rate:,.0f} examples/s")
                    if self._looks and self._looks.enough(watch):
                        break
            except KeyboardInterrupt:
                if not self._examples:
                    raise
                return self._save(partial=True)
            return self._save(partial=False)

    @property
    def _examples(self) -> int:
        """How many were counted, by earlier processes too."""
        return self._watch.examples + (self._reached.profile.examples if self._reached else 0)

    def _left(self, batches: Iterable[Any], show: Callable[[str], None]) -> Iterator[Any]:
        """The batches that no earlier process has counted."""
        iterator = iter(batches)
        for number in range(self._watch.batches):
            assert self._file is not None
            if not (passed := list(itertools.islice(iterator, 1))):
                raise self._file.too_few(self._watch.batches, number)
            self._file.check(self._mark, number + 1, passed.pop())
            show("")
        return iterator

    def _agree(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches, once all processes that share the pass agree on what counts as zero."""
        watch = self._watch
        if not (self._shared and watch.zero_tolerance):
            return batches
        trial = Watch(self._model, through_norms=watch.through_norms, zero_tolerance=watch.zero_tolerance)
        first = [] if watch.limits else list(itertools.islice(batches, 1))
        if first:
            self._count(first[0], trial)
        watch.limits = _shards.agreed(watch.limits or trial.limits)
        return itertools.chain((first.pop() for _ in range(len(first))), batches)

    def _count(self, batch: Any, watch: Watch) -> None:
        call, number = self._forward or _call, watch.batches + 1
        moved = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(self._device, non_blocking=True), batch)
        try:
            watch.run(lambda: call(self._model, moved))
        except NotFiniteError:
            raise
        except ProfileError as error:
            raise ProfileError(f"batch {number}: {error}") from error
        except TraceError as error:
            otherwise = "" if self._forward else " To call it otherwise, pass forward=lambda model, batch: ..."
            raise ProfileError(f"batch {number}: {error}{otherwise}") from error

    def _keep(self, batch: Any) -> None:
        """Write the file every now and then."""
        if self._file is None:
            return
        due = self._watch.batches % self._file.every == 0
        if due or not self._mark[0]:
            self._mark = self._watch.batches, digest_of(batch)
        if due:
            self._save(partial=True)

    def _save(self, *, partial: bool) -> Profile | None:
        """The profile of all that was counted, which goes to the file too."""
        watch = self._watch
        watch.look()
        found = self._reached and self._reached.profile
        if watch.examples:
            assert watch.graph is not None
            self._blank = self._blank or unmeasured(self._model, watch.graph)
            parts, tolerance = _parts(watch), watch.zero_tolerance
            doubt = self._looks.judge.in_doubt if self._looks else None
            latest = self._blank.with_parts(parts, watch.examples, zero_tolerance=tolerance, in_doubt=doubt)
            found = latest if found is None else found.merge(latest)
        elif found is None and watch.batches:
            raise ProfileError("`forward` did not call the model; expected it to call model(...) with the batch")
        if found is None:
            return None
        found.partial = partial
        if self._file:
            reached = Reached(found, watch.batches, self._mark, watch.limits)
            with uninterrupted():
                self._file.write(reached)
                self._reached = reached
                watch.restart()  # stretch by stretch: a pass that was cut between two gives the same bits
        return found


def _length(batches: Iterable[Any]) -> int | None:
    """How many there are; None if they do not know."""
    try:
        return len(batches)  # pyright: ignore[reportArgumentType]
    except (TypeError, NotImplementedError):
        return None


def unmeasured(model: nn.Module, graph: NeuronGraph) -> Profile:
    """The profile of a model that has seen no data: its layers, groups, locks and norms of weights."""
    incoming, outgoing = _incoming(model, graph), _outgoing(model, graph)
    layers = {
        name: LayerProfile.unmeasured(
            name,
            incoming_l1=incoming[name][0],
            incoming_l2=incoming[name][1],
            outgoing_l1=outgoing[0][layer.roots],
            outgoing_l2=outgoing[1][layer.roots],
            unit=np.where(layer.removable, layer.roots, -1),
            group=layer.group,
            locked=layer.locked,
        )
        for name, layer in graph.layers.items()
    }
    roots = {name: layer.roots for name, layer in graph.layers.items()}
    return Profile(layers, 0, roots=roots, through_norms=graph.through_norms)


def _parts(watch: Watch) -> tuple[Part, ...]:
    """What was counted, by neuron."""
    graph = watch.graph
    assert graph is not None
    return added_up(
        Part(site.index, site.name, site.module, site.kind, index, roots, counts.each(Tensor.flatten))
        for (site, index), counts in watch.tallies.totals().items()
        for roots in [graph.root[site.labels.factors[index].atoms].ravel()]
    )


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


@contextmanager
def _as_found(model: nn.Module, device: torch.device) -> Generator[None]:
    """Evaluation mode inside; modes and random state are as before at the end."""
    modes = [(module, module.training) for module in model.modules()]
    fused = torch.backends.mha.get_fastpath_enabled()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            model.eval()
            torch.backends.mha.set_fastpath_enabled(False)  # it would hide the activations of a transformer layer
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for module, mode in modes:
                module.training = mode


# ------------------------------------------------------------------ the weights into and out of neurons


def _incoming(model: nn.Module, graph: NeuronGraph) -> dict[str, tuple[Floats, Floats]]:
    """L1 and L2 norm of the weights that produce each neuron: float64 [neurons]."""
    weights = _weights(model)
    return {
        name: (_norms(weights[layer.parameter], layer.axis, 1), _norms(weights[layer.parameter], layer.axis, 2))
        for name, layer in graph.layers.items()
    }


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, without the connections that `torch.nn.utils.prune` has taken out."""
    buffers = dict(model.named_buffers())
    masks = {name: f"{name.removesuffix('_orig')}_mask" for name, _ in model.named_parameters()}
    return {
        name: parameter * buffers[masks[name]] if masks[name] in buffers else parameter
        for name, parameter in named_tensors(model).items()
        if isinstance(parameter, nn.Parameter)
    }


def _outgoing(model: nn.Module, graph: NeuronGraph) -> tuple[Floats, Floats]:
    """L1 and L2 norm of the weights that read each root: float64 [roots]."""
    first, second = np.zeros((2, len(graph.root)))
    producing = {(layer.parameter, layer.axis) for layer in graph.layers.values()}
    for name, parameter in _weights(model).items():
        for axis, roots in enumerate(graph.axes[name] if parameter.ndim > 1 else ()):
            if (name, axis) not in producing and roots.size > 1:
                np.add.at(first, roots, _norms(parameter, axis, 1))
                np.add.at(second, roots, _norms(parameter, axis, 2) ** 2)
    return first, np.sqrt(second)


def _norms(weight: Tensor, axis: int, order: int) -> Floats:
    """The norm of each slice along an axis: float64 [slices], summed in single precision at least."""
    others = [other for other in range(weight.ndim) if other != axis]
    values = weight.detach() if weight.dtype == torch.float64 else weight.detach().float()
    powers = values.abs() if order == 1 else values.square()
    sums = (powers.sum(others) if others else powers).double().cpu().numpy()
    return sums if order == 1 else np.sqrt(sums)
