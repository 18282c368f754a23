"""What `torchtrim inspect` says of a model, as text and as JSON, and how a trace prints."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from typer.testing import CliRunner

import torchtrim
from small_data import write_model
from torchtrim._inputs import Input, example_of, parse_inputs
from torchtrim._inspect import Inspection, inspect
from torchtrim._lenet import LeNet
from torchtrim._neurons import Layer, neurons_of
from torchtrim._reach import reach
from torchtrim.cli import app
from torchtrim.errors import TorchtrimError
from toys import Net

TWO = """
import torch
from torch import nn


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, 6)
        self.text = nn.Linear(6, 8)
        self.image = nn.Conv2d(3, 4, 3)
        self.out = nn.Linear(12, 5)

    def forward(self, image, ids):
        words = self.text(self.embed(ids).mean(1)).relu()
        return self.out(torch.cat([self.image(image).relu().mean((2, 3)), words], 1))
"""


@pytest.fixture
def two(tmp_path: Path) -> str:
    path = tmp_path / "two.py"
    path.write_text(TWO)
    return f"{path}:Two"


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["inspect", *arguments], terminal_width=200)


def printed(*arguments: str) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def refused(*arguments: str) -> str:
    """The one line that a mistake is answered with."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr


def tree(text: str) -> str:
    """The part between the heading and what is said below the tree."""
    return text.split("\n\n")[1]


# A trace


def test_a_trace_prints_a_table() -> None:
    graph = torchtrim.trace(LeNet(), torch.zeros(2, 1, 28, 28))
    assert str(graph).splitlines() == [
        "layer  neurons  group  sites  locked",
        "conv1       20  conv1  relu",
        "conv2       50  conv2  relu",
        "fc1        500  fc1    relu",
        "fc2         10                it is an output of the model",
    ]
    assert repr(graph) == "NeuronGraph(4 layers, 3 trimmable, 580 neurons)"
    assert "NeuronGraph(4 layers" in repr([graph])


def test_a_trace_says_what_goes_as_a_whole() -> None:
    modules = {"attend": nn.MultiheadAttention(8, 2, batch_first=True), "out": nn.Linear(8, 3)}
    model = Net(lambda net, x: net.out(net.attend(x, x, x, need_weights=False)[0]), modules)
    rows = [line.split() for line in str(torchtrim.trace(model, torch.zeros(2, 4, 8))).splitlines()]
    assert rows[0] == ["layer", "neurons", "units", "group", "locked"]  # no activation anywhere
    assert rows[1] == ["attend.in_proj_weight", "24", "2", "attend.in_proj_weight"]


@pytest.mark.parametrize(
    ("roots", "removable", "expected"),
    [
        ([1, 2, 3, 4], [True] * 4, ("4", "")),
        ([1, 2, 3, 4], [True, True, False, False], ("2 of 4", "")),
        ([1, 1, 3, 3], [True] * 4, ("4", "2")),
        ([1, 1, 3, 4], [True, True, False, False], ("2 of 4", "1")),
        ([1, 1, 1, 1], [False] * 4, ("4", "")),
    ],
)
def test_neurons_are_told_from_units(roots: list[int], removable: list[bool], expected: tuple[str, str]) -> None:
    assert neurons_of(Layer("a", "a.weight", 0, np.array(roots), np.array(removable), "a", None)) == expected


# The text


def test_lenet() -> None:
    assert printed("lenet") == (
        "lenet, called with 1x1x28x28\n"
        "\n"
        "layer  neurons  activations  locked\n"
        "conv1       20  relu\n"
        "conv2       50  relu\n"
        "fc1        500  relu\n"
        "fc2         10               a\n"
        "\n"
        "Locked:\n"
        "  a: it is an output of the model: fc2\n"
        "\n"
        "Within reach            of all   share\n"
        "layers              3        4  75.0 %\n"
        "weights       425,500  430,500  98.8 %\n"
        "FLOPs          4.58 M   4.59 M  99.8 %\n"
        "\n"
        "Weights are those of convolutions and matrix products. One is within reach where neurons can go\n"
        "along one of its axes; so are its FLOPs.\n"
        "Counted apart, as what the model gives out stays: the output layer fc2, 5,000 weights (1.2 %) and\n"
        "10.00 k FLOPs, which can lose inputs.\n"
    )


def test_layers_that_go_together_have_a_number_and_modules_that_are_alike_are_shown_once() -> None:
    text = printed("torchvision:resnet18", "--input", "1x3x64x64")
    lines = [line.rstrip() for line in tree(text).splitlines()]
    assert lines[:12] == [
        "layer               neurons  group  activations  locked",
        "conv1                    64  1      relu ×3",
        "layer1",
        "└─ 0, 1",
        "   ├─ conv1              64         relu",
        "   └─ conv2              64  1      relu ×3",
        "layer2",
        "├─ 0",
        "│  ├─ conv1             128         relu",
        "│  ├─ conv2             128  2      relu ×2",
        "│  └─ downsample.0      128  2      relu ×2",
        "└─ 1",
    ]
    assert lines[-1].split() == ["fc", "1,000", "a"]
    assert re.findall(r"  (\d)      relu", tree(text)) == list("11222333444")
    assert "Layers with the same group number share neurons, which go together." in text
    assert "groups of its own" not in text


def test_groups_of_modules_that_are_alike_are_said_to_be_their_own() -> None:
    text = printed("torchvision:efficientnet_b0", "--input", "1x3x64x64")
    assert re.search(r"└─ 1\.block … 3\.block \(3 alike\)", text)
    assert "each has groups of its own" in " ".join(text.split())


def test_a_deep_net_fits_a_screen_and_80_columns() -> None:
    found = inspect("torchvision:densenet121", inputs="1x3x64x64")
    lines = found.text(80).splitlines()
    assert len(lines) < 40
    assert max(map(len, lines)) <= 80
    first = lines.index("├─ denseblock1")
    assert lines[first + 1] == "│  └─ denselayer1 … denselayer6 (6 alike)"
    assert lines[first + 3].split() == ["│", "└─", "conv2", "32", "relu", "×1–6"]


def test_reasons_are_listed_once_with_few_of_their_layers() -> None:
    text = inspect("torchvision:vit_b_16").text(80)
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"encoder_layer_0 … encoder_layer_11 \(12 alike\)", text)
    reasons = text.split("Locked:\n")[1].split("\n\n")[0]
    letters = re.findall(r"^  ([a-z]): ", reasons, re.MULTILINE)
    assert letters == [chr(ord("a") + number) for number in range(len(letters))]
    assert reasons.count("native_layer_norm") == 1
    assert re.search(r"conv_proj,.*, … \(25 layers\)", " ".join(reasons.split()))
    assert f"  {letters[-1]}: it is an output of the model: heads.head" in reasons
    assert "FLOPs without weights, such as attention's: 1.43 G (4.1 %)" in text
    assert "which can lose no inputs" in " ".join(text.split())


def test_the_input_that_a_library_made_a_model_for() -> None:
    assert printed("timm:convnext_atto").startswith("timm:convnext_atto, called with 1x3x224x224\n")
    text = printed("torchvision:inception_v3")
    assert text.startswith("torchvision:inception_v3, called with 1x3x299x299\n")
    assert "AuxLogits" in tree(text)  # which no single image reaches


def test_several_inputs(two: str) -> None:
    text = printed(two, "--input", "2x3x8x8,2x7:int64")
    assert text.startswith(f"{two}, called with 2x3x8x8,2x7:int64\n")
    assert [line.split()[0] for line in tree(text).splitlines()] == ["layer", "embed", "text", "image", "out"]
    named = printed(two, "--input", "ids=2x7:int64, image=2x3x8x8")
    assert named.partition("\n")[2] == text.partition("\n")[2]


def test_a_trimmed_model_and_another_number_of_classes(tmp_path: Path) -> None:
    model = LeNet(classes=3)
    example = torch.zeros(2, 1, 28, 28)
    small = torchtrim.trim(model, torchtrim.Plan({"conv1": torchtrim.LayerPlan(20, (0, 1))}), example)
    torchtrim.save(small, tmp_path / "small.safetensors")
    text = printed("lenet", "--classes", "3", "--weights", str(tmp_path / "small.safetensors"))
    assert re.search(r"^conv1 +18 .*^fc2 +3 ", text, re.MULTILINE | re.DOTALL)


# JSON


def test_json_holds_all_of_it() -> None:
    found = json.loads(printed("torchvision:resnet18", "--json", "--input", "1x3x64x64"))
    assert (found["version"], found["model"]) == (1, "torchvision:resnet18")
    assert found["input"] == [{"name": None, "shape": [1, 3, 64, 64], "dtype": "float32"}]
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert len(layers) == 21
    assert layers["layer2.0.downsample.0"] == {
        "name": "layer2.0.downsample.0",
        "parameter": "layer2.0.downsample.0.weight",
        "axis": 0,
        "neurons": 128,
        "removable": 128,
        "units": 128,
        "group": "layer2.0.conv2",
        "sites": [
            {"operator": "relu", "module": "layer2.0.relu", "kind": "rectifier"},
            {"operator": "relu", "module": "layer2.1.relu", "kind": "rectifier"},
        ],
        "locked": None,
    }
    assert layers["fc"] | {"parameter": ""} == {
        "name": "fc",
        "parameter": "",
        "axis": 0,
        "neurons": 1000,
        "removable": 0,
        "units": 0,
        "group": None,
        "sites": [],
        "locked": "it is an output of the model",
    }
    weights = 11_689_512 - 1000 - 9600  # of the whole model, without a bias and its batch norms
    assert found["reach"]["layers"] == {"within": 20, "all": 21, "share": round(20 / 21, 6)}
    assert found["reach"]["parameters"] == {
        "within": weights - 512_000,
        "all": weights,
        "share": round(1 - 512_000 / weights, 6),
    }
    assert found["reach"]["outputs"] == {
        "layers": ["fc"],
        "parameters": {"within": 512_000, "all": 512_000},
        "flops": {"within": 1_024_000, "all": 1_024_000},
    }
    assert found["reach"]["flops"]["all"] - found["reach"]["flops"]["within"] == 1_024_000
    assert found["reach"]["flops_without_weights"] == 0


# How much is within reach


def test_flops_are_those_that_measure_counts() -> None:
    model, image = LeNet(), torch.zeros(1, 1, 28, 28)
    found = reach(model, torchtrim.trace(model, image), image)
    assert found.flops.all == torchtrim.measure(model, image).flops
    assert found.flops.within == found.flops.all - 2 * 500 * 10
    assert found.outputs == ("fc2",)


def test_flops_belong_to_weights_that_modules_do_not_call() -> None:
    """Of attention, the rows of `in_proj_weight` and `out_proj.weight`, which no module's forward multiplies with."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    modules = {"attend": attention, "out": nn.Linear(8, 3)}
    model = Net(lambda net, x: net.out(net.attend(x, x, x, need_weights=False)[0]), modules)
    example = torch.zeros(1, 4, 8)
    found = reach(model, torchtrim.trace(model, example), example)
    products = 2 * 2 * 4 * 4 * 8  # queries with keys, and what comes of it with values
    assert found.weightless == products
    assert found.parameters.all == 4 * 8 * 8 + 3 * 8
    assert found.flops.all == 2 * 4 * found.parameters.all + products


def test_a_weight_that_is_computed_counts_for_its_parameters() -> None:
    modules = {"a": weight_norm(nn.Linear(5, 6)), "out": nn.Linear(6, 3)}
    model, example = Net(lambda net, x: net.out(net.a(x).relu()), modules), torch.zeros(1, 5)
    found = reach(model, torchtrim.trace(model, example), example)
    assert (found.flops.within, found.flops.all, found.weightless) == (2 * 5 * 6, 2 * 5 * 6 + 2 * 6 * 3, 0)


def test_nothing_is_within_reach_of_a_locked_weight() -> None:
    modules = {"a": nn.Linear(5, 6), "norm": nn.LayerNorm(6), "out": nn.Linear(6, 3)}
    model, example = Net(lambda net, x: net.out(net.norm(net.a(x))), modules), torch.zeros(1, 5)
    found = reach(model, torchtrim.trace(model, example), example)
    assert (found.layers.within, found.parameters.within, found.flops.within) == (0, 0, 0)
    assert (found.parameters.all, found.parameters.outputs, found.parameters.inputs) == (48, 18, 0)


def test_a_model_whose_way_depends_on_its_data() -> None:
    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        hidden = net.a(x).relu()
        return net.out(hidden if hidden.sum() >= 0 else -hidden)

    model, example = Net(forward, {"a": nn.Linear(5, 6), "out": nn.Linear(6, 3)}), torch.ones(1, 5)
    graph = torchtrim.trace(model, example)
    assert graph.device == "cpu"
    assert reach(model, graph, example).flops.within == 60


def test_a_model_without_products() -> None:
    model, example = Net(lambda net, x: x * 2, {}), torch.ones(2, 3)
    found = reach(model, torchtrim.trace(model, example), example)
    assert (found.flops.all, found.parameters.part) == (0, 0.0)
    text = Inspection("doubling", (Input((2, 3)),), torchtrim.trace(model, example), found).text()
    assert text.startswith("doubling, called with 2x3\n\nWithin reach")
    assert "weights       0       0      –\n" in text
    assert str(torchtrim.trace(model, example)) == ""


# Inputs


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1x3x224x224", [Input((1, 3, 224, 224))]),
        ("8×128:int64", [Input((8, 128), "int64")]),
        ("7", [Input((7,))]),
        ("2x3, 2:bool", [Input((2, 3)), Input((2,), "bool")]),
        ("ids=8x128:int64,mask=8x128", [Input((8, 128), "int64", "ids"), Input((8, 128), name="mask")]),
    ],
)
def test_inputs_are_read(text: str, expected: list[Input]) -> None:
    assert list(parse_inputs(text)) == expected
    assert parse_inputs(",".join(map(str, expected))) == tuple(expected)


def test_examples() -> None:
    image = example_of(parse_inputs("2x3:float64"))
    assert (image.shape, image.dtype) == ((2, 3), torch.float64)
    assert image.abs().min() > 0
    first, second = example_of(parse_inputs("2x3,4:int64"))
    assert (first.shape, first.dtype) == ((2, 3), torch.float32)
    assert second.tolist() == [0, 0, 0, 0]
    assert list(example_of(parse_inputs("a=1,b=2:bool"))) == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1x1x28y28", r"input: expected sizes such as 1x3x224x224.*found '1x1x28y28'"),
        ("", r"expected sizes such as .*found ''"),
        ("1x2,", r"expected sizes such as .*found '1x2,'"),
        ("-1x2", r"expected sizes such as .*found '-1x2'"),
        (f"1x{'9' * 5000}", r"expected sizes such as"),
        ("0x2", r"expected sizes of at least 1, found '0x2'"),
        ("1x2:int46", r"unknown type 'int46'; did you mean 'int64'"),
        ("1x2:zzz", r"unknown type 'zzz'; use one of float32, .*bool"),
        ("a=1x2,3", r"expected a name for every input or for none, found 'a=1x2,3'"),
        ("a=1,a=2", r"expected each name once, found 'a=1,a=2'"),
    ],
)
def test_a_malformed_input_is_refused(text: str, expected: str) -> None:
    with pytest.raises(TorchtrimError, match=expected):
        parse_inputs(text)
    assert re.search(expected, refused("lenet", f"--input={text}"))


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("torchvision:resnet81", r"no classifier named 'resnet81'; did you mean 'resnet18'"),
        ("lenett", r"found 'lenett'; did you mean 'lenet'\?"),
        ("none.py:Net --input 1x2", r"none\.py: no such file"),
        ("lenet --weights none.pt", r"none\.pt: no such file of weights"),
        ("lenet --weights DEFAULT", r"expected a model of torchvision or timm"),
        ("lenet --device tpu", r"device: expected auto, cpu or cuda, found 'tpu'"),
        ("lenet --input 1x1x5x5", r"the input 1x1x5x5 does not fit the model, LeNet: .*; name another with --input"),
        ("lenet --input x=1x1x28x28", r"unexpected keyword argument 'x'"),
        (f"lenet --input {10**9}x{10**9}", r"does not fit into memory"),
    ],
)
def test_a_mistake_is_one_line(arguments: str, expected: str) -> None:
    assert re.search(expected, refused(*arguments.split()))


def test_a_model_from_a_file_needs_its_input(tmp_path: Path) -> None:
    name = write_model(tmp_path)
    assert re.search(r"small\.py:Small: expected --input, .* such as 1x3x224x224", refused(name))
    assert "within reach" in printed(name, "--input", "1x1x8x8").lower()


def test_every_option_is_explained() -> None:
    command = typer.main.get_command(app).commands["inspect"]  # type: ignore[attr-defined]
    assert command.help
    text = call("--help").stdout
    for parameter in command.params:
        assert parameter.help
        assert parameter.param_type_name == "argument" or parameter.opts[0] in text
