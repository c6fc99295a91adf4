"""Importance matrices: of which model they are, and as llama-quantize reads them."""

import struct

import gguf
import numpy as np
import pytest
from weightsmith.core.errors import InputRefused
from weightsmith.quantizers.gguf_importance import (
    check_imatrix,
    experts_missed,
    read_imatrix,
    read_importance,
)

from tests.fakes.configs import facts
from tests.unit.quantizers.conftest import finish

SUMS = np.array([[1, 2, 3, 4], [10, 20, 30, 40]], np.float32)


def matrix(path, sums=SUMS):
    """Write a file as llama-imatrix does, with two experts."""
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text", "other"])
    writer.add_uint32("imatrix.chunk_count", 5)
    writer.add_uint32("imatrix.chunk_size", 128)
    writer.add_tensor("blk.0.ffn_up.weight.in_sum2", sums)
    writer.add_tensor("blk.0.ffn_up.weight.counts", np.array([[3], [0]], np.float32))
    finish(writer)
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


CONFIG = {"num_hidden_layers": 2, "hidden_size": 64}


def write(path, *, layers=2, hidden=64, kind="imatrix", counts=(8.0,)):
    writer = gguf.GGUFWriter(path, "none")
    writer.add_type(kind)
    for layer in range(layers):
        for part, columns in (("attn_q", hidden), ("ffn_down", 96)):
            name = f"blk.{layer}.{part}.weight"
            writer.add_tensor(name + ".in_sum2", np.ones((len(counts), columns), np.float32))
            writer.add_tensor(name + ".counts", np.array(counts, np.float32)[:, None])
    finish(writer)
    return path


def write_dat(path, *, layers=2, hidden=64):
    body = struct.pack("<i", layers)
    for layer in range(layers):
        name = f"blk.{layer}.attn_q.weight".encode()
        body += struct.pack("<i", len(name)) + name + struct.pack("<ii", 5, hidden)
        body += b"\0" * 4 * hidden
    path.write_bytes(body)
    return path


@pytest.mark.parametrize("writer", [write, write_dat])
def test_the_models_own_matrix_passes_and_anothers_is_refused(tmp_path, writer):
    check_imatrix(writer(tmp_path / "m"), facts(CONFIG))
    check_imatrix(writer(tmp_path / "n"), facts({"text_config": CONFIG}))
    layers, columns = "has 3 layers, but the model has 2", "32 columns"
    for other, says in (({"layers": 3}, layers), ({"hidden": 32}, columns)):
        path = writer(tmp_path / "other", **other)
        with pytest.raises(InputRefused, match=f"does not match the model.*{says}"):
            check_imatrix(path, facts(CONFIG))


@pytest.mark.parametrize("raw", [b"", b"GGUF", b"\xff" * 64, b"\x05\0\0\0\x03\0\0\0abc"])
def test_what_is_no_matrix_is_refused(tmp_path, raw):
    path = tmp_path / "m"
    path.write_bytes(raw)

    with pytest.raises(InputRefused, match="not an importance matrix"):
        read_imatrix(path)
    with pytest.raises(InputRefused, match=r"general\.type"):
        read_imatrix(write(tmp_path / "model", kind="model"))


def test_experts_that_no_text_reached_are_counted(tmp_path):
    path = write(tmp_path / "m", counts=(3.0, 0.0, 5.0, 0.0))

    (warning,) = experts_missed(path)

    assert "4 experts (layer 0: 2, layer 1: 2)" in warning
    assert experts_missed(write(tmp_path / "n")) == []
