"""What profiling costs beside the bare forward pass: each way to count, in turns with it."""

import argparse
import os
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.paper.common import table
from torchtrim._counting import native_room
from torchtrim._files import write_whole
from torchtrim._models import build_model
from torchtrim._watch import Watch

MODELS = ("torchvision:resnet50", "torchvision:vgg16", "lenet")
Run = Callable[[], None]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profiling", description=__doc__)
    parser.add_argument("--model", nargs="+", default=list(MODELS), help="as `torchtrim run` takes them")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, help="images at a time (default 16 on the CPU, 256 on a GPU; LeNet 250)")
    parser.add_argument("--batches", type=int, help="batches that are timed together (default 1, LeNet 240)")
    parser.add_argument("--repeats", type=int, default=7, help="pairs of each way (default %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on the CPU (default %(default)s)")
    parser.add_argument("--channels-last", action="store_true", help="model and images in that layout")
    parser.add_argument("--half", action="store_true", help="model and images in half precision")
    parser.add_argument("--out", type=Path, default=Path("docs/results/profiling.md"), help="where the page goes")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    parts = [measured(name, options) for name in options.model]
    given = " ".join(["python -m benchmarks.profiling", *_given(parser, options)])
    text = page(parts, given, options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(options.out, text)
    print(text)


def _given(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[str]:
    """The options that are not the usual ones."""
    words: list[str] = []
    for action in parser._actions:
        value = getattr(options, action.dest, None)
        if action.option_strings and action.dest not in ("help", "out") and value != action.default:
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [action.option_strings[0], *map(str, values)]
    return words


def page(parts: list[str], command: str, options: argparse.Namespace) -> str:
    cuda = options.device == "cuda"
    where = torch.cuda.get_device_name() if cuda else f"{options.threads} CPU thread{'s' * (options.threads > 1)}"
    clock = "time from a synchronised device to a synchronised device" if cuda else "CPU time of all threads"
    return f"""# What profiling costs

{clock[0].upper()}{clock[1:]}, as a multiple of the bare forward pass that ran right before: medians, and in brackets
the lowest and the highest. The naive hook is `(out == 0).sum`; keep-all concatenates every activation, as NNI does,
and counts at the end. They count the modules' ReLUs, and no moments; ours takes the sum and the squares' sum too.

{"".join(parts)}
A copy reads and writes {copy_speed(options.device):.0f} GB/s here, reading and writing counted. GB/s of counting is
what was counted over the time beyond the bare pass, where that is more than the pairs' spread. Peak memory is that of
tensors, weights and images included.

Measured by `{command}` with PyTorch {torch.__version__.partition("+")[0]} on {where}.
"""


def measured(name: str, options: argparse.Namespace) -> str:
    """One model's heading and table."""
    torch.manual_seed(0)
    lenet = name == "lenet"
    batch = options.batch or (250 if lenet else 256 if options.device == "cuda" else 16)
    count = options.batches or (240 if lenet else 1)
    form = torch.channels_last if options.channels_last else torch.contiguous_format
    dtype = torch.float16 if options.half else torch.float32
    model = build_model(name, classes=10 if lenet else 1000).eval().to(options.device, dtype=dtype, memory_format=form)
    shape = (1, 28, 28) if lenet else (3, 224, 224)
    images = torch.randn(batch, *shape).to(options.device, dtype=dtype, memory_format=form)

    def bare() -> None:
        with torch.no_grad():
            for _ in range(count):
                model(images)

    read = counted_bytes(model, images) * count
    rows: list[list[str]] = []
    for label, way in ways(model, images, count, options.device):
        with way as run:
            pairs = in_turns(bare, run, options)
            more = peak_bytes(run, model, images) / peak_bytes(bare, model, images) - 1
        ratios = [ours / alone for alone, ours in pairs]
        extra = statistics.median(ours - alone for alone, ours in pairs)
        spread = statistics.stdev(alone for alone, _ in pairs) if len(pairs) > 1 else 0
        speed = f"{read / extra / 1e9:.1f}" if extra > max(spread, 0) else "–"
        alone = statistics.median(alone for alone, _ in pairs)
        rows.append([label, f"{alone:.3f}", f"{statistics.median(ratios):.3f}",
                     f"({min(ratios):.3f}–{max(ratios):.3f})", speed, f"{100 * more:.2f} %"])  # fmt: skip
        print(name, *rows[-1], flush=True)
    head = ["way", "bare, s", "× bare", "range", "GB/s", "peak memory above bare"]
    batches = f", {count} batches" if count > 1 else ""
    return f"## {name}, batch {batch}{batches}: {read / 1e9:.2f} GB counted\n\n{table(head, rows)}\n"


def in_turns(bare: Run, run: Run, options: argparse.Namespace) -> list[tuple[float, float]]:
    """Seconds of the bare pass and of a way to count, taken one after the other."""
    cuda = options.device == "cuda"
    clock = time.perf_counter if cuda else time.process_time

    def seconds(work: Run) -> float:
        if cuda:
            torch.cuda.synchronize()
        start = clock()
        work()
        if cuda:
            torch.cuda.synchronize()
        return clock() - start

    for work in (bare, run, bare, run):
        seconds(work)
    return [(seconds(bare), seconds(run)) for _ in range(options.repeats)]


# ------------------------------------------------------------------ memory


class Storages(TorchDispatchMode):
    """Adds up the bytes of what operators allocate, as long as it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self._live += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self._live)
        return result

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


def peak_bytes(run: Run, model: nn.Module, images: Tensor) -> int:
    """The most bytes of tensors that are alive at once while it runs, the model's and the images' included."""
    if images.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    given = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in [
        images, *model.parameters(), *model.buffers()]}  # fmt: skip
    with Storages() as storages:
        run()
    return storages.peak + sum(given.values())


# ------------------------------------------------------------------ ways to count


def ways(model: nn.Module, images: Tensor, count: int, device: str) -> Iterator[tuple[str, Any]]:
    """Every way by name, as a context that gives a function to run."""
    if native_room(device) is not None:
        yield "ours, native", ours("native", model, images, count)
    yield "ours, plain", ours("plain", model, images, count)
    yield "naive hook", hooked(naive, model, images, count)
    yield "keep all", hooked(keep_all, model, images, count)


@contextmanager
def ours(path: str, model: nn.Module, images: Tensor, count: int) -> Iterator[Run]:
    """What `profile` does for each batch; the trace comes before, once for a model."""
    before = os.environ.get("TORCHTRIM_COUNTING")
    os.environ["TORCHTRIM_COUNTING"] = path
    watch = Watch(model)

    def run() -> None:
        for _ in range(count):
            watch.run(lambda: model(images))
        watch.look()

    try:
        yield run
    finally:
        del os.environ["TORCHTRIM_COUNTING"]
        if before is not None:
            os.environ["TORCHTRIM_COUNTING"] = before


@contextmanager
def hooked(kind: Callable[[list[Tensor]], tuple[Any, Run]], model: nn.Module, images: Tensor, count: int) -> Any:
    """A hook on each ReLU of the model, or on the function's results where it has no such modules.

    The hooks are there while `run` runs only: the bare pass beside it is without them.
    """
    found: list[Tensor] = []
    hook, finish = kind(found)
    modules = [module for module in model.modules() if isinstance(module, nn.ReLU)]
    relu = torch.relu

    def watched(values: Tensor) -> Tensor:
        result = relu(values)
        hook(result)
        return result

    def run() -> None:
        hooks = [module.register_forward_hook(lambda module, inputs, output: hook(output)) for module in modules]
        if not modules:  # LeNet calls the function
            torch.relu = watched
        try:
            with torch.no_grad():
                for _ in range(count):
                    model(images)
            finish()
        finally:
            torch.relu = relu
            found.clear()
            for handle in hooks:
                handle.remove()

    yield run


def naive(found: list[Tensor]) -> tuple[Any, Run]:
    def hook(output: Tensor) -> None:
        found.append((output == 0).sum([axis for axis in range(output.ndim) if axis != 1]))

    return hook, lambda: None


def keep_all(found: list[Tensor]) -> tuple[Any, Run]:
    """Every activation is kept for its site, all batches are concatenated, and the zeros counted at the end."""

    def finish() -> None:
        by_site: dict[tuple[int, ...], list[Tensor]] = {}
        for values in found:
            by_site.setdefault(tuple(values.shape[1:]), []).append(values)
        for values in by_site.values():
            whole = torch.cat(values)
            (whole == 0).sum([axis for axis in range(whole.ndim) if axis != 1])

    return lambda output: found.append(output.clone()), finish


def counted_bytes(model: nn.Module, images: Tensor) -> int:
    """The bytes of all activations of a batch."""
    watch = Watch(model)
    watch.run(lambda: model(images))
    positions = sum(counts.positions * counts.zeros.numel() for counts in watch.tallies.totals().values())
    return positions * images.element_size()


def copy_speed(device: str) -> float:
    """GB/s at which a large tensor is copied, reading and writing."""
    source = torch.ones(2**28 if device == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    times: list[float] = []
    for _ in range(5):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * source.numel() * source.element_size() / min(times) / 1e9


if __name__ == "__main__":
    main()
