"""What a linear or convolutional layer reads, one row for each output position, and moments of it, streamed.

Least squares from second moments: nothing of a batch is kept but sums, in double precision.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtrim._consumers import Reader

_PIECE = 1 << 23  # numbers that are looked at at a time: 64 MiB of them


class Moments:
    """Sums over rows x: how many, Σ x and Σ x xᵀ; float64 [groups, features], [groups, features, features]."""

    def __init__(self) -> None:
        self.count = 0
        self.total = self.square = torch.zeros((), dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """rows: float64 [groups, rows, features]."""
        self.count += rows.shape[1]
        self.total = self.total.to(rows.device) + rows.sum(1)
        self.square = _added(self.square.to(rows.device), rows, rows)

    def spread(self, *, centred: bool) -> Tensor:
        """Σ x xᵀ, about the mean or about zero, in memory of its own."""
        if not centred:
            return self.square.clone()
        return self.square.baddbmm(self.total.unsqueeze(2), self.total.unsqueeze(1), alpha=-1 / self.count)


class Residuals:
    """Sums over rows x with what a layer lacks there, y: Σ y, Σ y², Σ x yᵀ; float64, by group."""

    def __init__(self) -> None:
        self.count = 0
        self.total = self.square = self.product = torch.zeros((), dtype=torch.float64)

    def add(self, rows: Tensor, lacking: Tensor) -> None:
        """rows: float64 [groups, rows, features]. lacking: float64 [groups, rows, outputs of a group]."""
        self.count += rows.shape[1]
        self.total = self.total.to(rows.device) + lacking.sum(1)
        self.square = self.square.to(rows.device) + lacking.square().sum(1)
        self.product = _added(self.product.to(rows.device), rows, lacking)


class ChannelSums:
    """Of what a batch norm is given: how many values a channel has, Σ x and Σ x²; float64 [channels]."""

    def __init__(self) -> None:
        self.count = 0
        self.total = self.square = torch.zeros((), dtype=torch.float64)

    def add(self, inputs: Tensor, _: Tensor) -> None:
        values = inputs.transpose(0, 1).flatten(1).double()
        self.count += values.shape[1]
        self.total = self.total.to(values.device) + values.sum(1)
        self.square = self.square.to(values.device) + values.square().sum(1)


class InputMeans:
    """The mean of what a layer is given, over examples; its positions are kept apart, since their borders differ.

    sums: by the shape of an example, how many there were, and their sum in float64.
    """

    def __init__(self, module: Reader) -> None:
        self.module = module
        self.sums: dict[torch.Size, tuple[int, Tensor]] = {}

    def add(self, inputs: Tensor, _: Tensor) -> None:
        own = 1 if isinstance(self.module, nn.Linear) else len(self.module.kernel_size) + 1
        examples = inputs.reshape(-1, *inputs.shape[inputs.ndim - own :])
        count, total = self.sums.get(examples.shape[1:], (0, 0.0))
        summed = examples.sum(0, dtype=torch.float64)
        self.sums[examples.shape[1:]] = count + len(examples), summed + total

    def through(self, channels: Tensor) -> Tensor:
        """What the layer makes of it, by these input channels alone, bool [inputs of a group]: float64 [outputs].

        The layer is linear, so that the mean may be taken before it. Without the bias; the mean over the positions.
        """
        weight = self.module.weight.detach()
        shape = -1, *[1] * (weight.ndim - 2)
        weight = weight.double() * channels.to(weight.device).view(shape)
        positions, given = 0, torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
        for count, total in self.sums.values():
            if isinstance(self.module, nn.Linear):
                outputs = (weight @ total).unsqueeze(1)
            else:
                outputs = self.module._conv_forward((total / count).unsqueeze(0), weight, None).flatten(2)[0] * count
            given += outputs.sum(1)
            positions += count * outputs.shape[1]
        return given / positions


def _added(sums: Tensor, one: Tensor, other: Tensor) -> Tensor:
    if not sums.ndim:
        return one.mT @ other
    return sums.baddbmm_(one.mT, other)


def fit(moments: Moments, residuals: Residuals, *, ridge: float, centred: bool) -> tuple[Tensor, Tensor]:
    """What to add to weights and bias, so that a layer's outputs lack as little as can be.

    Minimises Σ |y − D x − d|² / rows + λ |D|², with λ the mean variance of an input times `ridge`; d is 0 unless
    `centred`. Since λ weighs what is added, not what there is, the error on these data never rises.
    Returns float64 [groups, features, outputs of a group], [groups, outputs of a group].
    """
    square = moments.spread(centred=centred)
    product = residuals.product
    if centred:
        product = product.baddbmm(moments.total.unsqueeze(2), residuals.total.unsqueeze(1), alpha=-1 / moments.count)
    damp(square, ridge)
    added = torch.cholesky_solve(product, torch.linalg.cholesky(square))
    mean = moments.total / moments.count
    bias = residuals.total / moments.count - (mean.unsqueeze(1) @ added).squeeze(1)
    return added, bias if centred else torch.zeros_like(bias)


def damp(square: Tensor, ridge: float) -> None:
    """Add to the variances of inputs, relative to their mean, in place; [groups, features, features]."""
    diagonal = square.diagonal(dim1=1, dim2=2)
    level = diagonal.mean(1, keepdim=True).clamp_min(1e-300)  # inputs may all be silent
    # an input that never varies gets no weight, whatever its sums have rounded to
    diagonal += ridge * level + torch.where(diagonal <= 1e-12 * level, level, 0.0)


# ------------------------------------------------------------------ rows


def features(module: Reader) -> int:
    """How many numbers of one group an output position reads of each input channel."""
    return module.weight[0, 0].numel()


def groups(module: Reader) -> int:
    return 1 if isinstance(module, nn.Linear) else module.groups


def pieces(module: Reader, block: int) -> list[slice]:
    """A layer's input channels (of a group) in as few and as equal pieces as have at most `block` inputs each."""
    width = module.weight.shape[1]
    count = -(-width // max(1, block // features(module)))
    return [slice(width * place // count, width * (place + 1) // count) for place in range(count)]


def rows(
    module: Reader, inputs: Tensor, outputs: Tensor, channels: slice, positions: int | None = None, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """What a layer reads at each output position of these input channels (of each group), and outputs there.

    In pieces of bounded size: float64 [groups, rows, features], float64 [groups, rows, outputs of a group].
    positions: at most so many of an example's, drawn anew for each piece; the seed decides which.
    """
    draw = torch.Generator().manual_seed(seed)
    if isinstance(module, nn.Linear):
        read = inputs[..., channels]
        if read.ndim > 2 and (places := _drawn(read.shape[1:-1], positions, draw)) is not None:
            read, outputs = (one.flatten(1, -2)[:, places.to(one.device)] for one in (read, outputs))
        yield _flat(read), _flat(outputs)
        return
    space = len(module.kernel_size)
    if inputs.ndim == space + 1:  # a single image, not in a batch
        inputs, outputs = inputs.unsqueeze(0), outputs.unsqueeze(0)
    width = len(range(*channels.indices(module.weight.shape[1]))) * features(module) * module.groups
    seen = min(outputs[0, 0].numel(), positions or math.inf)
    step = max(1, int(_PIECE // (seen * width)))
    for some, theirs in zip(inputs.split(step), outputs.split(step), strict=True):
        places = _drawn(theirs.shape[2:], positions, draw)
        yield _patches(module, some, channels, places), _positions(theirs, module.groups, places)


def _drawn(shape: torch.Size, positions: int | None, draw: torch.Generator) -> Tensor | None:
    """Some of the positions, int64 [positions], flat; None: all of them."""
    if positions is None or positions >= shape.numel():
        return None
    return torch.randperm(shape.numel(), generator=draw)[:positions]


def _flat(values: Tensor) -> Tensor:
    return values.reshape(1, -1, values.shape[-1]).double()


def _positions(outputs: Tensor, groups: int, places: Tensor | None) -> Tensor:
    """[images, outputs, …] as [groups, images · positions, outputs of a group]."""
    seen = outputs.unflatten(1, (groups, -1)).flatten(3)
    if places is not None:
        seen = seen[..., places.to(seen.device)]
    return seen.permute(1, 0, 3, 2).flatten(1, 2).double()


def _patches(
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d, images: Tensor, channels: slice, places: Tensor | None
) -> Tensor:
    space = len(module.kernel_size)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    seen = F.pad(images, _padding(module), mode).unflatten(1, (module.groups, -1))[:, :, channels]
    for axis, (size, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True)
    ):
        seen = seen.unfold(3 + axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    if places is not None:
        seen = seen[:, :, :, *torch.unravel_index(places.to(seen.device), seen.shape[3 : 3 + space])]
        space = 1
    images_and_places, kernel = (0, *range(3, 3 + space)), range(3 + space, seen.ndim)
    seen = seen.permute(1, *images_and_places, 2, *kernel)
    return seen.flatten(2 + space).flatten(1, 1 + space).double()


def _padding(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Sequence[int]:
    """As `F.pad` wants it: the last axis first, each side."""
    if isinstance(module.padding, str):
        return module._reversed_padding_repeated_twice  # what "same" and "valid" come to
    return [side for size in reversed(module.padding) for side in (size, size)]
