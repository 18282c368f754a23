"""The models of the zoo by name, `library:architecture`, and how each is called. Nothing is ever downloaded."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import nn

LIBRARIES = ("torchvision", "timm", "transformers", "ultralytics")


@dataclass(frozen=True)
class Specimen:
    """A model and what it is called with.

    example: as `torchtrim.trace` takes it. others: further examples that must work, such as of another batch size.
    sizes: further examples that the model may refuse, such as of another image size.
    """

    model: nn.Module
    example: Any
    others: tuple[Any, ...] = ()
    sizes: tuple[Any, ...] = ()


def build(name: str) -> Specimen:
    """A model by its name, with random weights."""
    library, _, architecture = name.partition(":")
    return _library(library).build(architecture)


def families(libraries: Iterable[str] = LIBRARIES) -> dict[str, str]:
    """The names of all models with the family of each, in the order in which they run."""
    return {
        f"{library}:{architecture}": family
        for library in libraries
        for architecture, family in _library(library).FAMILIES.items()
    }


def installed(library: str) -> bool:
    """Whether its models can be built here."""
    return find_spec(library) is not None


def _library(name: str) -> Any:
    return import_module(f"benchmarks.zoo.{name}_models")
