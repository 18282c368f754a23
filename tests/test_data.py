import gzip
import hashlib
import io
import struct
import urllib.error
from email.message import Message
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from torchtrim import _data
from torchtrim._data import CHECKSUMS, batches, load_data
from torchtrim.errors import DataError

TRAIN, TEST = 40, 10


def idx_bytes(values: np.ndarray) -> bytes:
    """The IDX format, written from its description: type 8 is unsigned bytes."""
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    return header + values.astype(np.uint8).tobytes()


def write_idx(directory: Path, *, separator: str = "-", packed: bool = True, size: int = 6) -> None:
    """A small data set whose image i begins with a pixel of brightness i, so that it can be recognised."""
    directory.mkdir(exist_ok=True)
    for part, count in (("train", TRAIN), ("t10k", TEST)):
        images = np.zeros((count, size, size))
        images[:, 0, 0] = np.arange(count)
        images[:, 1, 1] = 7
        labels = np.arange(count) % 5
        for kind, values in ((f"images{separator}idx3", images), (f"labels{separator}idx1", labels)):
            content = idx_bytes(values)
            name = f"{part}-{kind}-ubyte" + (".gz" if packed else "")
            (directory / name).write_bytes(gzip.compress(content) if packed else content)


def rewrite(path: Path, content: bytes) -> None:
    path.write_bytes(gzip.compress(content))


def content_of(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes())


def inputs_of(dataset: Any) -> torch.Tensor:
    return torch.stack([inputs for inputs, _ in (dataset[index] for index in range(len(dataset)))])


# IDX files


@pytest.mark.parametrize("separator", ["-", "."])
@pytest.mark.parametrize("packed", [True, False])
def test_idx_values_labels_and_normalisation(tmp_path: Path, separator: str, packed: bool) -> None:
    write_idx(tmp_path, separator=separator, packed=packed)
    data = load_data(f"idx:{tmp_path}", calibration=8, seed=3)
    assert (data.name, data.shape, data.classes) == (f"idx:{tmp_path}", (1, 6, 6), ("0", "1", "2", "3", "4"))
    assert data.example.shape == (2, 1, 6, 6)
    assert not data.example.any()

    raw = np.zeros((TRAIN, 1, 6, 6))
    raw[:, 0, 0, 0], raw[:, 0, 1, 1] = np.arange(TRAIN), 7
    everything = torch.cat([inputs_of(data.train), inputs_of(data.calibration)]) * raw.std() + raw.mean()
    order = everything[:, 0, 0, 0].round().long()
    np.testing.assert_allclose(everything.numpy(), raw[order], atol=1e-4)
    labels = torch.tensor([int(label) for part in (data.train, data.calibration) for _, label in part])
    assert torch.equal(labels, order % 5)

    test = inputs_of(data.test) * raw.std() + raw.mean()
    np.testing.assert_allclose(test.numpy(), raw[:TEST], atol=1e-4)


def numbers(dataset: Any, data_of_all: Any) -> list[int]:
    """Which images of `write_idx` a part holds, in order."""
    brightness = inputs_of(data_of_all.test)[:, 0, 0, 0]
    step = float(brightness[1] - brightness[0])
    return [round(float(inputs[0, 0, 0] - brightness[0]) / step) for inputs, _ in dataset]


def test_split_is_disjoint_complete_and_decided_by_the_seed(tmp_path: Path) -> None:
    write_idx(tmp_path)
    first, again, other = (load_data(f"idx:{tmp_path}", calibration=10, seed=seed) for seed in (1, 1, 2))
    train, calibration = numbers(first.train, first), numbers(first.calibration, first)
    assert len(calibration) == 10
    assert sorted(train + calibration) == list(range(TRAIN))
    assert calibration == numbers(again.calibration, again)
    assert sorted(calibration) != sorted(numbers(other.calibration, other))
    assert sorted(calibration) != list(range(10))


def test_a_tenth_calibrates_by_default(tmp_path: Path) -> None:
    write_idx(tmp_path)
    data = load_data(f"idx:{tmp_path}")
    assert (len(data.train), len(data.calibration), len(data.test)) == (TRAIN - 4, 4, TEST)


@pytest.mark.parametrize("calibration", [0, TRAIN, -1])
def test_calibration_must_leave_something_on_both_sides(tmp_path: Path, calibration: int) -> None:
    write_idx(tmp_path)
    with pytest.raises(DataError, match=rf"expected 1 to {TRAIN - 1} training examples.*found {calibration}"):
        load_data(f"idx:{tmp_path}", calibration=calibration)


def test_missing_idx_files_are_all_named(tmp_path: Path) -> None:
    write_idx(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    (tmp_path / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(DataError) as caught:
        load_data(f"idx:{tmp_path}")
    assert str(tmp_path) in str(caught.value)
    assert "found no train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz; put them there" in str(caught.value)


def damaged(content: bytes) -> dict[str, tuple[bytes, str]]:
    return {
        "truncated values": (content[:-3], rf"40 × 6 × 6 values.*found {len(content) - 3} bytes"),
        "truncated header": (content[:9], "found 9 bytes"),
        "surplus": (content + b"\0", rf"found {len(content) + 1} bytes"),
        "magic": (b"\0\0\x0d\x03" + content[4:], "begins with 00 00 08 03, found 00 00 0d 03"),
        "axes": (b"\0\0\x08\x01" + content[4:], "begins with 00 00 08 03, found 00 00 08 01"),
        "no bytes": (b"", "begins with 00 00 08 03"),
        "no images": (content[:4] + struct.pack(">III", 0, 6, 6), "0 × 6 × 6 values"),
    }


@pytest.mark.parametrize("fault", damaged(bytes(100)))
def test_damaged_idx_files(tmp_path: Path, fault: str) -> None:
    write_idx(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    content, message = damaged(content_of(path))[fault]
    rewrite(path, content)
    with pytest.raises(DataError, match=message) as caught:
        load_data(f"idx:{tmp_path}")
    assert str(path) in str(caught.value)


def test_truncated_compression(tmp_path: Path) -> None:
    write_idx(tmp_path)
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match="expected a readable IDX file") as caught:
        load_data(f"idx:{tmp_path}")
    assert str(path) in str(caught.value)


def test_as_many_labels_as_images(tmp_path: Path) -> None:
    write_idx(tmp_path)
    rewrite(tmp_path / "train-labels-idx1-ubyte.gz", idx_bytes(np.zeros(TRAIN - 1)))
    with pytest.raises(DataError, match=r"each of its 40 images, found 39 in train-labels-idx1-ubyte\.gz"):
        load_data(f"idx:{tmp_path}")


def test_test_images_like_the_training_images(tmp_path: Path) -> None:
    write_idx(tmp_path)
    rewrite(tmp_path / "t10k-images-idx3-ubyte.gz", idx_bytes(np.zeros((TEST, 5, 6))))
    with pytest.raises(DataError, match=r"size \(6, 6\).*found \(5, 6\)"):
        load_data(f"idx:{tmp_path}")
    write_idx(tmp_path)
    rewrite(tmp_path / "t10k-labels-idx1-ubyte.gz", idx_bytes(np.full(TEST, 9)))
    with pytest.raises(DataError, match=r"labels below 5.*labels up to 9"):
        load_data(f"idx:{tmp_path}")


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        ("minst", r"mnist, idx:DIR, imagefolder:DIR, found 'minst'; did you mean 'mnist'\?"),
        ("idx:", "found 'idx:'"),
        ("mnist:here", "found 'mnist:here'"),
        ("imagefold:/tmp", "did you mean 'imagefolder:DIR'"),
    ],
)
def test_unknown_names(specification: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(specification)


# batches


def test_batches_in_memory_and_by_example_are_equal() -> None:
    dataset = TensorDataset(torch.randn(11, 3), torch.arange(11))
    by_example = Subset(dataset, list(range(11)))
    for (inputs, labels), (others, other_labels) in zip(batches(dataset, 4), batches(by_example, 4), strict=True):
        assert torch.equal(inputs, others)
        assert torch.equal(labels, other_labels)
    assert [len(labels) for _, labels in batches(dataset, 4)] == [4, 4, 3]
    assert [len(labels) for _, labels in batches(dataset, 4, drop_last=True)] == [4, 4]


def test_shuffled_batches_follow_the_generator() -> None:
    dataset = TensorDataset(torch.zeros(50, 1), torch.arange(50))

    def order(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [int(label) for _, labels in batches(dataset, 7, shuffle=True, generator=generator) for label in labels]

    assert order(0) == order(0) != order(1)
    assert sorted(order(0)) == list(range(50)) != order(0)


def test_batches_leave_the_global_random_state_alone() -> None:
    dataset = TensorDataset(torch.zeros(5, 1), torch.arange(5))
    before = torch.get_rng_state()
    list(batches(dataset, 2))
    list(batches(dataset, 2, shuffle=True, generator=torch.Generator()))
    assert torch.equal(before, torch.get_rng_state())


# MNIST's places and download


@pytest.fixture
def small_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for MNIST, its checksums declared the right ones, and no other place to find it."""
    source = tmp_path / "source"
    write_idx(source)
    for name in CHECKSUMS:
        monkeypatch.setitem(CHECKSUMS, name, hashlib.sha256((source / name).read_bytes()).hexdigest())
    monkeypatch.setattr(_data, "_CHECKOUT", tmp_path / "no-checkout")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCHTRIM_DATA", raising=False)
    return source


class Response(io.BytesIO):
    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.headers = Message()
        self.headers["Content-Length"] = str(len(content))


def offline(address: str, timeout: float) -> Response:
    raise urllib.error.URLError("no route to host")


def test_the_checkouts_mnist_is_the_published_one() -> None:
    directory = Path(__file__).parents[1] / "data" / "mnist"
    for name, expected in CHECKSUMS.items():
        assert hashlib.sha256((directory / name).read_bytes()).hexdigest() == expected
        assert expected in (directory / "README.md").read_text()


def test_mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHTRIM_DATA", raising=False)
    monkeypatch.setattr("urllib.request.urlopen", offline)
    data = load_data("mnist")
    assert (len(data.train), len(data.calibration), len(data.test)) == (55_000, 5_000, 10_000)
    assert (data.shape, len(data.classes)) == ((1, 28, 28), 10)
    assert isinstance(data.test, TensorDataset)
    inputs, labels = data.test.tensors
    assert (inputs.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert inputs.min().item() == pytest.approx(-0.1307 / 0.3081, abs=1e-3)  # the usual constants of MNIST


def test_mnist_from_the_named_directory(small_mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHTRIM_DATA", str(small_mnist))
    assert len(load_data("mnist").test) == TEST
    (small_mnist / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"found no t10k-labels-idx1-ubyte\.gz; put them there or unset"):
        load_data("mnist")


def test_mnist_with_another_checksum_is_refused(small_mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHTRIM_DATA", str(small_mnist))
    path = small_mnist / "train-labels-idx1-ubyte.gz"
    rewrite(path, content_of(path)[:-1] + b"\1")
    with pytest.raises(DataError, match=f"with SHA-256 {CHECKSUMS[path.name]}, found") as caught:
        load_data("mnist")
    assert str(path) in str(caught.value)


def test_download_from_the_second_mirror(small_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def urlopen(address: str, timeout: float) -> Response:
        asked.append(address)
        content = (small_mnist / address.rpartition("/")[2]).read_bytes()
        return Response(content[:-1] if address.startswith(_data.MIRRORS[0]) else content)

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    assert len(load_data("mnist").test) == TEST
    assert asked == [mirror + name for name in CHECKSUMS for mirror in _data.MIRRORS]
    cache = tmp_path / "cache" / "torchtrim" / "mnist"
    assert sorted(path.name for path in cache.iterdir()) == sorted(CHECKSUMS)
    load_data("mnist")
    assert len(asked) == 8  # the second time, the cache is read


def test_offline_says_what_was_tried_and_where_to_put_the_files(
    small_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(DataError) as caught:
        load_data("mnist")
    message = str(caught.value)
    for mirror in _data.MIRRORS:
        assert f"{mirror}train-images-idx3-ubyte.gz: <urlopen error no route to host>" in message
    assert f"into {tmp_path / 'cache' / 'torchtrim' / 'mnist'}" in message
    assert "TORCHTRIM_DATA" in message


def test_a_damaged_download_leaves_nothing(small_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.urlopen", lambda address, timeout: Response(b"an error page"))
    found = hashlib.sha256(b"an error page").hexdigest()
    with pytest.raises(DataError, match=f"expected SHA-256 .*, found {found}"):
        load_data("mnist")
    assert not any(path.is_file() for path in (tmp_path / "cache").rglob("*"))


# Folders of images


def write_images(directory: Path, *, per_class: int = 5, classes: tuple[str, ...] = ("ant", "bee")) -> None:
    """Images of one colour each: red tells the class, green the number within it, in steps of 20."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    for number, name in enumerate(classes):
        (directory / name).mkdir(parents=True)
        for index in range(per_class):
            image.new("RGB", (20, 16), (200 * number, 20 * index, 0)).save(directory / name / f"{index}.png")


def colours(inputs: torch.Tensor) -> list[int]:
    """Undo ImageNet's normalisation at the centre pixel: red, green, blue."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return [round(float(value)) for value in 255 * (inputs[:, 4, 4] * std + mean)]


@pytest.mark.parametrize("tested", ["val", "test"])
def test_image_folder(tmp_path: Path, tested: str) -> None:
    write_images(tmp_path / "train")
    write_images(tmp_path / tested, per_class=3)
    data = load_data(f"imagefolder:{tmp_path}", calibration=4, resize=10, crop=8)
    assert (data.classes, data.shape) == (("ant", "bee"), (3, 8, 8))
    parts = [[(*colours(inputs), label) for inputs, label in part] for part in (data.train, data.calibration)]
    assert [len(part) for part in parts] == [6, 4]
    expected = [(200 * number, 20 * index, 0, number) for number in range(2) for index in range(5)]
    assert sorted(parts[0] + parts[1]) == expected
    assert [(*colours(inputs), label) for inputs, label in data.test] == [e for e in expected if e[1] < 60]
    inputs, labels = next(iter(batches(data.train, 4)))
    assert (inputs.shape, labels.dtype) == ((4, 3, 8, 8), torch.int64)


def test_only_training_images_are_augmented(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    gradient = np.tile(np.arange(0, 200, 10, dtype=np.uint8)[None, :, None], (16, 1, 3))
    for part in ("train", "val"):
        (tmp_path / part / "all").mkdir(parents=True)
        for index in range(2):
            image.fromarray(gradient).save(tmp_path / part / "all" / f"{index}.png")
    data = load_data(f"imagefolder:{tmp_path}", calibration=1, resize=16, crop=12)
    torch.manual_seed(0)
    augmented = [data.train[0][0] for _ in range(4)]
    assert any(not torch.equal(augmented[0], other) for other in augmented[1:])
    centre = data.calibration[0][0]
    assert torch.equal(centre, data.calibration[0][0])
    assert torch.equal(centre, data.test[0][0])
    expected = (torch.arange(40, 160, 10) / 255 - 0.485) / 0.229  # columns 4 to 15 of 20
    torch.testing.assert_close(centre[0, 0], expected)


def test_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    for part in ("train", "val"):
        write_images(tmp_path / part)
    broken = next((tmp_path / "val").rglob("*.*"))
    broken.write_bytes(b"no image")
    data = load_data(f"imagefolder:{tmp_path}", resize=10, crop=8)
    with pytest.raises(DataError, match=r"expected an image, found.*repair or remove it"):
        list(data.test)


def test_image_folder_errors(tmp_path: Path) -> None:
    write_images(tmp_path / "train")
    name = f"imagefolder:{tmp_path}"
    with pytest.raises(DataError, match=r"expected train/CLASS/IMAGE and val/CLASS/IMAGE.*found: .*test"):
        load_data(name)
    write_images(tmp_path / "val", classes=("ant", "cow"))
    with pytest.raises(DataError, match="only one of the two: bee, cow"):
        load_data(name)
    with pytest.raises(DataError, match="found crop 11 and resize 10"):
        load_data(name, resize=10, crop=11)
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        load_data(name)
