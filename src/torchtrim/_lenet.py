"""LeNet, the small convolutional network for 28 × 28 grey images that examples and tests start from.

It is the variant that Caffe ships: two convolutions, two fully connected layers, a ReLU after each
hidden layer, 431,080 parameters.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LeNet(nn.Module):
    """images: float [batch, 1, 28, 28] → logits: float [batch, classes].

    The command line trains it on pixels less their mean over the training images, divided by their standard deviation:
    for MNIST with pixels from 0 to 1 these are 0.1307 and 0.3081.

    Source: LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition",
    1998, as adapted in Caffe's `examples/mnist/lenet.prototxt`.
    """

    def __init__(self, widths: tuple[int, int, int] = (20, 50, 500), classes: int = 10) -> None:
        super().__init__()
        first, second, third = widths
        self.conv1: nn.Conv2d = nn.Conv2d(1, first, kernel_size=5)
        self.conv2: nn.Conv2d = nn.Conv2d(first, second, kernel_size=5)
        self.fc1: nn.Linear = nn.Linear(second * 4 * 4, third)
        self.fc2: nn.Linear = nn.Linear(third, classes)

    def forward(self, images: Tensor) -> Tensor:
        features = F.max_pool2d(F.relu(self.conv1(images)), 2)
        features = F.max_pool2d(F.relu(self.conv2(features)), 2)
        hidden = F.relu(self.fc1(torch.flatten(features, 1)))
        return self.fc2(hidden)
