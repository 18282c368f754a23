"""What the layers of a model cost in seconds at other widths, measured on this machine and kept as a table."""

import copy
import json
import platform
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from torchtrim._copies import call_arguments, named_modules
from torchtrim._cost import latencies_beside, now
from torchtrim._files import write_whole
from torchtrim._forward import device_of, left_as_found, moved
from torchtrim._neurons import Kept, NeuronGraph
from torchtrim._price import Shape
from torchtrim.criteria import Floats
from torchtrim.errors import StoreError

SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)  # of a layer's widths, at which it is timed
_CALLS = 5
_FORMAT, _VERSION = "torchtrim-latencies", 1


class LatencyTable:
    """Seconds of one call of a layer, by what it is and is given: float64 [outputs, inputs], at `SHARES` of each.

    Of a grouped convolution inputs go with outputs: [outputs, 1]. path: a file that is read where there is one, and
    written when layers were measured that it did not have.

    Raises StoreError: the file is something else, or of another device, number of threads, or version of PyTorch.
    """

    def __init__(self, device: torch.device, path: str | Path | None = None) -> None:
        self._device, self._path = device, Path(path) if path is not None else None
        self._machine = _machine(device)
        self._seconds: dict[str, Floats] = {}
        if self._path and self._path.exists():
            self._seconds = _read(self._path, self._machine)

    def measure(self, layers: Mapping[str, tuple["_Timed", Tensor]]) -> dict[str, Floats]:
        """The seconds of layers, by their names, each with what it was given."""
        keys = {name: f"{layer} on {tuple(given.shape)} {given.dtype}" for name, (layer, given) in layers.items()}
        missing = {key: layers[name] for name, key in keys.items() if key not in self._seconds}
        for key, (layer, given) in missing.items():
            self._seconds[key] = _grid(layer, given, self._device)
        if self._path and missing:
            seconds = {key: grid.tolist() for key, grid in self._seconds.items()}
            content = {"format": _FORMAT, "version": _VERSION, "machine": self._machine, "seconds": seconds}
            write_whole(self._path, json.dumps(content, indent=1))
        return {name: self._seconds[key] for name, key in keys.items()}


_Timed = nn.Linear | _ConvNd


class Latencies:
    """Seconds of one call of what is left of a model.

    What is none of the table's layers takes its part of the whole model's time, and falls with the layers' outputs.
    `whole`: seconds of one call of the model as it is.
    """

    def __init__(self, model: nn.Module, graph: NeuronGraph, table: LatencyTable) -> None:
        calls = _calls(model, graph.example)
        grids = table.measure({name: (layer, given[0]) for name, (layer, given, _) in calls.items()})
        self._layers: list[tuple[Shape, Floats, int, float]] = []
        for name, (layer, given, outputs) in calls.items():
            weight = f"{name}.weight".lstrip(".")
            if weight in graph.axes:  # else it is computed, or another layer's
                shape = Shape.of_axes(layer.weight, graph.axes[weight])
                self._layers.append((shape, grids[name], len(given), outputs))
        (self.whole,) = latencies_beside([model], graph.example)
        self._rest = max(self.whole - sum(float(grid[-1, -1]) * count for _, grid, count, _ in self._layers), 0.0)
        self._outputs = sum(outputs for *_, outputs in self._layers)

    def seconds(self, kept: Kept) -> float:
        total = left = 0.0
        for shape, grid, count, outputs in self._layers:
            shares = np.array(shape.left(kept)[:2]) / np.array(shape.whole[:2])
            total += count * interpolated(grid, float(shares[0]), float(shares[1]))
            left += outputs * float(shares[0])
        return total + self._rest * (left / self._outputs if self._outputs else 1.0)


def interpolated(grid: Floats, outputs: float, inputs: float) -> float:
    """The seconds at shares of the widths, linear between those that were measured and below the smallest."""
    along = [_linear(row, inputs) for row in grid] if grid.shape[1] > 1 else grid[:, 0]
    return _linear(np.array(along), outputs)


def _linear(values: Floats, share: float) -> float:
    place = min(max(int(np.searchsorted(SHARES, share)) - 1, 0), len(SHARES) - 2)
    slope = (values[place + 1] - values[place]) / (SHARES[place + 1] - SHARES[place])
    return max(float(values[place] + slope * (share - SHARES[place])), 0.0)


def _calls(model: nn.Module, example: Any) -> dict[str, tuple[_Timed, list[Tensor], float]]:
    """By name, the linear and convolutional layers that a call on the example runs, what each is given, and the number
    of values that it gives."""
    found: dict[str, tuple[_Timed, list[Tensor], float]] = {}
    handles: list[Any] = []
    device = device_of(model)
    for name, module in named_modules(model).items():
        if isinstance(module, (nn.Linear, _ConvNd)) and not isinstance(module, _ConvTransposeNd):

            def hear(layer: Any, args: Any, kwargs: Any, outputs: Tensor, name: str = name) -> None:
                given = (args[0] if args else kwargs["input"]).detach()
                before = found.get(name, (layer, [], 0.0))
                found[name] = (layer, [*before[1], given], before[2] + outputs.numel())

            handles.append(module.register_forward_hook(hear, with_kwargs=True))
    try:
        args, kwargs = moved(call_arguments(example), device)
        with left_as_found(model, device), torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _grid(layer: _Timed, given: Tensor, device: torch.device) -> Floats:
    grouped = isinstance(layer, _ConvNd) and layer.groups > 1
    return np.array([[_seconds(layer, given, o, i, device) for i in ((o,) if grouped else SHARES)] for o in SHARES])


def _seconds(layer: _Timed, given: Tensor, outputs: float, inputs: float, device: torch.device) -> float:
    """The median of several calls, after one that chooses kernels."""
    call, times = _call(layer, given, outputs, inputs), list[float]()
    with torch.no_grad():
        for _ in range(1 + _CALLS):
            start = now(device)
            call()
            times.append(now(device) - start)
    return statistics.median(times[1:])


def _call(layer: _Timed, given: Tensor, outputs: float, inputs: float) -> Any:
    """A call of the layer at shares of its widths, with values of its own."""
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    if isinstance(layer, nn.Linear):
        out, into = _part(weight.shape[0], outputs), _part(weight.shape[1], inputs)
        x, w = given[..., :into].contiguous(), weight[:out, :into].contiguous()
        b = None if bias is None else bias[:out].contiguous()
        return lambda: F.linear(x, w, b)
    other = copy.copy(layer)
    axis = given.ndim - (len(layer.kernel_size) + 1)  # there may be no batch
    if layer.groups > 1:
        other.groups = _part(layer.groups, outputs)
        out, into = weight.shape[0] // layer.groups * other.groups, weight.shape[1]
        channels = into * other.groups
    else:
        out, into = _part(weight.shape[0], outputs), _part(weight.shape[1], inputs)
        channels = into
    x, w = given.narrow(axis, 0, channels).contiguous(), weight[:out, :into].contiguous()
    b = None if bias is None else bias[:out].contiguous()
    forward: Any = getattr(other, "_conv_forward")  # noqa: B009
    return lambda: forward(x, w, b)


def _part(width: int, share: float) -> int:
    return max(1, round(width * share))


def _machine(device: torch.device) -> dict[str, Any]:
    """What latencies depend on besides the layer."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"device": f"{device.type}: {name}", "threads": torch.get_num_threads(), "torch": torch.__version__}


def _processor() -> str:
    """The processor by its name, which on Linux Python knows no more of than the kind: x86_64."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _read(path: Path, machine: Mapping[str, Any]) -> dict[str, Floats]:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT or content["version"] != _VERSION:
            raise ValueError(f"{content['format']!r} {content['version']!r}")
        found: dict[str, Any] = content["machine"]
        seconds = {str(key): np.array(grid, np.float64) for key, grid in content["seconds"].items()}
        if any(
            grid.ndim != 2 or len(grid) != len(SHARES) or grid.shape[1] not in (1, len(SHARES))
            for grid in seconds.values()
        ):
            raise ValueError("other shares of widths")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{path}: expected latencies that a Budget wrote, found: {error}; choose another file"
        ) from error
    differs = [f"{key} {found.get(key)!r}, here {value!r}" for key, value in machine.items() if found.get(key) != value]
    if differs:
        raise StoreError(
            f"{path}: its latencies are of another machine or set-up: {'; '.join(differs)}; delete it to measure anew, "
            "or choose another file"
        )
    return seconds
