"""Write files so that each is complete or absent, whatever happens in between."""

import os
import tempfile
from pathlib import Path

from torchtrim._errors import StoreError


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file under a temporary name, flush it to the disk, and rename it. Raises StoreError."""
    data = content.encode() if isinstance(content, str) else content
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)  # mkstemp makes files that only their owner reads
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except OSError as error:
        raise StoreError(f"{path}: cannot be written: {error.strerror or error}; choose another place") from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
