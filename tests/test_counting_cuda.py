"""Counting on a GPU, against counting on the CPU.

Without a GPU, the kernels alone run in Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/test_counting_cuda.py`.
"""

import importlib.util
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchtrim import _counting, profile
from torchtrim._flow import Site
from torchtrim._labels import UNKNOWN
from torchtrim._lenet import LeNet
from torchtrim._watch import Watch
from torchtrim.errors import ProfileError

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
GPU = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")
KERNELS = pytest.mark.skipif(
    not (HAS_TRITON and (INTERPRETED or torch.cuda.is_available())), reason="needs Triton and a GPU"
)
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def tally() -> Any:
    from torchtrim import _counting_triton

    if INTERPRETED:
        _counting_triton._PROGRAMS = 6  # one after the other
    return _counting_triton.DeviceTally(DEVICE)


def place(index: int = 0) -> Any:
    return Site(index, "relu", "", "rectifier", (), UNKNOWN), 0


def plainly(values: Tensor, kept: tuple[int, ...], examples: int | None, tolerance: float) -> _counting.Counts:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHTRIM_COUNTING", "plain")
        return _counting.count(values.cpu(), kept, examples=examples, tolerance=tolerance)


@KERNELS
@pytest.mark.parametrize(
    ("dtype", "rows", "tolerance"),
    [(torch.float32, 1, 0.0), (torch.float64, None, 0.0), (torch.float16, 2, 0.5), (torch.bfloat16, 1, 0.0)],
)
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "sliced"])
@pytest.mark.parametrize(
    ("shape", "kept"),
    [
        ((8,), ()),
        ((3, 4), (0,)),
        ((3, 4), (0, 1)),
        ((9, 5), (1,)),
        ((70, 2), ()),
        ((40, 300), (1,)),
        ((4, 6, 5), (2,)),
        ((4, 5, 6, 7), (1,)),
        ((2, 3, 4, 5), (1, 3)),
        ((3, 100, 7, 7), (1,)),
        ((2, 3, 50, 61), (1,)),
        ((2, 1, 70_000), (1,)),
    ],
)
def test_equals_the_plain_path(shape, kept, layout, dtype, rows, tolerance) -> None:
    """rows: of an example along the first axis; None where it does not hold examples."""
    kernels, here = tally(), place()
    expected: list[_counting.Counts] = []
    for batch, seed in enumerate([0, 1], 1):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).relu().to(dtype).to(DEVICE)
        if layout == "channels last" and values.ndim > 1:
            values = values.movedim(1, -1).contiguous().movedim(-1, 1)
        elif layout == "sliced":
            values = values[..., 1:] if values.shape[-1] > 2 else values[1:]
        fits = rows and 0 not in kept and len(values) % rows == 0
        examples = len(values) // rows if fits else None
        kernels.add(here, values, kept, examples, tolerance)
        kernels.commit(batch)
        expected.append(plainly(values, kept, examples, tolerance))
    whole = expected[0] + expected[1]
    (found,) = kernels.totals().values()
    assert kernels.bad() is None
    for name in ("zeros", "nonzero_square", "nonzero_positions"):
        assert torch.equal(getattr(found, name).cpu(), getattr(whole, name))
    for name in ("positions", "positions_square", "examples"):
        assert getattr(found, name) == getattr(whole, name)
    torch.testing.assert_close(found.total.cpu(), whole.total, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.square.cpu(), whole.square, rtol=1e-5, atol=1e-6)


@KERNELS
@pytest.mark.parametrize("shape", [(6, 5, 300), (6, 5, 7, 7), (6, 700)])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_sums_do_not_depend_on_the_batches(shape, layout) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).relu().to(DEVICE)
    if layout == "channels last":
        values = values.movedim(1, -1).contiguous().movedim(-1, 1)
    found: list[_counting.Counts] = []
    for sizes in ([6], [1] * 6, [4, 2]):
        kernels, here = tally(), place()
        for batch, part in enumerate(values.split(sizes), 1):
            kernels.add(here, part, (1,), len(part))
            kernels.commit(batch)
        found += kernels.totals().values()
    for other in found[1:]:
        assert torch.equal(other.zeros, found[0].zeros)
        assert torch.equal(other.nonzero_square, found[0].nonzero_square)
        torch.testing.assert_close(other.total, found[0].total, rtol=1e-14, atol=0)
        torch.testing.assert_close(other.square, found[0].square, rtol=1e-14, atol=0)


@KERNELS
def test_a_batch_counts_as_a_whole_or_not_at_all() -> None:
    kernels, here = tally(), place()
    kernels.add(here, torch.ones(4, 3, device=DEVICE), (1,))
    kernels.drop()
    kernels.add(here, torch.zeros(2, 3, device=DEVICE), (1,))
    kernels.add(here, torch.ones(2, 3, device=DEVICE), (1,))
    kernels.commit(1)
    counts = kernels.totals()[here]
    assert counts.positions == 4
    assert counts.zeros.tolist() == [[2, 2, 2]]
    assert counts.total.tolist() == [[2, 2, 2]]


@KERNELS
def test_squares_that_single_precision_cannot_hold() -> None:
    kernels, here = tally(), place()
    lowest = torch.finfo(torch.float32).min
    kernels.add(here, torch.tensor([[1e30, 0.0, lowest]], device=DEVICE), ())
    kernels.commit(1)
    assert kernels.bad() is None
    assert kernels.totals()[here].square.item() == pytest.approx(1e60 + lowest**2, rel=1e-6)


@KERNELS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_the_first_bad_batch_and_place_are_remembered(bad) -> None:
    kernels, places = tally(), [place(index) for index in range(3)]
    for batch in range(1, 5):
        for here in places:
            values = torch.zeros(3, 4, device=DEVICE)
            if batch >= 2 and here[0].index >= 1:
                values[1, 2] = bad
            kernels.add(here, values, (1,))
        kernels.commit(batch)
        assert kernels.bad() == (None if batch == 1 else (2, places[1]))


@pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="needs Triton")
def test_the_kernels_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "not float16 and not float64"]
    run = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 0, run.stdout


# ------------------------------------------------------------------ whole models


def convolutional(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(256, 5),
    ]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(5, 2)).to(dtype)


@GPU
@pytest.mark.parametrize("path", ["plain", "native"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_profile_equals_that_of_the_cpu(path, channels_last, monkeypatch) -> None:
    """In double precision, so that convolutions on both devices agree where values are zero."""
    if path == "native" and not HAS_TRITON:
        pytest.skip("needs Triton")
    model, images = convolutional(torch.float64), torch.randn(7, 3, 8, 8, dtype=torch.float64)
    here = profile(model, list(images.split([4, 3])))
    monkeypatch.setenv("TORCHTRIM_COUNTING", path)
    form = torch.channels_last if channels_last else torch.contiguous_format
    there = profile(model.to("cuda", memory_format=form), list(images.to(memory_format=form).split([4, 3])))
    assert list(here) == list(there)
    for name in here:
        np.testing.assert_array_equal(here.zeros[name], there.zeros[name])
        np.testing.assert_array_equal(here.positions[name], there.positions[name])
        np.testing.assert_allclose(here.mean[name], there.mean[name], rtol=1e-9)
        np.testing.assert_allclose(here[name].mean_square, there[name].mean_square, rtol=1e-9)


@GPU
def test_half_precision_on_a_gpu() -> None:
    model, images = convolutional(torch.float16).cuda(), torch.randn(7, 3, 8, 8).half().cuda()
    found = profile(model, [images])
    with torch.no_grad():
        np.testing.assert_array_equal(found["0"].zeros, (model[:2](images) == 0).sum((0, 2, 3)).cpu())


@GPU
@pytest.mark.parametrize("count", [3, 200])
def test_the_error_names_the_batch_that_was_bad(count) -> None:
    model, images = LeNet().cuda(), torch.randn(2, 1, 28, 28)
    batches = [images * (torch.nan if number == 2 else 1) for number in range(1, count + 1)]
    with pytest.raises(ProfileError, match=r"^batch 2: NaN or infinite .* layer 'conv1' \(relu"):
        profile(model, batches)
    assert not model._forward_hooks


@GPU
def test_an_earlier_bad_batch_is_named_before_a_later_fault() -> None:
    model, images = LeNet().cuda(), torch.randn(2, 1, 28, 28)
    with pytest.raises(ProfileError, match=r"^batch 1: NaN or infinite"):
        profile(model, [images * torch.nan, torch.randn(2, 3, 28, 28)])


@GPU
@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_no_batch_waits_for_the_device() -> None:
    model, images = LeNet().cuda().eval(), torch.randn(8, 1, 28, 28, device="cuda")
    watch = Watch(model)
    for _ in range(2):
        watch.run(lambda: model(images))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            watch.run(lambda: model(images))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    watch.look()
    assert watch.examples == 7 * 8
