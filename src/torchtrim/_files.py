"""Write files so that each is complete or absent, whatever happens in between; hold a directory for one process."""

import errno
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path

from torchtrim.errors import StoreError

try:
    import fcntl
except ImportError:  # not on Windows: two processes are then not kept apart
    fcntl = None


_SUFFIX = ".partial"
_held: set[Path] = set()  # by this process, from which the system's locks do not protect


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file under a temporary name, flush it to the disk, and rename it. Raises StoreError."""
    data = content.encode() if isinstance(content, str) else content
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_SUFFIX, dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)  # mkstemp makes files that only their owner reads
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
        _flush_directory(path.parent)
    except OSError as error:
        raise StoreError(f"{path}: cannot be written: {error.strerror or error}; choose another place") from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def _flush_directory(path: Path) -> None:
    """A new name outlives a power failure once its directory is on the disk; Windows does that by itself."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def is_partial(name: str, of: str) -> bool:
    """Whether a file of this name is what a killed process left of writing the file `of`."""
    return name.startswith(f".{of}.") and name.endswith(_SUFFIX)


def hold(path: Path) -> Callable[[], None]:
    """Lock a file, which is made, until the result is called or the process ends, however it ends.

    Raises StoreError when another process, or this one, holds it.
    """
    place = path.resolve()
    if place in _held:
        raise StoreError(f"{path.parent}: this process works in it already; close that first, or choose another --out")
    try:
        handle = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise StoreError(f"{path}: cannot be written: {error.strerror}; choose another place") from error
    if not _lock(handle):
        holder = os.read(handle, 100).decode(errors="replace").strip() or "another process"
        os.close(handle)
        raise StoreError(f"{path.parent}: {holder} works in it; wait for its end, or choose another --out")
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {platform.node()}\n".encode())
    _held.add(place)

    def release() -> None:
        _held.discard(place)
        os.close(handle)

    return release


def _lock(handle: int) -> bool:
    """False if another process has the lock. Where the system or the file system has none, all may have it."""
    if fcntl is None:
        return True
    try:
        # of the POSIX kind: workers that a killed process leaves behind do not inherit it
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True
