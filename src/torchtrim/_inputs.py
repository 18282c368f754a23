"""What a model is called with, as words of the command line: sizes, types, names."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchtrim.errors import TorchtrimError, nearest

_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in ["float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
}
_INPUT = re.compile(r"(?:(?P<name>[^\W\d]\w*)=)?(?P<sizes>\d{1,15}(?:[x×]\d{1,15})*)(?::(?P<dtype>\w+))?")
FORM = "sizes such as 1x3x224x224, with a type if not float32 (8x128:int64), several with commas"


@dataclass(frozen=True)
class Input:
    """One tensor that a model is called with. `name`: of the keyword argument, or None where it has its place."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    name: str | None = None

    def __str__(self) -> str:
        name = f"{self.name}=" if self.name else ""
        dtype = "" if self.dtype == "float32" else f":{self.dtype}"
        return name + "x".join(map(str, self.shape)) + dtype

    def tensor(self, random: torch.Generator) -> Tensor:
        """Noise; zeros of an integer type, as any table of embeddings has a row 0."""
        dtype = _DTYPES[self.dtype]
        if dtype.is_floating_point:
            return torch.randn(self.shape, generator=random).to(dtype)
        return torch.zeros(self.shape, dtype=dtype)


def listed(inputs: Sequence[Input]) -> str:
    return ",".join(map(str, inputs))


def parse_inputs(text: str) -> tuple[Input, ...]:
    """`1x3x224x224`, `8x128:int64,8x128:bool`, or `ids=8x128:int64,mask=8x128` as inputs. Raises TorchtrimError."""
    found: list[Input] = []
    for part in text.split(","):
        match = _INPUT.fullmatch(part.strip())
        if match is None:
            raise TorchtrimError(f"input: expected {FORM}, found {part.strip() or text!r}")
        shape = tuple(int(size) for size in re.split("[x×]", match["sizes"]))
        if 0 in shape:
            raise TorchtrimError(f"input: expected sizes of at least 1, found {match['sizes']!r}")
        dtype = match["dtype"] or "float32"
        if dtype not in _DTYPES:
            hint = nearest(dtype, _DTYPES) or f"; use one of {', '.join(_DTYPES)}"
            raise TorchtrimError(f"input: unknown type {dtype!r}{hint}")
        found.append(Input(shape, dtype, match["name"]))
    names = [one.name for one in found]
    if None in names and any(names):
        raise TorchtrimError(f"input: expected a name for every input or for none, found {text!r}")
    if any(names) and len({*names}) < len(names):
        raise TorchtrimError(f"input: expected each name once, found {text!r}")
    return tuple(found)


def example_of(inputs: Sequence[Input]) -> Any:
    """What `trace` calls a model with: a tensor, a tuple of several, or a dict of those with names."""
    random = torch.Generator().manual_seed(0)
    try:
        tensors = [one.tensor(random) for one in inputs]
    except (RuntimeError, MemoryError) as error:
        raise TorchtrimError(f"input: {listed(inputs)} does not fit into memory; use a smaller one") from error
    if inputs[0].name:
        return {str(one.name): tensor for one, tensor in zip(inputs, tensors, strict=True)}
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def usual_inputs(name: str, model: nn.Module) -> tuple[Input, ...]:
    """The input that a model was made for, so far as its library says: one image."""
    if name == "lenet":
        return (Input((1, 1, 28, 28)),)
    settings = getattr(model, "pretrained_cfg", None)
    if name.startswith("timm:") and settings:
        return (Input((1, *settings["input_size"])),)
    side = 299 if name == "torchvision:inception_v3" else int(getattr(model, "image_size", 224))
    return (Input((1, 3, side, side)),)
