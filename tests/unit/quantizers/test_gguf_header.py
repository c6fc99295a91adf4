"""Headers of GGUF files, held against the gguf package."""

import gguf
import numpy as np
import pytest
from weightsmith.quantizers.gguf_header import (
    changed_values,
    number,
    quantized,
    read_header,
    strings,
)

from tests.unit.quantizers.conftest import finish


@pytest.fixture
def written(tmp_path):
    """A file with a value of every kind, by gguf-py."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_quantization_version(2)
    writer.add_file_type(1)
    writer.add_bool("a.bool", True)
    writer.add_float32("a.float", 1.5)
    writer.add_uint64("a.large", 1 << 40)
    writer.add_array("a.words", ["one", "zwölf"])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_license("mit")
    writer.add_uint16("split.no", 0)
    writer.add_tensor("norm", np.ones(64, np.float32))
    writer.add_tensor("flat", np.ones((1, 64), np.float32))
    writer.add_tensor("matrix", np.zeros((3, 64), np.float16))
    finish(writer)
    return path


def test_a_header_is_read_as_the_gguf_package_reads_it(written):
    header, reader = read_header(written), gguf.GGUFReader(written)

    own = {name for name in reader.fields if not name.startswith("GGUF.")}
    assert header.values.keys() == own
    assert strings(header.values["a.words"]) == ["one", "zwölf"]
    assert number(header.values["general.file_type"]) == 1
    found = {t.name: (tuple(map(int, t.shape)), int(t.tensor_type)) for t in reader.tensors}
    assert {e.name: (e.shape, e.kind) for e in header.tensors.values()} == found
    for tensor in reader.tensors:
        assert header.size + header.tensors[tensor.name].offset == tensor.data_offset


def test_a_new_header_has_the_same_values_and_the_changed_ones_last(written, tmp_path):
    header = read_header(written)
    changes = changed_values(15, {"general.license": "apache", "quantize.imatrix.entries_count": 7})
    targets = {"matrix": (int(gguf.GGMLQuantizationType.Q8_0), 3 * 68), "flat": (0, 256)}

    data, offsets = quantized(header, targets, changes)

    path = tmp_path / "new.gguf"
    path.write_bytes(data + bytes(224 + 256))
    reader = gguf.GGUFReader(path)
    names = [name for name in reader.fields if not name.startswith("GGUF.")]
    assert names[-5:-3] == ["general.quantization_version", "general.file_type"]
    assert names[-3:] == ["general.license", "quantize.imatrix.entries_count", "split.no"]
    assert reader.fields["general.file_type"].contents() == 15
    assert reader.fields["general.license"].contents() == "apache"
    assert reader.fields["a.numbers"].contents() == [1, 2, 3]
    tensors = {t.name: t for t in reader.tensors}
    assert [t.name for t in reader.tensors] == ["matrix", "flat"]
    assert {name: t.data_offset for name, t in tensors.items()} == offsets
    assert [int(n) for n in tensors["flat"].shape] == [64]  # as ggml counts dimensions


def test_a_later_part_has_only_its_place(tmp_path, written):
    header = read_header(written)
    part = type(header)(
        values={"split.no": header.values["split.no"]}, tensors=header.tensors, size=0
    )

    data, _ = quantized(part, {"norm": (0, 256)}, changed_values(15, {}))

    (tmp_path / "part.gguf").write_bytes(data)
    assert read_header(tmp_path / "part.gguf").values.keys() == {"split.no"}


def test_what_is_no_gguf_is_refused(tmp_path, written):
    (tmp_path / "other").write_bytes(b"GGML" + bytes(20))
    with pytest.raises(ValueError, match="not a GGUF file"):
        read_header(tmp_path / "other")
    (tmp_path / "cut").write_bytes(written.read_bytes()[:60])
    with pytest.raises(ValueError, match="ends inside its header"):
        read_header(tmp_path / "cut")
