"""On a GPU everything is as on a CPU. Skipped where PyTorch finds none."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from typer.testing import CliRunner

import torchtrim
from small_data import write_idx, write_model
from torchtrim._copies import named_tensors
from torchtrim._lenet import LeNet
from torchtrim.cli import app
from torchtrim.errors import ProfileError
from torchtrim.testing import assert_exact, random_plan
from toys import randomised

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU")


@pytest.fixture(autouse=True)
def _exact_products():
    """TF32 would round what is compared."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vit_b_16"])
def test_trimming_is_exact_and_stays_on_the_gpu(name) -> None:
    torch.manual_seed(0)
    size = 224 if name == "vit_b_16" else 64
    model = randomised(torchvision.models.get_model(name, num_classes=10)).cuda()
    example = torch.randn(2, 3, size, size, device="cuda", dtype=torch.float64)
    plan = assert_exact(model, example)
    trimmed = torchtrim.trim(model, plan, example)
    assert {tensor.device.type for tensor in named_tensors(trimmed).values()} == {"cuda"}


def test_an_example_on_the_cpu_serves_too() -> None:
    """Only its shape matters: `trace` runs without data."""
    model = LeNet().cuda()
    here, there = (
        torchtrim.trace(model, torch.randn(1, 1, 28, 28)),
        torchtrim.trace(model.cpu(), torch.zeros(1, 1, 28, 28)),
    )
    assert str(here) == str(there)


class ByData(nn.Module):
    """Goes another way for bright inputs, so that the trace needs data."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = F.relu(self.first(inputs))
        return self.second(hidden * 2 if inputs.sum().item() > 0 else hidden)


def test_control_flow_that_needs_data() -> None:
    torch.manual_seed(0)
    assert_exact(ByData().cuda(), torch.randn(4, 6, device="cuda"))


def test_attention_and_recurrent_states() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(6, 16, batch_first=True)
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
            self.head = nn.Linear(16, 3)

        def forward(self, inputs):
            hidden, _ = self.lstm(inputs)
            return self.head(self.attention(hidden, hidden, hidden, need_weights=False)[0])

    torch.manual_seed(0)
    assert_exact(Mixed().cuda(), torch.randn(2, 5, 6, device="cuda"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_profile_counts_what_the_gpu_computed(dtype) -> None:
    torch.manual_seed(0)
    model = LeNet().cuda().to(dtype)
    images = torch.randn(7, 1, 28, 28, dtype=dtype)
    profile = torchtrim.profile(model, [images[:4], images[4:]])
    zeros: dict[str, np.ndarray] = {}
    hooks = [
        module.register_forward_hook(
            lambda _, __, out, name=name: zeros.update({name: (F.relu(out) == 0).flatten(2).sum((0, 2)).cpu().numpy()})
        )
        for name, module in model.named_modules()
        if name in ("conv1", "conv2")
    ]
    expected = {name: np.zeros(len(profile.zeros[name]), np.int64) for name in ("conv1", "conv2")}
    for batch in (images[:4], images[4:]):
        with torch.no_grad():
            model.eval()(batch.cuda())
        expected = {name: expected[name] + zeros[name] for name in expected}
    for hook in hooks:
        hook.remove()
    for name, counts in expected.items():
        np.testing.assert_array_equal(profile.zeros[name], counts)
    if dtype == torch.float64:
        there = torchtrim.profile(model.cpu(), [images])
        for name in there:
            np.testing.assert_array_equal(profile.zeros[name], there.zeros[name])
            np.testing.assert_allclose(profile.mean[name], there.mean[name], rtol=1e-9)


def test_activations_that_are_not_finite_are_reported() -> None:
    model = LeNet().cuda()
    images = torch.randn(4, 1, 28, 28)
    broken = images.clone()
    broken[1] = torch.nan
    with pytest.raises(ProfileError, match="batch 2: NaN or infinite activations of layer 'conv1'"):
        torchtrim.profile(model, [images, broken, images])


def test_saved_on_the_gpu_and_loaded_on_the_cpu(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LeNet().cuda()
    example = torch.randn(2, 1, 28, 28, device="cuda")
    trimmed = torchtrim.trim(model, random_plan(torchtrim.trace(model, example)), example)
    torchtrim.save(trimmed, tmp_path / "model")
    loaded = torchtrim.load(LeNet(), tmp_path / "model")
    for name, tensor in named_tensors(loaded).items():
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, named_tensors(trimmed)[name].cpu())


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_whole_run(device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path)
    write_idx(tmp_path / "digits")
    arguments = "run small.py:Small --data idx:digits --rounds 1 --retrain-epochs 1 --train-epochs 1 --out runs/gpu"
    result: Any = CliRunner().invoke(app, [*arguments.split(), "--device", device], terminal_width=200)
    assert result.exit_code == 0, result.output
    assert torch.cuda.get_device_name() in " ".join(result.stdout.split())
    assert (tmp_path / "runs/gpu/round-01/metrics.json").exists()
