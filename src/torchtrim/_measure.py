"""Run a model over data and measure how often each of its neurons is silent.

`profile` counts at the model's activation sites: on the tensors that the activation functions return, wherever and
however often they are called. Every site's counts go to the neurons whose labels reach it (`_graph.py`).
"""

import itertools
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchtrim import _shards
from torchtrim._copies import named_tensors
from torchtrim._counting import native_room
from torchtrim._neurons import NeuronGraph
from torchtrim._profile import Part, Profile, added_up
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
    sharded: bool = True,
) -> Profile:
    """Measure every neuron of a model over data, in one pass, in evaluation mode and without gradients.

    batches: any iterable, such as a DataLoader. A batch that is a tensor is the model's input; of a tuple or list the
    first element is; a mapping holds keyword inputs. `forward=lambda model, batch: ...` calls the model otherwise.
    Tensors are moved to where the model is. Memory does not grow with the data. through_norms: as for `trace`; a plan
    that is selected from the profile has it too. zero_tolerance: after activations that give no exact zeros (GELU,
    SiLU, tanh, sigmoid), what counts as zero, as a share of the root mean square of the tensor's values in the first
    batch; such as 0.01.

    In a process group of several processes (`torchrun`, `accelerate launch`) each gives its shard of the data, which
    may be empty, and gets the profile of all shards, equal to the last bit; sharded=False measures each on its own. A
    first batch is that of the first process that has one. A model in DistributedDataParallel is measured without it.

    A `TorchtrimWarning` says where the figures are uncertain or say little. The first axis of the first input is taken
    for the examples; every APoZ has a standard error, in which what happens within an example is one observation.

    The model is left as it was found: modes, gradients, hooks and random state.
    Raises ProfileError: no batches, a batch that does not fit the model, an activation that is NaN or infinite; the
    message names the batch, and the layer where there is one; and the process, on all of them.
    """
    if isinstance(batches, Tensor):
        raise ProfileError(
            "batches: expected an iterable of batches, found a tensor, whose rows it would give; pass [it]"
        )
    if not 0 <= zero_tolerance < float("inf"):
        raise ProfileError(f"zero_tolerance: expected a share of the root mean square, found {zero_tolerance!r}")
    shared = sharded and _shards.several()
    one = _Pass(_shards.unwrapped(model), forward, through_norms, zero_tolerance, shared=shared)
    found = _shards.together(lambda: one.over(batches)) if shared else one.over(batches)
    if found is None:
        raise ProfileError("expected at least one batch, found none; look at what the loader yields")
    for note in found.notes:
        warnings.warn(note, TorchtrimWarning, stacklevel=2)
    return found


class _Pass:
    """One pass of this process over data."""

    def __init__(
        self, model: nn.Module, forward: Forward | None, through_norms: bool, zero_tolerance: float, *, shared: bool
    ) -> None:
        self._model, self._forward, self._shared = model, forward, shared
        self._device = next((tensor.device for tensor in named_tensors(model).values()), torch.device("cpu"))
        self._watch = Watch(model, through_norms=through_norms, zero_tolerance=zero_tolerance)

    def over(self, batches: Iterable[Any]) -> Profile | None:
        """What they hold; None if there are none."""
        native_room(self._device.type)  # a way to count that is asked for and missing is known before the first batch
        with _as_found(self._model, self._device):
            for batch in self._agreed(batches):
                self._count(batch, self._watch)
                del batch  # the next is made without it
            self._watch.look()
        return self._found()

    def _count(self, batch: Any, watch: Watch) -> None:
        number = watch.batches + 1
        moved = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(self._device, non_blocking=True), batch)
        try:
            watch.run(partial(self._forward or _call, self._model, moved))
        except NotFiniteError:
            raise
        except ProfileError as error:
            raise ProfileError(f"batch {number}: {error}") from error
        except TraceError as error:
            otherwise = "" if self._forward else " To call it otherwise, pass forward=lambda model, batch: ..."
            raise ProfileError(f"batch {number}: {error}{otherwise}") from error

    def _agreed(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, once all processes that share the pass agree on what counts as zero."""
        iterator = iter(batches)
        if self._shared and self._watch.zero_tolerance:
            first = list(itertools.islice(iterator, 1))
            trial = Watch(
                self._model, through_norms=self._watch.through_norms, zero_tolerance=self._watch.zero_tolerance
            )
            for batch in first:
                self._count(batch, trial)
            self._watch.limits = _shards.agreed(trial.limits)
            while first:
                yield first.pop()
        yield from iterator

    def _found(self) -> Profile | None:
        watch = self._watch
        if watch.graph is None:
            if watch.batches:
                raise ProfileError("`forward` did not call the model; expected it to call model(...) with the batch")
            return None
        blank = unmeasured(self._model, watch.graph)
        return blank.with_parts(_parts(watch), watch.examples, zero_tolerance=watch.zero_tolerance)


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
