"""Whole neurons against single connections at the same number of parameters: accuracy, file, memory, latency."""

import copy
import tempfile
import warnings
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune

from benchmarks.paper.common import BLUE, GREY, ORANGE, Experiment, at_compression, curve, picture, spread, table
from torchtrim import Round
from torchtrim._cost import latencies_beside
from torchtrim._lenet import LeNet

SIZES = (3.8, 10, 25)
KINDS = ("whole neurons, dense", "connections, dense", "connections, sparse CSR")
DIGITS = (2, 2, 0, 0, 2)  # of the figures of `compared`
LAYERS = ("conv1", "conv2", "fc1", "fc2")


class SparseLeNet(nn.Module):
    """A LeNet whose weights are sparse CSR matrices; a convolution multiplies unfolded patches."""

    def __init__(self, dense: LeNet) -> None:
        super().__init__()
        for name in LAYERS:
            layer = getattr(dense, name)
            matrix = layer.weight.detach().flatten(1).to_sparse_csr()
            matrix = torch.sparse_csr_tensor(
                matrix.crow_indices().int(), matrix.col_indices().int(), matrix.values(), matrix.shape
            )
            self.register_buffer(f"{name}_weight", matrix)
            self.register_buffer(f"{name}_bias", layer.bias.detach()[:, None])

    def _multiply(self, name: str, columns: Tensor) -> Tensor:
        return getattr(self, f"{name}_weight") @ columns + getattr(self, f"{name}_bias")

    def _convolve(self, name: str, images: Tensor) -> Tensor:
        count, _, height, width = images.shape
        patches = F.unfold(images, 5).transpose(0, 1).flatten(1)  # [inputs · 25, images · positions]
        output = self._multiply(name, patches).unflatten(1, (count, height - 4, width - 4)).transpose(0, 1)
        return F.max_pool2d(F.relu(output), 2)

    def forward(self, images: Tensor) -> Tensor:
        features = self._convolve("conv2", self._convolve("conv1", images))
        hidden = F.relu(self._multiply("fc1", features.flatten(1).T.contiguous()))
        return self._multiply("fc2", hidden).T

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, tensor in self.named_buffers():
            if tensor.layout == torch.sparse_csr:
                found |= {f"{name}.rows": tensor.crow_indices(), f"{name}.columns": tensor.col_indices()}
            found[name] = tensor.values() if tensor.layout == torch.sparse_csr else tensor
        return found


def main() -> None:
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
    experiment = Experiment("benchmarks.paper.connections", __doc__)
    found: dict[tuple[float, str], list[list[float]]] = {(size, kind): [] for size in SIZES for kind in KINDS}
    with experiment.progress:
        for seed in experiment.seeds:
            ancestor, rounds = experiment.iterative(seed)
            work = partial(compared, experiment, ancestor, rounds, seed)
            figures = iter(experiment.once(f"seed {seed}", work))
            for size in SIZES:
                for kind in KINDS:
                    found[size, kind].append([next(figures) for _ in DIGITS])
    columns = {key: [list(values) for values in zip(*entries, strict=True)] for key, entries in found.items()}
    rows = [
        [kind, *(spread(values, digits) for values, digits in zip(columns[size, kind], DIGITS, strict=True))]
        for size in SIZES
        for kind in KINDS
    ]

    def draw(axes) -> None:
        for axis, which, title in (
            (axes[0], 1, "test accuracy, %"),
            (axes[1], 2, "file, kB"),
            (axes[2], 4, "speed-up"),
        ):
            for kind, colour in zip(KINDS, (BLUE, GREY, ORANGE), strict=True):
                chosen = [columns[size, kind] for size in SIZES]
                curve(axis, [column[0] for column in chosen], [column[which] for column in chosen], kind, colour)
            axis.set(ylabel=title)
        axes[1].set(yscale="log")
        axes[2].set(ylim=(0, None))
        axes[2].axhline(1, c=GREY, lw=0.8)
        axes[0].legend(frameon=False)

    head = ["network", "compression", "test accuracy, %", "file, kB", "weights in memory, kB", "speed-up"]
    experiment.write(
        "Whole neurons against single connections",
        f"""
Connections of the smallest magnitude over all weights are pruned (`torch.nn.utils.prune.global_unstructured`, Han et
al., 2015), in as many rounds as the iterative run had and to the same number of non-zero parameters in each, with one
epoch of retraining a round. Each is then run dense, with its zeros, and as sparse CSR matrices with 32-bit indices
(convolutions on unfolded patches). Speed-up is the latency of a batch of 32, the ancestor's over the network's, timed
in turns.

{table(head, rows)}""",
        picture(3, draw),
    )


def compared(experiment: Experiment, ancestor: nn.Module, rounds: list[Round], seed: int) -> list[float]:
    """Compression, accuracy, kB on disk, kB in memory, speed-up; of each kind at each size, one after the other."""
    targets = {at_compression(rounds, size).number for size in SIZES}
    pruned = copy.deepcopy(ancestor)
    figures: list[float] = []
    for done in rounds[: max(targets)]:
        prune_to(pruned, done.cost.parameters)
        experiment.train(pruned, 1, 1_000 * seed + done.number, f"seed {seed}: connections, round {done.number}")
        if done.number not in targets:
            continue
        dense = finished(pruned)
        sparse = SparseLeNet(dense).eval()
        images = torch.randn(32, 1, 28, 28)
        torch.testing.assert_close(sparse(images), dense(images), rtol=1e-3, atol=1e-3)
        models = [done.model, dense, sparse]
        first, *latencies = latencies_beside([ancestor, *models], images, 0.5)
        accuracy = experiment.test(dense)
        for model, latency in zip(models, latencies, strict=True):
            tensors = sparse.tensors() if model is sparse else dict(model.named_parameters())
            memory = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            tested = done.test.retrained if model is done.model else accuracy
            figures += [done.compression, tested, file_size(tensors) / 1e3, memory / 1e3, first / latency]
    return figures


def prune_to(model: nn.Module, parameters: int) -> None:
    """Prune until this many parameters are not zero, biases counted."""
    weights = [(getattr(model, name), "weight") for name in LAYERS]
    biases = sum(layer.bias.numel() for layer, _ in weights)
    left = sum(
        int(layer.weight_mask.sum()) if hasattr(layer, "weight_mask") else layer.weight.numel() for layer, _ in weights
    )
    prune.global_unstructured(weights, prune.L1Unstructured, amount=left + biases - parameters)


def finished(model: nn.Module) -> LeNet:
    """The network with its zeros in plain weights."""
    plain = LeNet()
    state = {f"{name}.bias": getattr(model, name).bias for name in LAYERS}
    state |= {f"{name}.weight": getattr(model, name).weight_orig * getattr(model, name).weight_mask for name in LAYERS}
    plain.load_state_dict({name: tensor.detach() for name, tensor in state.items()})
    return plain.eval()


def file_size(tensors: dict[str, Tensor]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
        return path.stat().st_size


if __name__ == "__main__":
    main()
