"""The networks of the accuracy benchmarks: for grey images of 28 × 28 pixels, and small enough for a CPU."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ResNet(nn.Module):
    """images: float [batch, 1, 28, 28] → logits: float [batch, classes].

    The residual network for small images, with three blocks in each of three stages: ResNet-20. The first convolution
    halves the image, and a stream that changes its shape goes through a convolution of 1 × 1.
    He, Zhang, Ren and Sun, "Deep residual learning for image recognition", 2016, section 4.2.
    """

    def __init__(self, widths: Sequence[int] = (16, 32, 64), blocks: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_convolution(1, widths[0], 2), nn.ReLU())
        stages: list[nn.Module] = []
        for before, width in zip((widths[0], *widths), widths, strict=False):
            strides = (1 if not stages else 2, *[1] * (blocks - 1))
            inputs = (before, *[width] * (blocks - 1))
            stages.append(
                nn.Sequential(*(Block(one, width, stride) for one, stride in zip(inputs, strides, strict=True)))
            )
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(images)).mean((2, 3)))


class Block(nn.Module):
    """Two convolutions beside the stream, which is added to what they compute."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(*_convolution(inputs, width, stride), nn.ReLU())
        self.second = nn.Sequential(*_convolution(width, width, 1))
        alike = inputs == width and stride == 1
        self.stream = nn.Identity() if alike else nn.Sequential(*_convolution(inputs, width, stride, size=1))

    def forward(self, features: Tensor) -> Tensor:
        return torch.relu(self.second(self.first(features)) + self.stream(features))


class VGG(nn.Module):
    """images: float [batch, 1, 28, 28] → logits: float [batch, classes].

    Pairs of convolutions, each with batch normalisation, and the image is halved after each pair.
    Simonyan and Zisserman, "Very deep convolutional networks for large-scale image recognition", 2015.
    """

    def __init__(self, widths: Sequence[int] = (16, 32, 64), hidden: int = 128, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((1, *widths), widths, strict=False):
            layers += [*_convolution(before, width, 1), nn.ReLU(), *_convolution(width, width, 1), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(widths[-1] * 9, hidden), nn.ReLU(), nn.Linear(hidden, classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(images), 1))


def _convolution(inputs: int, outputs: int, stride: int, size: int = 3) -> tuple[nn.Module, nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return convolution, nn.BatchNorm2d(outputs)
