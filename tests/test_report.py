"""Tables and pictures of rounds and profiles."""

import io
import re
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from torch import nn

from torchtrim import Fraction, LayerPlan, MeanPlusStd, Plan, Profile, Round, Threshold, TorchtrimWarning
from torchtrim._cost import Cost
from torchtrim._guard import Accuracy, Attempt
from torchtrim._picture import _accuracy, _limits, _ridge, _shares, picture
from torchtrim._report import Ancestor, RoundTable, advice, profile_table
from torchtrim.criteria import LayerProfile
from torchtrim.errors import PlanError


def layer(name: str, zeros: list[int], positions: int = 100, locked: str | None = None) -> LayerProfile:
    counts = np.array(zeros)
    rest = {field: np.ones(counts.size) for field in ("mean", "mean_square", "standard_error", "examples", *NORMS)}
    unit = np.full(counts.size, -1) if locked else np.arange(counts.size)
    return LayerProfile(
        name, zeros=counts, positions=np.full(counts.size, positions), unit=unit, group=name, locked=locked, **rest
    )


NORMS = ("incoming_l1", "incoming_l2", "outgoing_l1", "outgoing_l2")


def measured() -> Profile:
    layers = [
        layer("conv1", [10, 10, 10, 12]),
        layer("conv2", [40, 50, 95, 60]),
        layer("fc1", [60, 60, 60, 60, 60, 60, 60, 91, 100, 100]),
        layer("fc2", [0, 0], positions=0, locked="it is an output"),
    ]
    return Profile({one.name: one for one in layers}, examples=50)


def cost(parameters: int, flops: int, milliseconds: float) -> Cost:
    return Cost(parameters, flops, 4 * parameters, milliseconds / 1e3)


ANCESTOR = Ancestor({"conv1": 4, "conv2": 4, "fc1": 10, "fc2": 2}, cost(1_200, 64_000_000, 3.0), 99.31, 12.34)


def rounds(count: int = 2, tested: bool = True) -> list[Round]:
    """The second layer loses one neuron a round, the third two."""
    made: list[Round] = []
    layers = dict(measured().layers)
    for number in range(1, count + 1):
        plan = Plan({"conv2": LayerPlan(layers["conv2"].width, (2,)), "fc1": LayerPlan(layers["fc1"].width, (0, 1))})
        made.append(
            Round(
                number,
                nn.Identity(),
                ("conv2", "fc1"),
                plan,
                Profile(dict(layers), 50),
                cost(1_200 - 200 * number, 32_000_000, 2.0),
                cost(1_200, 64_000_000, 3.0),
                Accuracy(99.2, 98.5, 99.1),
                Accuracy(99.31, 90.123, 99.256) if tested else None,
                {"retrain": 4.0, "profile": 1.04},
                99.2,
            )
        )
        layers["conv2"] = layer("conv2", [40, 50, 60])
        layers["fc1"] = layer("fc1", [60] * 8)
    return made


def shown(table) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()


# Rounds


def test_the_lines_of_a_round_table() -> None:
    table = RoundTable(ANCESTOR, ["conv2", "fc1"], batch=32)
    lines = [table.line(cells) for cells in (table.titles, table.first, *map(table.cells, rounds()))]
    assert lines == [
        "round  conv1-conv2-fc1-fc2  parameters  compression  test accuracy (%)  speed-up     FLOPs           latency"
        "     time",
        "    0  4-4-10-2                  1,200        1.00×              99.31     1.00×    2.00 M           3.00 ms"
        "   12.3 s",
        "    1  4-3-8-2                   1,000        1.20×      90.12 → 99.26     1.50×    1.00 M    3.00 → 2.00 ms"
        "    5.0 s",
        "    2  4-2-6-2                     800        1.50×      90.12 → 99.26     1.50×    1.00 M    3.00 → 2.00 ms"
        "    5.0 s",
    ]
    assert "batch of 32 inputs on the CPU" in table.caption


def test_the_last_columns_make_room() -> None:
    table = RoundTable(ANCESTOR, ["conv2", "fc1"], batch=32, columns=80)
    assert table.line(table.titles).split() == [
        "round", "conv1-conv2-fc1-fc2", "parameters", "compression", "test", "accuracy", "(%)", "speed-up",
    ]  # fmt: skip
    assert len(table.line(table.first)) <= 80
    assert len(table.cells(rounds(1)[0])) == len(table.titles)


def test_without_a_test_the_deciding_accuracy_is_shown() -> None:
    table = RoundTable(ANCESTOR, None, batch=32, tested=False)
    assert table.titles[4] == "accuracy (%)"
    assert table.cells(rounds(1, tested=False)[0])[4] == "98.50 → 99.10"


def test_of_a_large_model_only_trimmed_layers_are_shown() -> None:
    many = replace(ANCESTOR, widths={f"layer{number}": 100 for number in range(10)})
    table = RoundTable(many, ["layer3", "layer8"], batch=1)
    assert (table.titles[1], table.first[1]) == ("layer3-layer8", "100-100")
    for layers in (None, list(many.widths)[:5]):
        table = RoundTable(many, layers, batch=1)
        assert (table.titles[1], table.first[1]) == ("neurons", "1,000")


@pytest.mark.parametrize(
    ("flops", "expected"), [(12, "12"), (4_586_000, "4.59 M"), (30_960_000_000, "30.96 G"), (2_000, "2.00 k")]
)
def test_flops_are_short(flops: int, expected: str) -> None:
    assert RoundTable(replace(ANCESTOR, cost=cost(1, flops, 1)), None, batch=1).first[6] == expected


def test_the_markdown_table() -> None:
    table = RoundTable(ANCESTOR, None, batch=32)
    markdown = table.markdown(rounds()).splitlines()
    cells = [tuple(cell.strip() for cell in row.strip("|").split("|")) for row in markdown if row.startswith("|")]
    assert cells == [table.titles, cells[1], table.first, *map(table.cells, rounds())]
    assert set("".join(cells[1])) == set("-:")


# A profile


def test_a_profile_table_counts_and_gives_reasons() -> None:
    text = shown(profile_table(measured(), MeanPlusStd(1)))
    rows = {row[0]: row[1:] for line in text.splitlines() if "│" in line for row in [cells_of(line)]}
    for name in ("conv1", "conv2", "fc1"):
        low, high = measured()[name].interval()
        rows[name][1], half = rows[name][1].split(" ± ")
        assert float(half) == pytest.approx(50 * (high - low).mean(), abs=0.006)
    assert rows == {
        "conv1": ["4", "10.50", "0", "0", "1", ""],
        "conv2": ["4", "61.25", "1", "0", "1", ""],
        "fc1": ["10", "71.10", "3", "2", "3", ""],
        "fc2": ["2", "–", "–", "–", "–", "it is an output"],
        "total": ["20", "", "4", "2", "5", ""],
    }
    assert "over 50 examples" in text


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]


def test_a_profile_of_locked_layers_is_still_shown() -> None:
    text = shown(profile_table(Profile({"fc2": measured()["fc2"]}, 50), MeanPlusStd(1)))
    assert "it is an output" in text
    assert "no layer that can be trimmed" in text


def test_a_layer_name_is_not_markup() -> None:
    text = shown(profile_table(Profile({"[bold]x": layer("[bold]x", [1, 2])}, 50), MeanPlusStd(1)))
    assert "[bold]x" in text


def test_an_unknown_criterion_is_not_swallowed() -> None:
    with pytest.raises(PlanError, match="unknown criterion 'apos'"):
        profile_table(measured(), MeanPlusStd(1), "apos")


def test_advice_begins_with_the_most_silent_layers() -> None:
    assert advice(measured(), MeanPlusStd(1)) == [
        "Trim first, as their mean APoZ is highest: conv2, fc1.",
        "  conv2: mean APoZ 61.25 %; the rule mean + 1.0 std removes 1 of 4 neurons a round.",
        "  fc1: mean APoZ 71.10 %; the rule mean + 1.0 std removes 3 of 10 neurons a round.",
        "Then, together with them, their neighbours: conv1.",
    ]


def test_advice_when_nothing_is_to_be_done() -> None:
    assert advice(measured(), Threshold(1.0))[-1] == "The rule removes nothing there; choose a lower limit."
    smooth = Profile({"a": layer("a", [0, 0, 0]), "b": layer("b", [0, 0])}, 50)
    (sentence,) = advice(smooth, MeanPlusStd(1))
    assert "APoZ says nothing here; choose another criterion" in sentence
    assert len(advice(smooth, MeanPlusStd(1), "l1_norm")) > 1
    assert advice(Profile({"fc2": measured()["fc2"]}, 50), MeanPlusStd(1))[0].startswith("There is nothing to trim")


# The picture


def opened(png: bytes | None) -> Image.Image:
    assert png is not None
    return Image.open(io.BytesIO(png))


def test_a_picture_is_drawn_and_leaves_matplotlib_as_it_was() -> None:
    import matplotlib as mpl

    before = mpl.rcParams.copy()
    image = opened(picture(rounds(), 99.31, rule=MeanPlusStd(1), title="LeNet"))
    assert image.format == "PNG"
    assert min(image.size) > 500
    colours = {colour for count, colour in image.convert("RGB").getcolors(1 << 24) if count > 200}
    assert {(0x44, 0x77, 0xAA), (0xEE, 0x77, 0x33)} <= colours  # what stays and what goes
    assert mpl.rcParams.copy() == before
    assert "matplotlib.pyplot" not in sys.modules


def test_many_layers_and_rounds_and_perfect_accuracy_can_be_drawn() -> None:
    one = rounds(1, tested=False)[0]
    layers = {f"layer{number}": layer(f"layer{number}", [1, 50, 99]) for number in range(9)}
    plan = Plan({name: LayerPlan(3, (2,)) for name in layers})
    perfect = replace(one, profile=Profile(layers, 50), plan=plan, accuracy=Accuracy(100.0, 0.0, 100.0))
    many = [replace(perfect, number=number, cost=cost(1_200 - number, 1, 1)) for number in range(1, 21)]
    image = opened(picture(many, 100.0, rule=Fraction(0.3), criterion="l1_norm"))
    assert image.height < 3_000


def test_a_layer_whose_activations_were_not_observed_can_be_drawn() -> None:
    one = rounds(1)[0]
    blind = Profile({"conv2": layer("conv2", [0] * 4, positions=0), "fc1": layer("fc1", [0] * 10, positions=0)}, 50)
    assert opened(picture([replace(one, profile=blind)], 99.31, rule=Fraction(0.3), criterion="l1_norm")).width > 500


@pytest.mark.parametrize("values", [(33.33, 33.33), (99.4, 99.6), (0.0, 100.0), (50.0, 99.9)])
def test_the_accuracy_axis_has_ticks_and_holds_every_value(values: tuple[float, float]) -> None:
    from matplotlib.figure import Figure

    low, high = values
    one = replace(rounds(1)[0], test=Accuracy(high, low, high))
    axes = Figure().subplots()
    _accuracy(axes, [one], high)
    bottom, top = axes.get_ylim()
    assert bottom < low <= high < top
    assert len(axes.get_yticks()) >= len({low, high})
    assert all(bottom <= tick <= top for tick in axes.get_yticks())


def test_no_rounds_no_picture() -> None:
    assert picture([], 99.0, rule=MeanPlusStd(1)) is None


def test_without_matplotlib_a_warning_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with pytest.warns(TorchtrimWarning, match=r"no picture was drawn: .* pip install 'torchtrim\[report\]'"):
            assert picture(rounds(), 99.31, rule=MeanPlusStd(1)) is None


def test_the_shares_of_a_histogram_are_those_of_the_neurons() -> None:
    both, kept = _shares(rounds(1)[0], "conv2")
    assert both.sum() == pytest.approx(1)
    assert kept.sum() == pytest.approx(0.75)
    assert (both - kept).argmax() == 38  # 95 %, in bins of 2.5 %


@pytest.mark.parametrize(
    ("rule", "criterion", "expected"),
    [
        (Threshold(0.9), "apoz", 90.0),
        (MeanPlusStd(2), "apoz", 61.25 + 2 * float(np.std([40, 50, 95, 60]))),
        (Fraction(0.3), "apoz", None),
        (MeanPlusStd(1), "l1_norm", None),
    ],
)
def test_the_limit_is_drawn_where_the_rule_has_one(rule, criterion: str, expected: float | None) -> None:
    found = _limits(rule, criterion)(measured()["conv2"])
    assert found == (expected if expected is None else pytest.approx(expected))


def test_no_limit_is_drawn_of_a_round_that_took_less_than_the_rule_says() -> None:
    from matplotlib.figure import Figure

    one = rounds(1)[0]
    attempt = Attempt(1, one.plan, one.accuracy, 99.15)
    for rejected, lines in (((), 2), ((attempt,), 1)):  # the base line, and the limit
        axes = Figure().subplots()
        _ridge(axes, replace(one, rejected=rejected), "conv2", 0, 1.0, _limits(Threshold(0.9), "apoz"))
        assert len(axes.lines) == lines
