"""What a linear or convolutional layer reads, one row for each output position, and moments of it, streamed.

Least squares from second moments: nothing of a batch is kept but sums, in double precision.
"""

import math
from collections.abc import Iterator, Sequence
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtrim._consumers import Reader
from torchtrim.errors import ProfileError, TorchtrimError

_PIECE = 1 << 23  # numbers that are looked at at a time: 64 MiB of them


class Moments:
    """Sums over rows x: how many, Σ x and Σ x xᵀ; float64 [groups, features], [groups, features, features].

    The rows are counted from the first of them: inputs that never vary are exactly 0 then, and no digits are lost to
    large means.
    """

    def __init__(self) -> None:
        self.count = 0
        self.first: Tensor | None = None
        self.total = self.square = torch.zeros((), dtype=torch.float64)

    def about(self, rows: Tensor) -> Tensor:
        """Rows as they are added: less the first of all; float64 [groups, rows, features]."""
        if self.first is None:
            self.first = rows[:, :1].clone()
        return rows - self.first

    def add(self, rows: Tensor) -> None:
        """rows: of `about`."""
        self.count += rows.shape[1]
        self.total = self.total.to(rows.device) + rows.sum(1)
        self.square = _added(self.square.to(rows.device), rows, rows)

    @property
    def mean(self) -> Tensor:
        """Of the rows as they are read; float64 [groups, features]."""
        assert self.first is not None
        return self.first.squeeze(1) + self.total / self.count

    def spread(self, *, centred: bool) -> Tensor:
        """Σ x xᵀ, about the mean or about zero, in memory of its own."""
        square = self.square.baddbmm(self.total.unsqueeze(2), self.total.unsqueeze(1), alpha=-1 / self.count)
        if not centred:
            square.baddbmm_(self.mean.unsqueeze(2), self.mean.unsqueeze(1), alpha=self.count)
        return square


class Residuals:
    """Sums over rows x, of `about`, with what a layer lacks there, y: Σ y, Σ y², Σ x yᵀ; float64, by group."""

    def __init__(self) -> None:
        self.count = 0
        self.total = self.square = self.product = torch.zeros((), dtype=torch.float64)

    def add(self, rows: Tensor, lacking: Tensor) -> None:
        """rows: of `about`. lacking: float64 [groups, rows, outputs of a group]."""
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


def fit(moments: Moments, residuals: Residuals, *, ridge: float, centred: bool, name: str) -> tuple[Tensor, Tensor]:
    """What to add to weights and bias, so that a layer's outputs lack as little as can be.

    Minimises Σ |y − D x − d|² / rows + λ |D|², with λ the mean variance of an input times `ridge`; d is 0 unless
    `centred`. Since λ weighs what is added, not what there is, the error on these data never rises.
    Returns float64 [groups, features, outputs of a group], [groups, outputs of a group].
    """
    total = residuals.total.unsqueeze(1)
    product = residuals.product.baddbmm(moments.total.unsqueeze(2), total, alpha=-1 / moments.count)
    if not centred:
        product.baddbmm_(moments.mean.unsqueeze(2), total)
    added = torch.cholesky_solve(product, factor(moments.spread(centred=centred), ridge, name))
    bias = residuals.total / moments.count - (moments.mean.unsqueeze(1) @ added).squeeze(1)
    return added, bias if centred else torch.zeros_like(bias)


def factor(square: Tensor, ridge: float, name: str) -> Tensor:
    """The Cholesky factor once the ridge is added to the variances of inputs, in place; [groups, features, features].

    Raises ProfileError, with the layer's name: a ridge that rounding swallows.
    """
    diagonal = square.diagonal(dim1=1, dim2=2)
    level = diagonal.mean(1, keepdim=True).clamp_min(1e-300)  # inputs may all be silent
    # an input that never varies gets no weight, whatever its sums have rounded to
    diagonal += ridge * level + torch.where(diagonal <= 1e-12 * level, level, 0.0)
    found, failed = torch.linalg.cholesky_ex(square)
    if failed.any():
        raise ProfileError(
            f"{name}: its inputs depend on one another to the last digit; expected a larger ridge, found {ridge!r}"
        )
    return found


def check_fit(where: str, ridge: float, block: int, positions: int | None) -> None:
    """Raises TorchtrimError: numbers with which least squares cannot be done."""
    if not (isinstance(ridge, Real) and math.isfinite(ridge) and ridge > 0):
        raise TorchtrimError(f"{where}: expected a finite ridge above 0, found {ridge!r}")
    if not isinstance(block, Integral) or block < 1:
        raise TorchtrimError(f"{where}: expected blocks of at least 1 input, found {block!r}")
    check_positions(where, positions)


def check_positions(where: str, positions: int | None) -> None:
    """Raises TorchtrimError: fewer than one position."""
    if positions is not None and (not isinstance(positions, Integral) or positions < 1):
        raise TorchtrimError(
            f"{where}: expected at least 1 position of an example, or None for all, found {positions!r}"
        )


# ------------------------------------------------------------------ rows


def features(module: Reader) -> int:
    """How many numbers of one group an output position reads of each input channel."""
    return module.weight[0, 0].numel()


def groups(module: Reader) -> int:
    return 1 if isinstance(module, nn.Linear) else module.groups


def pieces(module: Reader, block: int) -> list[slice]:
    """A layer's input channels (of a group) in few and equal pieces, whose moments are at most `block` squared."""
    width = module.weight.shape[1]
    inputs = math.isqrt(block**2 // groups(module))
    count = -(-width // max(1, inputs // features(module)))
    return [slice(width * place // count, width * (place + 1) // count) for place in range(count)]


def rows(
    module: Reader, inputs: Tensor, outputs: Tensor, channels: slice, positions: int | None = None, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """What a layer reads at each output position of these input channels (of each group), and outputs there.

    In pieces of bounded size: float64 [groups, rows, features], float64 [groups, rows, outputs of a group].
    positions: at most so many of an example's, drawn anew for each piece; the seed decides which.
    """
    if not inputs.numel():
        return
    draw = torch.Generator().manual_seed(seed)
    if isinstance(module, nn.Linear):
        read = inputs[..., channels]
        if read.ndim > 2 and (places := _drawn(read.shape[1:-1], positions, draw)) is not None:
            read, outputs = (one.flatten(1, -2)[:, places.to(one.device)] for one in (read, outputs))
        read, outputs = (one.reshape(-1, one.shape[-1]) for one in (read, outputs))
        step = max(1, _PIECE // max(read.shape[1], outputs.shape[1]))
        for some, theirs in zip(read.split(step), outputs.split(step), strict=True):
            yield some.double().unsqueeze(0), theirs.double().unsqueeze(0)
        return
    space = len(module.kernel_size)
    if inputs.ndim == space + 1:  # a single image, not in a batch
        inputs, outputs = inputs.unsqueeze(0), outputs.unsqueeze(0)
    width = len(range(*channels.indices(module.weight.shape[1]))) * features(module) * module.groups
    seen = min(outputs[0, 0].numel(), positions or math.inf)
    step = max(1, int(_PIECE // (seen * width)))
    for some, theirs in zip(inputs.split(step), outputs.split(step), strict=True):
        places = _drawn(theirs.shape[2:], positions, draw)
        if seen * width <= _PIECE:
            parts: Sequence[Tensor | None] = [places]
        else:  # of one image, by parts
            parts = (torch.arange(int(seen)) if places is None else places).split(max(1, _PIECE // width))
        for part in parts:
            yield _patches(module, some, channels, part), _positions(theirs, module.groups, part)


def _drawn(shape: torch.Size, positions: int | None, draw: torch.Generator) -> Tensor | None:
    """Some of the positions, int64 [positions], flat; None: all of them."""
    if positions is None or positions >= shape.numel():
        return None
    return torch.randperm(shape.numel(), generator=draw)[:positions]


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
