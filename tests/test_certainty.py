"""How far every figure is to be trusted, against formulas over examples one by one."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtrim import Profile, TorchtrimWarning, profile
from torchtrim._lenet import LeNet
from torchtrim.errors import ProfileError


def images(count: int, size: int = 28, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lenet() -> LeNet:
    torch.manual_seed(0)
    return LeNet().double().eval()


class Tokens(nn.Module):
    """Counts at tensors whose first axis holds the tokens of all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x.flatten(0, 1)).relu()).unflatten(0, x.shape[:2])


class Convolutions(nn.Module):
    """Runs on images of any size, and flattens what is left into neurons with several entries."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 5, 3), nn.Linear(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu())
        return self.last(F.adaptive_avg_pool2d(x, 2).flatten(1).relu())


def ratio_error(zeros: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Of the share of zeros, from [examples, neurons]: how far each example is from the share, squared."""
    share = zeros.sum(0) / positions.sum(0)
    count = len(zeros)
    return np.sqrt(((zeros - share * positions) ** 2).sum(0) * count / (count - 1)) / positions.sum(0)


def zeros_of(values: Tensor) -> tuple[int, ...]:
    """Of one example [1, neurons, ...] or [tokens, neurons]."""
    silent = (values == 0).movedim(1, 0).flatten(1)
    return tuple(silent.sum(1).tolist())


@pytest.mark.parametrize("sizes", [[9], [1] * 9, [4, 5]])
def test_standard_error_of_lenet(sizes) -> None:
    model, inputs = lenet(), images(9)
    found = profile(model, list(inputs.split(sizes)))
    with torch.no_grad():
        first = [model.conv1(image[None]).relu() for image in inputs]
        third = [
            model.fc1(F.max_pool2d(model.conv2(F.max_pool2d(one, 2)).relu(), 2).flatten(1)).relu() for one in first
        ]
    for name, values in (("conv1", first), ("fc1", third)):
        zeros = np.array([zeros_of(one) for one in values])
        positions = np.full(zeros.shape, values[0][0, 0].numel())
        np.testing.assert_allclose(found.standard_error[name], ratio_error(zeros, positions), rtol=1e-9)
        assert (found[name].examples == 9).all()
    assert np.isnan(found.standard_error["fc2"]).all()


def test_examples_of_different_sizes_are_a_ratio_of_sums() -> None:
    torch.manual_seed(0)
    model = Convolutions().double()
    batches = [images(3, 8), images(2, 11, seed=1), images(4, 8, seed=2)]
    found = profile(model, batches)
    with torch.no_grad():
        values = [model.first(image[None]).relu() for batch in batches for image in batch]
    zeros = np.array([zeros_of(one) for one in values])
    positions = np.array([[one[0, 0].numel()] * 4 for one in values])
    np.testing.assert_allclose(found.standard_error["first"], ratio_error(zeros, positions), rtol=1e-9)


def test_tokens_of_an_example_are_one_observation() -> None:
    torch.manual_seed(0)
    model, inputs = Tokens().double(), torch.randn(12, 7, 3, dtype=torch.float64)
    inputs += 3 * torch.randn(12, 1, 3, dtype=torch.float64)  # alike within an example
    found = profile(model, inputs.split(5))["up"]
    with torch.no_grad():
        zeros = np.array([zeros_of(model.up(one).relu()) for one in inputs])
    np.testing.assert_array_equal(found.zeros, zeros.sum(0))
    np.testing.assert_allclose(found.standard_error, ratio_error(zeros, np.full(zeros.shape, 7)), rtol=1e-9)
    naive = np.sqrt(found.apoz * (1 - found.apoz) / found.positions)
    assert (found.standard_error > 1.2 * naive).any()


def test_neurons_with_several_entries_have_an_upper_bound() -> None:
    torch.manual_seed(0)
    model, inputs = Convolutions().double(), images(50, 9)
    found = profile(model, [inputs])["second"]
    with torch.no_grad():
        values = F.adaptive_avg_pool2d(model.second(model.first(inputs).relu()), 2).relu()
    zeros = (values == 0).sum((2, 3)).double().numpy()
    exact = ratio_error(zeros, np.full(zeros.shape, 4))
    np.testing.assert_array_equal(found.zeros, zeros.sum(0))
    assert (found.standard_error >= exact * (1 - 1e-9)).all()
    assert (found.standard_error <= 2 * exact + 1e-9).all()  # twice, were the four entries independent


def test_intervals_cover_what_all_data_give() -> None:
    """Of 300 small samples, about 95 in 100 intervals hold the share of the whole."""
    torch.manual_seed(0)
    model = Tokens().double()
    inputs = torch.randn(30_000, 4, 3, dtype=torch.float64) + 2 * torch.randn(30_000, 1, 3, dtype=torch.float64)
    truth = profile(model, [inputs])["up"].apoz
    covered = []
    for part in inputs.split(100):
        low, high = profile(model, [part])["up"].interval(0.95)
        covered.append((low <= truth) & (truth <= high))
    assert 0.92 < np.mean(covered) < 0.98


def test_intervals_of_constants_shrink_with_the_examples() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].bias.fill_(-1e9)
    highs = []
    for count in (10, 1000):
        low, high = profile(model, [torch.randn(count, 2)])["0"].interval()
        np.testing.assert_allclose(high, 1)
        highs.append(1 - low[0])
    assert 0.2 < highs[0] < 0.4
    assert 0.003 < highs[1] < 0.005
    low, high = profile(model, [torch.randn(1, 2)])["0"].interval()
    assert (low == 0).all()
    assert (high == 1).all()


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.Tanh(), nn.Sigmoid()])
def test_values_near_zero_count_with_a_tolerance(activation) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), activation, nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    batches = (5 * torch.randn(40, 4)).split(16)
    found = profile(model, batches, zero_tolerance=0.3)
    with torch.no_grad():
        values = activation(model[0](torch.cat(batches)))
        limit = 0.3 * values[:16].square().mean().sqrt()
        np.testing.assert_array_equal(found["0"].zeros, (values.abs() <= limit).sum(0))
        np.testing.assert_array_equal(found["2"].zeros, (model[3](model[2](values)) == 0).sum(0))
    assert found["0"].zeros.sum() > 0
    assert found.zero_tolerance == 0.3
    with pytest.raises(ProfileError, match="zero_tolerance: expected"):
        profile(model, batches, zero_tolerance=-1.0)


def test_what_says_little_is_told() -> None:
    torch.manual_seed(0)
    smooth = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2))
    data = [torch.randn(2000, 4)]
    with pytest.warns(TorchtrimWarning, match="no zeros after gelu in 0: .*zero_tolerance=0.01"):
        profile(smooth, data)
    silent = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.warns(TorchtrimWarning, match="few examples: half of the neurons' APoZ is known to ± "):
        profile(silent, [torch.randn(20, 4)])
    assert profile(silent, data).notes == ()
    assert profile(silent.append(nn.Sigmoid()), data).notes == ()  # what the model gives out is never zero, and stays
    with torch.no_grad():
        silent[0].bias.fill_(-1e9)
    with pytest.warns(TorchtrimWarning, match="all neurons have the same APoZ in 0"):
        profile(silent, data)


def test_print_shows_intervals() -> None:
    found = profile(lenet(), [images(40)])
    lines = str(found).splitlines()
    assert "95 % interval" in lines[1]
    low, high = found["conv1"].interval()
    assert f"{100 * low.mean():.2f}–{100 * high.mean():.2f} %" in lines[2]


def same(one: Profile, other: Profile) -> None:
    assert list(one) == list(other)
    assert one.examples == other.examples
    for name, layer in one.items():
        theirs = other[name]
        for integers in ("zeros", "positions", "examples"):
            np.testing.assert_array_equal(getattr(layer, integers), getattr(theirs, integers))
        for floats in ("mean", "mean_square", "standard_error"):
            np.testing.assert_allclose(getattr(layer, floats), getattr(theirs, floats), rtol=1e-9)


@pytest.mark.parametrize("model", [lenet, lambda: Convolutions().double(), lambda: nn.Sequential(Tokens())])
def test_merged_profiles_are_that_of_all_data(model: Callable[[], nn.Module], tmp_path) -> None:
    network = model()
    data = torch.randn(11, 7, 3) if isinstance(network, nn.Sequential) else images(11)
    whole = profile(network, data.split(4))
    parts = [profile(network, [part]) for part in data.split(4)]
    parts[1].save(tmp_path / "one.safetensors")
    parts[1] = Profile.load(tmp_path / "one.safetensors")
    merged = Profile.merge(*parts)
    same(merged, whole)
    assert [len(merged.sites[name]) for name in merged] == [len(whole.sites[name]) for name in whole]


def test_only_profiles_of_one_model_are_merged() -> None:
    one, data = lenet(), [images(3)]
    other = lenet()
    with torch.no_grad():
        other.conv2.weight[0, 0, 0, 0] += 1
    first = profile(one, data)
    with pytest.raises(ProfileError, match=r"merge: .* found other weights in 'conv1'"):
        first.merge(profile(other, data))
    with pytest.raises(ProfileError, match="found other layers"):
        first.merge(profile(Convolutions().double(), data))
    with pytest.raises(ProfileError, match=r"zero_tolerance=0\.0 and zero_tolerance=0\.1"):
        first.merge(profile(one, data, zero_tolerance=0.1))
