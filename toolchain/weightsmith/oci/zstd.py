"""Decompresses zstd with the system's own library, which nearly every Linux has.

https://facebook.github.io/zstd/zstd_manual.html (streaming decompression)
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cache

_LIBRARY = "libzstd.so.1"
_BUFFER = 1 << 20


_Buffer = ctypes.c_size_t * 3
"""ZSTD_inBuffer and ZSTD_outBuffer: an address, a size, and how far it was used."""


@cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(_LIBRARY)
        library.ZSTD_createDStream.restype = ctypes.c_void_p
        library.ZSTD_freeDStream.argtypes = (ctypes.c_void_p,)
        library.ZSTD_decompressStream.restype = ctypes.c_size_t
        library.ZSTD_decompressStream.argtypes = (
            ctypes.c_void_p,
            ctypes.POINTER(_Buffer),
            ctypes.POINTER(_Buffer),
        )
        library.ZSTD_isError.argtypes = (ctypes.c_size_t,)
        library.ZSTD_getErrorName.argtypes = (ctypes.c_size_t,)
        library.ZSTD_getErrorName.restype = ctypes.c_char_p
    except (OSError, AttributeError):
        return None
    return library


def can_decompress() -> bool:
    """Return whether this machine has the library."""
    return _library() is not None


def decompress(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the content of all frames of a zstd stream, in bounded pieces.

    Raises ValueError for what is no zstd, EOFError for a stream that ends early.
    """
    library = _library()
    if library is None:
        raise ValueError(f"this machine has no {_LIBRARY}")
    stream = library.ZSTD_createDStream()
    space = ctypes.create_string_buffer(_BUFFER)
    missing = 1  # what the library still wants of a frame: 0 at the end of one
    try:
        for chunk in chunks:
            given = _Buffer(_address(ctypes.c_char_p(chunk)), len(chunk), 0)
            made = _Buffer(_address(space), _BUFFER, 0)
            while given[2] < given[1] or (missing and made[2] == _BUFFER):
                made[2] = 0
                missing = library.ZSTD_decompressStream(
                    stream, ctypes.byref(made), ctypes.byref(given)
                )
                if library.ZSTD_isError(missing):
                    raise ValueError(library.ZSTD_getErrorName(missing).decode())
                yield space.raw[: made[2]]
    finally:
        library.ZSTD_freeDStream(stream)
    if missing:
        raise EOFError("the zstd stream ends early")


def _address(buffer: ctypes.c_char_p | ctypes.Array[ctypes.c_char]) -> int:
    return ctypes.cast(buffer, ctypes.c_void_p).value or 0
