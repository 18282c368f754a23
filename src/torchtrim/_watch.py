"""Count at the activation calls of a model while it runs."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torchtrim._counting import Counts, count
from torchtrim._flow import Site
from torchtrim._graph import trace
from torchtrim._neurons import NeuronGraph
from torchtrim._operators import RECTIFIERS, SMOOTH
from torchtrim.errors import ProfileError

Totals = dict[tuple[Site, int], Counts]  # by site and by which of its factors


class _MisfitError(Exception):
    """The activations of this call are not those of a call that was traced."""


class Watch(TorchDispatchMode):
    """Counts at the activation calls of a model while it runs.

    Which neurons an activation belongs to is learnt by tracing the first call, and again any call that differs from
    it where labels matter, such as one with larger images ahead of a flatten.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.graph: NeuronGraph | None = None
        self.totals: Totals = {}
        self.examples = 0
        self._known: dict[Any, tuple[Site, ...]] = {}  # by the shapes of a call's inputs
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] = (), {}
        self._sites: tuple[Site, ...] | None = None  # of the call in progress
        self._seen = 0
        self._pending: list[tuple[Site, int, Counts]] = []
        self._pending_examples = 0

    def run(self, call: Callable[[], Any]) -> None:
        """Call the model, and count the batch as a whole or not at all."""
        while not self._fits(call):
            self._learn()
        for site, factor, counts in self._pending:
            if not counts.finite:
                raise ProfileError(
                    f"NaN or infinite activations {self._where(site)}; look for such values in the weights and the data"
                )
            before = self.totals.get((site, factor))
            self.totals[site, factor] = counts if before is None else before + counts
        self.examples += self._pending_examples

    def _fits(self, call: Callable[[], Any]) -> bool:
        """Whether the activations were the known ones; `_pending` then holds what was counted at them."""
        self._pending.clear()
        self._pending_examples = 0
        hooks = (
            self.model.register_forward_pre_hook(
                lambda _, args, kwargs: self._begin(args, kwargs), with_kwargs=True, prepend=True
            ),
            self.model.register_forward_hook(lambda *_: self._end()),
        )
        try:
            with torch.inference_mode(), self:
                call()
        except _MisfitError:
            return False
        except Exception as error:
            first = str(error).partition("\n")[0]
            raise ProfileError(
                f"{type(self.model).__name__} cannot run on it: {type(error).__name__}: {first}; expected what the "
                "model is called with: a tensor, a tuple or list that begins with it, or a mapping of keyword inputs; "
                "pass forward=lambda model, batch: ... to call it otherwise"
            ) from error
        finally:
            self._sites = None
            for hook in hooks:
                hook.remove()
        return True

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._arguments = args, kwargs
        if self.graph is None:
            raise _MisfitError
        self._sites = self._known.get(self._signature(), self.graph.sites)
        self._seen = 0

    def _end(self) -> None:
        if self._sites is not None and self._seen != len(self._sites):
            raise _MisfitError
        self._sites = None
        self._pending_examples += next((shape[0] for shape in self._signature() if shape), 1)

    def _learn(self) -> None:
        signature = self._signature()
        if signature in self._known:
            raise ProfileError(
                "the model calls other activations than when it was traced on the same input, so that they cannot be "
                "told apart; make it deterministic in evaluation mode"
            )
        graph = trace(self.model, _example(self.model, *self._arguments))
        self._known[signature] = graph.sites
        self.graph = self.graph or graph

    def _signature(self) -> tuple[tuple[int, ...], ...]:
        leaves = pytree.tree_leaves(self._arguments)
        return tuple(tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._sites is None or func._schema.name.removeprefix("aten::").rstrip("_") not in _ACTIVATIONS:
            return result
        if self._seen == len(self._sites):
            raise _MisfitError
        site = self._sites[self._seen]
        self._seen += 1
        values = next(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))
        for index, factor in enumerate(site.labels.factors):
            kept = factor.axes()
            if values.ndim != factor.atoms.ndim or any(values.shape[axis] != factor.atoms.shape[axis] for axis in kept):
                raise _MisfitError
            self._pending.append((site, index, count(values, kept)))
        return result

    def _where(self, site: Site) -> str:
        graph = self.graph
        assert graph is not None
        roots = {int(root) for factor in site.labels.factors for root in np.unique(graph.root[factor.atoms])} - {0}
        layers = [name for name, layer in graph.layers.items() if not roots.isdisjoint(layer.roots.tolist())]
        place = f"{site.name} in {site.module or 'the model itself'}"
        return f"of layer {layers[0]!r} ({place})" if layers else f"at {place}"


_ACTIVATIONS = RECTIFIERS | SMOOTH


def _example(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An example with which `trace` calls the model as it was called."""
    if not (args and kwargs):
        return kwargs or args
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    return dict(bound.arguments)
