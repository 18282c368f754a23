"""The Python code blocks of README.md and docs/*.md run as they stand, each in a process of its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[int, str]]:
    """The line on which each Python block's code begins, and the code."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, found.start(1)) + 1, found[1]) for found in BLOCK.finditer(text)]


CASES = [
    pytest.param(page, line, code, id=f"{page.relative_to(ROOT)}:{line}")
    for page in PAGES
    for line, code in blocks(page)
]


def test_readme_has_a_python_block() -> None:
    assert blocks(ROOT / "README.md")


@pytest.mark.parametrize(("page", "line", "code"), CASES)
def test_block_runs(page: Path, line: int, code: str, tmp_path: Path) -> None:
    script = tmp_path / f"{page.stem}.py"
    script.write_text("\n" * (line - 1) + code, encoding="utf-8")  # tracebacks then name the page's lines
    command = [sys.executable, str(script)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, f"{page.name}, block at line {line}:\n{run.stderr}"
