"""Rows of stored weights as float32."""

import ml_dtypes
import numpy as np
import pytest
from weightsmith.quantizers.gguf_rows import StoredRows, joined, to_bfloat16

pytestmark = [pytest.mark.builders, pytest.mark.usefixtures("compiled_kernels")]
TYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@pytest.mark.parametrize("kind", TYPES)
def test_rows_are_read_at_their_place(tmp_path, kind):
    stored = np.random.default_rng(0).standard_normal((7, 32)).astype(TYPES[kind])
    path = tmp_path / "data"
    path.write_bytes(b"before" + stored.tobytes() + b"after")
    place = StoredRows(path=path, kind=kind, offset=6, rows=7, columns=32)

    np.testing.assert_array_equal(place.read(2, 5), stored[2:5].astype(np.float32))
    assert place.read(0, 7).dtype == np.float32
    with pytest.raises(ValueError, match="ends inside a tensor"):
        place.read(5, 9)


def test_rows_in_another_order_are_read_with_those_between(tmp_path):
    stored = np.arange(8 * 32, dtype=np.float32).reshape(8, 32)
    (tmp_path / "data").write_bytes(stored.tobytes())
    order = np.array([0, 2, 1, 3, 4, 6, 5, 7])
    size = {"rows": 8, "columns": 32}

    place = StoredRows(path=tmp_path / "data", kind="F32", offset=0, order=order, **size)

    for start, end in ((0, 8), (1, 2), (2, 6), (5, 8)):
        np.testing.assert_array_equal(place.read(start, end), stored[order[start:end]])


def test_matrices_of_several_places_are_one(tmp_path):
    stored = np.arange(3 * 4 * 8, dtype=np.float32).reshape(12, 8)
    (tmp_path / "data").write_bytes(stored.tobytes())
    parts = [
        StoredRows(path=tmp_path / "data", kind="F32", offset=at * 128, rows=4, columns=8)
        for at in range(3)
    ]

    read = joined(parts)

    for start, end in ((0, 4), (4, 6), (3, 9), (0, 12)):
        np.testing.assert_array_equal(read(start, end), stored[start:end])


def test_bfloat16_is_rounded_as_everywhere():
    bits = np.random.default_rng(0).integers(0, 1 << 32, 100_000, np.uint32)
    ties = (np.arange(1000, dtype=np.uint32) << 16) + np.uint32(0x8000)
    rows = np.concatenate([bits, ties]).view(np.float32)
    rows = rows[~np.isnan(rows)]

    expected = rows.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(to_bfloat16(rows), expected)
    assert np.isnan(to_bfloat16(np.array([np.nan], np.float32)))
