"""Loads the libraries that a builder compiled (`images/engines/kernels/`)."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

from weightsmith.errors import EnvironmentFailure

_NUMBER, _DATA, _COUNT = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64


@cache
def kernels() -> ctypes.CDLL:
    """Return our kernels; `quants.h` says what they do. Raises EnvironmentFailure without them."""
    library = _load("libkernels.so")
    library.weightsmith_lanes.argtypes = [_NUMBER]
    library.weightsmith_quantize_rows.argtypes = [_NUMBER, _DATA, _DATA, _COUNT, _COUNT, _DATA]
    library.weightsmith_quantize_rows.restype = _COUNT
    return library


@cache
def ggml() -> ctypes.CDLL:
    """Return llama.cpp's own quantization of rows. Raises EnvironmentFailure without it."""
    library = _load("libggml.so")
    library.ggml_type_name.argtypes, library.ggml_type_name.restype = [_NUMBER], ctypes.c_char_p
    library.ggml_row_size.argtypes = [_NUMBER, _COUNT]
    library.ggml_row_size.restype = ctypes.c_size_t
    library.ggml_validate_row_data.argtypes = [_NUMBER, _DATA, ctypes.c_size_t]
    library.ggml_validate_row_data.restype = ctypes.c_bool
    library.ggml_quantize_chunk.argtypes = [
        *(_NUMBER, _DATA, _DATA),
        *(_COUNT, _COUNT, _COUNT, _DATA),
    ]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def _load(name: str) -> ctypes.CDLL:
    path = Path(os.environ.get("WEIGHTSMITH_TOOLS_KERNELS", "/opt/kernels")) / name
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise EnvironmentFailure(
            f"the library {path} cannot be loaded: {error}",
            hint="delete the builder so that it is made again",
        ) from None
