"""Imports point one way: a room knows only the rooms that docs/design.md lists above it."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "torchtrim"
ENTRANCES = {"__init__", "__main__"}


def rooms() -> list[set[str]]:
    """The rows of the table of rooms, from top to bottom."""
    table = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").split("## Rooms")[1].split("##")[0]
    rows = [re.findall(r"`(\w+)\.py`", line.split("|")[1]) for line in table.splitlines() if line.startswith("| `")]
    return [set(row) for row in rows]


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts[0] == "torchtrim":
                found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("torchtrim.")}
    return found


def test_every_file_is_a_room() -> None:
    files = {path.stem for path in PACKAGE.glob("*.py")} - ENTRANCES
    assert set().union(*rooms()) == files


def test_imports_point_upwards() -> None:
    rows = rooms()
    height = {name: row for row, names in enumerate(rows) for name in names}
    wrong = [
        f"{name} imports {other}"
        for name in height
        for other in imports(PACKAGE / f"{name}.py") & height.keys()
        if height[other] > height[name]
    ]
    assert wrong == []
