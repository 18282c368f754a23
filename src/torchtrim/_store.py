"""A model as one safetensors file: its weights, and how it came from its ancestor.

Nothing in such a file is code. `load` needs a newly built ancestor: it copies the modules and replaces the tensors.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from torchtrim._attention import adapt
from torchtrim._copies import compacted, contract, named_tensors, rebuild, without_caches
from torchtrim._files import write_whole
from torchtrim._history import describes, history, set_history
from torchtrim._neurons import memory_of
from torchtrim._saved import FORMAT, KEY, VERSION, Content, library_version, opened, sizes
from torchtrim.errors import StoreError, nearest


def save(model: nn.Module, path: str | Path) -> None:
    """Write a model as one safetensors file, which `load` reads; it appears complete or not at all.

    Its metadata hold the plans that led from the ancestor to the model. Any model can be saved, trimmed or not. Buffers
    that a state_dict leaves out are stored too, for they may have been trimmed; each shared tensor is stored once.
    Raises StoreError: a tensor that has no values or no place in the format, or a path that cannot be written.
    """
    write_model(model, Path(path), {})


def load(model: nn.Module, path: str | Path) -> nn.Module:
    """The model that `save` wrote, made from a newly built ancestor; `model` itself is not changed.

    Widths, weights, dtypes, memory layout, shared tensors and history are the file's; devices, modes, hooks and which
    parameters are trained are those of `model`. A model on the meta device is loaded onto the CPU.
    Raises StoreError, listing all faults at once: a file that is missing, damaged or of another kind, and a `model`
    whose parameters and buffers have other names or shapes than the file's ancestor.
    """
    return _read(model, Path(path))[0]


def write_model(model: nn.Module, path: Path, facts: Mapping[str, Any]) -> None:
    """`save`, with facts about the model that JSON can say. Raises StoreError."""
    named = _all_tensors(model)
    _check_initialised(named, path)
    past = history(model)
    expected = {*past.shapes, *past.biases}
    if expected != set(named_tensors(model)):
        odd = sorted(expected ^ set(named_tensors(model)))
        raise StoreError(
            f"{path}: the model's tensors are not named as when it was trimmed: {', '.join(odd)}; "
            "save the model itself rather than one that wraps it, and add or remove no tensors"
        )
    own, tied, shared = _distinct(named)
    faults = [f"{name}: {fault}" for name, tensor in own.items() if (fault := _unstorable(tensor)) is not None]
    if faults:
        raise StoreError(f"{path}: the model cannot be saved:\n  " + "\n  ".join(faults))
    content = {
        "format": FORMAT,
        "version": VERSION,
        "torchtrim": library_version(),
        "plans": [json.loads(plan.to_json()) for plan in past.plans],
        "shapes": {name: list(shape) for name, shape in past.shapes.items()},
        "attributes": past.attributes,
        "biases": list(past.biases),
        "lists": past.lists,
        "tied": tied,
        "shared": shared,
        "strides": {name: strides for name, tensor in own.items() if (strides := _strides(tensor)) is not None},
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        "evaluating": [name for name, module in model.named_modules() if not module.training],
        "facts": dict(facts),
    }
    try:
        metadata = json.dumps(content)
        stored = to_safetensors(_apart(own), {KEY: metadata})
    except (TypeError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise StoreError(f"{path}: the model cannot be saved: {error}") from error
    write_whole(path, stored)


def read_model(model: nn.Module, path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """`load` and the facts; modes and which parameters are trained are as they were when the file was written."""
    loaded, content = _read(model, path)
    for name, parameter in loaded.named_parameters():
        parameter.requires_grad_(name not in content.frozen)
    for name, module in loaded.named_modules():
        module.training = name not in content.evaluating
    return loaded, dict(content.facts)


def _read(model: nn.Module, path: Path) -> tuple[nn.Module, Content]:
    with opened(path) as file:
        content = Content.of(file, path)
        model = _contracted(model, content.history.lists, path)
        _check(model, content, path)
        fresh = named_tensors(model)
        tensors = _Tensors(file, content)
        loaded = rebuild(model, {name: tensors.of(name, old.device) for name, old in fresh.items()})
        for name in set(content.history.biases) - set(fresh):
            place, _, leaf = name.rpartition(".")
            module = loaded.get_submodule(place)
            device = next((tensor.device for tensor in module.parameters(recurse=False)), torch.device("cpu"))
            module.register_parameter(leaf, nn.Parameter(tensors.of(name, device)))
    for name in content.tied:
        _tie(loaded, name, content.tied[name])
    modules = dict(loaded.named_modules())
    attributes = {name: dict(values) for name, values in content.history.attributes.items()}
    for name, values in attributes.items():
        for key, value in values.items():
            values[key] = tuple(value) if isinstance(vars(modules[name])[key], tuple) else value  # JSON has lists only
            setattr(modules[name], key, copy.copy(values[key]))
    set_history(compacted(adapt(without_caches(loaded))), replace(content.history, attributes=attributes))
    return loaded, content


def _contracted(model: nn.Module, lists: Mapping[str, tuple[int, ...]], path: Path) -> nn.Module:
    """A copy with what is left of its lists of modules; the model itself where they are whole."""
    if not lists:
        return model
    past = history(model)
    left: dict[str, list[int]] = {}
    for name, places in lists.items():
        try:
            entries = past.lists.get(name, range(len(model.get_submodule(name)._modules)))
            left[name] = [list(entries).index(place) for place in places]
        except (AttributeError, ValueError) as error:
            raise StoreError(
                f"{path}: expected a model with entries {list(places)} in {name}; build it anew"
            ) from error
    small = rebuild(model, named_tensors(model))
    contract(small, left)
    return small


class _Tensors:
    """The file's tensors, each read once per device into memory of its own."""

    def __init__(self, file: Any, content: Content) -> None:
        self.file = file
        self.content = content
        self.read: dict[tuple[str, torch.device], Tensor] = {}

    def of(self, name: str, device: torch.device) -> Tensor:
        stored = self.content.stored(name)
        device = torch.device("cpu") if device.type == "meta" else device
        if (stored, device) not in self.read:
            values: Tensor = self.file.get_tensor(stored)
            strides = self.content.strides.get(stored)
            place = torch.empty(values.shape, dtype=values.dtype, device=device)
            if strides is not None:
                place = torch.empty_strided(values.shape, strides, dtype=values.dtype, device=device)
            self.read[stored, device] = place.copy_(values)
        return self.read[stored, device].detach()  # an object of its own: shared is not tied


def _check(model: nn.Module, content: Content, path: Path) -> None:
    """Raise one StoreError that says in all what the model is not the ancestor of the file."""
    named = _all_tensors(model)
    _check_initialised(named, path)
    kind, past = type(model).__name__, history(model)
    if past.plans != content.history.plans[: len(past.plans)]:
        raise StoreError(
            f"{path}: expected a new {kind}, found one that was trimmed {len(past.plans)} times itself, by plans that "
            "are not the file's; build the model anew"
        )
    first = _distinct(named)[1]
    added = set(content.history.biases)
    faults = [f"{name}: in this model, not in the file" for name in named if name not in content.names]
    faults += [f"{name}: added by a repair in the file" for name in sorted((added & set(named)) - set(past.biases))]
    faults += [
        f"{name}: in the file, not in this model{nearest(name, set(named) - content.names)}"
        for name in sorted(content.names - added - set(named))
    ]
    modules = dict(model.named_modules())
    for name in added - set(named):
        holder = modules.get(name.rpartition(".")[0])
        if holder is None or "bias" not in holder._parameters:
            faults.append(f"{name}: in the file, no bias can be added in this model")
    for name in (name for name in named if name in content.names - added):
        expected = content.history.shapes[content.tied.get(name, name)]
        found = past.shapes.get(first.get(name, name), tuple(named[name].shape))
        if found != expected:
            faults.append(f"{name}: the file's ancestor has {sizes(expected)}, this model {sizes(found)}")
        other = first.get(name, name)
        if content.tied.get(name, name) != content.tied.get(other, other):
            faults.append(f"{name}: tied to {other} in this model, a tensor of its own in the file")
    for name, values in content.history.attributes.items():
        for key, value in values.items():
            found = vars(modules[name]).get(key) if name in modules else None
            if not describes(found) or isinstance(found, int) != isinstance(value, int):
                place = ".".join(filter(None, (name, key)))
                faults.append(f"{place}: the file sets it to {value!r}, this model has {found!r}")
    if faults:
        raise StoreError(
            f"{path}: it belongs to another model than this {kind}; build the model as it was before it was first "
            "trimmed:\n  " + "\n  ".join(faults)
        )


# ------------------------------------------------------------------ tensors


def _all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under each of its names."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found.update(model.named_buffers(remove_duplicate=False))
    return found


def _distinct(named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str], dict[str, str]]:
    """Each memory once; names that are the object of an earlier one; objects over the memory of an earlier one."""
    own: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    shared: dict[str, str] = {}
    objects: dict[int, str] = {}
    memories: dict[Any, str] = {}
    for name, tensor in named.items():
        if (first := objects.setdefault(id(tensor), name)) != name:
            tied[name] = first
        elif tensor.numel() and (first := memories.setdefault(_memory(tensor), name)) != name:
            shared[name] = first
        else:
            own[name] = tensor
    return own, tied, shared


def _memory(tensor: Tensor) -> Any:
    return memory_of(tensor) if _unstorable(tensor) is None else id(tensor)


def _check_initialised(named: Mapping[str, Tensor], path: Path) -> None:
    lazy = [name for name, tensor in named.items() if is_lazy(tensor)]
    if lazy:
        raise StoreError(f"{path}: not initialised yet: {', '.join(lazy)}; call the model once before")


def _unstorable(tensor: Tensor) -> str | None:
    if tensor.device.type == "meta":
        return "it is on the meta device, without values; fill the model first"
    if is_traceable_wrapper_subclass(tensor):
        return f"expected a plain tensor, found a {type(tensor).__name__}; gather it first"
    if tensor.layout != torch.strided or tensor.is_quantized:
        return f"expected a dense tensor, found {tensor.layout} of {tensor.dtype}"
    return None


def _strides(tensor: Tensor) -> list[int] | None:
    """The strides of a tensor that is not in C order, without gaps."""
    strides = torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format).stride()
    return None if strides == torch.empty(tensor.shape, device="meta").stride() else list(strides)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In C order on the CPU, no two in the same memory, as the format wants them."""
    apart: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        values = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        storage = values.untyped_storage()._cdata
        apart[name] = values.clone() if storage in storages else values
        storages.add(storage)
    return apart


def _tie(model: nn.Module, name: str, first: str) -> None:
    """Make two names of a parameter or buffer one object."""
    (place, _, leaf), (origin, _, source) = name.rpartition("."), first.rpartition(".")
    ours, theirs = model.get_submodule(place), model.get_submodule(origin)
    table = "_parameters" if leaf in ours._parameters else "_buffers"
    getattr(ours, table)[leaf] = theirs._parameters.get(source, theirs._buffers.get(source))
