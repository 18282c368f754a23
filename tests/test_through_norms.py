"""Widths that norms average over: locked, unless one asks for them; what goes then is exact but for the averages."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

import torchtrim
from torchtrim import Plan, Stop
from torchtrim._history import history
from torchtrim.cli import app
from torchtrim.testing import assert_exact, random_plan
from toys import randomised

TOKENS = (2, 5, 6)


class PythonNorm(nn.Module):
    """RMSNorm as many models write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Channels(nn.Module):
    """GroupNorm over all channels of tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


NORMS = {
    "LayerNorm": nn.LayerNorm,
    "LayerNorm without bias": lambda width: nn.LayerNorm(width, bias=False),
    "LayerNorm without scale": lambda width: nn.LayerNorm(width, elementwise_affine=False),
    "RMSNorm": nn.RMSNorm,
    "RMSNorm without scale": lambda width: nn.RMSNorm(width, elementwise_affine=False),
    "RMSNorm in Python": PythonNorm,
    "GroupNorm": Channels,
}


class Residual(nn.Module):
    """Tokens [batch, tokens, 6] through a stream of 12 with two feed-forward blocks → [batch, tokens, 4]."""

    def __init__(self, norm) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 12)
        self.norms = nn.ModuleList(norm(12) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(12, 20) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(20, 12) for _ in range(2))
        self.out = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
            x = x + down(F.relu(up(norm(x))))
        return self.out(self.norms[-1](x))


def residual(norm: str = "LayerNorm") -> nn.Module:
    torch.manual_seed(0)
    return randomised(Residual(NORMS[norm]))


def tokens() -> Tensor:
    return torch.randn(TOKENS, dtype=torch.float64)


STREAM = ["embed", "down.0", "down.1"]


@pytest.mark.parametrize("norm", NORMS)
def test_the_stream_goes_only_when_asked_for(norm) -> None:
    model = residual(norm)
    closed, opened = torchtrim.trace(model, tokens()), torchtrim.trace(model, tokens(), through_norms=True)
    assert set(STREAM) <= closed.locked.keys()
    assert list(opened.locked) == ["out"]
    assert {opened.layers[name].group for name in STREAM} == {"embed"}
    plan = assert_exact(model, tokens(), torch.randn(3, 7, 6), through_norms=True, seeds=(0, 1))
    assert plan.through_norms
    assert "embed" in plan.removed


def _over_kept(kept: Tensor):
    """Layer norm of which the averages are those of the kept neurons alone."""

    def layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5):
        rows = [x[..., i] for i in kept.tolist()]
        mean = sum(rows) / len(rows)
        variance = sum((row - mean) ** 2 for row in rows) / len(rows)
        normed = (x - mean[..., None]) / torch.sqrt(variance + eps)[..., None]
        return normed if weight is None else normed * weight + (0 if bias is None else bias)

    return layer_norm


@pytest.mark.parametrize("norm", ["LayerNorm", "LayerNorm without bias", "LayerNorm without scale"])
def test_averages_are_those_of_what_is_left(norm, monkeypatch) -> None:
    model, x = residual(norm), tokens()
    plan = random_plan(torchtrim.trace(model, x, through_norms=True))
    trimmed, silent = torchtrim.trim(model, plan, x), torchtrim.mask(model, plan, x)
    found = trimmed(x)
    assert not torch.allclose(found, silent(x), rtol=1e-3)  # the averages differ, or this test could not fail
    kept = torch.from_numpy(np.setdiff1d(np.arange(12), plan.removed["embed"]))
    monkeypatch.setattr(F, "layer_norm", _over_kept(kept))
    torch.testing.assert_close(found, silent(x), rtol=1e-9, atol=1e-9)


def test_modules_say_their_new_widths_and_survive_a_file(tmp_path: Path) -> None:
    model, x = residual(), tokens()
    plan = random_plan(torchtrim.trace(model, x, through_norms=True))
    trimmed = torchtrim.trim(model, plan, x)
    left = 12 - len(plan.removed["embed"])
    assert [norm.normalized_shape for norm in trimmed.norms] == [(left,)] * 3
    torchtrim.save(trimmed, tmp_path / "model")
    loaded = torchtrim.load(residual(), tmp_path / "model")
    assert [norm.normalized_shape for norm in loaded.norms] == [(left,)] * 3
    assert torch.equal(loaded(x), trimmed(x))
    assert history(loaded).plans[-1].through_norms


def test_a_plan_says_so() -> None:
    model, x = residual(), tokens()
    measured = torchtrim.profile(model, [x], through_norms=True)
    assert measured.through_norms
    plan = torchtrim.select(measured, rule="fraction:0.5", criterion="l2_norm")
    assert plan.through_norms
    assert len(plan.removed["embed"]) == 6
    assert "average over fewer" in str(plan)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.through_norms
    assert "through_norms" not in Plan(plan.layers).to_json()


def test_a_profile_keeps_it(tmp_path: Path) -> None:
    measured = torchtrim.profile(residual(), [tokens()], through_norms=True)
    measured.save(tmp_path / "profile")
    assert torchtrim.Profile.load(tmp_path / "profile").through_norms


def test_the_loop_trims_the_stream() -> None:
    rounds = torchtrim.iterate(
        residual(),
        tokens(),
        [tokens()],
        retrain=lambda model: None,
        evaluate=lambda model: 0.0,
        rule="fraction:0.5",
        criterion="l1_norm",
        stop=Stop(rounds=1),
        through_norms=True,
    )
    (done,) = list(rounds)
    assert done.plan.through_norms
    assert done.widths["embed"] == 6
    assert done.model.embed.out_features == 6


def test_other_reductions_stay_locked() -> None:
    class Pooled(nn.Module):
        """The largest channel is no average; and the average of what is not zero when silent is no norm's."""

        def __init__(self, largest: bool) -> None:
            super().__init__()
            self.a, self.out, self.largest = nn.Linear(6, 12), nn.Linear(12, 4), largest

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.a(x)
            gate = hidden.amax(-1, keepdim=True) if self.largest else hidden.sigmoid().mean(-1, keepdim=True)
            return self.out(hidden * gate)

    for largest in (True, False):
        assert "a" in torchtrim.trace(Pooled(largest), torch.zeros(4, 6), through_norms=True).locked


def test_on_the_command_line() -> None:
    without, with_it = (
        CliRunner().invoke(app, ["inspect", "torchvision:convnext_tiny", "--json", *more])
        for more in ([], ["--through-norms"])
    )
    assert '"through_norms": false' in without.stdout
    assert '"through_norms": true' in with_it.stdout
    assert without.stdout.count('"locked": null') < with_it.stdout.count('"locked": null')
