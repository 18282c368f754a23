"""Small networks, one for each thing that an operator can do to neurons, each with the layers that are free to trim.

A toy ends in a layer named `out`, the model's output, which must be locked; `locked` names the others that must be,
with a part of the reason. All other layers must be free.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import torchtrim
from torchtrim import Plan

OUTPUT = "output of the model"


def randomised(model: nn.Module) -> nn.Module:
    """In float64 and evaluation mode, with the statistics and scales of a model that was trained."""
    for module in model.modules():
        if isinstance(getattr(module, "running_mean", None), Tensor):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
        if (
            isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm))
            and module.weight is not None
        ):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, 0, 0.1)
    return model.double().eval()


def assert_trim_equals_mask(model: nn.Module, plan: Plan, example: Tensor, *others: Tensor) -> nn.Module:
    """Trim and mask by one plan, compare what they compute on all inputs; returns the trimmed model."""
    small, silent = torchtrim.trim(model, plan, example), torchtrim.mask(model, plan, example)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    moved = False
    for inputs in (example, *others):
        with torch.no_grad():
            expected = silent(inputs)
            torch.testing.assert_close(small(inputs), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
            assert expected.isfinite().all()
            moved |= not torch.allclose(expected, model(inputs), rtol=1e-6)
    assert moved, "the plan silences nothing that the outputs show"
    return small


class Net(nn.Module):
    """Modules by name, and a function of the network and its inputs."""

    def __init__(self, forward: Callable[..., Tensor], modules: Mapping[str, nn.Module | nn.Parameter]) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.function = forward

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


@dataclass(frozen=True)
class Toy:
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    free: frozenset[str]
    locked: Mapping[str, str] = field(default_factory=dict)


TOYS: dict[str, Toy] = {}


def toy(name: str, shape: tuple[int, ...], free: str, locked: Mapping[str, str] | None = None, **modules: object):
    """Register a network: `modules` are functions without arguments, so that each test builds its own."""

    def register(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def build() -> nn.Module:
            return Net(forward, {key: make() for key, make in modules.items()})  # type: ignore[operator]

        assert name not in TOYS, name
        TOYS[name] = Toy(build, shape, frozenset(free.split()), {"out": OUTPUT, **(locked or {})})
        return forward

    return register


def linear(ins: int, outs: int, bias: bool = True) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(ins, outs, bias)


def conv(ins: int, outs: int, kernel: int = 3, **options: object) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(ins, outs, kernel, padding=kernel // 2, **options)  # type: ignore[arg-type]


def weight(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.randn(shape) / math.sqrt(shape[-1]))


IMAGES = (2, 3, 8, 8)
SEQUENCES = (2, 5, 6)
VECTORS = (4, 6)

# ------------------------------------------------------------------ convolutions


@toy("conv1d", (2, 3, 9), "a b", a=lambda: nn.Conv1d(3, 6, 3), b=lambda: nn.Conv1d(6, 8, 3, bias=False),
     out=linear(8, 4))  # fmt: skip
def _(net, x):
    return net.out(net.b(net.a(x).relu()).relu().mean(2))


@toy("conv2d, strided and dilated", IMAGES, "a b", a=conv(3, 6, stride=2), b=conv(6, 8, dilation=2), out=linear(8, 4))
def _(net, x):
    return net.out(net.b(net.a(x).relu()).relu().mean((2, 3)))


@toy("conv3d", (2, 3, 4, 5, 6), "a b", a=lambda: nn.Conv3d(3, 6, 3, padding=1), b=lambda: nn.Conv3d(6, 8, 1),
     out=linear(8, 4))  # fmt: skip
def _(net, x):
    return net.out(net.b(net.a(x).relu()).relu().mean((2, 3, 4)))


@toy("grouped conv, few groups: the same positions of every group go", IMAGES, "a b", a=conv(3, 8),
     b=conv(8, 12, groups=2), out=linear(12, 4))  # fmt: skip
def _(net, x):
    return net.out(net.b(net.a(x).relu()).relu().mean((2, 3)))


@toy("grouped conv, many groups: whole groups go", IMAGES, "a b", a=conv(3, 16), b=conv(16, 24, groups=8),
     out=linear(24, 4))  # fmt: skip
def _(net, x):
    return net.out(net.b(net.a(x).relu()).relu().mean((2, 3)))


@toy("depthwise conv with multiplier", IMAGES, "a b", a=conv(3, 8), b=conv(8, 16, groups=8), out=linear(16, 4))
def _(net, x):
    return net.out(net.b(net.a(x).relu()).relu().mean((2, 3)))


@toy("transposed conv", IMAGES, "a b", a=conv(3, 6), b=lambda: nn.ConvTranspose2d(6, 8, 2, 2), out=linear(8, 4))
def _(net, x):
    return net.out(net.b(net.a(x).relu()).relu().mean((2, 3)))


@toy("transposed grouped conv", IMAGES, "a b", a=conv(3, 8), b=lambda: nn.ConvTranspose2d(8, 12, 2, 2, groups=2),
     out=linear(12, 4))  # fmt: skip
def _(net, x):
    return net.out(net.b(net.a(x).relu()).relu().mean((2, 3)))


@toy("transposed depthwise conv", IMAGES, "a b", a=conv(3, 8), b=lambda: nn.ConvTranspose2d(8, 8, 2, 2, groups=8),
     out=linear(8, 4))  # fmt: skip
def _(net, x):
    return net.out(net.b(net.a(x).relu()).relu().mean((2, 3)))


@toy("weight_norm", IMAGES, "b", {"a": "weights are normed"},
     a=lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3)),
     b=lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 8, 3)), out=linear(8, 4))  # fmt: skip
def _(net, x):
    return net.out(net.b(net.a(x).relu()).tanh().mean((2, 3)))


class Standardised(nn.Conv2d):
    """Weight standardisation: each neuron's weights over all its inputs have mean 0 and deviation 1."""

    def forward(self, x):
        spread, centre = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - centre) / (spread + 1e-5).sqrt(), self.bias, padding=1)


@toy("weight standardisation: inputs are normalised over, outputs are free", IMAGES, "b", {"a": "reduced over"},
     a=lambda: Standardised(3, 6, 3), b=lambda: Standardised(6, 8, 3), out=linear(8, 4))  # fmt: skip
def _(net, x):
    return net.out(net.b(net.a(x).relu()).relu().mean((2, 3)))


# ------------------------------------------------------------------ matrix products


@toy("linear through addmm", VECTORS, "a b", a=linear(6, 8), b=linear(8, 10), out=linear(10, 3))
def _(net, x):
    return net.out(net.b(net.a(x).relu()).relu())


@toy("linear through mm", VECTORS, "a b", a=linear(6, 8, False), b=linear(8, 10, False), out=linear(10, 3))
def _(net, x):
    return net.out(net.b(net.a(x).relu()).relu())


@toy("linear on sequences", SEQUENCES, "a b", a=linear(6, 8), b=linear(8, 10, False), out=linear(10, 3))
def _(net, x):
    return net.out(net.b(net.a(x).relu()).relu())


@toy("parameters and matmul", SEQUENCES, "a b", a=weight(6, 8), b=weight(8, 10), out=weight(10, 3))
def _(net, x):
    return (x @ net.a).relu() @ net.b @ net.out


@toy("einsum", SEQUENCES, "a b", a=weight(8, 6), b=weight(10, 8), out=weight(3, 10))
def _(net, x):
    hidden = torch.einsum("nlc,oc->nlo", x, net.a).relu()
    return torch.einsum("nlc,oc->nlo", torch.einsum("nlc,oc->nlo", hidden, net.b), net.out)


@toy("bmm with one weight per branch", SEQUENCES, "a b", a=weight(3, 6, 8), b=weight(3, 8, 10), out=linear(10, 3))
def _(net, x):
    branches = x.mean(1).expand(3, -1, -1)
    return net.out(torch.bmm(torch.bmm(branches, net.a).relu(), net.b).sum(0))


@toy("matrix and vector", (6,), "a", a=weight(8, 6), b=weight(8), out=weight(3, 8))
def _(net, x):
    return torch.mv(net.out, torch.mv(net.a, x).tanh() * net.b)


@toy("bilinear", VECTORS, "a b", a=linear(6, 8), b=lambda: nn.Bilinear(8, 6, 5), out=linear(5, 3))
def _(net, x):
    return net.out(net.b(net.a(x), x))


@toy("embedding", (4, 3), "table a", table=lambda: nn.Embedding(11, 6), a=linear(6, 8), out=linear(8, 3))
def _(net, x):
    return net.out(net.a(net.table(x.abs().long().clamp(0, 10))).relu().mean(1))


@toy("tied weights", VECTORS, "a", a=linear(6, 8), out=linear(6, 3))
def _(net, x):
    return net.out(F.linear(net.a(x).relu(), net.a.weight.t()))


@toy("a layer that is used twice", VECTORS, "a b", a=linear(6, 8), b=linear(8, 8), out=linear(8, 3))
def _(net, x):
    return net.out(net.b(net.b(net.a(x).relu()).relu()).relu())


@toy("low rank", VECTORS, "a b", a=linear(6, 8), b=weight(8, 2), c=weight(2, 8), out=linear(8, 3))
def _(net, x):
    return net.out(F.linear(net.a(x).relu(), net.b @ net.c).relu())


# ------------------------------------------------------------------ normalisation


@toy("batch norm, before and after the activation", IMAGES, "a b c", a=conv(3, 6),
     norm1=lambda: nn.BatchNorm2d(6), b=conv(6, 8, bias=False), norm2=lambda: nn.BatchNorm2d(8), c=conv(8, 8),
     norm3=lambda: nn.BatchNorm2d(8, affine=False), out=conv(8, 2))  # fmt: skip
def _(net, x):
    x = net.norm1(net.a(x)).relu()
    x = net.norm2(net.b(x).relu())
    return net.out(net.norm3(net.c(x)).relu())


@toy("a norm keeps zero only by a scale and a shift", VECTORS, "a c", {"b": "not zero"}, a=linear(6, 8),
     norm1=lambda: nn.BatchNorm1d(8), b=linear(1, 8), norm2=lambda: nn.BatchNorm1d(8, affine=False), c=linear(1, 8),
     out=linear(8, 3))  # fmt: skip
def _(net, x):
    x = net.norm1(net.a(x)).sum(1, keepdim=True)
    return net.out(net.c(net.norm2(net.b(x)).sum(1, keepdim=True)))


@toy("batch norm 1d", VECTORS, "a", a=linear(6, 8), norm=lambda: nn.BatchNorm1d(8), out=linear(8, 3))
def _(net, x):
    return net.out(net.norm(net.a(x)).relu())


@toy("instance norm", IMAGES, "a b", a=conv(3, 6), norm1=lambda: nn.InstanceNorm2d(6, affine=True), b=conv(6, 8),
     norm2=lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True), out=conv(8, 2))  # fmt: skip
def _(net, x):
    return net.out(net.norm2(net.b(net.norm1(net.a(x)).relu())).relu())


@toy("group norm: whole groups go", IMAGES, "a", {"b": "lose everything"}, a=conv(3, 12),
     norm1=lambda: nn.GroupNorm(4, 12), b=conv(12, 8), norm2=lambda: nn.GroupNorm(1, 8), out=conv(8, 2))  # fmt: skip
def _(net, x):
    return net.out(net.norm2(net.b(net.norm1(net.a(x)).relu())).relu())


@toy("layer norm: the normalised axis stays", SEQUENCES, "b", {"a": "normalised over", "c": "normalised over"},
     a=linear(6, 8), norm=lambda: nn.LayerNorm(8), b=linear(8, 10), c=linear(10, 8), out=linear(8, 3))  # fmt: skip
def _(net, x):
    x = net.a(x)
    return net.out(net.norm(x + net.c(net.b(net.norm(x)).relu())))


@toy("layer norm and rms norm over positions", IMAGES, "a b", a=conv(3, 6), norm=lambda: nn.LayerNorm([8, 8]),
     b=conv(6, 5), rms=lambda: nn.RMSNorm(8), out=conv(5, 2))  # fmt: skip
def _(net, x):
    return net.out(net.rms(net.b(net.norm(net.a(x)).relu())).relu())


@toy("rms norm", SEQUENCES, "b", {"a": "", "c": ""}, a=linear(6, 8), norm=lambda: nn.RMSNorm(8), b=linear(8, 10),
     c=linear(10, 8), out=linear(8, 3))  # fmt: skip
def _(net, x):
    x = net.a(x)
    return net.out(net.norm(x + net.c(net.b(net.norm(x)).relu())))


@toy("local response norm", IMAGES, "b", {"a": ""}, a=conv(3, 6), norm=lambda: nn.LocalResponseNorm(3), b=conv(6, 8),
     out=conv(8, 2))  # fmt: skip
def _(net, x):
    return net.out(net.b(net.norm(net.a(x).relu())).relu())


@toy("euclidean normalisation", VECTORS, "a", a=linear(6, 8), out=linear(8, 3))
def _(net, x):
    return net.out(F.normalize(net.a(x).relu(), dim=1))


@toy("softmax over neurons", VECTORS, "b", {"a": "compared"}, a=linear(6, 8), b=linear(8, 10), out=linear(10, 3))
def _(net, x):
    return net.out(net.b(net.a(x).softmax(1)).relu())


# ------------------------------------------------------------------ activations


@toy("smooth activations that keep zero", VECTORS, "a b c d", a=linear(6, 8), b=linear(8, 8), c=linear(8, 8),
     d=linear(8, 8), out=linear(8, 3))  # fmt: skip
def _(net, x):
    x = F.gelu(net.a(x))
    x = F.silu(net.b(x))
    return net.out(torch.tanh(F.elu(net.d(F.mish(net.c(x))))))


@toy("activations that do not keep zero, read through weights and summed", VECTORS, "a c",
     {"b": "silent neuron is not zero"}, a=linear(6, 8), b=linear(8, 8), c=linear(1, 8), out=linear(8, 3))  # fmt: skip
def _(net, x):
    x = torch.sigmoid(net.a(x))
    x = F.softplus(net.b(x)).sum(1, keepdim=True)
    return net.out(net.c(x) + 1)


@toy("numbers that keep zero, and one that does not", VECTORS, "a c", {"b": "silent neuron is not zero"},
     a=linear(6, 8), b=linear(1, 8), c=linear(1, 8), out=linear(8, 3))  # fmt: skip
def _(net, x):
    x = ((net.a(x).relu() - 0) * 2 / 3).sum(1, keepdim=True)
    return net.out(net.c((net.b(x) + 1).sum(1, keepdim=True)))


@toy("a sum of what is zero and what is not", VECTORS, "c", {"a": "not zero", "b": "not zero"}, a=linear(6, 8),
     b=linear(6, 8), c=linear(1, 8), out=linear(8, 3))  # fmt: skip
def _(net, x):
    return net.out(net.c((net.a(x).relu() + net.b(x).sigmoid()).sum(1, keepdim=True)))


@toy("a product of what is zero and what is not", VECTORS, "a b c", a=linear(6, 8), b=linear(6, 8), c=linear(1, 8),
     out=linear(8, 3))  # fmt: skip
def _(net, x):
    return net.out(net.c((net.a(x).relu() * net.b(x).sigmoid()).sum(1, keepdim=True)))


@toy("clamp keeps zero only where zero is inside", VECTORS, "a c", {"b": "silent neuron is not zero"}, a=linear(6, 8),
     b=linear(1, 8), c=linear(1, 8), out=linear(8, 3))  # fmt: skip
def _(net, x):
    x = net.a(x).clamp(-1, 1).sum(1, keepdim=True)
    return net.out(net.c(net.b(x).clamp(0.1, 1).sum(1, keepdim=True)))


@toy("prelu with one slope for each neuron", IMAGES, "a b", a=conv(3, 6), prelu=lambda: nn.PReLU(6), b=conv(6, 6),
     one=nn.PReLU, out=conv(6, 2))  # fmt: skip
def _(net, x):
    return net.out(net.one(net.b(net.prelu(net.a(x)))))


@toy("in place, functional and reused activations", VECTORS, "a b c", a=linear(6, 8), b=linear(8, 8), c=linear(8, 8),
     act=lambda: nn.ReLU(inplace=True), out=linear(8, 3))  # fmt: skip
def _(net, x):
    x = net.act(net.a(x))
    x = net.act(net.b(x))
    x = F.relu_(net.c(x))
    x += 0
    x.mul_(2)
    return net.out(x)


@toy("in place through a view", IMAGES, "a", a=conv(3, 6), out=linear(6 * 64, 3))
def _(net, x):
    x = net.a(x)
    x.flatten(1).relu_()
    return net.out(x.flatten(1).mul_(2))


@toy("in place through a view takes zero away", VECTORS, "b", {"a": "silent neuron is not zero"}, a=linear(6, 8),
     b=linear(1, 8), out=linear(8, 3))  # fmt: skip
def _(net, x):
    x = net.a(x).relu()
    x.view(-1, x.shape[1]).add_(1)
    return net.out(net.b(x.sum(1, keepdim=True)))


@toy("a part is overwritten", VECTORS, "b", {"a": "disagree"}, a=linear(6, 8), b=linear(8, 8), out=linear(8, 3))
def _(net, x):
    x = net.a(x)
    x[:, :2] = 0
    return net.out(net.b(x).relu())


@toy("a part is written into", VECTORS, "b", {"a": "written into"}, a=linear(6, 4), b=linear(8, 8), out=linear(8, 3))
def _(net, x):
    whole = x.new_zeros(x.shape[0], 8)
    whole[:, :4] = net.a(x)
    return net.out(net.b(whole).relu())


@toy("a view is read after its base was written to", VECTORS, "b", {"a": "another name"}, a=linear(6, 8),
     b=linear(8, 8), out=linear(8, 3))  # fmt: skip
def _(net, x):
    x = net.a(x).relu()
    view = x.view(-1, 8)
    x += 1
    return net.out(net.b(view).relu())


@toy("dropout", IMAGES, "a b", a=conv(3, 6), drop=lambda: nn.Dropout2d(0.5), b=conv(6, 8), out=conv(8, 2))
def _(net, x):
    return net.out(F.dropout(net.b(net.drop(net.a(x)).relu()), 0.3, net.training))


@toy("rolled as if flat", VECTORS, "b", {"a": "no rule"}, a=linear(6, 8), b=linear(8, 8), out=linear(8, 3))
def _(net, x):
    return net.out(net.b(net.a(x).roll(1)).relu())


@toy("a mask over two axes", VECTORS, "b", {"a": "no rule"}, a=linear(6, 8), b=linear(8, 8), out=linear(8, 3))
def _(net, x):
    x = net.a(x)
    return net.out(net.b(x[torch.ones(x.shape, dtype=torch.bool)].view(-1, 8)).relu())


@toy("data", VECTORS, "a", a=linear(6, 8), out=linear(8, 3))
def _(net, x):
    return net.out(net.a(x).relu().data * 2)


@toy("windows", IMAGES, "a", a=conv(3, 6), out=conv(6, 2))
def _(net, x):
    return net.out(net.a(x).unfold(2, 2, 2).unfold(-2, 2, 2).mean((-1, -2)))


@toy("values read at positions", IMAGES, "a", a=conv(3, 6), out=conv(6, 2))
def _(net, x):
    places = torch.linspace(-1, 1, 50, dtype=x.dtype, device=x.device).expand(len(x), 25, 50).reshape(len(x), 25, 25, 2)
    return net.out(F.grid_sample(net.a(x), places, align_corners=False).relu())


class Held(nn.Module):
    """Rows of a table, at positions that the module holds."""

    positions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", torch.tensor([0, 2, 1, 3, 3]))

    def forward(self, table: Tensor) -> Tensor:
        return table[self.positions]


@toy("rows at positions that the model holds", SEQUENCES, "a", a=linear(6, 8), table=weight(5, 8), held=Held,
     out=linear(8, 3))  # fmt: skip
def _(net, x):
    return net.out((net.a(x) + net.held(net.table)).relu())


@toy("regions", IMAGES, "a", a=conv(3, 6), out=conv(6, 2))
def _(net, x):
    boxes = torch.zeros(3, 5, dtype=x.dtype, device=x.device)
    boxes[:, 3:] = 4
    return net.out(torchvision.ops.roi_align(net.a(x).relu(), boxes, 2))


class StandardisedConv(nn.Conv2d):
    def forward(self, x):
        flat = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True)
        return F.conv2d(x, flat.reshape_as(self.weight), self.bias)


@toy("a weight that is standardised", IMAGES, "b", {"a": "fixed size"}, a=conv(3, 6),
     b=lambda: StandardisedConv(6, 8, 3), out=conv(8, 2))  # fmt: skip
def _(net, x):
    return net.out(net.b(net.a(x).relu()).relu())


# ------------------------------------------------------------------ residuals, joins, gates


@toy("residual", IMAGES, "a b c", a=conv(3, 8), b=conv(8, 6), c=conv(6, 8), out=conv(8, 2))
def _(net, x):
    x = net.a(x)
    return net.out((x + net.c(net.b(x).relu())).relu())


@toy("dense joins", IMAGES, "a b c", a=conv(3, 4), b=conv(4, 5), c=conv(9, 6), out=conv(15, 2))
def _(net, x):
    a = net.a(x).relu()
    b = net.b(a).relu()
    c = net.c(torch.cat([a, b], 1)).relu()
    return net.out(torch.cat([a, b, c], 1))


@toy("joins of what must stay whole", IMAGES, "b", {"a": "lose everything", "c": "lose everything"}, a=conv(3, 6),
     one=lambda: nn.GroupNorm(1, 6), c=conv(3, 6), two=lambda: nn.GroupNorm(1, 6), b=conv(12, 8),
     out=conv(8, 2))  # fmt: skip
def _(net, x):
    x = torch.cat([net.one(net.a(x)), net.two(net.c(x))], 1)
    return net.out(net.b(x.relu()).relu())


@toy("cat with an input", IMAGES, "a", a=conv(3, 4), out=conv(7, 2))
def _(net, x):
    return net.out(torch.cat([x, net.a(x).relu()], 1))


@toy("residual with an input", IMAGES, "", {"a": "fixed size"}, a=conv(3, 3), out=conv(3, 2))
def _(net, x):
    return net.out(x + net.a(x))


@toy("squeeze and excitation", IMAGES, "a b c", a=conv(3, 8), b=conv(8, 4, 1), c=conv(4, 8, 1), out=conv(8, 2))
def _(net, x):
    x = net.a(x).relu()
    gate = net.c(net.b(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()
    return net.out(x * gate)


@toy("spatial attention: a mean over neurons", IMAGES, "", {"a": "reduced"}, a=conv(3, 8), b=conv(2, 1, 7),
     out=conv(8, 2))  # fmt: skip
def _(net, x):
    x = net.a(x).relu()
    return net.out(x * net.b(torch.stack([x.mean(1), x.amax(1)], 1)).sigmoid())


@toy("a sum over neurons", IMAGES, "a", a=conv(3, 8), out=conv(1, 2))
def _(net, x):
    return net.out(net.a(x).relu().sum(1, keepdim=True))


@toy("a sum over neurons, divided by their number", IMAGES, "", {"a": "a number depends on the width"}, a=conv(3, 8),
     out=conv(1, 2))  # fmt: skip
def _(net, x):
    x = net.a(x).relu()
    return net.out(x.sum(1, keepdim=True) / x.shape[1])


@toy("gated unit", VECTORS, "a b", a=linear(6, 16), b=linear(8, 20), out=linear(10, 3))
def _(net, x):
    value, gate = net.a(x).chunk(2, 1)
    return net.out(F.glu(net.b(value * gate.sigmoid()), 1))


@toy("gated unit of two layers", SEQUENCES, "a b", a=linear(6, 8), b=linear(6, 8), out=linear(8, 3))
def _(net, x):
    return net.out(F.silu(net.a(x)) * net.b(x))


@toy("maxout", VECTORS, "a b", a=linear(6, 8), b=linear(6, 8), out=linear(8, 3))
def _(net, x):
    return net.out(torch.maximum(net.a(x), net.b(x)))


@toy("where", VECTORS, "a b", a=linear(6, 8), b=linear(6, 8), out=linear(8, 3))
def _(net, x):
    a = net.a(x)
    return net.out(torch.where(a > 0, a, net.b(x)))


@toy("layer scale and drop path", IMAGES, "a b", a=conv(3, 8), b=conv(8, 8), scale=weight(8, 1, 1), out=conv(8, 2))
def _(net, x):
    x = net.a(x)
    return net.out(x + net.scale * net.b(x).relu() * x.new_ones(x.shape[0], 1, 1, 1))


# ------------------------------------------------------------------ pooling, padding, interpolation


@toy("pooling", IMAGES, "a b c", a=conv(3, 6), b=conv(6, 8), c=conv(8, 8), out=linear(8, 3))
def _(net, x):
    x = F.max_pool2d(net.a(x).relu(), 3, 2, 1)
    x = F.avg_pool2d(net.b(x).relu(), 2, ceil_mode=True)
    return net.out(F.adaptive_max_pool2d(net.c(x).relu(), 1).flatten(1) + x.mean((2, 3)) * 0 + x.amax((2, 3)) * 0)


@toy("padding", IMAGES, "a b c", a=conv(3, 6), b=conv(6, 8), c=conv(8, 8), out=conv(8, 2))
def _(net, x):
    x = F.pad(net.a(x).relu(), (1, 1, 1, 1))
    x = F.pad(net.b(x).relu(), (1, 1, 1, 1), "reflect")
    return net.out(F.pad(net.c(x).relu(), (1, 1, 1, 1), value=1.0))


@toy("padding with something else than zero, summed", IMAGES, "a", {"b": "not zero"}, a=conv(3, 6), b=conv(1, 6),
     out=conv(1, 2))  # fmt: skip
def _(net, x):
    x = F.pad(net.a(x).relu(), (1, 1, 1, 1)).sum(1, keepdim=True)
    return net.out(F.pad(net.b(x).relu(), (1, 1, 1, 1), value=1.0).sum(1, keepdim=True))


@toy(
    "padding neurons with zeros",
    IMAGES,
    "a b",
    a=conv(3, 6),
    b=conv(6, 10),
    out=conv(10, 2),
)
def _(net, x):
    x = net.a(x).relu()
    return net.out(net.b(x) + F.pad(x, (0, 0, 0, 0, 2, 2)))


@toy("interpolation", IMAGES, "a b", a=conv(3, 6), b=conv(6, 8), out=conv(8, 2))
def _(net, x):
    x = F.interpolate(net.a(x).relu(), scale_factor=2, mode="nearest")
    return net.out(F.interpolate(net.b(x).relu(), size=(5, 5), mode="bilinear"))


# ------------------------------------------------------------------ shapes


@toy("flatten", IMAGES, "a b", a=conv(3, 6), b=linear(6 * 64, 8), out=linear(8, 3))
def _(net, x):
    return net.out(net.b(net.a(x).relu().flatten(1)).relu())


@toy("view, reshape, unsqueeze and squeeze", IMAGES, "a b", a=conv(3, 6), b=linear(6 * 64, 8), out=linear(8, 3))
def _(net, x):
    x = net.a(x).relu()
    x = net.b(x.view(x.size(0), -1)).relu()
    return net.out(x.unsqueeze(1).unsqueeze(-1).squeeze().reshape(x.shape))


@toy("permute and transpose", IMAGES, "a b c", a=conv(3, 6), b=linear(6, 8), c=conv(8, 8), out=linear(8, 3))
def _(net, x):
    x = net.b(net.a(x).relu().permute(0, 2, 3, 1)).relu()
    return net.out(net.c(x.movedim(-1, 1)).relu().flatten(2).transpose(1, 2))


@toy("roll, flip and repeat", SEQUENCES, "a b", a=linear(6, 8), b=linear(8, 8), out=linear(8, 3))
def _(net, x):
    x = net.a(x).relu().roll(2, 1).flip(1)
    return net.out(net.b(x.repeat(1, 2, 1)).relu())


@toy("neurons in reverse and twice", VECTORS, "a", a=linear(6, 8), out=linear(16, 3))
def _(net, x):
    return net.out(net.a(x).relu().flip(1).repeat(1, 2))


@toy("expand", VECTORS, "a b", a=linear(6, 8), b=linear(8, 8), out=linear(8, 3))
def _(net, x):
    x = net.a(x).relu()
    return net.out(net.b(x.unsqueeze(1).expand(-1, 3, -1)).relu())


@toy("equal pieces: chunk, split, slice, strided slice", VECTORS, "a b c d", a=linear(6, 16), b=linear(8, 16),
     c=linear(8, 16), d=linear(8, 16), out=linear(8, 3))  # fmt: skip
def _(net, x):
    left, right = net.a(x).relu().chunk(2, 1)
    x = net.b(left + right).relu()
    left, right = x.split(x.shape[1] // 2, 1)
    x = net.c(left * right).relu()
    x = net.d(x[:, : x.shape[1] // 2] + x[:, x.shape[1] // 2 :]).relu()
    return net.out(x[:, ::2] - x[:, 1::2])


@toy("unequal pieces", VECTORS, "b", {"a": "unequal"}, a=linear(6, 9), b=linear(3, 8), out=linear(14, 3))
def _(net, x):
    left, right = net.a(x).relu().split([3, 6], 1)
    return net.out(torch.cat([net.b(left).relu(), right], 1))


@toy("pieces of a size that the code holds", VECTORS, "b", {"a": ""}, a=linear(6, 16), b=linear(8, 8), out=linear(8, 3))
def _(net, x):
    left, right = net.a(x).relu().split(8, 1)
    return net.out(net.b(left * right).relu())


@toy("select, stack and unbind", SEQUENCES, "a b", a=linear(6, 8), b=linear(8, 8), out=linear(8, 3))
def _(net, x):
    first, *others = net.a(x).relu().unbind(1)
    return net.out(net.b(torch.stack([first, *others], 1)).relu()[:, 0])


@toy("one neuron is picked", VECTORS, "b", {"a": "picked"}, a=linear(6, 8), b=linear(8, 8), out=linear(8, 3))
def _(net, x):
    x = net.a(x).relu()
    return net.out(net.b(x).relu() + x[:, 2].unsqueeze(1))


@toy("positions are picked by index", SEQUENCES, "a b", a=linear(6, 8), b=linear(8, 8), out=linear(8, 3))
def _(net, x):
    x = net.a(x).relu()[:, torch.tensor([0, 2, 4])]
    return net.out(net.b(x).relu().index_select(1, torch.tensor([1, 0])))


@toy("neurons are picked by index", VECTORS, "b", {"a": "picked"}, a=linear(6, 8), b=linear(4, 8), out=linear(8, 3))
def _(net, x):
    return net.out(net.b(net.a(x).relu()[:, torch.tensor([0, 2, 4, 6])]).relu())


@toy("indices that neurons compute", SEQUENCES, "b", {"a": "no rule is known"}, a=linear(6, 8), b=linear(6, 8),
     out=linear(8, 3))  # fmt: skip
def _(net, x):
    order = net.a(x).argsort(1)
    return net.out(net.b(x).relu() + torch.gather(x[:, :, :1].expand(-1, -1, order.shape[2]), 1, order)[:, :, :1])


@toy("channel shuffle", IMAGES, "a b", a=conv(3, 8), b=conv(8, 8), out=conv(8, 2))
def _(net, x):
    x = net.a(x).relu()
    x = x.view(x.shape[0], 2, -1, 8, 8).transpose(1, 2).reshape(x.shape[0], -1, 8, 8)
    return net.out(F.channel_shuffle(net.b(x).relu(), 2))


@toy("shuffled halves", IMAGES, "a b c d", a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), d=conv(8, 8), out=conv(16, 2))
def _(net, x):
    def shuffled(*parts):
        x = torch.cat(parts, 1)
        n, channels, height, width = x.shape
        return x.view(n, 2, channels // 2, height, width).transpose(1, 2).reshape(n, channels, height, width)

    x = net.a(x).relu()
    left, right = shuffled(x, net.b(x).relu()).chunk(2, 1)
    left, right = shuffled(left, net.c(right).relu()).chunk(2, 1)
    return net.out(shuffled(left, net.d(right).relu()))


@toy("pixel shuffle and back", IMAGES, "a b", a=conv(3, 24), b=conv(6, 5), out=conv(20, 2))
def _(net, x):
    x = net.b(F.pixel_shuffle(net.a(x).relu(), 2)).relu()
    return net.out(F.pixel_unshuffle(x, 2))


@toy("unfold and fold", IMAGES, "a b", a=conv(3, 4), b=linear(16, 12), out=conv(3, 2))
def _(net, x):
    patches = F.unfold(net.a(x).relu(), 2, stride=2).transpose(1, 2)
    return net.out(F.fold(net.b(patches).relu().transpose(1, 2), (8, 8), 2, stride=2))


# ------------------------------------------------------------------ attention


def heads(x: Tensor, count: int) -> Tensor:
    return x.view(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


@toy("attention with a number of heads that the code holds", SEQUENCES, "", {"q": "", "k": "", "v": ""},
     q=linear(6, 8), k=linear(6, 8), v=linear(6, 12), out=linear(12, 3))  # fmt: skip
def _(net, x):
    q, k, v = heads(net.q(x), 2), heads(net.k(x), 2), heads(net.v(x), 2)
    return net.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Heads(nn.Module):
    """Attention that keeps the number of its heads in attributes; `real` makes its code look at the data."""

    def __init__(self, key_heads: int, real: bool) -> None:
        super().__init__()
        self.num_heads, self.key_heads, self.head_dim, self.attn_dim, self.real = 4, key_heads, 3, 12, real
        self.q, self.k, self.v = nn.Linear(6, 12), nn.Linear(6, key_heads * 3), nn.Linear(6, key_heads * 3)

    def forward(self, x):
        n, length, _ = x.shape
        if self.real and x.isnan().any():
            raise ValueError("not a number")
        q = self.q(x).reshape(n, length, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k(x).reshape(n, length, self.key_heads, self.head_dim).transpose(1, 2)
        v = self.v(x).reshape(n, length, self.key_heads, self.head_dim).transpose(1, 2)
        grouped = self.key_heads < self.num_heads
        x = F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
        return x.transpose(1, 2).reshape(n, length, self.attn_dim)


HEADS = "attention.q attention.k attention.v"


@toy("attention heads", SEQUENCES, HEADS, attention=lambda: Heads(4, False), out=linear(12, 3))
def _(net, x):
    return net.out(net.attention(x))


@toy("attention heads, fused", SEQUENCES, HEADS, attention=lambda: Heads(4, True), out=linear(12, 3))
def _(net, x):
    return net.out(net.attention(x))


@toy("attention heads that share keys and values", SEQUENCES, HEADS, attention=lambda: Heads(2, False),
     out=linear(12, 3))  # fmt: skip
def _(net, x):
    return net.out(net.attention(x))


@toy("attention heads that share keys and values, fused", SEQUENCES, HEADS, attention=lambda: Heads(2, True),
     out=linear(12, 3))  # fmt: skip
def _(net, x):
    return net.out(net.attention(x))


class Joined(nn.Module):
    """Queries, keys and values of one layer, as vision transformers have them; as many heads as there are parts."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = 3, 4, 12
        self.qkv = nn.Linear(6, 36)

    def forward(self, x):
        n, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = ((q * self.head_dim**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        return x.transpose(1, 2).reshape(n, length, self.attn_dim)


@toy("attention heads of one layer", SEQUENCES, "attention.qkv", attention=Joined, out=linear(12, 3))
def _(net, x):
    return net.out(net.attention(x))


class Rotary(nn.Module):
    """Heads whose features are turned by angles that a buffer holds; as many features as heads in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = 2, 4, 8
        self.qkv = nn.Linear(6, 24)
        self.register_buffer("frequencies", torch.tensor([1.0, 0.3]))

    def turned(self, x):
        angles = torch.arange(x.shape[2], device=x.device, dtype=x.dtype)[:, None] * self.frequencies.repeat(2)
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    def forward(self, x):
        n, length, _ = x.shape
        heads = (part.reshape(n, length, self.num_heads, self.head_dim) for part in self.qkv(x).chunk(3, -1))
        q, k, v = (part.transpose(1, 2) for part in heads)
        q, k = self.turned(q), self.turned(k)
        scores = torch.bmm(q.reshape(-1, length, self.head_dim), k.reshape(-1, length, self.head_dim).mT)
        x = torch.bmm(scores.softmax(-1), v.reshape(-1, length, self.head_dim)).view(n, -1, length, self.head_dim)
        return x.transpose(1, 2).reshape(n, length, self.attn_dim)


@toy("attention heads with rotary positions", SEQUENCES, "attention.qkv", attention=Rotary, out=linear(8, 3))
def _(net, x):
    return net.out(net.attention(x))


@toy("attention heads with one scale for each of their features", SEQUENCES, "q k v", {},
     q=linear(6, 12), k=linear(6, 12), v=linear(6, 12), scale=lambda: nn.Parameter(torch.ones(3)),
     out=linear(12, 3))  # fmt: skip
def _(net, x):
    q, k, v = (layer(x).unflatten(-1, (-1, 3)).transpose(1, 2) for layer in (net.q, net.k, net.v))
    return net.out(F.scaled_dot_product_attention(q * net.scale, k, v).transpose(1, 2).flatten(2))


class Mixed(nn.Module):
    """Kernels of several sizes, each for some of the channels: the sizes of the pieces are kept in a list."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.splits = sizes
        self.kernels = nn.ModuleList(nn.Conv2d(n, n, 2 * i + 1, padding=i, groups=n) for i, n in enumerate(sizes))

    def forward(self, x):
        return torch.cat([kernel(part) for kernel, part in zip(self.kernels, x.split(self.splits, 1), strict=True)], 1)


@toy("pieces of sizes that a list holds", IMAGES, "a b.kernels.0 b.kernels.1 b.kernels.2 c.kernels.0 c.kernels.1",
     a=conv(3, 15), b=lambda: Mixed([6, 5, 4]), c=lambda: Mixed([8, 7]), out=conv(15, 2))  # fmt: skip
def _(net, x):
    return net.out(net.c(net.b(net.a(x).relu()).relu()).relu())


class Halves(nn.Module):
    """Code that cuts by half of an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.expand_chs = 16
        self.a = nn.Linear(6, 16)

    def forward(self, x):
        left, right = self.a(x).split(self.expand_chs // 2, 1)
        return left * right.sigmoid()


@toy("pieces of half of what an attribute holds", VECTORS, "halves.a", halves=Halves, out=linear(8, 3))
def _(net, x):
    return net.out(net.halves(x))


class Pieces(nn.Module):
    """Code that cuts by an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.batches = 8, 8
        self.a = nn.Linear(6, 16)

    def forward(self, x):
        left, right = self.a(x).split(self.width, 1)
        return left * right.sigmoid()


@toy("pieces of a size that an attribute holds", VECTORS, "pieces.a", pieces=Pieces, out=linear(8, 3))
def _(net, x):
    return net.out(net.pieces(x))


@toy("attention whose scale the code holds", SEQUENCES, "q k v", q=linear(6, 8), k=linear(6, 8), v=linear(6, 8),
     out=linear(8, 3))  # fmt: skip
def _(net, x):
    scores = net.q(x) @ net.k(x).transpose(1, 2) * 0.35
    return net.out(scores.softmax(-1) @ net.v(x))


@toy("nn.MultiheadAttention", SEQUENCES, "a attention.in_proj_weight", {"attention.out_proj": "fixed size"},
     attention=lambda: nn.MultiheadAttention(6, 3, batch_first=True), a=linear(6, 8), out=linear(8, 3))  # fmt: skip
def _(net, x):
    return net.out(net.a(x + net.attention(x, x, x, need_weights=False)[0]).relu())


@toy("nn.MultiheadAttention whose weights are not read", SEQUENCES, "attention.in_proj_weight a e attention.out_proj",
     e=linear(6, 9), attention=lambda: nn.MultiheadAttention(9, 3, batch_first=True), a=linear(9, 8),
     out=linear(8, 3))  # fmt: skip
def _(net, x):
    x = net.e(x)
    return net.out(net.a(x + net.attention(x, x, x)[0]).relu())


@toy("nn.MultiheadAttention whose weights are returned", SEQUENCES, "a attention.out_proj",
     {"attention.in_proj_weight": "reduced"}, attention=lambda: nn.MultiheadAttention(6, 3, batch_first=True),
     a=linear(6, 8), out=linear(8, 3))  # fmt: skip
def _(net, x):
    mixed, weights = net.attention(x, x, x)
    return net.out(net.a(mixed).relu()) + weights.sum()


@toy("cross attention", SEQUENCES,
     "e f attention.q_proj_weight attention.k_proj_weight attention.v_proj_weight attention.out_proj", {},
     e=linear(6, 8), f=linear(6, 4), attention=lambda: nn.MultiheadAttention(8, 4, kdim=4, vdim=4, add_bias_kv=True),
     out=linear(8, 3))  # fmt: skip
def _(net, x):
    read = net.f(x).relu()
    return net.out(net.attention(net.e(x).relu(), read, read)[0])


@toy("what is computed for nothing", SEQUENCES, "a", {}, a=linear(6, 8), out=linear(8, 3))
def _(net, x):
    x = net.a(x).relu()
    x.mean(-1)
    return net.out(x)


@toy("layers that compute for nothing", IMAGES, "a b c d", {}, a=conv(3, 6), b=conv(6, 5),
     norm=lambda: nn.BatchNorm2d(5), c=conv(5, 4), d=conv(6, 7), out=linear(7, 3))  # fmt: skip
def _(net, x):
    x = net.a(x).relu()
    net.c(net.norm(net.b(x)).relu()).relu()
    return net.out(net.d(x).relu().mean((2, 3)))


@toy("linear layers that compute for nothing", VECTORS, "a b c", {}, a=linear(6, 8), b=linear(8, 5), c=linear(5, 3),
     out=linear(8, 3))  # fmt: skip
def _(net, x):
    x = net.a(x).relu()
    net.c(net.b(x).relu())
    return net.out(x)


@toy("what a later call may read", SEQUENCES, "", {"a": "reduced"}, a=linear(6, 8), out=linear(8, 3))
def _(net, x):
    x = net.a(x).relu()
    net.state = x.mean(-1)
    return net.out(x)


@toy("transformer layer", SEQUENCES, "layer.linear1 layer.self_attn.in_proj_weight",
     {"layer.self_attn.out_proj": "", "layer.linear2": "fixed size"},
     layer=lambda: nn.TransformerEncoderLayer(6, 2, 16, batch_first=True), out=linear(6, 3))  # fmt: skip
def _(net, x):
    return net.out(net.layer(x))


@toy("LSTM", SEQUENCES, "e lstm.weight_ih_l0 lstm.weight_hh_l0 a", e=linear(6, 5),
     lstm=lambda: nn.LSTM(5, 8, batch_first=True), a=linear(8, 7), out=linear(7, 3))  # fmt: skip
def _(net, x):
    return net.out(net.a(net.lstm(net.e(x).relu())[0][:, -1]).relu())


@toy("GRU in both directions, of two layers", SEQUENCES,
     " ".join(f"gru.weight_{gates}_l{layer}{way}" for layer in (0, 1) for way in ("", "_reverse") for gates in
              ("ih", "hh")), gru=lambda: nn.GRU(6, 8, 2, bidirectional=True), out=linear(16, 3))  # fmt: skip
def _(net, x):
    return net.out(net.gru(x)[0])


@toy("recurrent cells", VECTORS, "a cell.weight_ih cell.weight_hh", a=linear(6, 5), cell=lambda: nn.LSTMCell(5, 8),
     out=linear(8, 3))  # fmt: skip
def _(net, x):
    x = net.a(x).relu()
    return net.out(net.cell(x, net.cell(x))[0])


@toy("token mixing", SEQUENCES, "a", {"b": "fixed size"}, a=linear(5, 8), b=linear(8, 5),
     out=linear(6, 3))  # fmt: skip
def _(net, x):
    return net.out(x + net.b(net.a(x.transpose(1, 2)).relu()).transpose(1, 2))


@toy("spectral norm", VECTORS, "c", {"a": "normed together", "b": "normed together"}, a=linear(6, 8),
     b=lambda: parametrizations.spectral_norm(nn.Linear(8, 8)), c=linear(8, 8),
     out=linear(8, 3))  # fmt: skip
def _(net, x):
    return net.out(net.c(net.b(net.a(x).relu()).relu()).relu())


@toy("spectral norm by a hook", VECTORS, "c", {"a": "normed together", "b": "normed together"}, a=linear(6, 8),
     b=lambda: nn.utils.spectral_norm(nn.Linear(8, 8)), c=linear(8, 8), out=linear(8, 3))  # fmt: skip
def _(net, x):
    return net.out(net.c(net.b(net.a(x).relu()).relu()).relu())


# ------------------------------------------------------------------ what cannot be known


@toy("an operator without a row", VECTORS, "b", {"a": "no rule is known"}, a=linear(6, 8), b=linear(8, 8),
     out=linear(8, 3))  # fmt: skip
def _(net, x):
    return net.out(net.b(torch.cdist(net.a(x), net.a(x)) @ net.a(x)).relu())


@toy("control flow that depends on data", VECTORS, "a b", a=linear(6, 8), b=linear(8, 8), out=linear(8, 3))
def _(net, x):
    x = net.a(x).relu()
    if x.sum() > 1e6:
        x = x * 2
    return net.out(net.b(x).relu())


@toy("a width that the code holds locks only its group", IMAGES, "b", {"a": "holds its width"}, a=conv(3, 6),
     b=linear(6 * 64, 8), out=linear(8, 3))  # fmt: skip
def _(net, x):
    return net.out(net.b(net.a(x).relu().view(-1, 6 * 64)).relu())


@toy("a mean over neurons through weights", VECTORS, "b", {"a": ""}, a=linear(6, 8), b=linear(8, 8), out=linear(8, 3))
def _(net, x):
    return net.out(net.b(net.a(x).relu()).relu() * net.a.weight.detach().abs().mean())
