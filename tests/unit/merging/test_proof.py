"""The proof of the written file: a wrong byte or a wrong sum, anywhere, is caught."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from weightsmith.core.errors import CheckFailed
from weightsmith.merging import proof
from weightsmith.merging.blocks import MergeCounts, RowMaker, Settings
from weightsmith.merging.outputs import OutputShard
from weightsmith.merging.plan import make_plan
from weightsmith.merging.proof import Sketch, prove
from weightsmith.merging.shards import ShardMaker
from weightsmith.merging.stream import Checksum, Writer, continued
from weightsmith.models.safetensors import read_header

from tests.unit.merging.oracle import run


@pytest.fixture
def merged(make_model: Any, make_adapter: Any) -> tuple[OutputShard, Path]:
    base = make_model("gpt2", dtype=torch.bfloat16)
    adapter = make_adapter(base, target_modules=["c_attn", "c_fc"])
    out = base.parent / "out"
    run(base, adapter, out)
    (shard,) = make_plan(base, [(adapter, 1.0)]).shards
    return shard, out / "model.safetensors"


def check(shard: OutputShard, path: Path) -> None:
    """Prove what the file says, as if it had been computed so."""
    data = memoryview(path.read_bytes())
    infos = read_header(path).tensors
    edges = [0, *(info.start for info in infos), len(data)]
    checksums = tuple(
        Checksum(start, end - start, continued(0, data[start:end]))
        for start, end in pairwise(edges)
    )
    with closing(ShardMaker(Settings(device="cpu", workers=2), MergeCounts())) as maker:
        maker.write(shard, path.with_name("again"), lambda _: None).finish()
        prove(shard, path, checksums, maker.sketches, maker.files, maker.pool)


def rows_of(path: Path, name: str) -> np.memmap:
    """A 16-bit tensor of a file, to be changed in place."""
    info = next(info for info in read_header(path).tensors if info.name == name)
    return np.memmap(path, np.uint16, "r+", info.start, info.shape)


@pytest.mark.parametrize(
    "damage",
    [
        lambda rows: rows.__ixor__(np.uint16(1)),
        lambda rows: rows[5].__ixor__(np.uint16(0x8000)),
        lambda rows: rows.__setitem__(slice(None), rows[::-1].copy()),
        lambda rows: rows.__setitem__(3, rows[4].copy()),
        lambda rows: rows.__setitem__((0, 0), 0x7F80),
    ],
    ids=["last-bits", "signs-of-a-row", "order", "a-row-twice", "infinity"],
)
def test_a_wrong_sum_is_caught(
    damage: Callable[[Any], Any], merged: tuple[OutputShard, Path]
) -> None:
    shard, path = merged
    check(shard, path)
    damage(rows_of(path, "transformer.h.0.attn.c_attn.weight"))

    with pytest.raises(CheckFailed, match=r"h\.0\.attn\.c_attn\.weight was written wrong"):
        check(shard, path)


def test_a_wrong_copy_and_a_missing_tensor_are_caught(merged: tuple[OutputShard, Path]) -> None:
    shard, path = merged
    rows_of(path, "transformer.wte.weight")[95, 31] ^= 1

    with pytest.raises(CheckFailed, match=r"wte\.weight was written wrongly: 1 of"):
        check(shard, path)
    with pytest.raises(CheckFailed, match="its header differs from the plan"):
        check(replace(shard, outputs=shard.outputs[1:]), path)


def test_a_wrong_scaling_is_caught(merged: tuple[OutputShard, Path]) -> None:
    shard, path = merged
    scaled = [
        replace(output, terms=tuple(replace(t, factor=t.factor * 1.01) for t in output.terms))
        for output in shard.outputs
    ]

    with pytest.raises(CheckFailed, match="was written wrong"):
        check(replace(shard, outputs=tuple(scaled)), path)


@pytest.mark.parametrize("place", [0.2, 0.5, 0.999])
def test_any_byte_that_changes_on_the_disk_fails_the_merge(
    place: float, make_model: Any, make_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_model(dtype=torch.bfloat16)
    adapter, out = make_adapter(base), base.parent / "out"
    finish = Writer.finish

    def damaged(writer: Any) -> Any:
        done = finish(writer)
        data = bytearray(writer.path.read_bytes())
        data[int(place * len(data))] ^= 1
        writer.path.write_bytes(data)
        return done

    monkeypatch.setattr(Writer, "finish", damaged)

    with pytest.raises(CheckFailed):
        run(base, adapter, out)

    assert not list(out.glob("*.safetensors"))


def test_a_shard_that_is_wrong_takes_the_next_one_with_it(
    make_model: Any, make_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_model(shard="20KB", dtype=torch.bfloat16)
    adapter, out = make_adapter(base), base.parent / "out"
    finish, names = Writer.finish, []

    def damaged(writer: Any) -> Any:
        done = finish(writer)
        names.append(writer.path.name)
        if len(names) == 2:
            with writer.path.open("r+b") as file:
                file.seek(-1, 2)
                (last,) = file.read(1)
                file.seek(-1, 2)
                file.write(bytes([last ^ 1]))
        return done

    monkeypatch.setattr(Writer, "finish", damaged)

    with pytest.raises(CheckFailed):
        run(base, adapter, out)

    # The first is kept for the next attempt; the third was complete, but is nothing any more.
    assert [path.name for path in out.iterdir() if path.name in names] == names[:1]
    assert len(names) == 2
    assert not list(out.glob(".*.partial"))


@given(
    data=st.binary(min_size=1, max_size=300),
    place=st.floats(0, 1, exclude_max=True),
    other=st.integers(1, 255),
)
def test_one_wrong_byte_changes_the_checksum(data: bytes, place: float, other: int) -> None:
    changed = bytearray(data)
    changed[int(place * len(data))] ^= other

    one, two = (continued(0, memoryview(bytes(some))) for some in (data, changed))

    assert one != two


@given(words=st.lists(st.integers(0, 70_000), max_size=3), rest=st.integers(0, 7))
def test_a_checksum_does_not_depend_on_the_pieces(words: list[int], rest: int) -> None:
    """They are of whole words, but for the last; a checksum's own pieces have 32,768."""
    sizes = [*(8 * some for some in words), rest]
    data = np.random.default_rng(1).bytes(sum(sizes))
    value, at = 0, 0
    for size in sizes:
        value = continued(value, memoryview(data)[at : at + size], at)
        at += size

    assert value == continued(0, memoryview(data))


def test_a_change_that_rounding_swallows_is_reported(make_model: Any, make_adapter: Any) -> None:
    base = make_model(dtype=torch.bfloat16)
    adapter = make_adapter(base, target_modules=["q_proj"], lora_alpha=1e-9)

    found = run(base, adapter, base.parent / "out")

    assert "2 of 2 merged tensors equal the base" in found["findings"][0]


class Backwards:
    """A base tensor whose rows come in the wrong order."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def rows(self, *args: Any) -> Any:
        return self._source.rows(*args)[::-1].copy()


def test_base_rows_that_were_read_wrongly_are_caught(
    make_model: Any, make_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Projections are taken of the rows that were merged, so recomputed rows are read again."""
    base = make_model(dtype=torch.bfloat16)
    adapter, right = make_adapter(base), RowMaker._merge

    def backwards(self: Any, output: Any, *rest: Any) -> Any:
        return right(self, replace(output, source=Backwards(output.source)), *rest)

    monkeypatch.setattr(RowMaker, "_merge", backwards)
    with pytest.raises(CheckFailed, match="was written wrongly"):
        run(base, adapter, base.parent / "out")


def test_rows_whose_base_was_not_projected_are_recomputed(
    merged: tuple[OutputShard, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    compare = proof._compare_rows
    monkeypatch.setattr(Sketch, "add", lambda *_: None)
    monkeypatch.setattr(
        proof, "_compare_rows", lambda *args: rows.extend(args[2]) or compare(*args)
    )

    check(*merged)

    shard, _ = merged
    assert len(rows) == sum(output.rows for output in shard.outputs if output.terms)
