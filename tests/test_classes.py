"""Counts of the examples of each class, against profiles of these examples alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torchtrim import Profile, profile
from torchtrim.errors import ProfileError


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(64, 6), nn.ReLU(),
        nn.Linear(6, 2),
    ).double()  # fmt: skip


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (23,), generator=generator)
    images = torch.randn(23, 1, 8, 8, generator=generator, dtype=torch.float64) + labels[:, None, None, None]
    return images, labels


def loader(size: int = 6) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*data()), batch_size=size)


def same(one: Profile, other: Profile) -> None:
    assert one.examples == other.examples
    for name, layer in one.items():
        for integers in ("zeros", "positions", "examples"):
            np.testing.assert_array_equal(getattr(layer, integers), getattr(other[name], integers))
        for floats in ("mean", "standard_error"):
            np.testing.assert_allclose(getattr(layer, floats), getattr(other[name], floats), rtol=1e-9)


@pytest.mark.parametrize("size", [1, 6, 23])
@pytest.mark.parametrize("path", ["plain", "auto"])
def test_each_class_is_measured_as_if_alone(size: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHTRIM_COUNTING", "" if path == "auto" else path)
    images, labels = data()
    found = profile(network(), loader(size), classes=True)
    assert list(found.classes) == [0, 1, 2]
    for label, one in found.classes.items():
        same(one, profile(network(), [images[labels == label]]))
    same(found, profile(network(), [images]))
    for name in found:
        np.testing.assert_array_equal(sum(one.zeros[name] for one in found.classes.values()), found.zeros[name])


class Tokens(nn.Module):
    """[batch, tokens, 3]; its first activation has the tokens of all examples along its first axis, its second has
    the tokens first.
    """

    def __init__(self, swapped: bool) -> None:
        super().__init__()
        self.up, self.middle, self.down = nn.Linear(3, 6), nn.Linear(6, 5), nn.Linear(5, 2)
        self.swapped = swapped

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.middle(self.up(x.flatten(0, 1)).relu()).unflatten(0, x.shape[:2])
        return self.down((hidden.transpose(0, 1) if self.swapped else hidden).relu())


def test_rows_of_one_example_stay_together() -> None:
    torch.manual_seed(0)
    model, inputs, labels = Tokens(swapped=False).double(), torch.randn(8, 5, 3).double(), list("abbacaba")
    found = profile(model, [(inputs, labels)], classes=True)
    assert list(found.classes) == ["a", "b", "c"]
    for label, one in found.classes.items():
        same(one, profile(model, [inputs[[other == label for other in labels]]]))


def test_what_cannot_be_told_by_class_is_left_out_and_said() -> None:
    torch.manual_seed(0)
    model, inputs, labels = Tokens(swapped=True), torch.randn(4, 5, 3), torch.tensor([0, 1, 1, 0])
    with pytest.warns(UserWarning, match="not by class: middle, where the first axis of an activation is not the exam"):
        found = profile(model, [(inputs, labels)], classes=True)
    assert set(found.positions["middle"]) == {20}
    assert not found.classes[0]["middle"].positions.any()
    assert set(found.classes[0].positions["up"]) == {10}


def test_merged_saved_resumed_and_tolerant(tmp_path: Path) -> None:
    how: dict[str, Any] = {"classes": lambda batch: [f"class {label}" for label in batch[1]]}
    whole = profile(network(), loader(), **how)
    batches = list(loader())
    merged = profile(network(), batches[:1], **how).merge(profile(network(), batches[1:], **how))
    whole.save(tmp_path / "whole")
    kept = profile(network(), batches, **how, checkpoint=tmp_path / "pass", every=2)
    for other in (merged, kept, Profile.load(tmp_path / "whole"), Profile.load(tmp_path / "pass")):
        assert list(other.classes) == list(whole.classes) == ["class 0", "class 1", "class 2"]
        for label, one in whole.classes.items():
            same(other.classes[label], one)
    tolerant = profile(network(), loader(), classes=True, zero_tolerance=0.3)
    assert tolerant.zeros["2"].any()
    np.testing.assert_array_equal(sum(one.zeros["2"] for one in tolerant.classes.values()), tolerant.zeros["2"])


def test_only_profiles_that_both_have_classes_are_merged() -> None:
    with pytest.raises(ProfileError, match=r"merge: .* found classes in one of them only"):
        profile(network(), loader()).merge(profile(network(), loader(), classes=True))


def test_neurons_silent_for_one_class_only() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1], [-1, -1]]))
        model[0].bias.zero_()
    inputs = torch.tensor([[1.0, -1]] * 3 + [[-1, 1]] * 3 + [[1, 1]] * 2)
    labels = [0, 0, 0, 1, 1, 1, 2, 2]
    found = profile(model, [(inputs, labels)], classes=True)
    assert found.silent_for(0) == {"0": (1,)}  # neuron 2 is silent for both of them, neuron 3 for all
    assert found.silent_for(1) == {"0": (0,)}
    assert found.silent_for(2) == {}
    with pytest.raises(ProfileError, match=r"expected one of the classes, found 7; there are 0, 1, 2"):
        found.silent_for(7)
    with pytest.raises(ProfileError, match="there are none; measure with classes=True"):
        profile(model, [inputs]).silent_for(0)


IMAGES = torch.zeros(2, 1, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize(
    ("batch", "classes", "message"),
    [
        (IMAGES, True, r"batch 1: classes: expected batches \(inputs, labels\)"),
        ((IMAGES, torch.zeros(3)), True, r"expected whole numbers or words as labels, found 0\.0"),
        ((IMAGES, [1, 2, 3]), True, "expected a label for each of 2 examples, found 3"),
        ((IMAGES, 5), True, "expected a label for each example, found int; pass classes=lambda"),
        (IMAGES, lambda batch: "ab", "expected a label for each example, found str"),
    ],
)
def test_labels_that_do_not_serve(batch: Any, classes: Any, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        profile(network(), [batch], classes=classes)


def test_labels_among_keywords() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = network()

        def forward(self, pixels: Tensor, labels: Tensor) -> Tensor:
            return self.inside(pixels)

    images, labels = data()
    found = profile(Named(), [{"pixels": images, "labels": labels}], classes=True)
    assert {label: one.examples for label, one in found.classes.items()} == {
        label: int((labels == label).sum()) for label in range(3)
    }
