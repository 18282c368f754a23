"""Trace, plan and trim a Llama of seven billion parameters on the meta device: seconds of CPU time and peak memory."""

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import torchtrim
from torchtrim.testing import random_plan

_PEAK_UNIT = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux kilobytes


def timed(what: str, work: Callable[[], Any]) -> Any:
    start = time.process_time()
    result = work()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _PEAK_UNIT
    print(f"{what}: {time.process_time() - start:.1f} s, peak of the process so far {peak:.2f} GiB")
    return result


def main() -> None:
    torch.set_num_threads(1)
    with torch.device("meta"):
        model = timed("build", LlamaForCausalLM(LlamaConfig(use_cache=False)).eval)
    example = {"input_ids": torch.zeros(1, 16, dtype=torch.long)}
    graph = timed("trace", lambda: torchtrim.trace(model, example))
    plan = timed("plan", lambda: random_plan(graph, 0, 0.3))
    small = timed("trim and prove", lambda: torchtrim.trim(model, plan, graph))
    before, after = (sum(p.numel() for p in one.parameters()) for one in (model, small))
    print(f"{before:,} -> {after:,} parameters")


if __name__ == "__main__":
    main()
