import struct

import numpy as np
import pytest
from gguf import GGUFWriter
from weightsmith.core.errors import InputRefused
from weightsmith.quantizers.gguf_importance import check_imatrix, experts_missed, read_imatrix

from tests.fakes.configs import facts

CONFIG = {"num_hidden_layers": 2, "hidden_size": 64}


def write(path, *, layers=2, hidden=64, kind="imatrix", counts=(8.0,)):
    writer = GGUFWriter(path, "none")
    writer.add_type(kind)
    for layer in range(layers):
        for part, columns in (("attn_q", hidden), ("ffn_down", 96)):
            name = f"blk.{layer}.{part}.weight"
            writer.add_tensor(name + ".in_sum2", np.ones((len(counts), columns), np.float32))
            writer.add_tensor(name + ".counts", np.array(counts, np.float32)[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
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
def test_the_models_own_matrix_passes(tmp_path, writer):
    check_imatrix(writer(tmp_path / "m"), facts(CONFIG))
    check_imatrix(writer(tmp_path / "n"), facts({"text_config": CONFIG}))


@pytest.mark.parametrize("writer", [write, write_dat])
@pytest.mark.parametrize(
    ("other", "says"),
    [({"layers": 3}, "has 3 layers, but the model has 2"), ({"hidden": 32}, "32 columns")],
)
def test_another_models_matrix_is_refused(tmp_path, writer, other, says):
    path = writer(tmp_path / "m", **other)

    with pytest.raises(InputRefused, match=f"does not match the model.*{says}"):
        check_imatrix(path, facts(CONFIG))


@pytest.mark.parametrize("raw", [b"", b"GGUF", b"\xff" * 64, b"\x05\0\0\0\x03\0\0\0abc"])
def test_what_is_no_matrix_is_refused(tmp_path, raw):
    path = tmp_path / "m"
    path.write_bytes(raw)

    with pytest.raises(InputRefused, match="not an importance matrix"):
        read_imatrix(path)


def test_a_model_is_no_matrix(tmp_path):
    with pytest.raises(InputRefused, match=r"general\.type"):
        read_imatrix(write(tmp_path / "m", kind="model"))


def test_experts_that_no_text_reached_are_counted(tmp_path):
    path = write(tmp_path / "m", counts=(3.0, 0.0, 5.0, 0.0))

    (warning,) = experts_missed(path)

    assert "4 experts (layer 0: 2, layer 1: 2)" in warning
    assert experts_missed(write(tmp_path / "n")) == []
