"""Importing torchtrim is cheap: optional and heavy libraries are loaded by what uses them."""

import subprocess
import sys

import pytest

import torchtrim

HEAVY = ("accelerate", "matplotlib", "timm", "torchvision")
PACKAGE = "import torchtrim"
EVERY_MODULE = """
import importlib, pkgutil, torchtrim
for module in pkgutil.walk_packages(torchtrim.__path__, "torchtrim."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


@pytest.mark.parametrize("imports", [PACKAGE, EVERY_MODULE], ids=["package", "every module"])
def test_heavy_libraries_are_not_imported(imports: str) -> None:
    program = f"{imports}\nimport sys\nprint(*(set({HEAVY}) & sys.modules.keys()))"
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


def test_every_public_name_is_found() -> None:
    names = {name: getattr(torchtrim, name) for name in torchtrim.__all__}
    assert sorted(torchtrim._HOMES) == sorted(names)
    assert all(value.__name__.rpartition(".")[2] == name for name, value in names.items())
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        torchtrim.nothing  # noqa: B018
