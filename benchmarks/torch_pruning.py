"""Time torchtrim beside Torch-Pruning, model by model and in turns, each model in a process of its own.

Prints what is known so far as a line of JSON after every run, and writes a page with a table of all models.
"""

import argparse
import copy
import gc
import json
import os
import platform
import resource
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchtrim
from benchmarks.zoo.__main__ import Results, last_record
from benchmarks.zoo.examine import FRACTION, first_line
from benchmarks.zoo.report import table
from torchtrim._copies import call_arguments
from torchtrim._files import write_whole
from torchtrim.testing import random_plan

_TORCHVISION = """
    resnet18 resnet50 vgg16_bn efficientnet_b0 mobilenet_v2 mobilenet_v3_large densenet121 densenet201 googlenet
    inception_v3 regnet_y_400mf convnext_tiny vit_b_16 shufflenet_v2_x1_0 squeezenet1_1 mnasnet1_0
"""
_TIMM = """
    vit_tiny_patch16_224 deit3_small_patch16_224 mixer_s32_224 convnextv2_atto mobilenetv4_conv_small_035 hgnetv2_b0
    dla34 cspresnet50 swin_tiny_patch4_window7_224 maxvit_pico_rw_256
"""
MODELS = (
    *(f"torchvision:{name}" for name in _TORCHVISION.split()),
    *(f"timm:{name}" for name in _TIMM.split()),
    "transformers:llama",
    "transformers:llama-grouped",
)
_NAMES = {"torchtrim": "torchtrim", "torch_pruning": "Torch-Pruning"}
SIDES = tuple(_NAMES)
_CLASSES = 1000
_SPARE = 3.0  # times what is timed, for what is not, and for a busy machine
_SLOWER = 1.5  # times as long as Torch-Pruning, from which on a model is named
Record = dict[str, Any]


# The models, and what Torch-Pruning is to be told of each ---------------------------------------------------


@dataclass
class Case:
    """A model in evaluation mode, what it is called with, and what Torch-Pruning's own examples say of its kind.

    example: as `torchtrim.trace` takes it. hints: options of its pruner, by the names of modules where it wants
    modules. mend: what its examples set on the model after pruning.
    """

    model: nn.Module
    example: Any
    outputs: tuple[str, ...]
    heads: dict[str, int] = field(default_factory=dict)
    hints: dict[str, Any] = field(default_factory=dict)
    mend: Callable[[nn.Module, Mapping[nn.Module, int]], None] = lambda model, heads: None


def build(name: str) -> Case:
    """A model by its name, `library:architecture`, with random weights, and one input of its usual size."""
    library, _, architecture = name.partition(":")
    return {"torchvision": _torchvision, "timm": _timm, "transformers": _transformers}[library](architecture)


def _torchvision(name: str) -> Case:
    import torchvision

    options = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, **options).eval()
    side = 299 if name == "inception_v3" else 224
    case = Case(model, torch.rand(1, 3, side, side), _classifiers(model))
    if isinstance(model, torchvision.models.VisionTransformer):
        case.hints["round_to"] = model.encoder.layers[0].num_heads
        case.mend = _mend_vision_transformer
    return case


def _mend_vision_transformer(model: Any, heads: Mapping[nn.Module, int]) -> None:
    model.hidden_dim = model.conv_proj.out_channels


def _timm(name: str) -> Case:
    import timm

    timm.layers.set_fused_attn(False)  # as Torch-Pruning's example for timm does
    model = timm.create_model(name, pretrained=False).eval()
    heads = {
        f"{path}.qkv": module.num_heads
        for path, module in model.named_modules()
        if hasattr(module, "num_heads") and isinstance(getattr(module, "qkv", None), nn.Linear)
    }
    side = model.default_cfg["input_size"][-1]
    return Case(model, torch.rand(1, 3, side, side), _classifiers(model), heads, mend=_mend_timm)


def _mend_timm(model: nn.Module, heads: Mapping[nn.Module, int]) -> None:
    for module in model.modules():
        if (layer := getattr(module, "qkv", None)) in heads:
            module.num_heads = heads[layer]
            module.head_dim = layer.out_features // (3 * module.num_heads)
            if hasattr(module, "attn_dim"):  # newer than the example
                module.attn_dim = module.num_heads * module.head_dim


def _transformers(name: str) -> Case:
    import transformers

    grouped = name == "llama-grouped"
    config = transformers.LlamaConfig(
        vocab_size=_CLASSES,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2 if grouped else 8,
        max_position_embeddings=64,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    heads = {
        f"model.layers.{layer}.self_attn.{part}_proj": config.num_attention_heads if part == "q" else key_heads
        for layer in range(config.num_hidden_layers)
        for part, key_heads in (("q", 8), ("k", config.num_key_value_heads), ("v", config.num_key_value_heads))
    }
    hints = {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": FRACTION, "round_to": 4}
    example = {"input_ids": torch.randint(3, _CLASSES, (1, 8))}
    return Case(model, example, ("lm_head",), heads, hints, _mend_llama)


def _mend_llama(model: Any, heads: Mapping[nn.Module, int]) -> None:
    model.config.hidden_size = model.lm_head.in_features
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.num_key_value_groups = attention.q_proj.out_features // attention.k_proj.out_features


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    """The layers that give one number for each class."""
    return tuple(
        name
        for name, module in model.named_modules()
        if _CLASSES in (getattr(module, "out_features", None), getattr(module, "out_channels", None))
    )


# What is timed ----------------------------------------------------------------------------------------------


def trim(case: Case, model: nn.Module) -> tuple[nn.Module, Record]:
    """What torchtrim is timed for: the trace, a random plan of a fraction of every group, the trim and its proof."""
    graph = torchtrim.trace(model, case.example)
    return torchtrim.trim(model, random_plan(graph, 0, FRACTION), graph), {}


def prune(case: Case, model: nn.Module) -> tuple[nn.Module, Record]:
    """What Torch-Pruning is timed for: its graph, the least magnitudes of every group, and their removal in place.

    Also returns the seconds that the magnitudes took, which torchtrim's random plan needs nothing like.
    """
    import torch_pruning

    spent: list[float] = []

    class Magnitude(torch_pruning.importance.GroupMagnitudeImportance):
        def __call__(self, group: Any) -> Tensor:
            result, seconds = timed(lambda: super(Magnitude, self).__call__(group))
            spent.append(seconds)
            return result

    heads = {model.get_submodule(name): number for name, number in case.heads.items()}
    pruner = torch_pruning.pruner.BasePruner(
        model,
        case.example if isinstance(case.example, dict) else (case.example,),
        importance=Magnitude(p=2),
        global_pruning=False,
        pruning_ratio=FRACTION,
        ignored_layers=[model.get_submodule(name) for name in case.outputs],
        num_heads=heads,
        in_channel_groups={},  # its defaults are shared by all pruners
        out_channel_groups={},
        **case.hints,
    )
    pruner.step()
    return model, {"importance_s": sum(spent), "heads": pruner.num_heads}


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and the seconds of CPU time that it took, which are those of the clock on an idle machine."""
    start = time.process_time()
    result = work()
    return result, round(time.process_time() - start, 6)


class TooLong(BaseException):
    """A run has used up its time. Not an Exception, so that nothing on the way takes it for one of its own."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TooLong in the block after these seconds of CPU time, then every second, should something swallow it."""

    def stop(number: int, frame: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


class Contest:
    """One model, shrunk by both in turns. `found`: what is known so far.

    repeats: runs of each that count; another one before them does not, since it loads code. seconds: limit of a run;
    no further turn begins after three times as many.
    """

    def __init__(self, name: str, repeats: int, seconds: float, report: Callable[[Record], None]) -> None:
        self.found: Record = {"name": name, "sides": {side: {"times": []} for side in SIDES}}
        self._repeats, self._seconds, self._report = repeats, seconds, report

    def run(self, case: Case, works: Mapping[str, Callable[[Case, nn.Module], tuple[nn.Module, Record]]]) -> None:
        start = time.process_time()
        self.found["parameters"] = parameters(case.model)
        for turn in range(self._repeats + 1):
            if turn and time.process_time() - start > 3 * self._seconds:
                break
            for side, work in works.items():
                if "error" not in self.found["sides"][side]:
                    self._once(case, side, work, first=turn == 0)
                    self._report(self.found)

    def _once(self, case: Case, side: str, work: Callable[..., tuple[nn.Module, Record]], *, first: bool) -> None:
        model, found = copy.deepcopy(case.model), self.found["sides"][side]
        gc.collect()
        try:
            with limited(self._seconds), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                (small, more), seconds = timed(lambda: work(case, model))
        except TooLong:
            found["error"] = f"no end within {self._seconds:g} s"
        except (Exception, RecursionError) as error:
            found["error"] = first_line(error)
        else:
            found["times"].append(seconds)
            found["importance_s"] = more.get("importance_s", 0.0)
            if first:
                found |= {"parameters": parameters(small), "forward": forward(case, side, small, more)}


def forward(case: Case, side: str, small: nn.Module, more: Record) -> str:
    """What becomes of a forward pass of what is left: nothing, or the first line of an exception."""
    args, kwargs = call_arguments(case.example)
    try:
        if side == "torch_pruning":
            case.mend(small, more["heads"])
        with torch.no_grad():
            small(*args, **kwargs)
    except Exception as error:
        return first_line(error)
    return ""


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# The page ---------------------------------------------------------------------------------------------------


def seconds_of(side: Record) -> list[float]:
    """The runs that count: all but the first, where there are others."""
    return side["times"][1:] or side["times"]


def ratio(record: Record) -> float | None:
    """How many times as long Torch-Pruning takes as torchtrim, by the medians; None where either has no result."""
    ours, theirs = (record["sides"][side] for side in SIDES)
    if "error" in ours or "error" in theirs or not (ours["times"] and theirs["times"]):
        return None
    return statistics.median(seconds_of(theirs)) / statistics.median(seconds_of(ours))


def page(records: Sequence[Record], command: str) -> str:
    """The whole page."""
    head = ("model", "torchtrim", "Torch-Pruning", "times as long", "it leaves", "parameters left: torchtrim", "it")
    return (
        "\n\n".join(
            [
                "# torchtrim beside Torch-Pruning",
                _INTRODUCTION.strip(),
                _summary(records),
                table(head, [_row(record) for record in records]),
                _errors(records),
                f"Measured by `{command}` with torchtrim {version('torchtrim')}, Torch-Pruning "
                f"{version('torch-pruning')}, PyTorch {torch.__version__.partition('+')[0]}, "
                f"torchvision {version('torchvision').partition('+')[0]}, timm {version('timm')} and Transformers "
                f"{version('transformers')}, on one thread of a machine with {os.cpu_count()} {platform.machine()} CPU "
                "cores.",
            ]
        )
        + "\n"
    )


_INTRODUCTION = f"""Seconds from a model to a smaller one, by both, in turns in one process: the median, and in
brackets the least and the most. They are seconds of CPU time on one thread, so that what else the machine does counts
for nothing.

- torchtrim: `trace`, a random plan of {FRACTION:.0%} of every group, `trim`; the proof that nothing else changes is
  part of it.
- Torch-Pruning: `BasePruner(...)` and `step()` with `pruning_ratio={FRACTION}`, `GroupMagnitudeImportance(p=2)`,
  `global_pruning=False`, the output layer in `ignored_layers`, and what its own examples say of a kind of model:
  `num_heads`, `round_to`, unfused attention (for both), attributes set after `step()`. Nothing is proved.

Torch-Pruning works on the model itself, torchtrim on a copy; both get a deep copy of the model, made outside what is
timed. Every model has random weights and one input of its usual size. A first run of each loads code, and does not
count where others followed. **It leaves** says what became of Torch-Pruning's result: whether a forward pass runs; that
it computes what it should was not checked. The two do not remove the same: parameters left are shares of the model's.
"""


def _summary(records: Sequence[Record]) -> str:
    ratios = {record["name"]: value for record in records if (value := ratio(record)) is not None}
    lines = [f"{len(records)} models. {_ends(records, 'torchtrim')} {_ends(records, 'torch_pruning')}"]
    if ratios:
        lowest, highest = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
        slower = [name for name, value in ratios.items() if value < 1 / _SLOWER]
        lines += [
            f"Where both came to an end, Torch-Pruning took **{statistics.median(ratios.values()):.2f} times** as long "
            f"as torchtrim in the median, from {ratios[lowest]:.2f} (`{lowest}`) to {ratios[highest]:.2f} "
            f"(`{highest}`).",
            f"torchtrim took more than {_SLOWER} times as long as Torch-Pruning on {len(slower)} of {len(ratios)}.",
            _without_importance(records),
        ]
    return "\n".join(lines)


def _ends(records: Sequence[Record], side: str) -> str:
    """How the runs of one of the two ended, in a sentence."""
    found = [record["sides"][side] for record in records]
    errors = [one["error"] for one in found if "error" in one]
    late = sum("no end" in error for error in errors)
    runs = sum(one.get("forward") == "" for one in found if "error" not in one)
    return (
        f"{_NAMES[side]} came to an end on {len(found) - len(errors)}, and what it left runs on {runs}; it found no "
        f"end on {late} and raised on {len(errors) - late}."
    )


def _without_importance(records: Sequence[Record]) -> str:
    """The median ratio if the magnitudes had cost nothing."""
    less: list[float] = []
    for record in records:
        if ratio(record) is not None:
            ours, theirs = (statistics.median(seconds_of(record["sides"][side])) for side in SIDES)
            less.append((theirs - record["sides"]["torch_pruning"]["importance_s"]) / ours)
    return f"Without the time that the magnitudes take, the median would be {statistics.median(less):.2f}."


def _row(record: Record) -> tuple[str, ...]:
    ours, theirs = (record["sides"][side] for side in SIDES)
    value = ratio(record)
    leaves = "–" if "error" in theirs else "an error in forward" if theirs.get("forward") else "a model that runs"
    shares = [
        f"{side['parameters'] / record['parameters']:.0%}" if "parameters" in side else "–" for side in (ours, theirs)
    ]
    return (record["name"], _time(ours), _time(theirs), "–" if value is None else f"{value:.2f}", leaves, *shares)


def _time(side: Record) -> str:
    if "error" in side:
        return side["error"] if "no end" in side["error"] else "an error"
    times = seconds_of(side)
    return f"{statistics.median(times):.2f} s ({min(times):.2f}–{max(times):.2f})" if times else "–"


def _errors(records: Sequence[Record]) -> str:
    """What both raised, by model."""
    rows = [
        (record["name"], side, one[:200])
        for record in records
        for side, found in record["sides"].items()
        for one in (found.get("error", ""), f"forward: {found['forward']}" if found.get("forward") else "")
        if one and "no end" not in one
    ]
    return "Errors:\n\n" + table(("model", "of", "what"), rows, left=3) if rows else "Neither raised an error."


# The command ------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.torch_pruning", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=MODELS, help="these models alone")
    parser.add_argument("--out", type=Path, default=Path("docs/results/torch_pruning.md"), help="the page")
    parser.add_argument("--resume", action="store_true", help="keep what an earlier run found, and go on with the rest")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each that count (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="CPU time limit of a run (default %(default)s)")
    parser.add_argument("--gibibytes", type=float, default=8, help="memory limit of a model (default %(default)s)")
    parser.add_argument("--one", choices=MODELS, help=argparse.SUPPRESS)  # in the process of one model
    options = parser.parse_args(arguments)
    if options.one:
        _one(options)
        return
    store = Results(options.out.with_suffix(".jsonl"), keep=options.resume)
    names = [name for name in MODELS if not options.only or name in options.only]
    for name in names:
        if name not in store.found:
            store.add(_apart(name, options))
            print(_row(store.found[name]), flush=True)
    command = " ".join(["python -m benchmarks.torch_pruning", *_changed(options, parser)])
    write_whole(options.out, page([store.found[name] for name in MODELS if name in store.found], command))


def _changed(options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """The options that decide what is found, where they are not the usual ones."""
    only = ["--only", *options.only] if options.only else []
    values = {key: getattr(options, key) for key in ("repeats", "seconds", "gibibytes")}
    return [*only, *(f"--{key} {value:g}" for key, value in values.items() if value != parser.get_default(key))]


def _apart(name: str, options: argparse.Namespace) -> Record:
    """What a process of its own finds of a model."""
    limits = [f"--{key}={getattr(options, key)}" for key in ("repeats", "seconds", "gibibytes")]
    command = [sys.executable, "-m", "benchmarks.torch_pruning", "--one", name, *limits]
    empty: Record = {"name": name, "sides": {side: {"times": []} for side in SIDES}}
    record, error = last_record(command, 5 * options.seconds * _SPARE)
    record = empty | record
    if error:
        for side in record["sides"].values():
            if not side["times"]:
                side.setdefault("error", error)
    return record


def _one(options: argparse.Namespace) -> None:
    if sys.platform == "linux":
        with suppress(ValueError):  # a lower limit is set already
            resource.setrlimit(resource.RLIMIT_DATA, (int(options.gibibytes * 2**30),) * 2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    contest = Contest(options.one, options.repeats, options.seconds, lambda found: print(json.dumps(found), flush=True))
    contest.run(build(options.one), dict(zip(SIDES, (trim, prune), strict=True)))


if __name__ == "__main__":
    main()
