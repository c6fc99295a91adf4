"""Our reading of metadata against the gguf package's own, on files that the package wrote."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from weightsmith.models.gguf_reader import GGUFReader

ARRAYS = {
    "words": ["", "ab", "ähm ▁<s>", "x" * 300],
    "pairs": [f"{n} {n + 1}" for n in range(50)],
    "ints": [-1, 0, 7],
    "floats": [0.5, -2.0],
    "flags": [True, False, True],
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "some.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("name", "one")
    for name, values in ARRAYS.items():
        writer.add_array(name, values)
    kinds = gguf.GGUFValueType
    writer.add_key_value("wide", [1 << 40, 3], kinds.ARRAY, sub_type=kinds.UINT64)
    writer.add_array("bytes", b"\x00\xff")
    writer.add_uint32("after", 5)
    writer.add_tensor("t", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_field_and_tensor_is_what_the_package_reads(file):
    ours, theirs = GGUFReader(file), gguf.GGUFReader(file)
    assert list(ours.fields) == list(theirs.fields)
    for name, field in theirs.fields.items():
        assert ours.fields[name].contents() == field.contents()
        assert ours.fields[name].types == field.types
        assert (ours.fields[name].offset, ours.fields[name].name) == (field.offset, name)
    assert {name: ours.fields[name].contents() for name in ARRAYS} == ARRAYS
    assert ours.tensors[0].data_offset == theirs.tensors[0].data_offset
    assert np.array_equal(ours.tensors[0].data, theirs.tensors[0].data)


def test_a_file_that_ends_inside_its_metadata_is_refused(file, tmp_path):
    whole = file.read_bytes()
    end = gguf.GGUFReader(file).fields["after"].offset
    cut = tmp_path / "cut.gguf"
    for length in range(24, end, 7):
        cut.write_bytes(whole[:length])
        with pytest.raises((ValueError, IndexError)):
            GGUFReader(cut)


@pytest.mark.parametrize(
    ("name", "place", "said"),
    [("words", 4, "is"), ("ints", 4, "values is"), ("words", 12, "a string of .* is")],
)
def test_a_length_beyond_the_file_is_refused_at_once(file, name, place, said):
    data = bytearray(file.read_bytes())
    at = GGUFReader(file).fields[name].offset + 8 + len(name) + 4 + place
    data[at : at + 8] = (1 << 62).to_bytes(8, "little")
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"{said} longer than the file"):
        GGUFReader(file)
