"""Every neuron's zeros, against hooks and loops that a reader can check by eye."""

import gc
import tracemalloc
from collections import UserDict
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchtrim
from torchtrim import Profile, profile
from torchtrim._lenet import LeNet
from torchtrim.errors import ProfileError, StoreError


def images(count: int = 7, size: int = 28, channels: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def lenet_slowly(model: LeNet, inputs: Tensor) -> dict[str, np.ndarray]:
    """Zeros of LeNet's hidden neurons, layer by layer and image by image."""
    zeros = {"conv1": np.zeros(20, int), "conv2": np.zeros(50, int), "fc1": np.zeros(500, int)}
    with torch.no_grad():
        for image in inputs:
            first = model.conv1(image[None]).clamp_min(0)
            second = model.conv2(F.max_pool2d(first, 2)).clamp_min(0)
            third = model.fc1(F.max_pool2d(second, 2).flatten(1)).clamp_min(0)
            for name, values in (("conv1", first), ("conv2", second), ("fc1", third)):
                for neuron in range(values.shape[1]):
                    zeros[name][neuron] += int((values[0, neuron] == 0).sum())
    return zeros


@pytest.mark.parametrize("sizes", [[7], [1] * 7, [4, 3], [3, 1, 3]])
def test_lenet_counts_are_exact_whatever_the_batches(sizes) -> None:
    torch.manual_seed(0)
    model, inputs = LeNet().double(), images().double()
    found = profile(model, list(inputs.split(sizes)))
    for name, zeros in lenet_slowly(model, inputs).items():
        np.testing.assert_array_equal(found[name].zeros, zeros)
    assert set(found.positions["conv1"]) == {7 * 24 * 24}
    assert set(found.positions["conv2"]) == {7 * 8 * 8}
    assert set(found.positions["fc1"]) == {7}
    assert not found["fc2"].positions.any()
    assert np.isnan(found.apoz["fc2"]).all()
    assert found.examples == 7
    np.testing.assert_allclose(found.apoz["fc1"], found.zeros["fc1"] / 7)


def test_both_ways_to_count_give_the_same_profile(monkeypatch) -> None:
    pytest.importorskip("numba")
    model = torchvision.models.resnet18(num_classes=3)
    found: list[Profile] = []
    for path in ("plain", "native"):
        monkeypatch.setenv("TORCHTRIM_COUNTING", path)
        found.append(profile(model, [images(3, 40, 3), images(2, 40, 3, seed=1)]))
    plain, native = found
    for name in plain:
        np.testing.assert_array_equal(plain.zeros[name], native.zeros[name])
        np.testing.assert_array_equal(plain.positions[name], native.positions[name])
        np.testing.assert_allclose(plain.mean[name], native.mean[name], rtol=1e-5)


def test_an_unknown_way_to_count_is_refused_before_the_first_batch(monkeypatch) -> None:
    monkeypatch.setenv("TORCHTRIM_COUNTING", "quick")
    with pytest.raises(ProfileError, match=r"^TORCHTRIM_COUNTING: expected 'plain' or 'native'"):
        profile(LeNet(), [images()])


def test_moments_and_norms() -> None:
    torch.manual_seed(0)
    model, inputs = LeNet().double(), images().double()
    found = profile(model, [inputs])["conv1"]
    with torch.no_grad():
        values = model.conv1(inputs).clamp_min(0)
        torch.testing.assert_close(torch.from_numpy(found.mean), values.mean((0, 2, 3)))
        torch.testing.assert_close(torch.from_numpy(found.mean_square), values.square().mean((0, 2, 3)))
        torch.testing.assert_close(torch.from_numpy(found.incoming_l1), model.conv1.weight.abs().sum((1, 2, 3)))
        torch.testing.assert_close(
            torch.from_numpy(found.outgoing_l2), model.conv2.weight.square().sum((0, 2, 3)).sqrt()
        )
    behind_flatten = profile(model, [inputs])["conv2"].outgoing_l1
    expected = model.fc1.weight.detach().abs().sum(0).reshape(50, 16).sum(1)
    torch.testing.assert_close(torch.from_numpy(behind_flatten), expected)


class Activations(nn.Module):
    """One hidden layer of 6 neurons; `kind` says how its ReLU is called. images [batch, 4] → [batch, 2]"""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.hidden, self.relu, self.output = nn.Linear(4, 6), nn.ReLU(inplace=kind == "in place"), nn.Linear(6, 2)
        self.norm = nn.BatchNorm1d(6) if kind == "behind a norm" else nn.Identity()
        self.kind = kind

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norm(self.hidden(inputs))
        if self.kind == "functional":
            return self.output(F.relu(hidden))
        if self.kind == "method":
            return self.output(hidden.relu())
        if self.kind == "clamp":
            return self.output(hidden.clamp(min=0))
        if self.kind == "relu6":
            return self.output(F.relu6(hidden))
        return self.output(self.relu(hidden))


@pytest.mark.parametrize("kind", ["module", "functional", "method", "in place", "clamp", "relu6", "behind a norm"])
def test_however_the_activation_is_called(kind) -> None:
    torch.manual_seed(0)
    model, inputs = Activations(kind), torch.randn(50, 4)
    if kind == "behind a norm":
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
    model.eval()
    with torch.no_grad():
        silent = (model.norm(model.hidden(inputs)) <= 0).sum(0)
    found = profile(model.train(), [inputs])
    np.testing.assert_array_equal(found["hidden"].zeros, silent.numpy())
    assert 0 < found["hidden"].zeros.sum() < 300
    assert model.training


def test_a_reused_activation_is_two_sites() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.output = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 2)
            self.relu = nn.ReLU()

        def forward(self, inputs):
            return self.output(self.relu(self.second(self.relu(self.first(inputs)))))

    model, inputs = Twice(), torch.randn(20, 3)
    found = profile(model, [inputs])
    with torch.no_grad():
        first = model.first(inputs).relu()
        np.testing.assert_array_equal(found["first"].zeros, (first == 0).sum(0))
        np.testing.assert_array_equal(found["second"].zeros, (model.second(first) <= 0).sum(0))


def test_a_residual_stream_keeps_each_site() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.branch, self.output = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, inputs):
            stream = F.relu(self.stem(inputs))
            return self.output(F.relu(stream + self.branch(stream)))

    model, inputs = Residual(), torch.randn(30, 3)
    found = profile(model, [inputs])
    with torch.no_grad():
        one = F.relu(model.stem(inputs))
        two = F.relu(one + model.branch(one))
    expected = [(one == 0).sum(0).numpy(), (two == 0).sum(0).numpy()]
    for name in ("stem", "branch"):
        assert len(found.sites[name]) == 2
        for site, zeros in zip(found.sites[name], expected, strict=True):
            np.testing.assert_array_equal(site.zeros, zeros)
            assert set(site.positions) == {30}
        np.testing.assert_array_equal(found[name].zeros, expected[0] + expected[1])


def test_tokens_and_smooth_activations() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
            self.act: nn.Module = nn.ReLU()

        def forward(self, tokens):
            return tokens + self.down(self.act(self.up(tokens)))

    model, tokens = Block(), torch.randn(3, 5, 4)
    found = profile(model, [tokens])["up"]
    np.testing.assert_array_equal(found.zeros, (model.up(tokens) <= 0).sum((0, 1)))
    assert set(found.positions) == {15}
    model.act = nn.GELU()
    smooth = profile(model, [tokens])
    assert smooth["up"].zeros.sum() == 0
    assert smooth.sites["up"][0].kind == "smooth"


def test_sizes_may_vary_even_ahead_of_a_flatten() -> None:
    class Late(nn.Module):
        """The activation comes after the flatten, where a neuron's positions depend on the image's size."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.output = nn.Conv2d(1, 3, 3), nn.LazyLinear(2)

        def forward(self, inputs):
            flat = F.relu(self.conv(inputs).flatten(1))
            pooled = flat.unflatten(1, (3, -1)).mean(2)
            return self.output(pooled)

    model = Late()
    model(images(2, 8))
    small, large = images(2, 8), images(3, 11)
    found = profile(model, [small, large, small])["conv"]
    with torch.no_grad():
        expected = sum((model.conv(x) <= 0).sum((0, 2, 3)) for x in (small, large, small))
    np.testing.assert_array_equal(found.zeros, expected)
    assert set(found.positions) == {4 * 36 + 3 * 81}


class Branches(nn.Module):
    """Two hidden layers, of which a call uses one: as it is told, or as its input says."""

    def __init__(self, by_data: bool) -> None:
        super().__init__()
        self.one, self.other, self.output = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)
        self.by_data = by_data

    def forward(self, inputs: Tensor, second: bool = False) -> Tensor:
        second = bool(inputs.mean() < 0) if self.by_data else second
        return self.output((self.other if second else self.one)(inputs).relu())


@pytest.mark.parametrize("by_data", [True, False])
def test_calls_that_go_other_ways_are_told_apart(by_data) -> None:
    model, inputs = Branches(by_data), torch.randn(16, 4)
    inputs += 0.5 - inputs.mean()
    batches = [(inputs, False), (-inputs, True), (inputs, False), (-inputs[:3], True), (inputs[:5], False)]
    found = profile(model, batches, forward=lambda m, batch: m(batch[0], second=batch[1]))
    with torch.no_grad():
        expected = sum((model.one(x) <= 0).sum(0) for x, second in batches if not second)
    np.testing.assert_array_equal(found["one"].zeros, expected)
    assert set(found.positions["one"]) == {16 + 16 + 5}
    assert found.examples == 16 + 16 + 16 + 3 + 5


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_layers_behind_a_recurrent_one(kind) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent, self.hidden, self.output = kind(4, 5, batch_first=True), nn.Linear(5, 6), nn.Linear(6, 2)

        def forward(self, inputs):
            return self.output(self.hidden(self.recurrent(inputs)[0][:, -1]).relu())

    model, inputs = Recurrent(), torch.randn(9, 3, 4)
    found = profile(model, [inputs, inputs[:4]])
    with torch.no_grad():
        silent = model.hidden(model.recurrent(inputs)[0][:, -1]) <= 0
    np.testing.assert_array_equal(found.zeros["hidden"], silent.sum(0) + silent[:4].sum(0))
    assert not model.recurrent._forward_hooks


def test_clamps_and_gates_are_no_activations_of_a_layer() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gate, self.output = nn.Conv2d(1, 6, 3), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, inputs):
            hidden = F.silu(self.conv(inputs))
            gates = F.hardsigmoid(self.gate(hidden.mean((2, 3))))
            pooled = (hidden * gates[..., None, None]).clamp(min=-1e6).mean((2, 3))
            return self.output(pooled)

    model, inputs = Gated(), images(5, 8)
    found = profile(model, [inputs])
    with torch.no_grad():
        expected = F.silu(model.conv(inputs)).mean((0, 2, 3))
    np.testing.assert_allclose(found.mean["conv"], expected, rtol=1e-5)
    assert set(found.positions["conv"]) == {5 * 36}
    assert [site.kind for site in found.sites["conv"]] == ["smooth", "gate"]


def test_what_a_model_caches_can_be_trained_with() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.output, self.table = nn.Linear(4, 6), nn.Linear(6, 2), None

        def forward(self, inputs):
            if self.table is None:
                self.table = torch.arange(len(inputs), dtype=inputs.dtype, device=inputs.device)[:, None].cos()
            return self.output((self.hidden(inputs) * self.table).relu())

    model, inputs = Caching(), torch.randn(5, 4)
    profile(model, [inputs])
    torchtrim.measure(model, inputs)
    model(inputs).sum().backward()
    assert model.hidden.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype) -> None:
    torch.manual_seed(0)
    model, inputs = Activations("module").to(dtype), torch.randn(40, 4).to(dtype)
    found = profile(model, [inputs])["hidden"]
    with torch.no_grad():
        np.testing.assert_array_equal(found.zeros, (F.relu(model.hidden(inputs)) == 0).sum(0))


def test_kinds_of_batches() -> None:
    model, inputs = Activations("module"), torch.randn(12, 4)
    expected = profile(model, [inputs]).zeros["hidden"]
    loader = DataLoader(TensorDataset(inputs, torch.zeros(12)), batch_size=5)
    kinds = [
        loader,
        (batch for batch in loader),
        [(inputs, "label")],
        [[inputs, 3]],
        [{"inputs": inputs}],
        [UserDict(inputs=inputs)],
    ]
    for kind in kinds:
        np.testing.assert_array_equal(profile(model, kind).zeros["hidden"], expected)
    by_hand = profile(model, [{"pixels": inputs}], forward=lambda m, batch: m(inputs=batch["pixels"]))
    np.testing.assert_array_equal(by_hand.zeros["hidden"], expected)


def test_positional_and_keyword_inputs_together() -> None:
    class Scaled(Activations):
        def forward(self, inputs, scale=None):
            return super().forward(inputs * scale)

    model, inputs, scale = Scaled("module"), torch.randn(9, 4), torch.tensor(2.0)
    found = profile(model, [inputs], forward=lambda m, batch: m(batch, scale=scale))
    np.testing.assert_array_equal(found["hidden"].zeros, (model.hidden(inputs * 2) <= 0).sum(0))


def test_a_transformer_layer_shows_its_activation() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    found = profile(model, [torch.randn(4, 3, 8)])
    assert set(found["linear1"].positions) == {12}
    assert found["linear1"].zeros.sum() > 0
    assert torch.backends.mha.get_fastpath_enabled()


def test_everything_is_left_as_it_was() -> None:
    model = torchvision.models.resnet18()
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    loader = DataLoader(TensorDataset(images(4, 32, 3)), batch_size=2, shuffle=True)
    profile(model, loader)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "expected at least one batch"),
        (torch.randn(2, 4), "expected an iterable of batches, found a tensor"),
        ([torch.randn(2, 5)], r"batch 1: Activations cannot run on the example.*pass forward=lambda"),
        ([torch.randn(2, 4), torch.randn(0, 4)], r"batch 2: expected at least one example, found none"),
        ([torch.randn(2, 4), torch.randn(2, 5)], r"batch 2: Activations cannot run on it: RuntimeError"),
        ([torch.randn(2, 4), torch.full((2, 4), torch.nan)], r"batch 2: NaN or infinite .* layer 'hidden' \(relu"),
        ([torch.full((2, 4), torch.inf)], "batch 1: NaN or infinite"),
    ],
)
def test_data_that_does_not_serve(batches, message) -> None:
    model = Activations("module")
    with pytest.raises(ProfileError, match=message):
        profile(model, batches)
    assert model.training
    assert not model._forward_hooks


def test_forward_that_never_calls_the_model() -> None:
    with pytest.raises(ProfileError, match="did not call the model"):
        profile(Activations("module"), [torch.randn(2, 4)], forward=lambda model, batch: None)


def test_memory_does_not_grow_with_the_data() -> None:
    def batches(count: int) -> Iterator[Tensor]:
        for _ in range(count):
            gc.collect()  # a few cycles of PyTorch's are left by every call
            yield torch.randn(2, 4)

    model = Activations("module")
    profile(model, [torch.randn(2, 4)])
    peaks = []
    for count in (4, 64):
        tracemalloc.start()
        profile(model, batches(count))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0]


def test_save_and_load(tmp_path) -> None:
    model = torchvision.models.resnet18()
    found = profile(model, [images(2, 32, 3)])
    found.save(tmp_path / "profile.safetensors")
    again = Profile.load(tmp_path / "profile.safetensors")
    assert list(again) == list(found)
    assert str(again) == str(found)
    for name, layer in found.items():
        for key, value in vars(layer).items():
            np.testing.assert_array_equal(getattr(again[name], key), value)
        assert len(again.sites[name]) == len(found.sites[name])
        for one, other in zip(again.sites[name], found.sites[name], strict=True):
            assert (one.index, one.operator, one.module, one.kind) == (
                other.index,
                other.operator,
                other.module,
                other.kind,
            )
            np.testing.assert_array_equal(one.zeros, other.zeros)
    rule = torchtrim.MeanPlusStd(1)
    assert torchtrim.select(again, rule=rule) == torchtrim.select(found, rule=rule)


def test_load_refuses_other_files(tmp_path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "text").write_text("no")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    for name in ("absent", "text", "other"):
        with pytest.raises(StoreError, match=name):
            Profile.load(tmp_path / name)


def test_table() -> None:
    torch.manual_seed(0)
    text = str(profile(LeNet(), [images()]))
    assert text.splitlines()[0] == "Profile of 7 examples"
    assert "no activation was observed at: fc2" in text


def test_summary() -> None:
    torch.manual_seed(0)
    found = profile(LeNet(), [images()])
    rows = found.summary().rows
    assert [row.layer for row in rows] == ["conv1", "conv2", "fc1"]
    assert [row.neurons for row in rows] == [20, 50, 500]
    for row in rows:
        layer = found[row.layer]
        assert row.apoz == pytest.approx(layer.zeros.sum() / layer.positions.sum())
        assert row.dead == sum(
            zeros == positions for zeros, positions in zip(layer.zeros, layer.positions, strict=True)
        )
        assert row.above == sum(zeros > 0.9 * count for zeros, count in zip(layer.zeros, layer.positions, strict=True))
        assert row.low < row.apoz < row.high
    assert any(row.above for row in rows)
    assert str(found.summary()) in str(found)
