"""Which calls count as activations, and of what kind."""

import pytest

from torchtrim._activations import kind_of


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "kind"),
    [
        ("relu", (), {}, "rectifier"),
        ("hardswish", (), {}, "rectifier"),
        ("gelu", (), {}, "smooth"),
        ("sigmoid", (), {}, "gate"),
        ("hardsigmoid", (), {}, "gate"),
        ("clamp", ("x", 0), {}, "rectifier"),
        ("clamp", ("x", 0.0, 6.0), {}, "rectifier"),
        ("clamp", ("x",), {"min": 0}, "rectifier"),
        ("clamp", ("x", 1e-6), {}, None),
        ("clamp", ("x", None, 1.0), {}, None),
        ("clamp_min", ("x", 1e-12), {}, None),
        ("clamp_min", ("x", 0), {}, "rectifier"),
        ("hardtanh", ("x", 0.0, 6.0), {}, "rectifier"),
        ("hardtanh", ("x",), {}, "smooth"),
        ("threshold", ("x", 0.1, 0), {}, "rectifier"),
        ("threshold", ("x", 0.1, 20), {}, None),
        ("add", ("x", "y"), {}, None),
    ],
)
def test_kind(name, args, kwargs, kind) -> None:
    assert kind_of(name, args, kwargs) == kind
