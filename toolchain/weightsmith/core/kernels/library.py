"""Loads the libraries that a builder compiled (`images/engines/kernels/`)."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

from weightsmith.core.errors import EnvironmentFailure

_NUMBER, _DATA, _COUNT = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64


def found() -> ctypes.CDLL | None:
    """Return our kernels, or None where they were not compiled or cannot be loaded."""
    return _found(_folder())


@cache
def _found(folder: str) -> ctypes.CDLL | None:
    try:
        return kernels() if Path(folder, "libkernels.so").is_file() else None
    except EnvironmentFailure:
        return None


@cache
def kernels() -> ctypes.CDLL:
    """Return our kernels; `quants.h` says what they do. Raises EnvironmentFailure without them."""
    library = _load("libkernels.so")
    library.weightsmith_lanes.argtypes = [_NUMBER]
    library.weightsmith_quantize_rows.argtypes = [_NUMBER, _DATA, _DATA, _COUNT, _COUNT, _DATA]
    library.weightsmith_quantize_rows.restype = _COUNT
    library.weightsmith_round_sums.argtypes = [
        *(_DATA, _DATA, _COUNT, _DATA, _NUMBER, _DATA, _DATA, _NUMBER),
        *(_COUNT, _COUNT, ctypes.c_float, _DATA, _DATA),
    ]
    library.weightsmith_round_sums.restype = _COUNT
    library.weightsmith_dot_products.argtypes = [
        *(_DATA, _DATA, _DATA, _COUNT),
        *(_DATA, _DATA, _COUNT, _DATA),
    ]
    library.weightsmith_dot_products.restype = None
    library.weightsmith_project_rows.argtypes = [
        *(_DATA, _NUMBER, _COUNT, _COUNT),
        *(_DATA, _DATA, _DATA),
    ]
    library.weightsmith_project_rows.restype = None
    library.weightsmith_sum_words.argtypes = [_DATA, _DATA, _COUNT]
    library.weightsmith_sum_words.restype = ctypes.c_uint64
    library.weightsmith_widen.argtypes = [_DATA, _NUMBER, _COUNT, _DATA]
    library.weightsmith_widen.restype = None
    library.weightsmith_multiply_rows.argtypes = [
        *(_DATA, _COUNT, _DATA, _NUMBER, _COUNT),
        *(_COUNT, _DATA, _COUNT, _DATA),
    ]
    library.weightsmith_multiply_rows.restype = None
    if library.weightsmith_tiles():
        library.weightsmith_split_inputs.argtypes = [_DATA, _COUNT, _COUNT, _DATA]
        library.weightsmith_split_inputs.restype = None
        library.weightsmith_multiply_split.argtypes = [
            *(_DATA, _COUNT, _DATA, _COUNT, _COUNT),
            *(_DATA, _COUNT, _DATA),
        ]
        library.weightsmith_multiply_split.restype = None
    library.weightsmith_round_tiles.argtypes = [
        *(_DATA, _NUMBER, _COUNT, _COUNT, _COUNT, _COUNT),
        *(_NUMBER, _NUMBER, ctypes.c_float, _DATA, _DATA, _DATA),
    ]
    library.weightsmith_compare_tiles.argtypes = [
        *(_DATA, _DATA, _NUMBER, _DATA, _COUNT, _COUNT),
        *(_DATA, _NUMBER, _COUNT, _COUNT, _DATA),
    ]
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


def _folder() -> str:
    return os.environ.get("WEIGHTSMITH_TOOLS_KERNELS", "/opt/kernels")


def _load(name: str) -> ctypes.CDLL:
    path = Path(_folder(), name)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise EnvironmentFailure(
            f"the library {path} cannot be loaded: {error}",
            hint="delete the builder so that it is made again",
        ) from None
