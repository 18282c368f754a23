"""A pass that was killed goes on, and ends as if it had not been."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchtrim import MeanPlusStd, Profile, Stable, profile
from torchtrim.errors import ProfileError, StoreError


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 2))


def batches() -> list[Tensor]:
    return list(torch.randn(30, 4, generator=torch.Generator().manual_seed(1)).split(4))


def killed(at: int, place: Path) -> None:
    """Measure until batch `at` is asked for; this process then ends as no handler can prevent."""

    def loader() -> Iterator[Tensor]:
        yield from batches()[: at - 1]
        os.kill(os.getpid(), signal.SIGKILL)

    profile(network(), loader(), zero_tolerance=0.2, checkpoint=place, every=2)


def ends(at: int, place: Path) -> int | None:
    """How a process that is killed there ended."""
    process = multiprocessing.get_context("spawn").Process(target=killed, args=(at, place))
    process.start()
    process.join(100)
    return process.exitcode


def reading(seen: list[int], given: list[Tensor]) -> Iterator[Tensor]:
    for number, batch in enumerate(given, 1):
        seen.append(number)
        yield batch


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a system that kills")
def test_a_killed_pass_goes_on(tmp_path: Path) -> None:
    whole = profile(network(), batches(), zero_tolerance=0.2, checkpoint=tmp_path / "whole", every=2)
    assert ends(6, tmp_path / "pass") == -signal.SIGKILL
    left = Profile.load(tmp_path / "pass")
    assert (left.partial, left.examples) == (True, 16)  # four of the five batches were saved
    assert "partial: measuring was interrupted after 16 examples" in str(left)
    found = profile(network(), batches(), zero_tolerance=0.2, checkpoint=tmp_path / "pass", every=2)
    assert not found.partial
    assert found.zeros["2"].any()
    assert (tmp_path / "pass").read_bytes() == (tmp_path / "whole").read_bytes()
    bare = profile(network(), batches(), zero_tolerance=0.2)
    for name, layer in bare.items():
        for one in (found[name], whole[name]):
            np.testing.assert_array_equal(one.zeros, layer.zeros)
            np.testing.assert_array_equal(one.positions, layer.positions)
            np.testing.assert_allclose(one.mean, layer.mean, rtol=1e-12)
            np.testing.assert_allclose(one.standard_error, layer.standard_error, rtol=1e-9)


def interrupted(count: int) -> Iterator[Tensor]:
    yield from batches()[:count]
    raise KeyboardInterrupt


@pytest.mark.parametrize("count", [1, 4, 7, 8])
def test_an_interrupted_pass_goes_on_from_where_it_was(tmp_path: Path, count: int) -> None:
    how: dict[str, Any] = {"checkpoint": tmp_path / "pass", "every": 3}
    with pytest.warns(UserWarning, match="partial: measuring was interrupted"):
        profile(network(), interrupted(count), **how)
    found = profile(network(), batches(), **how)
    expected = profile(network(), batches())
    for name in expected:
        np.testing.assert_array_equal(found.zeros[name], expected.zeros[name])
    assert found.examples == 30
    assert not found.partial


def test_a_pass_that_ended_is_not_measured_again(tmp_path: Path) -> None:
    first = profile(network(), batches(), checkpoint=tmp_path / "pass", every=3)
    seen: list[int] = []
    again = profile(network(), reading(seen, batches()), checkpoint=tmp_path / "pass", every=3)
    assert seen == []
    assert str(again) == str(first)
    assert [path.name for path in tmp_path.iterdir()] == ["pass"]


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "pass"
    with pytest.warns(UserWarning, match="partial"):
        profile(network(), interrupted(4), checkpoint=place, every=2)
    left, data = place.read_bytes(), batches()
    other = network()
    with torch.no_grad():
        other[2].weight[0, 0] += 1
    seen: list[int] = []
    with pytest.raises(StoreError, match=r"pass: expected a pass over this model, .* found other weights; delete"):
        profile(other, reading(seen, data), checkpoint=place)
    with pytest.raises(StoreError, match=r"found zero_tolerance=0\.0 instead of 0\.1"):
        profile(network(), reading(seen, data), checkpoint=place, zero_tolerance=0.1)
    assert seen == []
    with pytest.raises(StoreError, match="batch 4 is another than the one that was counted; give the same data"):
        profile(network(), [*data[:3], data[0], *data[4:]], checkpoint=place)
    with pytest.raises(StoreError, match="of which 4 batches were counted, found 3"):
        profile(network(), data[:3], checkpoint=place)
    with pytest.raises(ProfileError, match="every: expected 1 or more batches"):
        profile(network(), data, checkpoint=place, every=0)
    assert place.read_bytes() == left
    profile(network(), data).save(place)
    with pytest.raises(StoreError, match="expected a checkpoint, found a profile without one"):
        profile(network(), data, checkpoint=place)
    place.write_text("mine")
    with pytest.raises(StoreError, match="expected a profile"):
        profile(network(), data, checkpoint=place)
    assert place.read_text() == "mine"


def test_an_error_leaves_what_was_saved(tmp_path: Path) -> None:
    bad = [*batches()[:5], torch.full((4, 4), torch.nan)]
    with pytest.raises(ProfileError, match="batch 6: NaN or infinite"):
        profile(network(), bad, checkpoint=tmp_path / "pass", every=2)
    assert Profile.load(tmp_path / "pass").examples == 16
    with pytest.raises(ProfileError, match="batch 6: NaN or infinite"):
        profile(network(), bad, checkpoint=tmp_path / "pass", every=2)


def test_a_pass_with_a_checkpoint_goes_to_the_end(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="until: expected one pass from beginning to end, found a checkpoint"):
        profile(network(), batches(), checkpoint=tmp_path / "pass", until=Stable(MeanPlusStd(1)))
