"""What a trial cut teaches: other readings of the model's own code, found by the proof and proved again."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchtrim
from torchtrim import _trial
from torchtrim._graph import untried
from torchtrim._neurons import NeuronGraph
from torchtrim.testing import assert_exact


class Halves(nn.Module):
    """Images [batch, 32, 4, 4]. The sizes of the pieces are an attribute of an uncommon name."""

    def __init__(self) -> None:
        super().__init__()
        self.c = 16
        self.first, self.inner, self.out = nn.Conv2d(32, 32, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).split((self.c, self.c), 1)
        return self.out(torch.cat((a, b + self.inner(b)), 1))


class Attention(nn.Module):
    """Images [batch, channels, height, width]; the values are viewed in the channels of the inputs."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.key_dim = heads, channels // heads, channels // heads // 2
        self.qkv = nn.Conv2d(channels, channels + 2 * self.key_dim * heads, 1)
        self.proj = nn.Conv2d(channels, channels, 1)
        self.positions = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(x).view(batch, self.num_heads, self.key_dim * 2 + self.head_dim, height * width)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.head_dim], 2)
        attended = (v @ (q.transpose(-2, -1) @ k).softmax(-1).transpose(-2, -1)).view(batch, channels, height, width)
        return self.proj(attended + self.positions(v.reshape(batch, channels, height, width)))


class Stream(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.first, self.out = nn.Conv2d(3, channels, 1), nn.Conv2d(channels, 4, 1)
        self.blocks = nn.ModuleList(Attention(channels, heads) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


class WindowAttention(nn.Module):
    """Tokens [batch, tokens, width]; the size of a head is what the inputs' width comes to."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return x + self.proj(attended.transpose(1, 2).reshape(batch, tokens, width))


class Projections(nn.Module):
    """As GPT-2 writes linear layers: the outputs are viewed in a width of the layer's own, which is the inputs' too."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.weight, self.nf = nn.Parameter(torch.randn(*widths)), widths[1]
        self.bias = nn.Parameter(torch.randn(widths[1]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


def free(graph: NeuronGraph) -> set[str]:
    return graph.layers.keys() - graph.locked.keys()


def test_sizes_of_pieces_by_an_attribute_of_any_name() -> None:
    example = torch.randn(2, 32, 4, 4)
    assert free(torchtrim.trace(Halves(), example)) == {"first", "inner"}
    assert_exact(Halves(), example)


@pytest.mark.parametrize(("channels", "heads"), [(16, 2), (64, 4)])
def test_what_is_viewed_in_the_width_of_the_inputs_goes_with_them(channels, heads) -> None:
    model, example = Stream(channels, heads), torch.randn(2, 3, 5, 5)
    graph = torchtrim.trace(model, example)
    assert graph.locked.keys() == {"out"}
    assert {layer.group for name, layer in graph.layers.items() if name != "out"} == {"first"}
    plan = assert_exact(model, example, torch.randn(1, 3, 7, 4))
    gone = plan.removed["first"]
    assert len(gone) % (channels // heads) == 0, "a whole head's channels"


def test_heads_whose_size_is_a_share_of_the_width() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 24), WindowAttention(24, 3), WindowAttention(24, 3), nn.Linear(24, 3))
    example = torch.randn(2, 7, 5)
    assert not free(torchtrim.trace(model, example)), "the norms average over the width"
    assert free(torchtrim.trace(model, example, through_norms=True)) == {"0", "1.qkv", "1.proj", "2.qkv", "2.proj"}
    trimmed = torchtrim.trim(model, assert_exact(model, example, through_norms=True), example)
    assert trimmed[1].num_heads == 2


def test_an_attribute_that_is_as_large_as_the_inputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        Projections(6, 12), nn.ReLU(), Projections(12, 12), nn.ReLU(), Projections(12, 12), nn.Linear(12, 3)
    )
    example = torch.randn(2, 5, 6)
    assert free(torchtrim.trace(model, example)) == {"0", "2", "4"}
    assert_exact(model, example)


def test_tensors_that_modules_hold_need_no_data() -> None:
    class Grid(nn.Module):
        """Keeps a grid from one call to the next, and reads numbers from a table."""

        shape = None

        def __init__(self) -> None:
            super().__init__()
            self.first, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
            self.table, self.order = torch.arange(1.0, 5.0), torch.tensor([0, 2, 1])

        def forward(self, x: Tensor) -> Tensor:
            y = self.out(self.first(x).relu() * self.table.max().item() + self.table[1])
            if self.shape != y.shape:
                self.grid, self.shape = torch.arange(float(y.shape[-1]), dtype=x.dtype), y.shape
            return (y * self.grid)[..., self.order] * sum(self.table.tolist())

    model, example = Grid(), torch.randn(2, 3, 4, 4)
    model(example)
    held = model.grid
    graph = torchtrim.trace(model, example)
    assert graph.device == "meta"
    assert free(graph) == {"first"}
    assert model.grid is held
    assert_exact(model, example)


def test_what_modules_keep_by_device_is_computed_anew(tmp_path: Path) -> None:
    """As LeViT keeps the biases of its attention, which are computed of parameters at the first call."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
            self.biases = nn.Parameter(torch.randn(8, 4))
            self.register_buffer("positions", torch.tensor([0, 2, 1, 3, 3]))
            self.cache: dict[str, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            key = str(x.device)
            if key not in self.cache:
                self.cache[key] = self.biases[:, self.positions].t()
            return self.out((self.first(x) + self.cache[key]).relu())

    model, example = Biased().double(), torch.randn(2, 5, 6, dtype=torch.float64)
    plan = assert_exact(model, example)
    model(example)
    trimmed, silent = torchtrim.trim(model, plan, example), torchtrim.mask(model, plan, example)
    assert list(model.cache) == ["cpu"]
    torch.testing.assert_close(trimmed(example), silent(example))
    torchtrim.save(trimmed, tmp_path / "model")
    assert torch.equal(torchtrim.load(model, tmp_path / "model")(example), trimmed(example))


def test_the_guilty_are_found_by_halving(monkeypatch) -> None:
    """Of 32 layers with a fault that blames nobody, one is found in far fewer cuts than 32."""
    layers = [nn.Linear(8, 8) if index % 2 == 0 else nn.ReLU() for index in range(63)]
    model, example = nn.Sequential(*layers, nn.Linear(8, 2)), torch.randn(2, 8)
    cuts = 0

    def attempt(model, graph, kept, sources, *, keep):
        nonlocal cuts
        cuts += 1
        faulty = not kept[graph.layers["40"].roots].all()
        return model, _trial.Failure(set(), "a fault") if faulty else None

    monkeypatch.setattr(_trial, "attempt", attempt)
    graph = _trial.tried(model, untried(model, example))
    assert graph.locked.keys() == {"40", "63"}
    assert cuts < 20


def test_a_habit_of_layers_is_not_that_of_their_neighbours() -> None:
    """A block's attention holds the stream, of which one layer of its feed-forward part is; the other goes."""
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    options = {"embed_dim": 36, "depths": [1, 1, 1], "num_heads": [3, 6, 12], "window_size": [2, 2], "num_classes": 5}
    model, images = swin.SwinTransformer([4, 4], **options).eval(), torch.zeros(1, 3, 32, 32)
    locked = torchtrim.trace(model, images, through_norms=True).locked
    assert "features.5.0.mlp.3" in locked
    assert not {f"features.{stage}.0.mlp.0" for stage in (1, 3, 5)} & locked.keys()
