"""Whole files, and directories that one process holds."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from torchtrim import _files
from torchtrim._files import hold, is_partial, write_whole
from torchtrim.errors import StoreError

HOLDING = """
import sys
from pathlib import Path
from torchtrim._files import hold
release = hold(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_writes_text_and_bytes(tmp_path) -> None:
    write_whole(tmp_path / "text", "20 × 50\n")
    write_whole(tmp_path / "bytes", b"\0\1")
    write_whole(tmp_path / "bytes", b"\2")
    assert (tmp_path / "text").read_text(encoding="utf-8") == "20 × 50\n"
    assert (tmp_path / "bytes").read_bytes() == b"\2"
    assert {path.name for path in tmp_path.iterdir()} == {"text", "bytes"}


def test_others_may_read_what_the_umask_lets_them(tmp_path) -> None:
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "file", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, error) -> None:
    write_whole(tmp_path / "file", "old")

    def fail(handle: int) -> None:
        raise error

    monkeypatch.setattr(_files.os, "fsync", fail)
    with pytest.raises((KeyboardInterrupt, StoreError)) as caught:
        write_whole(tmp_path / "file", "new")
    assert caught.type is KeyboardInterrupt or "No space left on device; choose another place" in str(caught.value)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_says_where_it_cannot_write(tmp_path) -> None:
    with pytest.raises(StoreError, match=r"missing/file: cannot be written: No such file or directory"):
        write_whole(tmp_path / "missing" / "file", "x")
    (tmp_path / "directory").mkdir()
    with pytest.raises(StoreError, match=r"directory: cannot be written"):
        write_whole(tmp_path / "directory", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["directory"]


@pytest.mark.skipif(os.name != "posix", reason="directories are not flushed there")
def test_the_content_is_on_the_disk_before_the_name_and_the_name_at_the_end(tmp_path, monkeypatch) -> None:
    flushed: list[tuple[bool, bool]] = []

    def note(handle: int) -> None:
        flushed.append((stat.S_ISDIR(os.fstat(handle).st_mode), (tmp_path / "file").exists()))

    monkeypatch.setattr(_files.os, "fsync", note)
    write_whole(tmp_path / "file", "x")
    assert flushed == [(False, False), (True, True)]


def test_partial_files_are_known_by_their_names(tmp_path, monkeypatch) -> None:
    names: list[str] = []
    monkeypatch.setattr(_files.os, "fsync", lambda handle: names.extend(path.name for path in tmp_path.iterdir()))
    write_whole(tmp_path / "model.safetensors", "x")
    partial = names[0]
    assert is_partial(partial, "model.safetensors")
    assert not is_partial(partial, "plan.json")
    assert not is_partial("model.safetensors", "model.safetensors")


def test_one_holder_at_a_time(tmp_path) -> None:
    lock = tmp_path / "run.lock"
    release = hold(lock)
    with pytest.raises(StoreError, match=r"this process works in it already"):
        hold(tmp_path / "." / "run.lock")
    release()
    hold(lock)()
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    with pytest.raises(StoreError, match="cannot be written"):
        hold(tmp_path / "missing" / "run.lock")


@pytest.mark.skipif(_files.fcntl is None, reason="this system has no such locks")
def test_another_process_is_kept_out_until_it_dies(tmp_path) -> None:
    lock = tmp_path / "run.lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            with pytest.raises(StoreError, match=rf"process {other.pid} on .* works in it; wait for its end"):
                hold(lock)
        finally:
            other.kill()
    hold(lock)()


def test_file_systems_without_locks_do_without(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(_files, "fcntl", None)
    hold(Path(tmp_path / "run.lock"))()
