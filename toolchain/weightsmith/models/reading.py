"""Read model files, and detect changes by other processes."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from weightsmith.core.errors import EnvironmentFailure, InputRefused
from weightsmith.core.values import Slice

_CHUNK = 1 << 20


def read_file(source: Path, size: int) -> Iterator[bytes]:
    """Yield a regular file in chunks; raise InputRefused if its size differs or it changes."""
    return _read(Slice(path=source, offset=0, size=size), size)


def read_part(part: Slice) -> Iterator[bytes]:
    """Yield a part of a regular file in chunks; raise InputRefused if the file changes."""
    return _read(part, None)


def _read(part: Slice, size: int | None) -> Iterator[bytes]:
    try:
        # O_NONBLOCK, because opening a pipe would block forever.
        handle = os.open(part.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb", buffering=0) as file:
            before = os.fstat(file.fileno())
            if not stat.S_ISREG(before.st_mode) or size not in (None, before.st_size):
                raise _changed(part.path)
            file.seek(part.offset)
            left = part.size
            while left and (chunk := file.read(min(_CHUNK, left))):
                left -= len(chunk)
                yield chunk
            after = os.fstat(file.fileno())
            if left or (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise _changed(part.path)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise _changed(part.path) from None
    except OSError as error:
        raise EnvironmentFailure(
            f"cannot read {part.path}: {error.strerror}", hint="check the disk and the permissions"
        ) from None


def _changed(source: Path) -> InputRefused:
    return InputRefused(
        f"{source} changed while it was added to the image",
        hint="stop the process that writes to it, then build again",
    )
