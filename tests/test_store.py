"""Saved models come back as they were, or are refused with a reason."""

import copy
import json
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from torchtrim import Fraction, load, mask, profile, save, select, trim
from torchtrim._copies import named_tensors
from torchtrim._history import history
from torchtrim._lenet import LeNet
from torchtrim._saved import is_saved_model, read_facts
from torchtrim._store import read_model, write_model
from torchtrim.errors import StoreError

IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
VECTORS = IMAGES.flatten(1)[:, :6].contiguous()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads would only wait for each other over tiny tensors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Normalised(nn.Module):
    """Linear layers with BatchNorm; vectors [batch, 6] → [batch, 3]."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a = nn.Linear(6, width)
        self.norm = nn.BatchNorm1d(width)
        self.b = nn.Linear(width, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, vectors: Tensor) -> Tensor:
        return self.out(self.b(self.norm(self.a(vectors)).relu()).relu())


class Tied(nn.Module):
    """Two layers with one weight, two with one memory, and a module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.b = nn.Linear(8, 8)
        self.c = nn.Linear(8, 8)
        self.d = nn.Linear(8, 8)
        self.again = self.b
        self.out = nn.Linear(8, 3)
        self.c.weight = self.b.weight
        self.d.weight = nn.Parameter(self.b.weight.data)

    def forward(self, vectors: Tensor) -> Tensor:
        hidden = self.a(vectors).relu()
        for layer in (self.b, self.c, self.d, self.again):
            hidden = layer(hidden).relu()
        return self.out(hidden)


class Buffers(nn.Module):
    """A buffer per neuron that a state_dict leaves out, and one without axes."""

    scale: Tensor
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.out = nn.Linear(8, 3)
        self.register_buffer("scale", torch.rand(8), persistent=False)
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, vectors: Tensor) -> Tensor:
        return self.out(self.a(vectors).relu() * self.scale)


class Grouped(nn.Module):
    """Convolutions in groups and GroupNorm; images [batch, 3, 6, 6] → [batch, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.GroupNorm(6, 12)
        self.b = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.c = nn.Conv2d(12, 16, 1)
        self.out = nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Tensor:
        images = self.b(self.norm(self.a(images)).relu()).relu()
        return self.out(self.c(images).relu().mean((2, 3)))


class Split(nn.Module):
    """Code that cuts by sizes which it keeps in a list and in a tuple; vectors [batch, 6] → [batch, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 12)
        self.b = nn.Linear(4, 12)
        self.sizes = [4, 8]
        self.later = (8, 4)
        self.out = nn.Linear(8, 3)

    def forward(self, vectors: Tensor) -> Tensor:
        first, rest = self.a(vectors).relu().split(self.sizes, 1)
        one, two = self.b(first).relu().split(self.later, 1)
        return self.out(one) + two.sum(1, keepdim=True) + rest.sum(1, keepdim=True)


def weight_normed() -> nn.Module:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 8))
    return nn.Sequential(normed, nn.ReLU(), nn.Linear(8, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "BatchNorm": (Normalised, VECTORS),
    "tied": (Tied, VECTORS),
    "buffers": (Buffers, VECTORS),
    "half": (lambda: Normalised().bfloat16(), VECTORS.bfloat16()),
    "grouped": (Grouped, IMAGES),
    "channels last": (lambda: Grouped().to(memory_format=torch.channels_last), IMAGES),
    "lists": (Split, VECTORS),
    "weight norm": (weight_normed, VECTORS),
}


def made(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    build, example = MODELS[name]
    return build(), example


def trimmed(model: nn.Module, example: Tensor, share: float = 0.3) -> nn.Module:
    return trim(model, select(profile(model, [example]), rule=Fraction(share)), example)


def lenet(share: float = 0.2) -> nn.Module:
    return trimmed(LeNet(), torch.randn(2, 1, 28, 28), share)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = named_tensors(one), named_tensors(other)
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert tensor.stride() == theirs[name].stride(), name
        assert torch.equal(tensor, theirs[name]), name
        assert type(tensor) is type(theirs[name]), name
    assert list(one.state_dict()) == list(other.state_dict())
    assert str(one) == str(other)
    assert history(one) == history(other)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("times", [0, 1, 2])
def test_comes_back_as_it_was(tmp_path, name, times) -> None:
    model, example = made(name)
    small = model
    for _ in range(times):
        small = trimmed(small, example)
    fresh, _ = made(name, seed=1)
    before = copy.deepcopy(fresh)
    save(small, tmp_path / "small.safetensors")
    loaded = load(fresh, tmp_path / "small.safetensors")
    assert_same(loaded, small)
    assert (sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in model.parameters())) == (times > 0)
    assert torch.equal(loaded.eval()(example), small.eval()(example))
    assert_same(fresh, before)
    storages = {tensor.untyped_storage()._cdata for tensor in named_tensors(fresh).values()}
    assert storages.isdisjoint(tensor.untyped_storage()._cdata for tensor in named_tensors(loaded).values())


@pytest.mark.parametrize("name", MODELS)
def test_can_be_trimmed_and_saved_again(tmp_path, name) -> None:
    model, example = made(name)
    small = trimmed(model, example)
    save(small, tmp_path / "one.safetensors")
    loaded = load(made(name, 1)[0], tmp_path / "one.safetensors")
    smaller, again = trimmed(small, example), trimmed(loaded, example)
    assert_same(smaller, again)
    save(again, tmp_path / "two.safetensors")
    assert_same(load(made(name, 2)[0], tmp_path / "two.safetensors"), smaller)
    # the chain of plans goes on from the loaded model too
    assert_same(load(loaded, tmp_path / "two.safetensors"), smaller)
    plan = history(smaller).plans[-1]
    double = copy.deepcopy(loaded).double().eval()
    inputs = example.double()
    assert torch.allclose(trim(double, plan, inputs)(inputs), mask(double, plan, inputs)(inputs), atol=1e-12)


def test_tensors_of_one_memory_are_stored_once_and_stay_so(tmp_path) -> None:
    model, example = made("tied")
    path = tmp_path / "tied.safetensors"
    save(trimmed(model, example), path)
    assert {"again.weight", "c.weight", "d.weight"}.isdisjoint(load_file(path))
    untied = Tied()
    untied.c, untied.d = nn.Linear(8, 8), nn.Linear(8, 8)
    for fresh in (Tied(), untied):
        loaded = load(fresh, path)
        assert loaded.c.weight is loaded.b.weight
        assert loaded.again is loaded.b
        assert loaded.d.weight is not loaded.b.weight
        with torch.no_grad():
            loaded.b.weight[0, 0] = 5
        assert loaded.d.weight[0, 0] == 5


def test_buffers_over_one_memory_stay_two(tmp_path) -> None:
    def build() -> nn.Module:
        model = nn.Module()
        model.register_buffer("scale", torch.rand(3))
        model.register_buffer("view", model.scale.view(3))
        return model

    model = build()
    save(model, tmp_path / "model.safetensors")
    loaded = load(build(), tmp_path / "model.safetensors")
    assert_same(loaded, model)
    loaded.scale[0] = 5
    assert loaded.view[0] == 5


def test_a_tie_that_the_file_does_not_have_is_refused(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    save(model, tmp_path / "model.safetensors")
    fresh = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fresh[1].weight = fresh[0].weight
    with pytest.raises(
        StoreError, match=r"1\.weight: tied to 0\.weight in this model, a tensor of its own in the file"
    ):
        load(fresh, tmp_path / "model.safetensors")


def test_tensors_that_only_overlap_are_stored_apart(tmp_path) -> None:
    model = nn.Linear(4, 4)
    flat = torch.randn(20)
    model.weight.data, model.bias.data = flat[:16].view(4, 4), flat[12:16]
    save(model, tmp_path / "model.safetensors")
    assert_same(load(nn.Linear(4, 4), tmp_path / "model.safetensors"), model)


def test_memory_with_gaps_is_closed_up(tmp_path) -> None:
    model = nn.Linear(4, 4)
    model.weight.data = torch.randn(8, 8)[::2, ::2]
    save(model, tmp_path / "model.safetensors")
    loaded = load(nn.Linear(4, 4), tmp_path / "model.safetensors")
    assert torch.equal(loaded.weight, model.weight)
    assert loaded.weight.is_contiguous()


def test_modes_and_what_is_trained_are_those_of_the_new_model(tmp_path) -> None:
    model, example = made("BatchNorm")
    small = trimmed(model, example)
    small.norm.eval()
    small.b.weight.requires_grad_(False)
    write_model(small, tmp_path / "small.safetensors", {"accuracy": 98.5})
    fresh = Normalised().eval()
    fresh.a.bias.requires_grad_(False)
    loaded = load(fresh, tmp_path / "small.safetensors")
    assert not any(module.training for module in loaded.modules())
    assert [name for name, p in loaded.named_parameters() if not p.requires_grad] == ["a.bias"]
    # a resumed run, however, goes on as it was
    exact, facts = read_model(fresh, tmp_path / "small.safetensors")
    assert [name for name, module in exact.named_modules() if not module.training] == ["norm"]
    assert [name for name, p in exact.named_parameters() if not p.requires_grad] == ["b.weight"]
    assert facts == read_facts(tmp_path / "small.safetensors") == {"accuracy": 98.5}


def test_a_model_on_the_meta_device_is_enough(tmp_path) -> None:
    small = lenet()
    save(small, tmp_path / "small.safetensors")
    with torch.device("meta"):
        fresh = LeNet()
    assert_same(load(fresh, tmp_path / "small.safetensors"), small)


def test_metadata_are_json_that_others_can_read(tmp_path) -> None:
    from safetensors import safe_open

    small = lenet()
    save(small, tmp_path / "small.safetensors")
    with safe_open(tmp_path / "small.safetensors", "pt") as file:
        content = json.loads(file.metadata()["torchtrim"])
    assert content["format"] == "torchtrim-model"
    assert content["shapes"]["fc1.weight"] == [500, 800]
    assert content["attributes"]["fc1"] == {"in_features": small.fc1.in_features, "out_features": 400}
    assert len(content["plans"][0]["layers"]["fc1"]["removed"]) == 100
    stored = load_file(tmp_path / "small.safetensors")
    assert set(stored) == {name for name, _ in small.named_parameters()}
    assert all(torch.equal(tensor, small.get_parameter(n)) for n, tensor in stored.items())


# ------------------------------------------------------------------ refusals


def test_every_fault_is_listed(tmp_path) -> None:
    save(lenet(), tmp_path / "small.safetensors")
    with pytest.raises(StoreError) as caught:
        load(LeNet((20, 50, 512)), tmp_path / "small.safetensors")
    assert str(caught.value).splitlines()[1:] == [
        "  fc1.weight: the file's ancestor has 500 × 800, this model 512 × 800",
        "  fc1.bias: the file's ancestor has 500, this model 512",
        "  fc2.weight: the file's ancestor has 10 × 500, this model 10 × 512",
    ]
    other = LeNet()
    other.fc3, other.conv2 = other.fc1, nn.Sequential(other.conv2)
    del other.fc1
    other.register_buffer("steps", torch.tensor(0))
    with pytest.raises(StoreError) as caught:
        load(other, tmp_path / "small.safetensors")
    assert str(caught.value).splitlines()[1:] == [
        "  conv2.0.weight: in this model, not in the file",
        "  conv2.0.bias: in this model, not in the file",
        "  fc3.weight: in this model, not in the file",
        "  fc3.bias: in this model, not in the file",
        "  steps: in this model, not in the file",
        "  conv2.bias: in the file, not in this model; did you mean 'conv2.0.bias', 'fc3.bias', 'conv2.0.weight'?",
        "  conv2.weight: in the file, not in this model; did you mean 'conv2.0.weight', 'fc3.weight', 'conv2.0.bias'?",
        "  fc1.bias: in the file, not in this model; did you mean 'fc3.bias', 'conv2.0.bias'?",
        "  fc1.weight: in the file, not in this model; did you mean 'fc3.weight', 'conv2.0.weight'?",
        "  conv2.in_channels: the file sets it to 16, this model has None",
        "  conv2.out_channels: the file sets it to 40, this model has None",
        "  fc1.in_features: the file sets it to 640, this model has None",
        "  fc1.out_features: the file sets it to 400, this model has None",
    ]


def test_a_model_that_was_trimmed_otherwise_is_refused(tmp_path) -> None:
    save(lenet(0.2), tmp_path / "small.safetensors")
    with pytest.raises(StoreError, match=r"expected a new LeNet, found one that was trimmed 1 times itself"):
        load(lenet(0.3), tmp_path / "small.safetensors")
    save(LeNet(), tmp_path / "whole.safetensors")
    with pytest.raises(StoreError, match="build the model anew"):
        load(lenet(), tmp_path / "whole.safetensors")


def test_other_files_are_refused_with_what_to_do(tmp_path) -> None:
    path = tmp_path / "file.safetensors"
    with pytest.raises(StoreError, match=r"file\.safetensors: .* found no file; look at the path"):
        load(LeNet(), path)
    with pytest.raises(StoreError, match="found no file"):
        load(LeNet(), tmp_path)
    save_file(LeNet().state_dict(), path)
    with pytest.raises(StoreError, match=r"found another safetensors file; plain weights are loaded by model\.load_st"):
        load(LeNet(), path)
    assert not is_saved_model(path)
    profile(LeNet(), [torch.zeros(1, 1, 28, 28)]).save(path)
    with pytest.raises(StoreError, match="found 'torchtrim-profile' of version 2"):
        load(LeNet(), path)
    assert not is_saved_model(path)
    torch.save(LeNet().state_dict(), path)
    with pytest.raises(StoreError, match="expected a whole safetensors file, found"):
        load(LeNet(), path)
    assert not is_saved_model(path)
    assert not is_saved_model(tmp_path)
    assert not is_saved_model(tmp_path / "missing")


def test_a_file_that_was_cut_off_anywhere_is_refused(tmp_path) -> None:
    path = tmp_path / "small.safetensors"
    save(lenet(), path)
    assert is_saved_model(path)
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, 5_000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(StoreError, match="expected a whole safetensors file"):
            load(LeNet(), path)


@pytest.mark.parametrize(
    "damage",
    [
        {"plans": "none"},
        {"plans": [{"format": "torchtrim-plan"}]},
        {"shapes": {}},
        {"shapes": {"0.weight": [2, 4], "0.bias": [4], "2.weight": [2, 4], "2.bias": [2]}},
        {"shapes": {"0.weight": [4], "0.bias": [4], "2.weight": [2, 4], "2.bias": [2]}},
        {"shapes": None},
        {"attributes": {"0": {"forward": "x"}}},
        {"attributes": {"0": {"out_features": [1, "x"]}}},
        {"attributes": {"0": 3}},
        {"tied": {"0.bias": "2.bias"}},
        {"tied": {"3.bias": "4.bias"}},
        {"shared": {"0.weight": "nowhere"}},
        {"strides": {"0.weight": [0, 1]}},
        {"strides": {"0.weight": [400, 1]}},
        {"strides": {"0.weight": [-4, 1]}},
        {"strides": {"0.weight": [1]}},
        {"strides": {"nowhere": [1]}},
        {"frozen": 3},
        {"facts": [1]},
    ],
    ids=str,
)
def test_metadata_that_contradict_the_tensors_are_refused(tmp_path, damage) -> None:
    path = tmp_path / "model.safetensors"
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    save(model, path)
    rewrite(path, {})
    assert_same(load(copy.deepcopy(model), path), model)
    rewrite(path, damage)
    with pytest.raises(StoreError, match="its metadata are damaged"):
        load(model, path)


def rewrite(path, changes) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        content = json.loads(file.metadata()["torchtrim"])
    save_file(load_file(path), path, {"torchtrim": json.dumps(content | changes)})


@pytest.mark.parametrize("text", ["", "[]", "{", "3", "[" * 100_000])
def test_metadata_that_are_not_ours_are_refused(tmp_path, text) -> None:
    save_file(LeNet().state_dict(), tmp_path / "file.safetensors", {"torchtrim": text})
    assert not is_saved_model(tmp_path / "file.safetensors")
    with pytest.raises(StoreError, match="its metadata are damaged"):
        load(LeNet(), tmp_path / "file.safetensors")


def test_a_later_version_says_who_wrote_it(tmp_path) -> None:
    save(LeNet(), tmp_path / "file.safetensors")
    rewrite(tmp_path / "file.safetensors", {"version": 2, "torchtrim": "9.9"})
    assert is_saved_model(tmp_path / "file.safetensors")
    with pytest.raises(StoreError, match=r"found 'torchtrim-model' of version 2; .*that wrote it \(9\.9; this is"):
        load(LeNet(), tmp_path / "file.safetensors")


def test_attributes_are_set_only_where_there_are_widths(tmp_path) -> None:
    path = tmp_path / "file.safetensors"
    save(LeNet(), path)
    rewrite(path, {"attributes": {"": {"training": 3}, "fc1": {"in_features": [1, 2], "forward": 1}, "x": {"y": 1}}})
    with pytest.raises(StoreError) as caught:
        load(LeNet(), path)
    assert str(caught.value).splitlines()[1:] == [
        "  training: the file sets it to 3, this model has True",
        "  fc1.in_features: the file sets it to [1, 2], this model has 800",
        "  fc1.forward: the file sets it to 1, this model has None",
        "  x.y: the file sets it to 1, this model has None",
    ]


def test_models_that_cannot_be_saved(tmp_path) -> None:
    path = tmp_path / "file.safetensors"
    with torch.device("meta"), pytest.raises(StoreError, match=r"conv1\.weight: it is on the meta device"):
        save(LeNet(), path)
    sparse = nn.Module()
    sparse.register_buffer("adjacency", torch.eye(3).to_sparse())
    with pytest.raises(StoreError, match=r"adjacency: expected a dense tensor, found torch\.sparse_coo"):
        save(sparse, path)
    with pytest.raises(StoreError, match=r"not initialised yet: weight, bias; call the model once"):
        save(nn.LazyLinear(3), path)
    small = lenet()
    small.register_buffer("steps", torch.tensor(0))
    with pytest.raises(StoreError, match=r"not named as when it was trimmed: steps"):
        save(small, path)
    with pytest.raises(StoreError, match="JSON"):
        write_model(LeNet(), path, {"accuracy": torch.tensor(3)})
    with pytest.raises(StoreError, match="cannot be written"):
        save(LeNet(), tmp_path / "missing" / "file.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_lazy_models_are_refused(tmp_path) -> None:
    save(nn.Linear(4, 3), tmp_path / "file.safetensors")
    with pytest.raises(StoreError, match="not initialised yet: weight"):
        load(nn.LazyLinear(3), tmp_path / "file.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.complex64, torch.bool, torch.uint8, torch.int64])
def test_dtypes(tmp_path, dtype) -> None:
    model = nn.Module()
    model.register_buffer("values", torch.arange(6).reshape(2, 3).to(dtype).t())
    model.register_buffer("empty", torch.empty(0, 3, dtype=dtype))
    save(model, tmp_path / "file.safetensors")
    fresh = copy.deepcopy(model)
    fresh.values = torch.zeros(3, 2)
    assert_same(load(fresh, tmp_path / "file.safetensors"), model)
