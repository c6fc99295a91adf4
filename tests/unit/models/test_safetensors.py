"""Headers: what the format allows is read, everything else is refused with file and tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, load_file, save_file
from weightsmith.core.errors import InputRefused
from weightsmith.core.safe_parse import read_json
from weightsmith.models.safetensors import build_header, open_checkpoint, read_header


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> Any:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | more


def write(path: Path, table: Any, data: bytes = bytes(8), length: int | None = None) -> Path:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_reads_what_the_library_writes(file):
    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.zeros((0, 4), np.int8)}
    save_file(arrays, file, {"format": "pt"})

    header = read_header(file)

    assert header.metadata == {"format": "pt"}
    assert header.file_size == file.stat().st_size
    found = {info.name: info for info in header.tensors}
    assert (found["b"].dtype, found["b"].shape, found["b"].size) == ("F32", (2, 3), 24)
    data = file.read_bytes()[found["b"].start : found["b"].end]
    assert data == arrays["b"].tobytes()


def test_the_library_reads_what_we_build():
    values = np.arange(4, dtype=np.float32)
    header = build_header([("x", "F32", (4,)), ("ü", "I8", (0,))], {"format": "pt"})

    assert len(header) % 8 == 0
    assert np.array_equal(load(header + values.tobytes())["x"], values)


def test_tensors_come_in_the_order_of_their_bytes(file):
    write(file, {"a": entry(offsets=(8, 16)), "z": entry()}, bytes(16))
    assert [info.name for info in read_header(file).tensors] == ["z", "a"]


BAD = {
    "cut within": (b'{"a"', None, "JSON"),
    "list": (b"[]", None, "not an object"),
    "not utf-8": (b'{"\xff": 1}', None, "JSON"),
    "deep": (b"[" * 100_000, None, "JSON"),
    "twice": (b'{"a": 1, "a": 2}', None, "duplicate key 'a'"),
    "too long": (b"{}", 100_000_001, "header size 100000001"),
    "longer than the file": (b"{}", 64, "header size 64"),
    "huge": (b"{}", (1 << 64) - 1, "invalid header size"),
    "metadata": ({"__metadata__": {"a": 1}}, None, "__metadata__"),
    "unknown type": ({"w": entry("F31")}, None, "'w' has the unknown dtype 'F31'"),
    "type is a list": ({"w": entry() | {"dtype": []}}, None, "unknown dtype"),
    "negative": ({"w": entry(shape=(-2,))}, None, "invalid shape"),
    "boolean": ({"w": entry(shape=(True, 2))}, None, "invalid shape"),
    "fraction": ({"w": entry(shape=(2.0,))}, None, "invalid shape"),
    "overflow": ({"w": entry(shape=(1 << 62, 1 << 62))}, None, "cannot have 8 bytes"),
    "wrong size": ({"w": entry(shape=(3,))}, None, "'w' of dtype F32"),
    "backwards": ({"w": entry(offsets=(8, 0))}, None, "cannot have -8 bytes"),
    "half a byte": ({"w": entry("F4", (3,), (0, 1))}, None, "cannot have 1 bytes"),
    "more keys": ({"w": entry(code="x")}, None, "must have exactly"),
    "no entry": ({"w": 3}, None, "must have exactly"),
    "gap": ({"w": entry(offsets=(8, 16))}, None, "'w' has a gap"),
    "overlap": ({"w": entry(), "v": entry()}, None, "overlaps"),
    "cut off": ({"w": entry(shape=(4,), offsets=(0, 16))}, None, "truncated at"),
    "more data": ({"w": entry(shape=(1,), offsets=(0, 4))}, None, "extra bytes"),
    "no name": ({"": entry()}, None, "name ''"),
    "control character": ({"a\u0007": entry()}, None, "not printable"),
    "lone surrogate": (b'{"\\ud800": 1}', None, "half a character"),
    "right to left": ({"a\u202eb": entry()}, None, "not printable"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_with_the_reason(case, file):
    table, length, said = BAD[case]
    write(file, table, length=length)

    with pytest.raises(InputRefused) as caught:
        read_header(file)
    assert said in caught.value.message
    assert str(file) in caught.value.message
    assert caught.value.exit_code == 3


def test_files_too_short_for_a_header(file):
    with pytest.raises(InputRefused, match="cannot be read"):
        read_header(file)
    for size in (0, 7, 8):
        file.write_bytes(bytes(size))
        with pytest.raises(InputRefused, match="invalid header size"):
            read_header(file)


@given(data=st.data())
def test_no_damage_to_a_header_gets_through_silently(data, tmp_path_factory):
    """One changed byte is refused, or read just as the safetensors library reads it."""
    path = tmp_path_factory.mktemp("damage") / "model.safetensors"
    good = build_header([("a", "F32", (2,)), ("b", "I16", (2, 1))], {}) + bytes(12)
    place = data.draw(st.integers(0, len(good) - 13))
    path.write_bytes(good[:place] + bytes([data.draw(st.integers(0, 255))]) + good[place + 1 :])
    try:
        ours = {info.name: info.shape for info in read_header(path).tensors}
    except InputRefused:
        return
    assert ours == {name: array.shape for name, array in load_file(path).items()}


def sharded(root: Path, weight_map: dict[str, str], shards: dict[str, list[str]]) -> Path:
    for name, tensors in shards.items():
        save_file({tensor: np.zeros(2, np.float32) for tensor in tensors}, root / name)
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (root / "model.safetensors.index.json").write_text(text)
    return root


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_shards_keep_their_order(tmp_path):
    sharded(tmp_path, {"b": TWO, "a": ONE}, {TWO: ["b"], ONE: ["a"]})

    index = open_checkpoint(tmp_path)

    assert [shard.path.name for shard in index.shards] == [ONE, TWO]
    assert sorted(index.tensors) == ["a", "b"]
    assert index.index_file == "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("weight_map", "shards", "said"),
    [
        ({"a": ONE, "b": ONE}, {ONE: ["a"]}, "'b' should be in " + ONE + " but is in no shard"),
        ({"a": ONE}, {ONE: ["a", "b"]}, "'b' should be in no shard"),
        ({"a": ONE, "b": TWO}, {ONE: ["b"], TWO: ["a"]}, "'a' should be in"),
        ({"a": ONE, "b": TWO}, {ONE: ["a"], TWO: ["a", "b"]}, "duplicate tensor 'a'"),
        ({"a": "../" + ONE}, {}, "invalid file name"),
        ({"a": "weights.bin"}, {}, "invalid file name"),
        ({"a": ".own.safetensors"}, {".own.safetensors": ["a"]}, "invalid file name"),
        ({"a": "consolidated.safetensors"}, {"consolidated.safetensors": ["a"]}, "invalid file"),
        ({}, {}, "weight_map"),
        ({"a": ONE}, {}, "cannot be read"),
        ({"a": ONE}, {ONE: ["a"], "model.safetensors": ["a"]}, "has both"),
    ],
)
def test_index_and_headers_must_agree(weight_map, shards, said, tmp_path):
    sharded(tmp_path, weight_map, shards)

    with pytest.raises(InputRefused) as caught:
        open_checkpoint(tmp_path)
    assert said in caught.value.message


def test_a_single_file_may_have_an_index(tmp_path):
    with pytest.raises(InputRefused, match="has neither"):
        open_checkpoint(tmp_path)
    name = "model.safetensors"
    sharded(tmp_path, {"a": name, "b": name}, {name: ["a", "b"]})

    assert sorted(open_checkpoint(tmp_path).tensors) == ["a", "b"]

    sharded(tmp_path, {"a": name}, {name: ["a", "b"]})
    with pytest.raises(InputRefused, match="no shard"):
        open_checkpoint(tmp_path)


def test_configs_may_hold_infinity(tmp_path):
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')

    assert read_json(tmp_path / "config.json")["time_step_limit"][1] == float("inf")
