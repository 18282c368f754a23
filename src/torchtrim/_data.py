"""Data sets by name, each cut into what trains, what calibrates and what tests.

`load_data("mnist")` reads MNIST, `load_data("idx:DIR")` any data set in MNIST's file format, and
`load_data("imagefolder:DIR")` a directory of images with one folder per class. Calibration examples are
held out of the training data: they decide what is removed, so that nothing has looked at the test data
when it gives the result.
"""

import copy
import gzip
import hashlib
import http.client
import math
import os
import tempfile
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from torchtrim.errors import DataError, nearest

SPECIFICATIONS = ("mnist", "idx:DIR", "imagefolder:DIR")
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
CHECKSUMS = {  # SHA-256 of MNIST's four files
    "train-images-idx3-ubyte.gz": "0b367032e93c5d0cea0925647cfdb18614af8ee15f83e6f2fc2ad904a6835971",
    "train-labels-idx1-ubyte.gz": "1787548bbe0bff1ec2ecdc0ef292b02df999e2d1a6002d27500982c652b17203",
    "t10k-images-idx3-ubyte.gz": "1a1a05eab793c14bb050b398624a11b0ffd1a2953baed553b1b9bd079e2a20be",
    "t10k-labels-idx1-ubyte.gz": "b91679a0acfe4ba0e50a2437a903084cba1f5f92592b016a25a7dfd00455798b",
}
_CHECKOUT = Path(__file__).parents[2] / "data" / "mnist"  # there in a source checkout, absent from the wheel


@dataclass(frozen=True)
class Data:
    """A data set and its parts; each part yields (input, label) pairs.

    `calibration` is disjoint from `train` and seen as at test time, without augmentation.
    `shape` is that of one input, without a batch axis.
    """

    name: str
    train: Dataset[Any]
    calibration: Dataset[Any]
    test: Dataset[Any]
    classes: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def example(self) -> Tensor:
        """What a model for this data can be called with: zeros [2, *shape]."""
        return torch.zeros(2, *self.shape)


def load_data(
    specification: str, *, calibration: int | None = None, seed: int = 0, resize: int = 256, crop: int = 224
) -> Data:
    """The data set that `specification` names: `mnist`, `idx:DIR` or `imagefolder:DIR`.

    `calibration` examples are held out of the training data, chosen by `seed`; by default every tenth,
    at most 5,000. `resize` and `crop` are in pixels and concern folders of images only.

    Raises DataError: an unknown name, and files that are missing, damaged or do not fit together.
    """
    kind, _, place = specification.partition(":")
    directory = Path(place).expanduser()
    if specification == "mnist":
        return _grey_images(specification, _mnist_directory(), calibration, seed)
    if kind == "idx" and place:
        return _grey_images(specification, directory, calibration, seed)
    if kind == "imagefolder" and place:
        return _image_folder(specification, directory, calibration, seed, resize=resize, crop=crop)
    raise DataError(
        f"data: expected one of {', '.join(SPECIFICATIONS)}, found {specification!r}" + nearest(kind, SPECIFICATIONS)
    )


def batches(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    shuffle: bool = False,
    drop_last: bool = False,
    generator: Generator | None = None,
    workers: int = 0,
) -> DataLoader[Any]:
    """A loader of (inputs, labels) batches: inputs [batch, ...], labels int64 [batch].

    Without `shuffle`, iterating leaves the global random state alone; with it, `generator` decides the order.
    """
    if generator is None and not shuffle:
        generator = Generator()  # otherwise the loader draws a seed for its workers from the global state
    in_memory = isinstance(dataset, TensorDataset)
    return DataLoader(
        _WholeBatches(dataset) if in_memory else dataset,
        batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        generator=generator,
        collate_fn=(lambda batch: batch) if in_memory else None,
        num_workers=0 if in_memory else workers,
        persistent_workers=workers > 0 and not in_memory,
        pin_memory=torch.cuda.is_available() and not in_memory,
    )


class _WholeBatches(Dataset[Any]):
    """A data set in memory that hands out a batch by one index operation, not example by example."""

    def __init__(self, dataset: TensorDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        return self.dataset[torch.tensor(indices)]


def _split(count: int, calibration: int | None, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """The indices that train and those that calibrate: int64 [count - calibration], [calibration]."""
    held_out = min(count // 10, 5_000) if calibration is None else calibration
    if not 0 < held_out < count:
        raise DataError(f"{name}: expected 1 to {count - 1} training examples for `calibration`, found {held_out}")
    order = torch.randperm(count, generator=Generator().manual_seed(seed))
    return order[held_out:], order[:held_out]


# Grey images in IDX files -------------------------------------------------------------------------------


def _grey_images(name: str, directory: Path, calibration: int | None, seed: int) -> Data:
    paths = _idx_paths(directory)
    images, labels = _labelled(paths["train-images"], paths["train-labels"])
    test_images, test_labels = _labelled(paths["t10k-images"], paths["t10k-labels"])
    classes = int(labels.max()) + 1
    if test_images.shape[1:] != images.shape[1:] or int(test_labels.max()) >= classes:
        raise DataError(
            f"{directory}: expected test images of size {tuple(images.shape[1:])}, labels below {classes}, "
            f"as in training, found {tuple(test_images.shape[1:])}, labels up to {int(test_labels.max())}"
        )
    rest, held_out = _split(len(images), calibration, seed, name)
    mean, deviation = _brightness(images)

    def prepared(images: Tensor, labels: Tensor) -> TensorDataset:
        return TensorDataset(images.unsqueeze(1).float().sub_(mean).div_(deviation), labels.long())

    return Data(
        name=name,
        train=prepared(images[rest], labels[rest]),
        calibration=prepared(images[held_out], labels[held_out]),
        test=prepared(test_images, test_labels),
        classes=tuple(map(str, range(classes))),
        shape=(1, *images.shape[1:]),
    )


def _brightness(images: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of uint8 pixels, from their histogram: exact, whatever the thread count."""
    counts = torch.bincount(images.flatten(), minlength=256).double()
    values = torch.arange(256, dtype=torch.float64)
    mean = float((counts * values).sum() / counts.sum())
    variance = float((counts * (values - mean) ** 2).sum() / counts.sum())
    return mean, math.sqrt(variance) or 1.0


def _idx_paths(directory: Path) -> dict[str, Path]:
    """Where the four files of an IDX data set are: packed or not, with `-` or `.` before `idx`."""
    found: dict[str, Path] = {}
    missing: list[str] = []
    for part in ("train-images", "train-labels", "t10k-images", "t10k-labels"):
        ending = "idx3-ubyte" if part.endswith("images") else "idx1-ubyte"
        names = [f"{part}{separator}{ending}{packed}" for packed in ("", ".gz") for separator in "-."]
        path = next((directory / name for name in names if (directory / name).is_file()), None)
        if path is None:
            missing.append(f"{part}-{ending}.gz")
        else:
            found[part] = path
    if missing:
        raise DataError(
            f"{directory}: expected the four files of an IDX data set, found no {', '.join(missing)}; "
            "put them there (packed or unpacked) or name another directory"
        )
    return found


def _labelled(images_path: Path, labels_path: Path) -> tuple[Tensor, Tensor]:
    """images: uint8 [examples, rows, columns], labels: uint8 [examples]."""
    images, labels = _read_idx(images_path, axes=3), _read_idx(labels_path, axes=1)
    if len(images) != len(labels):
        raise DataError(
            f"{images_path}: expected one label for each of its {len(images)} images, found {len(labels)} "
            f"in {labels_path.name}; use files of one data set"
        )
    return images, labels


def _read_idx(path: Path, axes: int) -> Tensor:
    """A file of two zero bytes, the type 8 (unsigned bytes), the number of axes, their sizes, the values."""
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: expected a readable IDX file, found: {error}; replace it") from error
    expected_magic = bytes((0, 0, 8, axes))
    if content[:4] != expected_magic:
        raise DataError(
            f"{path}: expected an IDX file of bytes with {axes} axes, which begins with "
            f"{expected_magic.hex(' ')}, found {content[:4].hex(' ')}; put the right file in its place"
        )
    start = 4 + 4 * axes
    sizes = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    if len(content) != start + math.prod(sizes) or not math.prod(sizes):
        raise DataError(
            f"{path}: expected {start} bytes of header and {' × '.join(map(str, sizes))} values, at least 1, "
            f"found {len(content)} bytes; the file is damaged, put an intact copy in its place"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).reshape(sizes)


# Where MNIST comes from ---------------------------------------------------------------------------------


def _mnist_directory() -> Path:
    """The first place with MNIST: TORCHTRIM_DATA, the source checkout, the cache (filled if need be)."""
    named = os.environ.get("TORCHTRIM_DATA")
    if named:
        directory = Path(named).expanduser()
        missing = [name for name in CHECKSUMS if not (directory / name).is_file()]
        if missing:
            raise DataError(
                f"{directory}: expected MNIST's four files, as TORCHTRIM_DATA names this directory, found no "
                f"{', '.join(missing)}; put them there or unset TORCHTRIM_DATA"
            )
    elif all((_CHECKOUT / name).is_file() for name in CHECKSUMS):
        directory = _CHECKOUT
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        directory = cache / "torchtrim" / "mnist"
        for name in CHECKSUMS:
            if not (directory / name).is_file():
                _download(name, directory)
    for name, expected in CHECKSUMS.items():
        found = hashlib.sha256((directory / name).read_bytes()).hexdigest()
        if found != expected:
            raise DataError(
                f"{directory / name}: expected MNIST's file with SHA-256 {expected}, found {found}; "
                "delete it, or put an intact copy in its place"
            )
    return directory


def _download(name: str, directory: Path) -> None:
    """Fetch one of MNIST's files; it appears in `directory` complete and verified, or not at all."""
    tried: list[str] = []
    for mirror in MIRRORS:
        try:
            content = _fetch(mirror + name)
            found = hashlib.sha256(content).hexdigest()
            if found == CHECKSUMS[name]:
                directory.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(prefix=".download-", dir=directory) as temporary:
                    partial = Path(temporary) / name
                    partial.write_bytes(content)
                    partial.replace(directory / name)
                return
            tried.append(f"  {mirror}{name}: expected SHA-256 {CHECKSUMS[name]}, found {found}")
        except (OSError, http.client.HTTPException) as error:
            tried.append(f"  {mirror}{name}: {error}")
    raise DataError(
        f"{directory / name}: expected to find or download this file, could do neither; tried\n"
        + "\n".join(tried)
        + f"\nPut MNIST's four files ({', '.join(CHECKSUMS)}) into {directory}, "
        "or into a directory of your choice and set TORCHTRIM_DATA to it"
    )


def _fetch(address: str) -> bytes:
    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    content = bytearray()
    with (
        urllib.request.urlopen(address, timeout=30) as response,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        size = int(response.headers.get("Content-Length") or 0) or None
        task = progress.add_task(address.rpartition("/")[2], total=size)
        while block := response.read(1 << 16):
            content += block
            progress.advance(task, len(block))
    return bytes(content)


# Folders of images --------------------------------------------------------------------------------------


def _image_folder(name: str, directory: Path, calibration: int | None, seed: int, *, resize: int, crop: int) -> Data:
    try:
        from torchvision import transforms
        from torchvision.datasets import ImageFolder
    except ImportError as error:
        raise DataError(f"{name}: {error}; run pip install 'torchtrim[vision]'") from error
    if not 0 < crop <= resize:
        raise DataError(f"{name}: expected 0 < crop <= resize, found crop {crop} and resize {resize} pixels")
    imagenet = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    normalised = [transforms.ToTensor(), imagenet]
    augmented = [transforms.RandomResizedCrop(crop), transforms.RandomHorizontalFlip(), *normalised]
    centred = transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(crop), *normalised])
    tested = directory / ("val" if (directory / "val").is_dir() else "test")
    try:
        train = ImageFolder(str(directory / "train"), transforms.Compose(augmented), loader=_image)
        test = ImageFolder(str(tested), centred, loader=_image)
    except OSError as error:  # no such directory, no class folders, or one without images
        raise DataError(
            f"{directory}: expected train/CLASS/IMAGE and val/CLASS/IMAGE (or test/CLASS/IMAGE), found: "
            f"{error}; arrange the images so, or name another directory"
        ) from error
    if test.classes != train.classes:
        raise DataError(
            f"{tested}: expected the class folders of train/, found that these are in only one of the two: "
            f"{', '.join(sorted(set(train.classes) ^ set(test.classes))[:5])}; make them the same"
        )
    unaugmented = copy.copy(train)  # the same images without a second scan of the directory
    unaugmented.transform = centred
    rest, held_out = _split(len(train), calibration, seed, name)
    return Data(
        name=name,
        train=Subset(train, rest.tolist()),
        calibration=Subset(unaugmented, held_out.tolist()),
        test=test,
        classes=tuple(train.classes),
        shape=(3, crop, crop),
    )


def _image(path: str) -> Any:
    """The image of a file, in colour. Raises DataError: it cannot be read."""
    from torchvision.datasets.folder import default_loader

    try:
        return default_loader(path)
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises on damaged files
        raise DataError(f"{path}: expected an image, found: {error}; repair or remove it") from error
