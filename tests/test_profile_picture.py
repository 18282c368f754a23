"""Pictures of a profile, as far as a test can see them; matplotlib's own state is as before."""

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from torchtrim import Profile, profile
from torchtrim._profile_picture import _short, _spread, layers_picture
from torchtrim.errors import ProfileError, StoreError

BLUE, ORANGE = (0x44, 0x77, 0xAA), (0xEE, 0x77, 0x33)


def measured(layers: int = 2, **how: Any) -> Profile:
    torch.manual_seed(0)
    hidden = [module for _ in range(layers) for module in (nn.Linear(6, 6), nn.ReLU())]
    labels = [f"the kind of things that are called number {label}" for label in range(12)]
    return profile(nn.Sequential(*hidden, nn.Linear(6, 2)), [(torch.randn(12, 6), labels)], **how)


def colours(path: Path) -> set[tuple[int, int, int]]:
    with Image.open(path) as image:
        found = image.convert("RGB").getcolors(1 << 24)
    return {colour for count, colour in found or () if count > 50}  # type: ignore[misc]


@pytest.fixture(autouse=True)
def left_as_found():
    import matplotlib as mpl

    before = mpl.rcParams.copy()
    yield
    assert mpl.rcParams.copy() == before
    assert "matplotlib.pyplot" not in sys.modules


def test_layers_and_classes_are_drawn(tmp_path: Path) -> None:
    found = measured(classes=True)
    found.plot(tmp_path / "layers.png")
    assert {BLUE, ORANGE} <= colours(tmp_path / "layers.png")
    found.plot(tmp_path / "classes.png", layer="2")
    assert len(colours(tmp_path / "classes.png") - {BLUE, ORANGE}) >= 2
    found.plot(tmp_path / "layers.pdf")
    assert (tmp_path / "layers.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("layers", [1, 30, 70])
def test_few_and_many_layers_can_be_drawn(layers: int, tmp_path: Path) -> None:
    measured(layers).plot(tmp_path / "apoz.png")
    with Image.open(tmp_path / "apoz.png") as image:
        assert 200 < image.height < 3_000


def test_every_name_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """No two names of layers overlap, and none is cut."""
    from torchtrim import _profile_picture

    seen: list[Any] = []

    def look(figure: Any, form: str) -> bytes:
        figure.canvas.draw()
        axes = figure.axes[0]
        seen.extend(label.get_window_extent() for label in axes.get_yticklabels())
        seen.append(figure.bbox)
        return b""

    monkeypatch.setattr(_profile_picture, "packed", look)
    layers_picture(list(measured(30).values())[:-1], 12, "png")
    *names, whole = seen
    assert len(names) == 30
    assert all(whole.x0 <= name.x0 and name.y0 >= whole.y0 for name in names)
    assert all(upper.y0 >= lower.y1 for upper, lower in pairwise(names))


def test_what_is_too_much_is_shortened() -> None:
    assert _spread(3, 5) == [0, 1, 2]
    assert _spread(100, 3) == [0, 49, 99]
    short = _short("encoder.layers.encoder_layer_11.self_attention.in_proj_weight")
    assert len(short) <= 34
    assert short.startswith("encoder.layers.e…")
    assert _short("conv1") == "conv1"


def test_what_cannot_be_drawn_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured()
    with pytest.raises(ProfileError, match=r"plot: '2' was not measured by class; pass classes=True"):
        found.plot(tmp_path / "a.png", layer="2")
    with pytest.raises(ProfileError, match="expected a layer that was measured, found 'convolution'"):
        found.plot(tmp_path / "a.png", layer="convolution")
    with pytest.raises(ProfileError, match=r"plot: .*a\.doc: expected an ending such as \.png or \.pdf, found \.doc"):
        found.plot(tmp_path / "a.doc")
    with pytest.raises(ProfileError, match="expected a profile that has seen data"):
        Profile({}, 0).plot(tmp_path / "a.png")
    with pytest.raises(StoreError, match="cannot be written"):
        found.plot(tmp_path / "none" / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ProfileError, match=r"pip install 'torchtrim\[report\]'"):
        found.plot(tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_layers_seen_in_part_only(tmp_path: Path) -> None:
    found = measured(classes=True)
    layer = found["0"]
    half = {**vars(layer), "positions": np.where(np.arange(6) < 3, layer.positions, 0)}
    (tmp_path / "half.png").write_bytes(layers_picture([type(layer)(**half)], 12, "png"))
    assert BLUE in colours(tmp_path / "half.png")
