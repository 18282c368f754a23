"""Examine one model in a process of its own: `python -m benchmarks.zoo.examine NAME GIBIBYTES DEVICE [through-norms]`.

Prints what is known so far as a line of JSON after every stage, so that whoever ends this process still learns how far
it came.
"""

import copy
import json
import math
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import torchtrim
from benchmarks.zoo.models import Specimen, build
from torchtrim import TorchtrimWarning
from torchtrim._copies import call_arguments, named_tensors
from torchtrim._flow import IS_OUTPUT
from torchtrim._neurons import NeuronGraph
from torchtrim._proof import on_device
from torchtrim.testing import WithoutNorms, random_plan

RTOL = 1e-6
SINGLE_RTOL = 1e-3  # for models whose own code insists on float32
FRACTION = 0.3
_SOON = 5.0


class Examination:
    """Everything that is tried with one model, stage by stage. `found`: what is known so far."""

    def __init__(
        self,
        name: str,
        report: Callable[[Mapping[str, Any]], None],
        device: str = "cpu",
        *,
        through_norms: bool = False,
    ) -> None:
        self.found: dict[str, Any] = {"name": name, "status": "failed", "stage": "build"}
        self._report = report
        self._device = device
        self._through_norms = through_norms
        self._start = time.perf_counter()
        self.rtol = RTOL

    def run(self) -> None:
        """All stages; the exception of the stage that raises is noted."""
        try:
            self._stages()
        except Exception as error:
            self.found["error"] = first_line(error)
        self._tell()

    def _stages(self) -> None:
        torch.manual_seed(0)
        specimen = build(self.found["name"])
        randomised(specimen.model).eval()
        specimen = self._in_double(specimen)
        model = specimen.model
        self.found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        self._enter("trace")
        floors: dict[str, float] = {}
        with suppress(Exception):  # a model may need data; first, since the first run of an operator loads its code
            floors["meta"] = floor(model, specimen, "meta")

        def trace() -> NeuronGraph:
            return torchtrim.trace(model, specimen.example, through_norms=self._through_norms)

        graph, seconds = timed(trace)
        if seconds < _SOON:  # the first time, some of it went into loading code
            graph, seconds = timed(trace)
        if graph.device not in floors:  # its code looks at values, which only the trace knows without data
            floors[graph.device] = floor(model, specimen, self._device)
        self.found |= {"trace_s": seconds, "device": graph.device, "floor_s": floors[graph.device]}
        self.found |= {"layers": len(graph.layers), "locked": graph.locked, "reach": reach(model, graph)}
        plan = random_plan(graph, 0, FRACTION)
        if not plan.removed:
            self.found |= {"status": "nothing to trim", "stage": "done"}
            return
        self._enter("trim")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            small, seconds = timed(lambda: torchtrim.trim(model, plan, specimen.example))
        left = [first_line(one.message) for one in caught if issubclass(one.category, TorchtrimWarning)]
        self.found |= {"trim_s": seconds, "left_untrimmed": left}
        self.found["trimmed_parameters"] = sum(parameter.numel() for parameter in small.parameters())
        self._enter("mask")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TorchtrimWarning)
            silent = torchtrim.mask(model, plan, specimen.example)
        self._enter("compare")
        with WithoutNorms() if self._through_norms else nullcontext():
            self._compare(model, small, silent, specimen)
        del silent
        self._enter("state_dict")
        self.found["state_dict"] = survives_state_dict(small, specimen.example)
        self._enter("backward")
        mode, lost = gradients_lost(model, small, specimen.example)
        self.found |= {"backward": mode, "without_gradient": lost}
        if self.found["differs"]:
            self.found |= {"status": "differs", "stage": "done"}
        elif not lost and self.found["state_dict"]:
            self.found |= {"status": "equal", "stage": "done"}

    def _in_double(self, specimen: Specimen) -> Specimen:
        """In float64, or where the model's own code does not take that, in float32 as it was."""
        self._enter("call")
        torch.set_default_dtype(torch.float64)  # for what models make while they run
        double = converted(specimen, torch.float64, self._device)
        try:
            call(double.model, double.example)
        except RuntimeError as error:
            if "loat" not in str(error):
                raise
            torch.set_default_dtype(torch.float32)
            double = converted(specimen, torch.float32, self._device)
            call(double.model, double.example)
            self.found["single"] = first_line(error)
            self.rtol = SINGLE_RTOL
        return double

    def _compare(self, model: nn.Module, small: nn.Module, silent: nn.Module, specimen: Specimen) -> None:
        """On every example: how far apart the trimmed and the masked model are, and whether either says anything."""
        # what a model refuses on a GPU, such as an index, ends the process
        optional = [("size", one) for one in specimen.sizes] if self._device == "cpu" else []
        errors: dict[str, float] = {}
        differs: list[str] = []
        for kind, example in [("example", specimen.example), *(("batch", one) for one in specimen.others), *optional]:
            try:
                expected = call(silent, example)
            except Exception as error:
                if kind != "size":
                    raise
                self.found["size_refused"] = first_line(error)
                continue
            try:
                errors[kind], message = difference(call(small, example), expected)
            except Exception as error:
                errors[kind], message = math.inf, f"the trimmed model raises {first_line(error)}"
            if errors[kind] > self.rtol:
                differs.append(f"{kind}: {message}")
            if kind == "example":
                self.found["moved"] = difference(call(model, example), expected)[0] > self.rtol
                self.found["finite"] = all(
                    bool(one.isfinite().all()) for _, one in leaves(expected) if isinstance(one, Tensor)
                )
            self.found |= {"errors": {key: _plain(value) for key, value in errors.items()}, "differs": differs}
            self._tell()

    def _enter(self, stage: str) -> None:
        self.found["stage"] = stage
        self._tell()

    def _tell(self) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        self.found |= {"peak_bytes": peak, "seconds": round(time.perf_counter() - self._start, 2)}
        self._report(self.found)


def _plain(value: float) -> float | str:
    """JSON has no infinity."""
    return value if math.isfinite(value) else str(value)


def first_line(error: BaseException | Any) -> str:
    """The kind of an exception and the first line of what it says."""
    lines = str(error).strip().splitlines()
    kind = "" if isinstance(error, Warning) else f"{type(error).__name__}: "
    return f"{kind}{lines[0] if lines else ''}"[:400]


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = work()
    return result, round(time.perf_counter() - start, 4)


# Models and their inputs -----------------------------------------------------------------------------------


def converted(specimen: Specimen, dtype: torch.dtype, device: str) -> Specimen:
    """On a device, with floating-point numbers of this type; the inputs too."""

    def convert(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)

    example, others, sizes = pytree.tree_map(convert, (specimen.example, specimen.others, specimen.sizes))
    return Specimen(specimen.model.to(device, dtype), example, others, sizes)


def randomised(model: nn.Module) -> nn.Module:
    """With norms, statistics and scales as training leaves them, so that none of them hides an error.

    Parameters that start as one constant, such as the scales of residual branches, would do so too.
    """
    for module in model.modules():
        if isinstance(getattr(module, "running_mean", None), Tensor):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if "Norm" in type(module).__name__ and isinstance(getattr(module, "weight", None), nn.Parameter):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() and (parameter == parameter.view(-1)[0]).all():
            if parameter.view(-1)[0]:
                nn.init.uniform_(parameter, 0.5, 1.5)
            else:
                nn.init.normal_(parameter, 0, 0.1)
    return model


def call(model: nn.Module, example: Any, *, gradients: bool = False) -> Any:
    """What a model returns for an example, with noise that is always the same."""
    torch.manual_seed(1)
    np.random.seed(1)
    args, kwargs = call_arguments(copy.deepcopy(example))
    with torch.set_grad_enabled(gradients):
        return model(*args, **kwargs)


class _Nothing(TorchDispatchMode):
    """What a dispatch mode costs that does nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def floor(model: nn.Module, specimen: Specimen, device: str) -> float:
    """Seconds of one forward pass under a dispatch mode, where the trace ran; the median of three."""
    moved = on_device(model, device).eval()
    example = pytree.tree_map(lambda one: one.to(device) if isinstance(one, Tensor) else one, specimen.example)

    def forward() -> None:
        with _Nothing():
            call(moved, example)

    return round(statistics.median(timed(forward)[1] for _ in range(3)), 4)


# What is checked -------------------------------------------------------------------------------------------


def reach(model: nn.Module, graph: NeuronGraph) -> dict[str, int]:
    """How many weights of linear layers and convolutions can lose neurons along an axis, and of how many.

    Layers that give the model's outputs are left out.
    """
    outputs = {layer.parameter for layer in graph.layers.values() if layer.locked == IS_OUTPUT}
    free = np.zeros(len(graph.root), bool)
    for layer in graph.layers.values():
        free[layer.roots[layer.removable]] = True
    free[0] = False
    weights = {name: number for name, number in _weights(model).items() if name not in outputs}
    within = [number for name, number in weights.items() if any(free[roots].any() for roots in graph.axes[name])]
    return {"within": sum(within), "all": sum(weights.values())}


def _weights(model: nn.Module) -> dict[str, int]:
    """The weights of linear layers and convolutions by their names, and how many numbers each has."""
    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        kind = type(module).__name__
        if isinstance(module, (nn.Linear, _ConvNd, nn.MultiheadAttention)) or any(
            word in kind for word in ("Conv1D", "Linear", "Experts")
        ):
            own = module.named_parameters(recurse=False)
            found |= {id(one): one for name, one in own if one.ndim > 1 and "bias" not in name}
    return {name: one.numel() for name, one in model.named_parameters() if id(one) in found}


def leaves(value: Any, path: str = "output", seen: frozenset[int] = frozenset()) -> Iterator[tuple[str, Any]]:
    """Every tensor and every plain value of what a model returns, in containers and objects of any kind."""
    if isinstance(value, (Tensor, str, bytes, int, float, complex, type(None), torch.dtype, torch.device, type)):
        yield path, value
    elif id(value) in seen or callable(value):
        return
    else:
        inner = seen | {id(value)}
        if isinstance(value, Mapping):
            parts: list[tuple[str, Any]] = [(f"[{key!r}]", one) for key, one in value.items()]
        elif isinstance(value, (list, tuple)):
            parts = [(f"[{index}]", one) for index, one in enumerate(value)]
        else:
            parts = [(f".{name}", one) for name, one in sorted(getattr(value, "__dict__", {}).items())]
        for name, one in parts:
            yield from leaves(one, path + name, inner)


def difference(found: Any, expected: Any) -> tuple[float, str]:
    """The largest difference of any leaf, relative to the largest number in that leaf, and where it is."""
    new, old = list(leaves(found)), list(leaves(expected))
    if [path for path, _ in new] != [path for path, _ in old]:
        return math.inf, f"{len(new)} leaves of output, not {len(old)}"
    worst, where = 0.0, ""
    for (path, one), (_, other) in zip(new, old, strict=True):
        error, message = _leaf_difference(one, other)
        if error > worst or math.isnan(error):
            worst, where = (math.inf if math.isnan(error) else error), f"{path}: {message}"
    return worst, where


def _leaf_difference(one: Any, other: Any) -> tuple[float, str]:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return (0.0, "") if type(one) is type(other) and one == other else (math.inf, f"{one!r}, not {other!r}")
    if one.shape != other.shape:
        return math.inf, f"shape {tuple(one.shape)}, not {tuple(other.shape)}"
    if not one.is_floating_point() and not one.is_complex():
        unequal = int((one != other).sum())
        return (math.inf, f"{unequal} of {one.numel()} values differ") if unequal else (0.0, "")
    finite = other.isfinite()
    if not torch.equal(one.isfinite(), finite) or not torch.equal(
        one[~finite].nan_to_num(), other[~finite].nan_to_num()
    ):
        return math.inf, "infinite or undefined in other places"
    if not finite.any():
        return 0.0, ""
    scale = float(other[finite].abs().max())
    gap = float((one[finite] - other[finite]).abs().max())
    return gap / max(scale, 1e-30), f"differs by {gap:.2g}, of at most {scale:.2g}"


def survives_state_dict(model: nn.Module, example: Any) -> bool:
    """Whether a copy with other numbers, filled from the state_dict, computes the same."""
    state = model.state_dict()
    other = copy.deepcopy(model)
    kept = other.state_dict(keep_vars=True)
    for tensor in kept.values():
        if isinstance(tensor, Tensor):
            tensor.data = torch.zeros_like(tensor.data)
    other.load_state_dict(state, strict=True)
    return difference(call(other, example), call(model, example))[0] <= RTOL


def gradients_lost(model: nn.Module, small: nn.Module, example: Any) -> tuple[str, list[str]]:
    """The mode in which a backward pass works, and the parameters to which trimming takes their gradient."""
    try:
        mode, expected = "train", _with_gradients(model.train(), example)
    except Exception:
        try:
            mode, expected = "eval", _with_gradients(model.eval(), example)
        except Exception as error:
            return f"the original has none: {first_line(error)}", []
    found = _with_gradients(small.train(mode == "train"), example)
    return mode, sorted(expected - found)


def _with_gradients(model: nn.Module, example: Any) -> set[str]:
    """The parameters that a backward pass reaches."""
    for parameter in model.parameters():
        parameter.grad = None
    outputs = [one for _, one in leaves(call(model, example, gradients=True)) if isinstance(one, Tensor)]
    sums = [one.sum() for one in outputs if one.requires_grad and one.is_floating_point()]
    torch.stack(sums).sum().backward()
    reached = {name for name, one in named_tensors(model).items() if one.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return reached


def main() -> None:
    name, gibibytes, device = sys.argv[1], float(sys.argv[2]), sys.argv[3]
    if sys.platform == "linux" and device == "cpu":  # a GPU's driver reserves far more than it uses
        with suppress(ValueError):  # a lower limit is set already
            resource.setrlimit(resource.RLIMIT_DATA, (int(gibibytes * 2**30),) * 2)
    torch.backends.cudnn.allow_tf32 = False  # for models that insist on single precision
    warnings.simplefilter("ignore")
    torchtrim.trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), torch.zeros(2, 2))  # loads its code
    through_norms = sys.argv[4:] == ["through-norms"]
    Examination(name, lambda found: print(json.dumps(found), flush=True), device, through_norms=through_norms).run()


if __name__ == "__main__":
    main()
