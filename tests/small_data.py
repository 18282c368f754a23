"""A data set and a network so small that a whole run on them takes a second."""

import gzip
import struct
from pathlib import Path

import numpy as np
from PIL import Image

MODEL = '''
import torch.nn.functional as F
from torch import nn


class Small(nn.Module):
    """images: float [batch, 1, 8, 8] -> logits: float [batch, 3]."""

    def __init__(self, width=8):
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3)
        self.conv2 = nn.Conv2d(width, 12, 3)
        self.fc1 = nn.Linear(12 * 16, 24)
        self.fc2 = nn.Linear(24, 3)

    def forward(self, images):
        features = F.relu(self.conv2(F.relu(self.conv1(images))))
        return self.fc2(F.relu(self.fc1(features.flatten(1))))


def wide():
    return Small(16)
'''


def write_model(directory: Path) -> str:
    """A Python file with the network above; its name as the command line takes it."""
    path = directory / "small.py"
    path.write_text(MODEL)
    return f"{path}:Small"


def write_idx(directory: Path, train: int = 120, test: int = 30) -> str:
    """Noise in [1, 8, 8], brighter in one of three bands, which is the class; its name as the command line takes it."""
    directory.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", test)):
        labels = (np.arange(count) % 3).astype(np.uint8)
        images = random.integers(0, 120, (count, 8, 8), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[3 * label : 3 * label + 2] += 100
        for name, values in ((f"{part}-images-idx3", images), (f"{part}-labels-idx1", labels)):
            header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
            (directory / f"{name}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes()))
    return f"idx:{directory}"


def write_images(directory: Path, size: int = 64) -> str:
    """Three classes of 12 images to train and 4 to test, told apart by their colour."""
    random = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for channel, name in enumerate(("blue", "green", "red")):
            place = directory / part / name
            place.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 120, (size, size, 3), dtype=np.uint8)
                pixels[..., 2 - channel] += 100
                Image.fromarray(pixels).save(place / f"{number}.png")
    return f"imagefolder:{directory}"
