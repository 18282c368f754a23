"""Models by name, as the command line takes them: LeNet, torchvision's, timm's, or a function in a file.

`build_model("torchvision:vgg16", classes=10)` makes a new one, and `load_weights(model, path)` fills it. Files of
weights are read without running code from them; a trimmed model's file also trims the model.
"""

import importlib.util
import inspect
import pickle
import sys
import warnings
import zipfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from torchtrim import _store
from torchtrim._lenet import LeNet
from torchtrim._neurons import memory_of
from torchtrim._saved import is_saved_model
from torchtrim.errors import ModelError, TorchtrimError, nearest

FORMS = ("lenet", "torchvision:NAME", "timm:NAME", "FILE.py:FUNCTION")
PRETRAINED = "DEFAULT"  # what to say instead of a file of weights
_SHOWN = 3  # tensors of each kind that an error lists


def check_model_name(name: str, weights: str | None = None) -> None:
    """Raise the ModelError that is sure to come, before anything is built."""
    kind, place = _split(name)
    if weights == PRETRAINED and kind not in ("torchvision", "timm"):
        raise ModelError(
            f"weights {PRETRAINED}: expected a model of torchvision or timm, found {name!r}; "
            "name a file, or let the function load the weights"
        )
    if weights is not None and weights != PRETRAINED and not Path(weights).expanduser().is_file():
        raise ModelError(f"{weights}: no such file of weights; name a .safetensors or .pt file, or {PRETRAINED}")
    if kind == "file" and not _file(place)[0].is_file():
        raise ModelError(
            f"{_file(place)[0]}: no such file; expected a Python file with a function that makes the model"
        )


def needs_weights(name: str) -> bool:
    """Whether the model that `name` names is untrained unless weights are loaded."""
    return _split(name)[0] != "file"


def build_model(name: str, *, classes: int, pretrained: bool = False) -> nn.Module:
    """A new model; `classes` is how many it tells apart, which a function in a file decides for itself.

    `pretrained` asks the library for its weights, which it may download.

    Raises ModelError: an unknown name, a library that is not installed, a function that fails, pretrained weights
    for another number of classes.
    """
    kind, place = _split(name)
    if kind == "lenet":
        return LeNet(classes=classes)
    if kind == "file":
        return _from_file(*_file(place))
    return {"torchvision": _from_torchvision, "timm": _from_timm}[kind](place, classes, pretrained)


def how_built(name: str, classes: int) -> str:
    """The expression that builds such a model in Python."""
    kind, place = _split(name)
    if kind == "lenet":
        return "torchtrim.LeNet()" if classes == 10 else f"torchtrim.LeNet(classes={classes})"
    if kind == "file":
        return f"{_file(place)[1]}()"
    build = {"torchvision": "torchvision.models.get_model", "timm": "timm.create_model"}[kind]
    return f'{build}("{place}", num_classes={classes})'


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """The model with the weights of a file: a state_dict, in pickle or safetensors form, or what `save` wrote.

    The model itself is filled, unless the file is a trimmed model's: that is a new, smaller one.
    Raises ModelError or StoreError: a missing or damaged file, or one of another architecture.
    """
    file = Path(path).expanduser()
    if is_saved_model(file):
        return _store.load(model, file)
    given = _read(file)
    _check(model, given, file)
    model.load_state_dict(given, strict=False)  # tied tensors may be given under one of their names
    return model


def _split(name: str) -> tuple[str, str]:
    """The kind of a model, and where to find it: `("timm", "resnet18")`."""
    kind, colon, place = name.partition(":")
    if name == "lenet":
        return "lenet", ""
    if kind in ("torchvision", "timm") and place:
        return kind, place
    if ".py:" in name and not name.endswith(":"):
        return "file", name
    hint = "; name the function too: FILE.py:FUNCTION" if name.rstrip(":").endswith(".py") else ""
    known = kind if colon else name
    raise ModelError(
        f"model: expected one of {', '.join(FORMS)}, found {name!r}"
        + (hint or nearest(known, ("lenet", "torchvision", "timm")))
    )


# Libraries ----------------------------------------------------------------------------------------------


def _from_torchvision(name: str, classes: int, pretrained: bool) -> nn.Module:
    try:
        from torchvision import models
    except ImportError as error:
        raise _not_installed("torchvision", error) from error
    known = models.list_models(module=models)
    if name not in known:
        raise ModelError(f"torchvision has no classifier named {name!r}{nearest(name, known)}")
    weights = models.get_model_weights(name).DEFAULT if pretrained else None  # pyright: ignore[reportAttributeAccessIssue]
    if weights is not None:
        _check_classes(f"torchvision:{name}", len(weights.meta["categories"]), classes)
    with _building(f"torchvision:{name}"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # some announce how they will draw initial weights
        return models.get_model(name, weights=weights, num_classes=classes)


def _from_timm(name: str, classes: int, pretrained: bool) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise _not_installed("timm", error) from error
    if not timm.is_model(name):
        raise ModelError(f"timm has no model named {name!r}{nearest(name, timm.list_models())}")
    if pretrained:
        settings = timm.get_pretrained_cfg(name, allow_unregistered=False)
        if settings is None or not settings.has_weights:
            raise ModelError(f"timm:{name}: timm has no pretrained weights for this model; name a file of weights")
        _check_classes(f"timm:{name}", settings.num_classes, classes)
    with _building(f"timm:{name}"):
        return timm.create_model(name, pretrained=pretrained, num_classes=classes)


def _not_installed(library: str, error: ImportError) -> ModelError:
    return ModelError(f"{library} cannot be imported: {error}; run pip install 'torchtrim[vision]'")


def _check_classes(name: str, pretrained: int, classes: int) -> None:
    if pretrained != classes:
        raise ModelError(
            f"{name}: its pretrained weights tell {pretrained:,} classes apart, the data has {classes:,}; use data of "
            "those classes, or weights of a model that was trained on this data"
        )


@contextmanager
def _building(name: str) -> Generator[None]:
    """Turn whatever goes wrong in someone else's code, or on the way to their weights, into a ModelError."""
    try:
        yield
    except TorchtrimError:
        raise
    except Exception as error:
        raise ModelError(f"{name}: making the model failed: {_first_line(error)}") from error


# A function in a file -----------------------------------------------------------------------------------


def _file(name: str) -> tuple[Path, str]:
    """A path and a function, of `path/to/file.py:function`."""
    path, _, function = name.rpartition(":")
    return Path(path).expanduser(), function


def _from_file(path: Path, function: str) -> nn.Module:
    name = f"{path}:{function}"
    with _building(name):
        module = _imported(path)
        factory = _factory(module, name, function)
        model = factory()
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name}: expected it to return a torch.nn.Module, found {type(model).__name__}")
    return model


def _imported(path: Path) -> ModuleType:
    """The file as a module; it can import what lies beside it, as a script can."""
    name = f"torchtrim_model_{path.stem}"
    specification = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or specification is None or specification.loader is None:
        raise ModelError(f"{path}: no such file; expected a Python file with a function that makes the model")
    module = importlib.util.module_from_spec(specification)
    beside = str(path.resolve().parent)
    sys.modules[name] = module  # dataclasses look their module up
    sys.path.insert(0, beside)
    try:
        specification.loader.exec_module(module)
    finally:
        sys.path.remove(beside)
    return module


def _factory(module: ModuleType, name: str, function: str) -> Callable[[], Any]:
    factory = getattr(module, function, None)
    if factory is None:
        own = [
            key
            for key, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", "") == module.__name__
        ]
        listed = f"; it defines {', '.join(own[:10])}" if own else ""
        raise ModelError(f"{name}: the file has no {function!r}{nearest(function, own) or listed}")
    if not callable(factory):
        raise ModelError(f"{name}: expected a function or class, found {type(factory).__name__}")
    needed = [
        parameter.name
        for parameter in inspect.signature(factory).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed:
        raise ModelError(
            f"{name}: expected a function that needs no arguments, found that it needs {', '.join(needed)}"
        )
    return factory


# Weights ------------------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path}: expected a state_dict, found a damaged file or one that would run code when it is read; save it "
            "with torch.save(model.state_dict(), path)"
        ) from error
    except (OSError, EOFError, SafetensorError, RuntimeError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{path}: expected a file of weights, found: {_first_line(error)}") from error
    for key in ("state_dict", "model"):  # how training scripts often wrap it
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"{path}: expected a state_dict, names with tensors, found {_described(content)}")
    return dict(content)


def _check(model: nn.Module, given: Mapping[str, Tensor], path: Path) -> None:
    """Raise ModelError unless the tensors are those of the model."""
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    present = {memory_of(own[name]) for name in given if name in own}
    missing = [name for name, value in own.items() if name not in given and memory_of(value) not in present]
    unexpected = [name for name in given if name not in own]
    misshaped = [
        f"{name} {_size(given[name])}, not {_size(value)}"
        for name, value in own.items()
        if name in given and given[name].shape != value.shape
    ]
    groups = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshaped))
    faults = [f"  {len(names)} {what}: {_few(names)}" for what, names in groups if names]
    if faults:
        wrapped = next((p for p in ("module.", "_orig_mod.") if all(name.startswith(p) for name in given)), None)
        advice = (
            f"they were saved from a wrapped model; save those of the model itself, without {wrapped!r}"
            if wrapped and given
            else "name the model that the weights were saved from"
        )
        raise ModelError(
            f"{path}: these are not the weights of this {type(model).__name__}; of its {len(own)} tensors\n"
            + "\n".join(faults)
            + f"\n{advice}"
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _size(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "scalar"


def _described(content: Any) -> str:
    if isinstance(content, Mapping):
        return f"a mapping with {', '.join(map(repr, list(content)[:_SHOWN])) or 'nothing in it'}"
    return type(content).__name__


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
