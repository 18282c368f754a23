"""Latencies from a table: the arithmetic with seconds that are made up, the table with seconds that are measured."""

import platform
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import torchtrim
from test_budget import built, noise
from torchtrim import Budget, _budget, _latency
from torchtrim._cost import flops_of, parameters_of
from torchtrim._latency import SHARES, Latencies, LatencyTable, interpolated
from torchtrim.errors import PlanError, StoreError

CPU = torch.device("cpu")


def test_between_what_was_measured_it_is_linear() -> None:
    grid = np.array([[10 * out + into for into in SHARES] for out in SHARES])
    for out, into in [(1.0, 1.0), (0.3, 0.9), (0.125, 0.6), (0.06, 0.5)]:
        assert interpolated(grid, out, into) == pytest.approx(10 * out + into)
    bent = np.array([[1.0], [1.0], [1.0], [1.0], [2.0]])  # a grouped convolution's, by outputs alone
    assert interpolated(bent, 0.8, 0.1) == pytest.approx(1.2)
    assert interpolated(np.array([[0.0], [2.0], [2.0], [2.0], [2.0]]), 0.01, 1) == 0  # never below nothing


def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer takes a nanosecond for each of its weights, a model two for each and a thousand besides."""

    def seconds(layer: nn.Module, given, out: float, into: float, device) -> float:
        return 1e-9 * layer.weight.numel() * out * into

    def beside(models, example, seconds=0.3):
        return [1e-9 * (2 * parameters_of(one) + 1000) for one in models]

    monkeypatch.setattr(_latency, "_seconds", seconds)
    monkeypatch.setattr(_latency, "latencies_beside", beside)
    monkeypatch.setattr(_budget, "latencies_beside", beside)


def test_the_rest_of_the_time_falls_with_the_outputs(monkeypatch) -> None:
    made_up(monkeypatch)
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    graph = torchtrim.trace(model, noise(2, 10))
    found = Latencies(model, graph, LatencyTable(CPU))
    kept = graph.bodies({"0": range(8)})
    rest = 2 * parameters_of(model) + 1000 - 300
    assert found.seconds(np.ones_like(kept)) == pytest.approx(1e-9 * (300 + rest))
    assert found.seconds(kept) == pytest.approx(1e-9 * (12 * 10 + 12 * 5 + rest * (12 + 5) / (20 + 5)))


@pytest.mark.parametrize("asked", [0.6, "0.6 ms"])
def test_what_the_trimmed_model_takes_corrects_what_the_table_says(monkeypatch, asked) -> None:
    made_up(monkeypatch)
    model, _, graph, profile = built("LeNet")
    plan = Budget(latency=asked).plan(model, graph, profile, criterion="l1_norm")
    seconds = 1e-9 * (2 * parameters_of(torchtrim.trim(model, plan, graph)) + 1000)
    target = 0.6 * 1e-9 * (2 * parameters_of(model) + 1000) if asked == 0.6 else 0.6e-3
    assert 0.99 * target <= seconds <= target


def test_layers_are_timed_at_their_widths() -> None:
    """What is called has the shares of the widths: by the FLOPs that are counted."""
    layers = {
        nn.Linear(16, 24): (noise(3, 16), 2 * 3 * 8 * 12),
        nn.Conv2d(8, 16, 3): (noise(2, 8, 5, 5), 2 * 2 * 9 * 9 * 4 * 8),
        nn.Conv1d(8, 16, 3, groups=8): (noise(2, 8, 5), 2 * 2 * 3 * 3 * 8),
    }
    for layer, (given, flops) in layers.items():
        wrapped = nn.Module()
        call = _latency._call(layer, given, 0.5, 0.5)
        wrapped.forward = lambda _, call=call: call()
        assert flops_of(wrapped, torch.zeros(1)) == flops


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the processor's name is that of Linux")
def test_processors_of_one_kind_are_told_apart(monkeypatch) -> None:
    for text, name in (("processor : 0\nmodel name : One @ 2 GHz\n", "One @ 2 GHz"), ("", "arm")):
        monkeypatch.setattr(Path, "read_text", lambda path, text=text, **_: text)
        monkeypatch.setattr(platform, "processor", lambda: "")
        monkeypatch.setattr(platform, "machine", lambda: "arm")
        assert _latency._machine(torch.device("cpu"))["device"] == f"cpu: {name}"


def test_a_table_is_kept_and_refused_elsewhere(tmp_path: Path) -> None:
    path, layer = tmp_path / "latencies.json", nn.Linear(16, 8)
    layers = {"one": (layer, noise(4, 16)), "two": (nn.Linear(16, 8), noise(4, 16)), "three": (layer, noise(5, 16))}
    found = LatencyTable(CPU, path).measure(layers)
    assert found["one"].shape == (5, 5)
    assert (found["one"] > 0).all()
    assert found["one"] is found["two"]  # alike, and so measured once
    again = LatencyTable(CPU, path).measure(layers)
    assert all(np.array_equal(found[name], again[name]) for name in layers)
    text = path.read_text()
    path.write_text(text.replace('"threads": ', '"threads": 9'))
    with pytest.raises(StoreError, match=r"of another machine or set-up: threads 91, here 1; delete it"):
        LatencyTable(CPU, path)
    for damaged in ("{}", "[]", "not JSON", text.replace('"seconds": {', '"seconds": {"x": [[1]],')):
        path.write_text(damaged)
        with pytest.raises(StoreError, match="expected latencies that a Budget wrote"):
            LatencyTable(CPU, path)


def test_out_of_reach_is_said_of_what_was_measured(monkeypatch) -> None:
    made_up(monkeypatch)
    model, _, graph, profile = built("LeNet")
    with pytest.raises(PlanError, match=r"latency: .* the smallest that can be reached is ([\d.]+) ms") as caught:
        Budget(latency="1 us").plan(model, graph, profile, criterion="l1_norm")
    smallest = float(str(caught.value).partition("reached is ")[2].partition(" ms")[0])
    plan = Budget(latency=f"{1.01 * smallest} ms").plan(model, graph, profile, criterion="l1_norm")
    assert 1e-6 * (2 * parameters_of(torchtrim.trim(model, plan, graph)) + 1000) <= 1.01 * smallest
