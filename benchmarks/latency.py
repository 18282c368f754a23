"""How much of what trimming saves in FLOPs is saved in time, in PyTorch and ONNX Runtime, and whether a latency that is
asked for is met.

Needs `pip install -e '.[vision]' onnx onnxscript onnxruntime`.
"""

import time
import warnings
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import torchtrim
from benchmarks.paper.common import Experiment, table
from torchtrim import Budget, TorchtrimWarning
from torchtrim._cost import flops_of, latencies_beside
from torchtrim._lenet import LeNet

MODELS = {"vgg16": "VGG-16", "resnet50": "ResNet-50"}
BATCHES = (1, 32)
MULTIPLES = (1, 16, 32)  # of which widths are
SECONDS = {1: 6.0, 32: 1.0}  # that each network is timed for, by batch; five calls at least
EXAMPLES = {
    "lenet": (32, 1, 28, 28),  # one image takes as long at any width
    "resnet18": (1, 3, 224, 224),
    "resnet50": (1, 3, 224, 224),
    "vgg16": (1, 3, 224, 224),
}


class Exported(nn.Module):
    """A model as ONNX Runtime runs it, on as many threads as PyTorch."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        with TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an exporter that is to go
            path = Path(folder) / "model.onnx"
            torch.onnx.export(model, (example,), path, dynamo=False)
            self._session: Any = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self._session.run(None, {self._input: images.numpy()})[0])


ENGINES = {"PyTorch": lambda model, example: model, "ONNX Runtime": Exported}


@dataclass(frozen=True)
class Study:
    """An architecture with random weights, of which only the widths matter here, and what is cut out of it."""

    name: str

    @cached_property
    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return LeNet().eval() if self.name == "lenet" else torchvision.models.get_model(self.name).eval()

    @cached_property
    def example(self) -> Tensor:
        return torch.rand(EXAMPLES[self.name])

    def trimmed(self, budget: Budget) -> nn.Module:
        profile = torchtrim.profile(self.model, [self.example])
        graph = torchtrim.trace(self.model, self.example)
        plan = budget.plan(self.model, graph, profile, criterion="random:0")
        return torchtrim.trim(self.model, plan, graph)

    @cached_property
    def networks(self) -> list[nn.Module]:
        """The whole one, and one at half its FLOPs for each multiple."""
        return [self.model, *(self.trimmed(Budget(flops=0.5, multiple_of=multiple)) for multiple in MULTIPLES)]

    def flops(self) -> list[float]:
        return [float(flops_of(network, self.example)) for network in self.networks]

    def seconds(self, engine: str, batch: int) -> list[float]:
        """Of one call of each network, timed in turns."""
        torch.manual_seed(1)
        images = torch.rand(batch, *self.example.shape[1:])
        ready = [ENGINES[engine](network, images) for network in self.networks]
        for network, other in zip(self.networks, ready, strict=True):
            torch.testing.assert_close(network(images[:1]), other(images)[:1], rtol=1e-3, atol=1e-4)
        return latencies_beside(ready, images, SECONDS[batch])

    def halved(self) -> list[float]:
        """Seconds of one call of the whole network and of the one whose latency should be half, and of planning it."""
        begun = time.perf_counter()
        small = self.trimmed(Budget(latency=0.5))
        taken = time.perf_counter() - begun
        return [*latencies_beside([self.model, small], self.example, SECONDS[1]), taken]


def main() -> None:
    experiment = Experiment("benchmarks.latency", __doc__ or "", seeds=1, runs="runs/latency")
    warnings.simplefilter("ignore", TorchtrimWarning)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    rows: list[list[str]] = []
    for name, title in MODELS.items():
        study = Study(name)
        flops = experiment.once(f"{name}, FLOPs", study.flops)
        saved = [flops[0] / one for one in flops[1:]]
        for engine, batch in product(ENGINES, BATCHES):
            seconds = experiment.once(f"{name}, {engine}, batch {batch}", partial(study.seconds, engine, batch))
            print(name, engine, batch, *(f"{one:.4f}" for one in seconds), flush=True)
            faster = [seconds[0] / one for one in seconds[1:]]
            cells = [f"{one:.2f}× ({one / times:.2f})" for one, times in zip(faster, saved, strict=True)]
            rows.append([f"{title}, {engine}, batch {batch}", f"{1000 * seconds[0]:.0f} ms", *cells])
    halved: list[list[str]] = []
    for name in EXAMPLES:
        whole, small, taken = experiment.once(f"{name}, half the latency", Study(name).halved)
        halved.append([name, f"{1000 * whole:.2f} ms", f"{small / whole:.1%}", f"{taken:.0f} s"])
        print(*halved[-1], flush=True)
    experiment.write(
        "Latency",
        f"""
Networks of torchvision with random weights, whose widths are all that matters here, on images of 224 × 224, and LeNet
on 32 of 28 × 28. Neurons were drawn at random, over all layers. All networks of a line were timed in turns.

## At half the FLOPs

`Budget(flops=0.5, multiple_of=...)`. How many times faster a call is, and in brackets that over how many times fewer
FLOPs it has: 1 where all that is saved in FLOPs is saved in time.

{table(["", "whole", *(f"multiples of {one}" for one in MULTIPLES)], rows)}
## At half the latency

`Budget(latency=0.5)` in PyTorch, of one image, or of LeNet's 32. The latency that is left was
measured again once the plan was made.

{table(["", "whole", "left", "to trace, measure, plan and trim"], halved)}""",
    )


if __name__ == "__main__":
    main()
