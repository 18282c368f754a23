"""Experts of a mixture, which a router picks by data: found by how a model is built, proved by comparison.

Which of them run is up to the data, so that labels cannot tell what becomes of a model that has fewer. What belongs to
an expert is therefore looked for in the module around its router: an entry in a list of modules, or a slice of stacked
parameters. A model without some experts is compared with the whole one in which they are never picked; with random
values, and as often as it takes to have every expert that stays picked.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from torchtrim._copies import NUMBER, call_arguments, contract, named_tensors, rebuild
from torchtrim._flow import IS_OUTPUT, Step
from torchtrim._labels import Atoms
from torchtrim._neurons import Kept, Mixture, NeuronGraph, cut
from torchtrim._surgery_attributes import set_attributes

_RTOL = 1e-4  # relative to the largest output: routers compute in single precision, and what is wrong is far off

# ------------------------------------------------------------------ found


def candidates(
    model: nn.Module, routers: Mapping[str, tuple[str, int]], reasons: Mapping[str, str]
) -> Iterator[tuple[Mixture, list[tuple[str, int]]]]:
    """What may be mixtures, without roots, each with the axes of tensors along which its experts lie.

    routers: the layers that may be a router, as parameter and axis, in the order of execution. reasons: why they stay.
    """
    tensors = named_tensors(model)
    taken: set[str] = set()
    for layer, (parameter, axis) in routers.items():
        table = isinstance(model.get_submodule(parameter.rpartition(".")[0]), nn.Embedding)
        if tensors[parameter].ndim != 2 or table or IS_OUTPUT in reasons[layer]:
            continue
        found = _around(model, tensors, layer, parameter, axis)
        if found is not None and taken.isdisjoint(claimed := {*found[0].lists, *(name for name, _ in found[1])}):
            taken |= claimed
            yield found


def _around(
    model: nn.Module, tensors: Mapping[str, Tensor], layer: str, parameter: str, axis: int
) -> tuple[Mixture, list[tuple[str, int]]] | None:
    """The mixture in the smallest module that has as many experts as the router has neurons."""
    size = tensors[parameter].shape[axis]
    owner = parameter.rpartition(".")[0]
    for block in _outwards(owner):
        module = model.get_submodule(block)
        lists = tuple(_join(block, name) for name, one in module.named_modules() if _holds_experts(one, size))
        lists = tuple(name for name in lists if not f"{owner}.".startswith(f"{name}."))
        inside = [name for name in tensors if name.startswith(_join(block, "")) and name != parameter]
        inside = [name for name in inside if not name.startswith(tuple(f"{entries}." for entries in lists))]
        first = {name: tensors[name].ndim for name in inside if tensors[name].shape[:1] == (size,)}
        homes = {name.rpartition(".")[0] for name, ndim in first.items() if ndim > 2}
        homes = {home for home in homes if not type(model.get_submodule(home)).__module__.startswith("torch.nn.")}
        stacks = [name for name, ndim in first.items() if ndim > 1 and name.rpartition(".")[0] in homes]
        if lists or stacks:
            within = (name for name, _ in model.get_submodule(owner).named_modules() if name)
            near = {owner, block, *homes, *(_join(owner, name) for name in within)}
            vectors = {
                name: tensors[name].shape.index(size)
                for name in inside
                if name.rpartition(".")[0] in near and tensors[name].numel() == size in tensors[name].shape
            }
            mixture = Mixture(layer, block, tuple(vectors), lists, (), np.empty(0, np.int64), ())
            return mixture, [(parameter, axis), *((name, 0) for name in stacks), *vectors.items()]
    return None


def _outwards(name: str) -> Iterator[str]:
    yield name
    while name:
        name = name.rpartition(".")[0]
        yield name


def _join(outer: str, inner: str) -> str:
    return f"{outer}.{inner}" if outer else inner


def _holds_experts(module: nn.Module, size: int) -> bool:
    """Whether it is a list of modules of one kind, one for each expert, or a dictionary that numbers them."""
    entries = module._modules if isinstance(module, (nn.ModuleList, nn.ModuleDict)) else {}
    numbers = [NUMBER.search(key) for key in entries]
    return (
        len(entries) == size
        and [number and int(number[0]) for number in numbers] == list(range(size))
        and len({NUMBER.sub("", key) for key in entries}) == len(set(map(type, entries.values()))) == 1
    )


def settled(model: nn.Module, mixture: Mixture, roots: Atoms, root: Atoms, steps: Sequence[Step]) -> Mixture:
    """A candidate with its roots, and what follows from them."""
    inside = f"{mixture.block}." if mixture.block else ""
    own = [step for step in steps if f"{step.where}.".startswith(inside)]
    return replace(
        mixture,
        roots=roots,
        limits=tuple(_limits(roots, root, own)),
        attributes=tuple(_attributes(model, mixture, roots.size)),
    )


def _limits(roots: Atoms, root: Atoms, steps: Sequence[Step]) -> Iterator[tuple[Atoms, int]]:
    """How many of the experts, or of groups of them, the largest are picked from."""
    maxima = sum(step.name in ("max", "argmax") and step.tensors[0][0][-1:] == roots.shape for step in steps)
    if maxima:
        yield roots, maxima  # one after the other
    for step in (step for step in steps if step.name == "topk"):
        (shape, labels), least = step.tensors[0], step.constants[1]
        axis = next((one for one in step.constants[2:3] if type(one) is int), -1) % len(shape)
        lines = [np.unique(root[f.atoms.reshape(-1)]) for f in labels.factors if f.axes() == (axis,)]
        lines = [line for line in lines if np.isin(line, roots).all()]
        if lines or shape[axis] == roots.size:
            yield (lines[0] if lines and lines[0].size < roots.size else roots), least


def _attributes(model: nn.Module, mixture: Mixture, size: int) -> Iterator[tuple[str, str]]:
    """The attributes that say how many experts there are: by their names, or else by their value alone."""
    block = model.get_submodule(mixture.block)
    modules = {_join(mixture.block, name) if name else mixture.block: module for name, module in block.named_modules()}
    equal = [
        (where, name)
        for where, module in modules.items()
        if not where.startswith(tuple(f"{entries}." for entries in mixture.lists))
        and not type(module).__module__.startswith("torch.nn.")
        for name, value in vars(module).items()
        if type(value) is int and value == size
    ]
    named = [(where, name) for where, name in equal if "expert" in name and _OTHERS.isdisjoint(name.split("_"))]
    yield from named or equal


_OTHERS = frozenset(["per", "shared"])  # of `num_experts_per_tok`, of experts that see every token


# ------------------------------------------------------------------ gone


def lists_left(graph: NeuronGraph, kept: Kept) -> dict[str, tuple[int, ...]]:
    """Which entries are left of lists of modules that lose some."""
    return {
        name: tuple(np.flatnonzero(kept[one.roots]).tolist())
        for one in graph.mixtures
        if not kept[one.roots].all()
        for name in one.lists
    }


def without_experts(
    model: nn.Module, graph: NeuronGraph, kept: Kept, sources: Mapping[str, Tensor]
) -> tuple[nn.Module, str | None]:
    """The model of which only this is kept, and what is wrong with it, had it all of its experts."""
    return _small(model, graph, kept, cut(graph, sources, kept)), difference(model, graph, kept)


def _small(model: nn.Module, graph: NeuronGraph, kept: Kept, tensors: Mapping[str, Tensor]) -> nn.Module:
    small = rebuild(model, tensors)
    set_attributes(model, small, graph, kept)
    for one in graph.mixtures:
        for where, name in one.attributes if not kept[one.roots].all() else ():
            setattr(small.get_submodule(where), name, int(kept[one.roots].sum()))
    contract(small, lists_left(graph, kept))
    return small


def close(model: nn.Module, graph: NeuronGraph, gone: Mapping[str, Any]) -> ExitStack:
    """Give the scores of these positions of routers minus infinity, in place; what is returned opens them again."""
    opened = ExitStack()
    for one in (one for one in graph.mixtures if len(gone[one.router])):
        places = torch.as_tensor(gone[one.router])
        tensors = named_tensors(model)
        for vector in (tensors[name] for name in one.vectors if tensors[name].is_floating_point()):
            before = vector.detach().clone()
            opened.callback(vector.data.copy_, before)
            axis = vector.shape.index(vector.numel())
            vector.data.index_fill_(axis, places.to(vector.device), -math.inf)
        layer = graph.layers[one.router]
        for place in {one.block, layer.parameter.rpartition(".")[0]}:  # its forward may not be what is called
            inside, module = f"{place}." if place else "", model.get_submodule(place)
            door = _Door(layer.parameter.removeprefix(inside), layer.axis, tuple(places.tolist()))
            opened.enter_context(module.register_forward_pre_hook(door.enter))
            opened.enter_context(module.register_forward_hook(door.leave, always_call=True))
    return opened


class _Door:
    """Hooks around a mixture, inside which the products of its router's weight have closed positions."""

    def __init__(self, parameter: str, axis: int, gone: tuple[int, ...]) -> None:
        self.parameter, self.axis, self.gone = parameter, axis, gone
        self.modes: list[_Closed] = []

    def enter(self, module: nn.Module, _: Any) -> None:
        self.modes.append(_Closed(module.get_parameter(self.parameter), self.axis, self.gone))
        self.modes[-1].__enter__()

    def leave(self, *_: Any) -> None:
        self.modes.pop().__exit__(None, None, None)


class _Closed(TorchFunctionMode):
    """The first function that combines the weight with another tensor gives minus infinity at closed positions."""

    def __init__(self, weight: Tensor, axis: int, gone: tuple[int, ...]) -> None:
        super().__init__()
        self.size, self.gone = weight.shape[axis], gone
        self.same = {id(weight): weight}  # what is only looked at in another way, or converted

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if isinstance(result, Tensor) and any(id(one) in self.same for one in given):
            if all(id(one) in self.same for one in given):
                self.same[id(result)] = result
            elif result.ndim and result.shape[-1] == self.size:
                closed = torch.zeros(self.size, dtype=torch.bool)
                closed[list(self.gone)] = True
                result = result.masked_fill(closed.to(result.device), -math.inf)
        return result


# ------------------------------------------------------------------ proved


def difference(model: nn.Module, graph: NeuronGraph, kept: Kept) -> str | None:
    """Why a model without experts is not the whole one in which none of them is picked; None if it is.

    Both have lost what else goes. They are compared with all experts that stay open to tokens, and then with as many at
    a time as a token goes to, so that each of them is picked.
    """
    graph = replace(graph, mixtures=tuple(one for one in graph.mixtures if not kept[one.roots].all()))
    whole = kept.copy()
    whole[graph.experts_roots] = True
    sources = named_tensors(model)
    if any(tensor.is_meta for tensor in sources.values()):
        return "they cannot be compared without data"
    try:
        large, example = _random(_small(model, graph, whole, cut(graph, sources, whole)), graph)
        left = {n: tuple(r[whole[r]] if r.size > 1 else r for r in axes) for n, axes in graph.axes.items()}
        small = _small(model, graph, kept, cut(replace(graph, axes=left), named_tensors(large), kept)).eval()
        turns = {one.router: _turns(one, kept) for one in graph.mixtures}
        for turn in range(max(map(len, turns.values()))):
            opened = {name: several[turn % len(several)] for name, several in turns.items()}
            found = _outputs(large, example, graph, opened, np.ones(len(kept), bool))
            if (fault := _fault(_outputs(small, example, graph, opened, kept), found)) is not None:
                return fault
    except Exception as error:  # it is the model's own code that runs
        lines = str(error).splitlines()
        return f"the model's own code counts them ({type(error).__name__}: {lines[0] if lines else ''})"
    return None


def _random(model: nn.Module, graph: NeuronGraph) -> tuple[nn.Module, Any]:
    """A copy with random values in its mixtures, and the example; in double precision where the model takes that."""
    model = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(0)
    inside = tuple(f"{one.block}." if one.block else "" for one in graph.mixtures)
    vectors = {name for one in graph.mixtures for name in one.vectors}
    for name, tensor in named_tensors(model).items():
        own = name in vectors or (isinstance(tensor, nn.Parameter) and name.startswith(inside))
        if own and tensor.is_floating_point():
            values = torch.randn(tensor.shape, generator=generator) / math.sqrt(max(tensor.shape[-1:], default=1))
            tensor.data.copy_(values)
    double, example = copy.deepcopy(model).double(), pytree.tree_map(_double, graph.example)
    try:
        _called(double, example)
    except RuntimeError:
        return model, graph.example
    return double, example


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _turns(mixture: Mixture, kept: Kept) -> list[Atoms]:
    """Positions of experts that are open at a time: all, then as many as a token goes to."""
    stay = np.flatnonzero(kept[mixture.roots])
    starts = range(0, stay.size, mixture.picked)
    return [stay, *(stay[min(start, stay.size - mixture.picked) :][: mixture.picked] for start in starts)]


def _outputs(
    model: nn.Module, example: Any, graph: NeuronGraph, opened: Mapping[str, Atoms], kept: Kept
) -> list[Tensor]:
    """What a model with these experts gives where all but some of them are closed."""
    gone = {
        one.router: np.flatnonzero(~np.isin(np.flatnonzero(kept[one.roots]), opened[one.router]))
        for one in graph.mixtures
    }
    with close(model, graph, gone):
        return _called(model, example)


def _called(model: nn.Module, example: Any) -> list[Tensor]:
    args, kwargs = pytree.tree_map(lambda one: one.clone() if isinstance(one, Tensor) else one, call_arguments(example))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        outputs = model(*args, **kwargs)
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _fault(found: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    if [one.shape for one in found] != [one.shape for one in expected]:
        return "they show in the sizes of the outputs"
    for new, old in zip(found, expected, strict=True):
        rtol = max(_RTOL, torch.finfo(old.dtype).eps ** 0.5) if old.is_floating_point() else 0
        apart = (new.double() - old.double()).abs()
        if apart.numel() and not apart.max() <= rtol * old.abs().max():
            return "without them others are picked, or in another way"
    return None
