"""GGUF files: metadata as the package reads them; which are the model, and which its projector."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from weightsmith.core.errors import InputRefused
from weightsmith.models.folder import scan
from weightsmith.models.gguf_config import files_with, gguf_models, projector_of
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


@pytest.mark.parametrize(
    ("models", "projector", "others"),
    [
        (["bot.gguf"], "", ["config.json", "LICENSE"]),
        (["bot.gguf"], "mmproj-bot.gguf", ["LICENSE"]),
        (["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"], "mmproj-a.gguf", []),
        (["adapters/a.gguf", "bot.gguf"], "mmproj-bot.gguf", []),
        (["bot-Q4_K_M.gguf"], "mmproj-model-f16.gguf", []),  # as published elsewhere
        (["mmproj-bot.gguf"], "", []),  # a model of that name
        (["mmproj-bot.gguf"], "mmproj-mmproj-bot.gguf", []),
        (["bot.gguf", "mmproj-1.gguf", "mmproj-2.gguf"], "", []),
        ([], "", ["model.safetensors"]),
    ],
)
def test_a_projector_is_named_after_its_model(models, projector, others):
    names = [*([projector] if projector else []), *reversed(models), *others]

    assert projector_of(names) == projector
    assert gguf_models(names) == sorted(models)


@pytest.mark.parametrize("name", ["bot-00002-of-00002.gguf", "mmproj-bot.gguf"])
def test_a_file_beside_the_model_may_not_be_a_link_out_of_the_folder(tmp_path, name):
    folder, secret = tmp_path / "model", tmp_path / "secret"
    folder.mkdir()
    secret.write_text("not for an image")
    for own in ("bot-00001-of-00002.gguf", "bot-00002-of-00002.gguf"):
        (folder / own).write_bytes(b"GGUF")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)

    with pytest.raises(InputRefused, match=f"{name} is a link to a file outside the folder"):
        files_with(folder / "bot-00001-of-00002.gguf")


def test_links_inside_a_hubs_cache_are_followed(tmp_path):
    """Repositories of GGUF files often have a folder for each type."""
    home = tmp_path / "models--org--bot"
    folder = home / "snapshots" / "abc" / "Q4_K_M"
    folder.mkdir(parents=True)
    (home / "blobs").mkdir()
    names = ("bot-00001-of-00002.gguf", "bot-00002-of-00002.gguf", "mmproj-bot.gguf")
    for name in names:
        (home / "blobs" / name).write_bytes(b"GGUF")
        (folder / name).symlink_to(home / "blobs" / name)

    assert files_with(folder / names[0]) == names
    assert scan(folder, gguf=True) == [*names]
