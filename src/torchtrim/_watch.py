"""Count at the activation calls of a model while it runs."""

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torchtrim._activations import ACTIVATIONS, RECURRENT, kind_of
from torchtrim._classes import Label, rows_of
from torchtrim._counting import Counts
from torchtrim._flow import Site
from torchtrim._graph import trace
from torchtrim._neurons import NeuronGraph
from torchtrim._progress import uninterrupted
from torchtrim._tally import Place, Tallies
from torchtrim.errors import ProfileError, TorchtrimError

Limits: TypeAlias = dict[tuple[int, str, str], float]  # by activation call, up to which size a value is zero


class _MisfitError(Exception):
    """This call does not go the way that was assumed."""


class NotFiniteError(ProfileError):
    """NaN or infinite activations in a batch that the message names; it need not be the one in progress."""


@dataclass(eq=False)
class _Path:
    """One way through the model: its activation calls, and which parameters are read before, between and after them.

    `trail`: numbers of parameters, and -1 for an activation; None until the way has been gone once.
    """

    sites: tuple[Site, ...]
    trail: list[int] | None = None


class Watch(TorchDispatchMode):
    """Counts at the activation calls of a model while it runs.

    Which neurons an activation belongs to is learnt by tracing the first call, and again any call that goes another
    way: that reads other parameters, or has larger images ahead of a flatten.
    """

    def __init__(self, model: nn.Module, *, through_norms: bool = False, zero_tolerance: float = 0.0) -> None:
        super().__init__()
        self.zero_tolerance = zero_tolerance
        self.limits: Limits = {}
        self.model = model
        self.through_norms = through_norms
        self.graph: NeuronGraph | None = None
        self.tallies = Tallies()
        self.classes: dict[Label, Tallies] = {}  # what belongs to examples of a class, where these are told
        self.class_examples: Counter[Label] = Counter()
        self.batches = 0  # counted
        self.examples = 0
        self._numbers = {id(parameter): number for number, parameter in enumerate(model.parameters())}
        self._paths: list[_Path] = []
        self._usual: dict[Any, _Path] = {}  # by the shapes of the inputs, the path that was gone last
        self._wrong: set[tuple[int, int]] = set()  # call of this batch and id of a path that it did not go
        self._rows: dict[Label, Tensor] = {}  # of the batch in progress, the examples of each class
        self._call = 0
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] = (), {}
        self._path: _Path | None = None  # of the call in progress
        self._seen = 0
        self._recurrent = 0  # how deep in recurrent modules the run is
        self._trail: list[int] = []
        self._examples = 0  # of the call in progress
        self._pending_examples = 0
        self._names: dict[Any, str | None] = {}  # by operator, its name if it may be an activation

    def run(self, call: Callable[[], Any], labels: Sequence[Label] | None = None) -> None:
        """Call the model, and count the batch as a whole or not at all. labels: of its examples, to count by class.

        Raises NotFiniteError, where values are on another device some batches late.
        """
        self._wrong.clear()
        self._rows = {} if labels is None else rows_of(labels)
        for label in self._rows:
            self.classes.setdefault(label, Tallies())
        try:
            while not self._fits(call):
                if self._candidate() is None:
                    self._learn()
        except TorchtrimError:
            self.look()  # an earlier batch may be why
            raise
        finally:
            self._arguments = (), {}  # the next batch is made without this one
        with uninterrupted():
            for tallies in self._tallies():
                tallies.commit(self.batches + 1)
            self.class_examples.update({label: rows.numel() * self._call for label, rows in self._rows.items()})
            self.examples += self._pending_examples
            self.batches += 1
        self.look(self.batches)

    def restart(self) -> None:
        """Forget what was counted, and go on."""
        self.tallies, self.classes = Tallies(), {}
        self.class_examples.clear()
        self.examples = 0

    def totals(self) -> dict[Place, Counts]:
        """What was counted, of all classes and of none."""
        totals: dict[Place, Counts] = {}
        for tallies in self._tallies():
            for place, counts in tallies.totals().items():
                totals[place] = totals[place] + counts if place in totals else counts
        return totals

    def _tallies(self) -> list[Tallies]:
        return [self.tallies, *self.classes.values()]

    def look(self, batch: int | None = None) -> None:
        """Raise NotFiniteError if a batch had NaN or infinite activations.

        batch: the one that was just counted; if it is given, devices are looked at now and then only.
        """
        found = [bad for tallies in self._tallies() if (bad := tallies.bad(batch)) is not None]
        if found:
            bad = min(found, key=lambda one: (one[0], one[1][0].index))
            number, (site, _) = bad
            raise NotFiniteError(
                f"batch {number}: NaN or infinite activations {self._where(site)}; look for such values in the weights "
                "and the data"
            )

    def _fits(self, call: Callable[[], Any]) -> bool:
        """Whether each call went a known way; the batch in progress then holds what was counted on it."""
        for tallies in self._tallies():
            tallies.drop()
        self._pending_examples = self._call = 0
        self._recurrent = 0
        hooks = [
            self.model.register_forward_pre_hook(
                lambda _, args, kwargs: self._begin(args, kwargs), with_kwargs=True, prepend=True
            ),
            self.model.register_forward_hook(lambda *_: self._end()),
        ]
        for module in self.model.modules():
            if isinstance(module, RECURRENT):
                hooks.append(module.register_forward_pre_hook(lambda *_: self._enter_recurrent(1)))
                hooks.append(module.register_forward_hook(lambda *_: self._enter_recurrent(-1)))
        try:
            # not inference mode: what a model caches there could not be trained with afterwards
            with torch.no_grad(), self:
                call()
        except _MisfitError:
            if self._path is not None:
                self._wrong.add((self._call, id(self._path)))
            return False
        except ProfileError:
            raise
        except Exception as error:
            first = str(error).partition("\n")[0]
            raise ProfileError(
                f"{type(self.model).__name__} cannot run on it: {type(error).__name__}: {first}; expected what the "
                "model is called with: a tensor, a tuple or list that begins with it, or a mapping of keyword inputs; "
                "pass forward=lambda model, batch: ... to call it otherwise"
            ) from error
        finally:
            self._path = None
            for hook in hooks:
                hook.remove()
        return True

    def _enter_recurrent(self, depth: int) -> None:
        self._recurrent += depth

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._arguments = args, kwargs
        self._examples = next((shape[0] for shape in self._shapes() if shape), 1)
        if not self._examples:
            raise ProfileError("expected at least one example, found none; leave empty batches out")
        told = sum(rows.numel() for rows in self._rows.values())
        if self._rows and told != self._examples:
            raise ProfileError(f"classes: expected a label for each of {self._examples} examples, found {told}")
        self._path = self._candidate()
        self._seen = 0
        self._trail = []
        if self._path is None:
            raise _MisfitError

    def _end(self) -> None:
        path = self._path
        if path is None:
            return
        if self._seen != len(path.sites) or (path.trail is not None and len(path.trail) != len(self._trail)):
            raise _MisfitError
        path.trail = self._trail
        self._path = None
        self._usual[self._shapes()] = path
        self._pending_examples += self._examples
        self._call += 1

    def _candidate(self) -> _Path | None:
        """A path that this call may go: the one that its like went last, or any other that it has not left yet."""
        usual = self._usual.get(self._shapes())
        ordered = self._paths if usual is None else [usual, *self._paths]
        return next((path for path in ordered if (self._call, id(path)) not in self._wrong), None)

    def _learn(self) -> None:
        if any(path.trail is None for path in self._paths):
            raise ProfileError(
                "the model goes another way than when it was traced on the same input, so that its activations cannot "
                "be told apart; make it deterministic in evaluation mode"
            )
        graph = trace(self.model, _example(self.model, *self._arguments), through_norms=self.through_norms)
        self._paths.append(_Path(graph.sites))
        self.graph = self.graph or replace(graph, example=None, training_example=None, recordings=())  # let go

    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        leaves = pytree.tree_leaves(self._arguments)
        return tuple(tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Runs at every operator of every batch, so that each line of it counts.
        kwargs = kwargs or {}
        path, numbers = self._path, self._numbers
        if path is not None:
            for argument in (*args, *kwargs.values()) if kwargs else args:
                if id(argument) in numbers:
                    self._go(numbers[id(argument)])
                elif type(argument) is list or type(argument) is tuple:
                    for item in argument:
                        if id(item) in numbers:
                            self._go(numbers[id(item)])
        result = func(*args, **kwargs)
        name = self._names.get(func, "")
        if name == "":
            name = self._names[func] = _activation(func)
        if name is not None and path is not None and not self._recurrent and kind_of(name, args, kwargs) is not None:
            self._go(-1)
            self._count(path, next(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)))
        return result

    def _go(self, step: int) -> None:
        trail = self._path and self._path.trail
        if trail is not None and (len(self._trail) == len(trail) or trail[len(self._trail)] != step):
            raise _MisfitError
        self._trail.append(step)

    def _count(self, path: _Path, values: Tensor) -> None:
        if self._seen == len(path.sites):
            raise _MisfitError
        site = path.sites[self._seen]
        self._seen += 1
        limit = self._limit(site, values)
        for index, factor in enumerate(site.labels.factors):
            kept = factor.axes()
            if values.ndim != factor.atoms.ndim or any(values.shape[axis] != factor.atoms.shape[axis] for axis in kept):
                raise _MisfitError
            fits = bool(values.ndim) and 0 not in kept and values.shape[0] % self._examples == 0
            for label, rows in self._rows.items() if fits else ():
                chosen = _chosen(values, rows, self._examples) if len(self._rows) > 1 else values
                self.classes[label].add((site, index), chosen, kept, rows.numel(), limit)
            if not (fits and self._rows):
                self.tallies.add((site, index), values, kept, self._examples if fits else None, limit)

    def _limit(self, site: Site, values: Tensor) -> float:
        """Up to which size a value counts as zero: a share of the root mean square where the site was first seen."""
        if not self.zero_tolerance or site.kind == "rectifier":
            return 0.0
        key = site.index, site.name, site.module
        if key not in self.limits:
            size = values.detach().double().square().mean().sqrt()
            self.limits[key] = float((self.zero_tolerance * size).float())  # all ways to count compare with one number
        return self.limits[key]

    def _where(self, site: Site) -> str:
        graph = self.graph
        assert graph is not None
        roots = {int(root) for factor in site.labels.factors for root in np.unique(graph.root[factor.atoms])} - {0}
        layers = [name for name, layer in graph.layers.items() if not roots.isdisjoint(layer.roots.tolist())]
        place = f"{site.name} in {site.module or 'the model itself'}"
        return f"of layer {layers[0]!r} ({place})" if layers else f"at {place}"


def _chosen(values: Tensor, rows: Tensor, examples: int) -> Tensor:
    """The values of some examples, of which each has as many rows along the first axis."""
    split = values.unflatten(0, (examples, values.shape[0] // examples))
    return split[rows.to(values.device)].flatten(0, 1)


def _activation(func: Any) -> str | None:
    name = func._schema.name.removeprefix("aten::").rstrip("_")
    return name if name in ACTIVATIONS else None


def _example(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An example with which `trace` calls the model as it was called."""
    if not (args and kwargs):
        return kwargs or args
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    return dict(bound.arguments)
