"""Our kernels round to numpy's bytes and read codes back, with every width of vectors."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from weightsmith.core.kernels import library, tiles
from weightsmith.models.tensors import largest
from weightsmith.outside.toolset import tools_variable
from weightsmith.quantizers import rounding
from weightsmith.quantizers.rounding import fused_scale, round_rows
from weightsmith.quantizers.schemes import SCHEMES, Scheme
from weightsmith.quantizers.tiled import QuantizedTiles

pytestmark = [pytest.mark.builders, pytest.mark.usefixtures("compiled_kernels")]

TYPES = [np.dtype(one) for one in (ml_dtypes.bfloat16, np.float16, np.float32)]
SHAPES = {8: [(1, 1), (3, 7), (5, 33), (130, 300), (2, 577), (256, 128)], 4: [(3, 32), (5, 544)]}
"""Rows and columns by bits: of whole and cut vectors, tiles and bands."""


def weights(kind: str, shape: tuple[int, int], scheme: Scheme) -> np.ndarray:
    random = np.random.default_rng(sum(shape))
    usual = random.standard_normal(shape)
    if kind == "gaussian":
        return usual * 0.02
    if kind == "student":
        return random.standard_t(2, shape)
    if kind == "zeros":
        return np.where(usual < 0, -0.0, 0.0)
    if kind == "small":  # down to subnormal numbers and what is 0 in float32
        return usual * 10.0 ** random.uniform(-50, -35, shape)
    if kind == "any size":
        return np.clip(usual * 10.0 ** random.uniform(-45, 38, shape), -3.3e38, 3.3e38)
    if kind == "one of all":
        return np.where(random.random(shape) < 1 / 32, usual, 0)
    return ties(shape, scheme)


def ties(shape: tuple[int, int], scheme: Scheme) -> np.ndarray:
    """Numbers in the middle of two codes, and next to it, where scales are powers of 2."""
    codes = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    if scheme.codes == "I8":
        codes = np.arange(128, dtype=np.float32)
    if scheme.packed:
        codes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    middle = (codes[1:] + codes[:-1]) / 2
    near = [np.nextafter(middle, np.float32(end)) for end in (0, 1e9)]
    some = np.resize(np.concatenate([middle, -middle, *near, codes, -codes]), shape)
    some[:, :: scheme.tile[1] or shape[1]] = codes[-1]  # so that each tile has the largest code
    return some


def both(
    rows: np.ndarray, scheme: Scheme, shared: np.float32 | None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return codes and scales of the kernel, and of numpy."""
    assert tiles.reads(rows.dtype)
    with np.errstate(over="ignore", under="ignore"):
        expected = rounding._round_rows(rows.astype(np.float32), scheme, shared)
    return [round_rows(rows, scheme, shared), expected]


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    "kind", ["gaussian", "student", "zeros", "small", "any size", "one of all", "ties"]
)
def test_bytes_are_those_of_numpy(name: str, dtype: np.dtype, kind: str, lanes: int) -> None:
    scheme = SCHEMES[name]
    for shape in SHAPES[4 if scheme.whole_tiles else 8]:
        with np.errstate(over="ignore"):
            rows = weights(kind, shape, scheme).astype(dtype)
        rows[~np.isfinite(rows)] = 1
        shares: list[np.float32 | None] = [None]
        if scheme.fused_scale:  # its own, that of larger matrices, and of smaller ones
            own = fused_scale(largest(rows), scheme)
            shares = [own, np.float32(own / 3), np.float32(448)]
        for shared in shares:
            ours, expected = both(rows, scheme, shared)
            for one, other in zip(ours, expected, strict=True):
                assert one.dtype == other.dtype
                np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", TYPES[:2], ids=str)
def test_every_number_of_16_bits(name: str, dtype: np.dtype, lanes: int) -> None:
    """In rows of its size, so that each is rounded to several codes."""
    infinite = np.array(np.inf, dtype).view(np.uint16)
    every = np.arange(infinite, dtype=np.uint16).view(dtype)
    rows = np.concatenate([every, -every])
    rows = np.concatenate([rows, rows[: -len(rows) % 256]]).reshape(-1, 256)
    shared = fused_scale(largest(rows), SCHEMES[name]) if SCHEMES[name].fused_scale else None
    for one, other in zip(*both(rows, SCHEMES[name], shared), strict=True):
        np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(name: str, wrong: float, lanes: int) -> None:
    scheme = SCHEMES[name]
    columns = 96 if scheme.packed else 77
    for dtype in TYPES:
        for at in (0, 5, columns - 1):
            rows = np.ones((130, columns), dtype)
            rows[129, at] = wrong
            with pytest.raises(ValueError, match="not finite"):
                round_rows(rows, scheme, np.float32(1) if scheme.fused_scale else None)


def test_rows_in_another_order_of_memory(lanes: int) -> None:
    rows = np.random.default_rng(1).standard_normal((96, 64)).astype(np.float32)
    turned, expected = (round_rows(one, SCHEMES["fp8"]) for one in (np.asfortranarray(rows), rows))
    for one, other in zip(turned, expected, strict=True):
        np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_squares_are_those_of_numpy(
    name: str, dtype: np.dtype, lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = SCHEMES[name]
    for shape in SHAPES[4 if scheme.whole_tiles else 8]:
        rows = weights("student", shape, scheme).astype(dtype)
        shared = fused_scale(largest(rows), scheme) if scheme.fused_scale else None
        made = read(*round_rows(rows, scheme, shared), scheme, shared)
        ours = made.squares(rows)
        with monkeypatch.context() as patch:
            patch.setattr(library, "found", lambda: None)
            assert ours == pytest.approx(made.squares(rows), rel=1e-5)


def read(
    codes: np.ndarray, scales: np.ndarray, scheme: Scheme, shared: np.float32 | None = None
) -> QuantizedTiles:
    wide = scales.astype(np.float32)
    if scheme.scales == "U8":
        wide = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
    if shared is not None:
        wide /= shared
    columns = codes.shape[1] * (2 if scheme.packed else 1)
    tile = (scheme.tile[0], scheme.tile[1] or columns)
    return QuantizedTiles(dtype=scheme.codes, codes=codes.view(np.uint8), scales=wide, tile=tile)


@pytest.mark.parametrize("columns", [1, 6, 64, 1024, 2090])
def test_exact_sums_are_exact(columns: int, lanes: int) -> None:
    """Small integers have no rounding, in any order of sums: each code counts by itself."""
    random = np.random.default_rng(columns)
    codes = random.integers(-9, 10, (5, columns)).astype(np.int8)
    rows = random.integers(-9, 10, (5, columns))
    scales = np.array([[1], [2], [-1], [0], [4]], np.float32)
    made = QuantizedTiles(dtype="I8", codes=codes.view(np.uint8), scales=scales, tile=(1, columns))
    wrong = ((codes * scales.astype(int) - rows) ** 2).sum()
    for dtype in TYPES:
        assert made.squares(rows.astype(dtype)) == (wrong, (rows**2).sum())


def test_every_byte_is_read_as_its_type_defines(lanes: int) -> None:
    """By ml_dtypes' own float8 and float4: all weights are 0, so the error is the code's value."""
    every = np.arange(256, dtype=np.uint8)[:, None]
    one, zeros = np.ones((256, 1), np.float32), np.zeros((256, 2), np.float32)
    for dtype, kind in (("F8_E4M3", ml_dtypes.float8_e4m3fn), ("I8", np.int8)):
        values = every.view(kind).astype(np.float64)
        for byte in np.flatnonzero(np.isfinite(values)):
            made = QuantizedTiles(
                dtype=dtype, codes=every[byte : byte + 1], scales=one[:1], tile=(1, 1)
            )
            assert made.squares(zeros[:1, :1]) == (values[byte, 0] ** 2, 0)
    small = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    for byte in range(256):
        made = QuantizedTiles(dtype="U8", codes=every[byte : byte + 1], scales=one[:1], tile=(1, 2))
        wrong, _ = made.squares(zeros[:1])
        assert wrong == small[byte & 15] ** 2 + small[byte >> 4] ** 2


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
@pytest.mark.parametrize("at", [0, 40, 68])
def test_a_code_that_is_no_number_is_found(byte: int, at: int, lanes: int) -> None:
    codes = np.zeros((3, 69), np.uint8)
    codes[2, at] = byte
    scales = np.ones((3, 1), np.float32)
    made = QuantizedTiles(dtype="F8_E4M3", codes=codes, scales=scales, tile=(1, 69))
    with pytest.raises(ValueError, match="NaN or infinite"):
        made.squares(np.zeros((3, 69), np.float32))


def test_an_infinite_product_is_found(lanes: int) -> None:
    codes = np.full((1, 20), 0x40, np.uint8)
    scales = np.array([[np.inf]], np.float32)
    made = QuantizedTiles(dtype="F8_E4M3", codes=codes, scales=scales, tile=(1, 20))
    with pytest.raises(ValueError, match="NaN or infinite"):
        made.squares(np.ones((1, 20), np.float32))


def test_shapes_that_do_not_fit_are_refused(lanes: int) -> None:
    codes, scales = np.zeros((4, 32), np.uint8), np.ones((4, 1), np.float32)
    made = QuantizedTiles(dtype="I8", codes=codes, scales=scales, tile=(1, 32))
    with pytest.raises(ValueError, match="shape"):
        made.squares(np.ones((4, 31), np.float32))
    made = QuantizedTiles(dtype="I8", codes=codes, scales=scales[:3], tile=(1, 32))
    with pytest.raises(ValueError, match="scales of shape"):
        made.squares(np.ones((4, 32), np.float32))


def test_without_a_library_numpy_rounds(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    ours = round_rows(rows, SCHEMES["w8a8"])
    monkeypatch.setenv(tools_variable("kernels"), str(tmp_path))
    assert not tiles.reads(rows.dtype)
    for one, other in zip(ours, round_rows(rows, SCHEMES["w8a8"]), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not tiles.reads(np.dtype(np.float64))
