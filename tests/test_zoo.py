"""The zoo: what it says of models that are well, that differ, and that cannot be examined."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.zoo import examine
from benchmarks.zoo.__main__ import Results, main
from benchmarks.zoo.models import LIBRARIES, Specimen, families
from benchmarks.zoo.report import page

pytest.importorskip("timm")
pytest.importorskip("torchvision")


def test_a_sweep_of_two_models_is_written_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "zoo.md"
    names = ["torchvision:squeezenet1_1", "timm:test_vit3"]
    main(["--only", *names, "--out", str(out)])
    records = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert [record["name"] for record in records] == names
    for record in records:
        assert record["status"] == "equal", record
        assert record["moved"]
        assert record["finite"]
        assert max(record["errors"].values()) < 1e-9
        assert 0 < record["reach"]["within"] <= record["reach"]["all"]
        assert record["trimmed_parameters"] < record["parameters"]
        assert record["backward"] == "train"
        assert record["trim_s"] > 0
        assert record["floor_s"] > 0
        assert record["peak_bytes"] > 2**20
    text = out.read_text()
    assert "python -m benchmarks.zoo --only torchvision:squeezenet1_1 timm:test_vit3" in text
    assert "| timm | 1 | 1 | 1 | 0 | 0 | 0 |" in text
    capsys.readouterr()
    main(["--only", *names, "--out", str(out), "--resume"])
    assert capsys.readouterr().out == ""
    assert [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()] == records


class Small(nn.Module):
    """Two layers, and outputs of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 10), nn.Linear(10, 3)

    def forward(self, inputs: torch.Tensor) -> dict[str, object]:
        hidden = self.first(inputs).relu()
        return {"logits": self.second(hidden), "more": [(inputs.shape[0], inputs > 0)]}


def examined(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> dict[str, object]:
    monkeypatch.setattr(examine, "build", lambda name: Specimen(model, torch.randn(5, 4), (torch.randn(2, 4),)))
    default = torch.get_default_dtype()
    examination = examine.Examination("toy", lambda found: None)
    try:
        examination.run()
    finally:
        torch.set_default_dtype(default)
    return {**examination.found, "family": "toys"}


def test_a_trimmed_model_that_computes_something_else_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    trim = examine.torchtrim.trim

    def wrong(*arguments: object) -> nn.Module:
        small = trim(*arguments)
        with torch.no_grad():
            small.second.weight[0, 0] += 1e-3
        return small

    assert examined(monkeypatch, Small())["status"] == "equal"
    monkeypatch.setattr(examine.torchtrim, "trim", wrong)
    found = examined(monkeypatch, Small())
    assert found["status"] == "differs"
    assert [one.partition(": differs")[0] for one in found["differs"]] == [
        "example: output['logits']",
        "batch: output['logits']",
    ]
    assert "example: output['logits']" in page([found], "x")


def test_a_model_that_raises_is_named_with_its_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Small):
        def forward(self, inputs: torch.Tensor) -> dict[str, object]:
            raise ValueError("no luck\nat all")

    found = examined(monkeypatch, Broken())
    assert (found["status"], found["stage"], found["error"]) == ("failed", "call", "ValueError: no luck")
    assert "call: ValueError: no luck" in page([found], "x")


def test_leaves_of_all_kinds_are_compared() -> None:
    old = {"a": [torch.ones(3), (1, "x")], "b": torch.tensor([True, False])}
    assert examine.difference(copy.deepcopy(old), old) == (0.0, "")
    for path, new in {
        "output['a'][0]": {**old, "a": [torch.ones(3) + 1e-3, (1, "x")]},
        "output['a'][1][0]": {**old, "a": [torch.ones(3), (2, "x")]},
        "output['b']": {**old, "b": torch.tensor([True, True])},
    }.items():
        error, where = examine.difference(new, old)
        assert error > examine.RTOL
        assert where.startswith(path + ":")
    assert examine.difference({"a": torch.ones(2)}, {"a": torch.ones(3)})[1] == "output['a']: shape (2,), not (3,)"
    assert examine.difference([torch.tensor(float("nan"))], [torch.tensor(1.0)])[0] == float("inf")


def test_what_was_found_before_an_interruption_is_kept(tmp_path: Path) -> None:
    first = Results(tmp_path / "zoo.jsonl", keep=False)
    first.add({"name": "timm:test_vit", "status": "equal"})
    assert Results(tmp_path / "zoo.jsonl", keep=True).found == first.found
    assert Results(tmp_path / "zoo.jsonl", keep=False).found == {}


def test_every_model_has_one_name_and_a_family() -> None:
    pytest.importorskip("transformers")
    found = families()
    assert len(found) > 250
    assert {name.partition(":")[0] for name in found} == set(LIBRARIES)
    with pytest.raises(SystemExit):
        main(["--only", "timm:nothing"])


def test_a_library_that_is_not_installed_is_left_out_with_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.zoo.__main__.installed", lambda library: library == "torchvision")
    out = tmp_path / "zoo.md"
    with pytest.raises(SystemExit):
        main(["--only", "ultralytics:yolov8n", "--out", str(out)])
    assert "ultralytics is not installed, and its models are left out" in capsys.readouterr().out
    main(["--family", "ultralytics", "--out", str(out)])
    assert "| all |" not in out.read_text()
