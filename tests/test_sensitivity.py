"""One layer trimmed at a time, against a loop written out; files, pictures, and weights."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import torchtrim
from torchtrim import Budget, Fraction, Sensitivity, sensitivity
from torchtrim.errors import PlanError, ProfileError, StoreError, TorchtrimError


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 3))


INPUTS = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))


def likeness(model: nn.Module, inputs: torch.Tensor = INPUTS):
    """An accuracy: how much like the original's the outputs are."""
    wanted = model(inputs).detach()
    return lambda other: 100 - float((other(inputs).detach() - wanted).square().mean() / wanted.square().mean())


def test_it_is_what_trimming_one_layer_at_a_time_gives(model) -> None:
    found = sensitivity(model, INPUTS[:2], [INPUTS], likeness(model), fractions=(0.25, 0.5))
    profile = torchtrim.profile(model, [INPUTS])
    assert found.baseline == 100
    assert list(found.accuracy) == ["0", "2"]
    for name, accuracies in found.accuracy.items():
        for fraction, accuracy in zip((0.25, 0.5), accuracies, strict=True):
            plan = torchtrim.select(profile, rule=Fraction(fraction), layers=[name])
            assert accuracy == likeness(model)(torchtrim.trim(model, plan, INPUTS[:2]))


def test_repair_makes_it_less(model) -> None:
    plain = sensitivity(model, INPUTS[:2], [INPUTS], likeness(model), fractions=[0.5])
    repaired = sensitivity(model, INPUTS[:2], [INPUTS], likeness(model), fractions=[0.5], repair="least-squares")
    assert all(repaired.lost[name] < plain.lost[name] for name in plain.lost)


def test_repair_may_look_at_few_positions() -> None:
    torch.manual_seed(0)
    images = torch.randn(16, 3, 9, 9)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))
    few = sensitivity(
        model,
        images[:2],
        [images],
        likeness(model, images),
        fractions=[0.5],
        repair="least-squares",
        repair_positions=3,
    )
    profile = torchtrim.profile(model, [images])
    for name, (accuracy,) in few.accuracy.items():
        plan = torchtrim.select(profile, rule=Fraction(0.5), layers=[name])
        trimmed = torchtrim.trim(model, plan, images[:2])
        assert accuracy == likeness(model, images)(
            torchtrim.repair(trimmed, model, images[:2], [images], "least-squares", positions=3)
        )
    every = sensitivity(model, images[:2], [images], likeness(model, images), fractions=[0.5], repair="least-squares")
    assert few.accuracy != every.accuracy
    with pytest.raises(TorchtrimError, match="repair positions: expected a repair by least-squares"):
        sensitivity(model, images[:2], [images], likeness(model, images), repair_positions=3)


def test_tied_layers_are_one_group() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            x = self.a(x)
            return self.out((x + self.b(x.relu())).relu())

    found = sensitivity(Residual(), INPUTS[:2], [INPUTS], lambda model: 1.0, fractions=[0.5])
    assert found.layers == {"a": ("a", "b")}
    assert found.weights() == {"a": 1.0, "b": 1.0}
    assert "+ 1" in str(found)


def test_weights_are_shares_of_the_mean_loss() -> None:
    accuracy = {"a": (90.0, 80.0), "b": (99.0, 96.0), "c": (100.0, 101.0)}
    found = Sensitivity(100.0, (0.1, 0.5), accuracy, {"a": ("a", "tied"), "b": ("b",), "c": ("c",)})
    mean = (15 + 2.5 + 0) / 3
    assert found.weights() == pytest.approx({"a": 15 / mean, "tied": 15 / mean, "b": 2.5 / mean, "c": 0.1})


def test_a_budget_spares_what_is_sensitive(model) -> None:
    profile = torchtrim.profile(model, [INPUTS])
    spared = {"0": 10.0, "2": 0.1}
    plain = Budget(parameters=0.6).plan(model, INPUTS[:2], profile)
    weighted = Budget(parameters=0.6, weights=spared).plan(model, INPUTS[:2], profile)
    assert weighted.layers["0"].remaining > plain.layers["0"].remaining
    assert weighted.layers["2"].remaining < plain.layers["2"].remaining


def test_an_interrupted_analysis_goes_on(model, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    evaluate, calls = likeness(model), 0

    def interrupted(other):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return evaluate(other)

    with pytest.raises(KeyboardInterrupt):
        sensitivity(model, INPUTS[:2], [INPUTS], interrupted, fractions=(0.2, 0.4), checkpoint=path)
    rest = sensitivity(model, INPUTS[:2], [INPUTS], interrupted, fractions=(0.2, 0.4), checkpoint=path)
    assert calls == 4 + 2  # what was found is not evaluated again
    assert rest == sensitivity(model, INPUTS[:2], [INPUTS], evaluate, fractions=(0.2, 0.4))
    with pytest.raises(StoreError, match="another fractions; delete the file"):
        sensitivity(model, INPUTS[:2], [INPUTS], evaluate, fractions=(0.2, 0.5), checkpoint=path)
    model[0].weight.data += 1
    with pytest.raises(StoreError, match="another model; delete the file"):
        sensitivity(model, INPUTS[:2], [INPUTS], evaluate, fractions=(0.2, 0.4), checkpoint=path)


def test_an_interrupted_pass_over_the_data_ends_the_analysis(model) -> None:
    def interrupted():
        yield INPUTS
        raise KeyboardInterrupt

    class Batches:
        def __iter__(self):
            return interrupted()

    with pytest.raises(KeyboardInterrupt), pytest.warns(torchtrim.TorchtrimWarning, match="partial"):
        sensitivity(model, INPUTS[:2], Batches(), lambda other: pytest.fail("it went on"))


def test_what_is_missing_is_not_taken_for_found(tmp_path: Path) -> None:
    """Such as of an analysis that was interrupted in its second layer."""
    found = Sensitivity(
        100.0, (0.1, 0.5), {"a": (90.0, 80.0), "b": (99.0,), "c": ()}, {name: (name,) for name in "abc"}
    )
    assert found.missing == 3
    for use in (found.weights, lambda: found.plot(tmp_path / "found.png")):
        with pytest.raises(ProfileError, match="found one that was interrupted, without 3 of its accuracies"):
            use()
    assert [line.split() for line in str(found).splitlines()[2:]] == [
        ["a", "90", "80", "?"],
        ["b", "99", "?", "?"],
        ["c", "?", "?", "?"],
    ]


def test_reconstruction_is_measured_by_its_name(model) -> None:
    profile = torchtrim.profile(model, [INPUTS])
    named, given = (
        sensitivity(model, INPUTS[:2], [INPUTS], likeness(model), fractions=[0.5], criterion=one, profile=profile)
        for one in ("reconstruction", torchtrim.reconstruction(model, INPUTS[:2], [INPUTS]))
    )
    assert named == given


def test_files_and_pictures(model, tmp_path: Path) -> None:
    found = sensitivity(model, INPUTS[:2], [INPUTS], likeness(model), fractions=(0.1, 0.3, 0.5))
    found.save(tmp_path / "found.json")
    assert Sensitivity.load(tmp_path / "found.json") == found
    assert json.loads((tmp_path / "found.json").read_text())["format"] == "torchtrim-sensitivity"
    (tmp_path / "other.json").write_text('{"format": "something"}')
    for name in ("other.json", "missing.json"):
        with pytest.raises(StoreError, match="expected a sensitivity"):
            Sensitivity.load(tmp_path / name)
    with pytest.raises(StoreError, match=r"missing\.json: expected .*, found no such file$"):
        Sensitivity.load(tmp_path / "missing.json")
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "found.png")
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ProfileError, match=r"plot: .*xyz"):
        found.plot(tmp_path / "found.xyz")


def test_what_cannot_be_asked(model) -> None:
    with pytest.raises(PlanError, match="expected a share"):
        sensitivity(model, INPUTS[:2], [INPUTS], likeness(model), fractions=[1.5])
    with pytest.raises(PlanError, match=r"fractions: expected shares such as \(0.1, 0.5\), found \[\]"):
        sensitivity(model, INPUTS[:2], [INPUTS], likeness(model), fractions=[])
    with pytest.raises(PlanError, match="unknown layer 'nothing'"):
        sensitivity(model, INPUTS[:2], [INPUTS], likeness(model), layers=["nothing"])
    with pytest.raises(ProfileError, match="expected a finite accuracy of the whole model, found nan"):
        sensitivity(model, INPUTS[:2], [INPUTS], lambda other: float("nan"))
    with pytest.raises(ProfileError, match="expected one number, the accuracy of the whole model, found None"):
        sensitivity(model, INPUTS[:2], [INPUTS], lambda other: None)
