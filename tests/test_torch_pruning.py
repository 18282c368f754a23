"""The comparison with Torch-Pruning: what it says of runs that end, that do not, and that fail."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("transformers")
pytest.importorskip("torch_pruning")

from benchmarks import torch_pruning as comparison


def case() -> comparison.Case:
    return comparison.Case(nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 3)), torch.randn(2, 4), ("2",))


def contest(works: Any, *, repeats: int = 2, seconds: float = 30) -> dict[str, Any]:
    one = comparison.Contest("toys:small", repeats, seconds, lambda found: None)
    one.run(case(), works)
    return one.found


def test_both_shrink_a_model() -> None:
    found = contest({"torchtrim": comparison.trim, "torch_pruning": comparison.prune})
    for side in found["sides"].values():
        assert "error" not in side
        assert len(side["times"]) == 3
        assert side["parameters"] == found["parameters"] - 3 * (5 + 3)  # 3 of 10 neurons, with their rows and columns
        assert side["forward"] == ""
    assert found["sides"]["torch_pruning"]["importance_s"] >= 0
    assert "| toys:small |" in comparison.page([found], "x")


def test_what_finds_no_end_and_what_raises_is_told() -> None:
    def endless(case: comparison.Case, model: nn.Module) -> Any:
        while True:
            try:
                sum(range(1000))
            except Exception:  # it swallows whatever comes
                continue

    def broken(case: comparison.Case, model: nn.Module) -> Any:
        raise ValueError("no luck\nat all")

    found = contest({"torchtrim": comparison.trim, "torch_pruning": endless}, seconds=0.5)
    assert found["sides"]["torch_pruning"] == {"times": [], "error": "no end within 0.5 s"}
    assert comparison.ratio(found) is None
    text = comparison.page([found], "x")
    assert "no end within 0.5 s" in text
    assert (
        "Torch-Pruning came to an end on 0, and what it left runs on 0; it found no end on 1 and raised on 0." in text
    )
    failed = contest({"torchtrim": comparison.trim, "torch_pruning": broken})
    assert failed["sides"]["torch_pruning"]["error"] == "ValueError: no luck"
    assert len(failed["sides"]["torchtrim"]["times"]) == 3
    assert "ValueError: no luck" in comparison.page([found, failed], "x")


def test_a_result_that_does_not_run_is_told() -> None:
    def halved(case: comparison.Case, model: nn.Module) -> Any:
        model[2] = nn.Linear(5, 3)
        return model, {"heads": {}}

    found = contest({"torchtrim": comparison.trim, "torch_pruning": halved})
    assert found["sides"]["torch_pruning"]["forward"].startswith("RuntimeError: mat1 and mat2")
    assert "an error in forward" in comparison.page([found], "x")
    assert "Torch-Pruning came to an end on 1, and what it left runs on 0;" in comparison.page([found], "x")


def test_the_first_run_does_not_count_where_others_followed() -> None:
    assert comparison.seconds_of({"times": [9.0, 1.0, 2.0]}) == [1.0, 2.0]
    assert comparison.seconds_of({"times": [9.0]}) == [9.0]
    ours, theirs = {"times": [9.0, 1.0, 1.0]}, {"times": [0.0, 3.0, 5.0]}
    assert comparison.ratio({"sides": {"torchtrim": ours, "torch_pruning": theirs}}) == 4.0


def test_a_model_in_a_process_of_its_own_is_written_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.md"
    arguments = ["--only", "transformers:llama", "--repeats", "1", "--out", str(out)]
    comparison.main(arguments)
    assert "transformers:llama" in capsys.readouterr().out
    text = out.read_text()
    assert "Torch-Pruning came to an end on 1, and what it left runs on 1;" in text
    assert "`python -m benchmarks.torch_pruning --only transformers:llama --repeats 1`" in text
    comparison.main([*arguments, "--resume"])
    assert capsys.readouterr().out == ""
    assert out.read_text() == text


def test_every_model_of_the_list_has_a_builder() -> None:
    assert {name.partition(":")[0] for name in comparison.MODELS} == {"torchvision", "timm", "transformers"}
    vision = comparison.build("timm:vit_tiny_patch16_224")
    assert vision.outputs == ("head",)
    assert vision.heads["blocks.0.attn.qkv"] == 3
    assert comparison.build("torchvision:vit_b_16").hints == {"round_to": 12}
    assert comparison.build("torchvision:squeezenet1_1").outputs == ("classifier.1",)
