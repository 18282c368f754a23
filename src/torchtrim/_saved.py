"""What the file of a saved model says of itself: its metadata, parsed and checked."""

import json
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from torchtrim._history import History, describes
from torchtrim._plan import Plan
from torchtrim.errors import PlanError, StoreError

FORMAT = "torchtrim-model"
VERSION = 1
KEY = "torchtrim"


@dataclass(frozen=True)
class Content:
    """The metadata of a file. tied, shared: names of tensors that are stored under another name.

    Tied ones are one object, shared ones several over the same memory. strides: of tensors that are not in C order.
    """

    history: History
    tied: Mapping[str, str]
    shared: Mapping[str, str]
    strides: Mapping[str, tuple[int, ...]]
    frozen: frozenset[str]
    evaluating: frozenset[str]
    facts: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, file: Any, path: Path) -> "Content":
        try:
            content: Any = json.loads((file.metadata() or {}).get(KEY, "{}"))
            found = content.get("format")
        except (ValueError, RecursionError, AttributeError) as error:
            raise _damaged(path, error) from error
        if found is None:
            raise StoreError(
                f"{path}: expected a model that torchtrim.save wrote, found another safetensors file; "
                "plain weights are loaded by model.load_state_dict(safetensors.torch.load_file(path))"
            )
        if found != FORMAT or content.get("version") != VERSION:
            raise StoreError(
                f"{path}: expected a model that torchtrim.save wrote, of version {VERSION}, found {found!r} of "
                f"version {content.get('version')!r}; use the file of a model, or the torchtrim that wrote it "
                f"({content.get('torchtrim', 'unknown')}; this is {library_version()})"
            )
        try:
            shapes = {name: tuple(map(int, shape)) for name, shape in content["shapes"].items()}
            attributes = {name: dict(values) for name, values in content["attributes"].items()}
            lists = {name: tuple(map(int, places)) for name, places in content.get("lists", {}).items()}
            plans = tuple(Plan.from_json(json.dumps(plan)) for plan in content["plans"])
            parsed = cls(
                History(plans, shapes, attributes, tuple(map(str, content.get("biases", ()))), lists),
                dict(content["tied"]),
                dict(content["shared"]),
                {name: tuple(map(int, strides)) for name, strides in content["strides"].items()},
                frozenset(content["frozen"]),
                frozenset(content["evaluating"]),
                dict(content["facts"]),
                {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()},  # noqa: SIM118
            )
            parsed.check()
        except (KeyError, TypeError, ValueError, AttributeError, PlanError) as error:
            raise _damaged(path, error) from error
        return parsed

    def stored(self, name: str) -> str:
        """The name under which a tensor's values are stored."""
        name = self.tied.get(name, name)
        return self.shared.get(name, name)

    @property
    def names(self) -> set[str]:
        """Of every tensor, those that are stored under another name too."""
        return {*self.shapes, *self.tied, *self.shared}

    def check(self) -> None:
        """Raise ValueError where the metadata contradict the tensors."""
        if not all(describes(value) for values in self.history.attributes.values() for value in values.values()):
            raise ValueError("an attribute is not a width")
        if {self.tied.get(name, name) for name in self.names} != {*self.history.shapes, *self.history.biases}:
            raise ValueError("the tensors and the ancestor's have other names")
        for name, shape in self.history.shapes.items():
            found = self.shapes[self.stored(name)]
            if len(found) != len(shape) or any(new > old for new, old in zip(found, shape, strict=True)):
                raise ValueError(f"{name} has {sizes(found)}, its ancestor {sizes(shape)}")
        for name, strides in self.strides.items():
            steps = 1
            for stride, size in sorted(zip(strides, self.shapes[name], strict=True)):
                if stride < 0 or (size > 1 and stride != steps):
                    raise ValueError(f"{name}: strides {strides} do not fit {sizes(self.shapes[name])}")
                steps *= size


def is_saved_model(path: str | Path) -> bool:
    """Whether `save` wrote this file, whatever its version; False for anything else, and where there is nothing."""
    try:
        with safe_open(str(path), "pt") as file:
            content = json.loads((file.metadata() or {}).get(KEY, "{}"))
    except (OSError, SafetensorError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def read_facts(path: Path) -> dict[str, Any]:
    """The facts that were written with a model. Raises StoreError."""
    with opened(path) as file:
        return dict(Content.of(file, path).facts)


@contextmanager
def opened(path: Path) -> Any:
    """The file, for reading. Raises StoreError."""
    try:
        if not path.is_file():
            raise StoreError(f"{path}: expected a model that torchtrim.save wrote, found no file; look at the path")
        with safe_open(str(path), "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"{path}: expected a whole safetensors file, found {error}; it is damaged, or of another kind"
        ) from error


def _damaged(path: Path, error: Exception) -> StoreError:
    return StoreError(f"{path}: its metadata are damaged: {type(error).__name__}: {error}; save the model again")


def sizes(shape: Iterable[int]) -> str:
    """A shape in words."""
    return " × ".join(map(str, shape)) or "a single number"


def library_version() -> str:
    """The version of torchtrim that is installed."""
    return version("torchtrim")
