"""Models by name, and the files of weights that fill them."""

from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file, save_model
from torch import nn

import torchtrim
from small_data import write_model
from torchtrim import LayerPlan, Plan
from torchtrim._lenet import LeNet
from torchtrim._models import build_model, check_model_name, how_built, load_weights, needs_weights
from torchtrim._store import save
from torchtrim.errors import ModelError, StoreError


class Tied(nn.Module):
    """Two names for one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight


def equal(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


# Names


def test_lenet_has_the_classes_of_the_data() -> None:
    model = build_model("lenet", classes=7)
    assert isinstance(model, LeNet)
    assert model.fc2.out_features == 7


@pytest.mark.parametrize("name", ["torchvision:squeezenet1_1", "timm:test_resnet"])
def test_a_library_model_has_the_classes_of_the_data(name: str) -> None:
    model = build_model(name, classes=5).eval()
    with torch.inference_mode():
        assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize("name", ["lenet", "torchvision:squeezenet1_1"])
@pytest.mark.parametrize("classes", [10, 7])
def test_it_is_said_how_to_build_it(name: str, classes: int) -> None:
    built = eval(how_built(name, classes), {"torchtrim": torchtrim, "torchvision": torchvision})
    shapes = [
        {key: value.shape for key, value in one.state_dict().items()}
        for one in (built, build_model(name, classes=classes))
    ]
    assert shapes[0] == shapes[1]


def test_a_file_is_imported_with_what_lies_beside_it(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "other.py").write_text("from small import wide\nmodel = wide\n")
    model = build_model(f"{tmp_path}/other.py:model", classes=1)
    assert model.conv1.out_channels == 16


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lenett", r"expected one of lenet, torchvision:NAME, .* found 'lenett'; did you mean 'lenet'\?"),
        ("torchvison:vgg16", r"found 'torchvison:vgg16'; did you mean 'torchvision'\?"),
        ("torchvision:", "found 'torchvision:'"),
        ("torchvision:vgg17", r"torchvision has no classifier named 'vgg17'; did you mean 'vgg1[1369]'"),
        ("torchvision:raft_large", "torchvision has no classifier named 'raft_large'"),  # optical flow
        ("timm:resnet17", r"timm has no model named 'resnet17'; did you mean 'resnet18'"),
        ("model.py", "name the function too: FILE.py:FUNCTION"),
    ],
)
def test_an_unknown_name_is_answered_with_close_ones(name: str, expected: str) -> None:
    with pytest.raises(ModelError, match=expected):
        build_model(name, classes=10)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("Smal", r"has no 'Smal'; did you mean 'Small'\?"),
        ("zzz", "has no 'zzz'; it defines Small, wide, broken, needy, number"),
        ("VALUE", "expected a function or class, found int"),
        ("broken", "making the model failed: ValueError: no luck"),
        ("needy", "needs no arguments, found that it needs width, depth"),
        ("number", "expected it to return a torch.nn.Module, found int"),
    ],
)
def test_a_function_that_makes_no_model(tmp_path: Path, function: str, expected: str) -> None:
    write_model(tmp_path)
    with (tmp_path / "small.py").open("a") as file:
        file.write("VALUE = 1\ndef broken(): raise ValueError('no luck')\ndef needy(width, depth, *more): pass\n")
        file.write("def number(): return 3\n")
    with pytest.raises(ModelError, match=expected):
        build_model(f"{tmp_path}/small.py:{function}", classes=3)


def test_a_file_that_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text("def f(:\n")
    with pytest.raises(ModelError, match=r"wrong\.py:f: making the model failed: SyntaxError"):
        build_model(f"{tmp_path}/wrong.py:f", classes=3)
    with pytest.raises(ModelError, match="no such file; expected a Python file"):
        build_model(f"{tmp_path}/nothing.py:f", classes=3)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(ModelError, match=rf"{library} cannot be imported: .* pip install 'torchtrim\[vision\]'"):
        build_model(f"{library}:resnet18", classes=3)


def test_what_is_sure_to_fail_is_said_without_building(tmp_path: Path) -> None:
    name = write_model(tmp_path)
    check_model_name(name)
    check_model_name("timm:resnet18", "DEFAULT")
    for arguments, expected in (
        ((f"{tmp_path}/nothing.py:f",), "no such file"),
        (("lenet", "DEFAULT"), "expected a model of torchvision or timm, found 'lenet'"),
        ((name, "DEFAULT"), "let the function load the weights"),
        (("lenet", f"{tmp_path}/nothing.pt"), "no such file of weights"),
    ):
        with pytest.raises(ModelError, match=expected):
            check_model_name(*arguments)


def test_only_a_function_can_bring_weights_of_its_own() -> None:
    assert needs_weights("lenet")
    assert needs_weights("timm:resnet18")
    assert not needs_weights("model.py:make")


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18"])
def test_pretrained_weights_of_other_classes_are_refused_without_a_download(name: str) -> None:
    with pytest.raises(ModelError, match="pretrained weights tell 1,000 classes apart, the data has 3"):
        build_model(name, classes=3, pretrained=True)


# Weights


@pytest.mark.parametrize("form", ["state_dict", "wrapped", "safetensors"])
def test_weights_in_all_forms(tmp_path: Path, form: str) -> None:
    trained, model = LeNet(), LeNet()
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pt")
    if form == "safetensors":
        save_file(trained.state_dict(), path)
    else:
        torch.save(
            {"state_dict": trained.state_dict(), "epoch": 3} if form == "wrapped" else trained.state_dict(), path
        )
    assert not equal(trained, model)
    assert load_weights(model, path) is model
    assert equal(trained, model)


def test_a_trimmed_model_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    plan = Plan({"conv2": LayerPlan(50, (0, 7)), "fc1": LayerPlan(500, tuple(range(100)))})
    small = torchtrim.trim(LeNet(), plan, torch.zeros(1, 1, 28, 28))
    save(small, tmp_path / "small.safetensors")
    loaded = load_weights(LeNet(), tmp_path / "small.safetensors")
    assert equal(loaded, small)
    assert loaded.fc1.out_features == 400
    with pytest.raises(StoreError, match=r"fc2\.bias: the file's ancestor has 10, this model 3"):
        load_weights(LeNet(classes=3), tmp_path / "small.safetensors")


def test_tied_weights_may_be_given_under_one_name(tmp_path: Path) -> None:
    trained, model = Tied(), Tied()
    save_model(trained, str(tmp_path / "tied.safetensors"))
    assert equal(load_weights(model, tmp_path / "tied.safetensors"), trained)


def test_weights_of_another_architecture_are_listed(tmp_path: Path) -> None:
    given = LeNet((20, 50, 400)).state_dict()
    given["fc9.weight"] = given.pop("conv1.weight")
    torch.save(given, tmp_path / "weights.pt")
    with pytest.raises(ModelError) as caught:
        load_weights(LeNet(), tmp_path / "weights.pt")
    message = str(caught.value)
    assert "of this LeNet; of its 8 tensors\n" in message
    assert "  1 missing: conv1.weight\n" in message
    assert "  1 unexpected: fc9.weight\n" in message
    assert "  3 of another shape: fc1.weight 400×800, not 500×800, fc1.bias 400, not 500, fc2.weight" in message


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_weights_of_a_wrapped_model(tmp_path: Path, prefix: str) -> None:
    given = {prefix + name: value for name, value in LeNet().state_dict().items()}
    torch.save(given, tmp_path / "weights.pt")
    with pytest.raises(ModelError, match=f"saved from a wrapped model; .* without '{prefix}'"):
        load_weights(LeNet(), tmp_path / "weights.pt")


def test_many_misfits_are_counted_and_a_few_are_named(tmp_path: Path) -> None:
    torch.save({f"layer{number}.weight": torch.zeros(1) for number in range(50)}, tmp_path / "weights.pt")
    with pytest.raises(ModelError, match=r"50 unexpected: layer0\.weight, layer1\.weight, layer2\.weight, …\n"):
        load_weights(LeNet(), tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([1, 2], "expected a state_dict, names with tensors, found list"),
        ({"epoch": 3}, "found a mapping with 'epoch'"),
        (nn.Linear(2, 2), "would run code when it is read"),
    ],
    ids=["list", "no tensors", "a whole module"],
)
def test_a_file_of_something_else(tmp_path: Path, content: object, expected: str) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ModelError, match=expected):
        load_weights(LeNet(), tmp_path / "weights.pt")


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_damaged_file(tmp_path: Path, name: str, damage: str) -> None:
    path = tmp_path / name
    if name.endswith(".pt"):
        torch.save(LeNet().state_dict(), path)
    else:
        save_file(LeNet().state_dict(), path)
    path.write_bytes({"cut": path.read_bytes()[:1000], "empty": b"", "text": b"hello, world, " * 9}[damage])
    with pytest.raises(ModelError, match=r"weights\.\w+: expected a (file of weights|state_dict), found"):
        load_weights(LeNet(), path)
