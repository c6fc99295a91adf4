"""Importance matrices, as llama-quantize reads them."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from weightsmith.core.errors import InputRefused
from weightsmith.quantizers.gguf_importance import read_importance

SUMS = np.array([[1, 2, 3, 4], [10, 20, 30, 40]], np.float32)


def matrix(path: Path, sums: np.ndarray = SUMS, counts=(3.0, 0.0)) -> Path:
    """Write a file as llama-imatrix does, with two experts."""
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text", "other"])
    writer.add_uint32("imatrix.chunk_count", 5)
    writer.add_uint32("imatrix.chunk_size", 128)
    writer.add_tensor("blk.0.ffn_up.weight.in_sum2", sums)
    writer.add_tensor("blk.0.ffn_up.weight.counts", np.array(counts, np.float32)[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_sums_are_divided_by_counts_and_experts_without_data_get_ones(tmp_path):
    found = read_importance(matrix(tmp_path / "imatrix.gguf"))

    weights = found.of("blk.0.ffn_up.weight", 4, 2)
    np.testing.assert_array_equal(weights, [SUMS[0] / np.float32(3), np.ones(4)])
    assert dict(found.about) == {
        "quantize.imatrix.file": "imatrix.gguf",
        "quantize.imatrix.dataset": "text",
        "quantize.imatrix.entries_count": 1,
        "quantize.imatrix.chunks_count": 5,
    }
    assert found.of("blk.1.ffn_up.weight", 4, 2) is None


def test_the_older_format_is_divided_by_calls(tmp_path):
    name = b"blk.0.attn_q.weight"
    entry = struct.pack("<i", len(name)) + name + struct.pack("<ii", 4, 4) + SUMS[0].tobytes()
    (tmp_path / "imatrix.dat").write_bytes(
        struct.pack("<i", 1) + entry + struct.pack("<ii", 9, 4) + b"text"
    )

    found = read_importance(tmp_path / "imatrix.dat")

    np.testing.assert_array_equal(found.of("blk.0.attn_q.weight", 4, 1), [SUMS[0] / np.float32(4)])
    assert found.about["quantize.imatrix.chunks_count"] == 9
    assert found.about["quantize.imatrix.dataset"] == "text"


def test_wrong_sizes_and_values_are_refused(tmp_path):
    found = read_importance(matrix(tmp_path / "a.gguf"))
    with pytest.raises(InputRefused, match=r"has 8 values for .*, not 16"):
        found.of("blk.0.ffn_up.weight", 8, 2)
    with pytest.raises(InputRefused, match="NaN or infinity"):
        read_importance(matrix(tmp_path / "b.gguf", SUMS * np.float32(np.inf)))
