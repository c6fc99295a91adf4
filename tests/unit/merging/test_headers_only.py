"""A merge that writes no weights: the same digests, and the same bytes where they are read."""

from __future__ import annotations

import itertools
import random
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from weightsmith.core.errors import CheckFailed, InputRefused
from weightsmith.core.merge_options import Merge
from weightsmith.merging import blocks, engine, virtual
from weightsmith.merging.shards import ShardMaker
from weightsmith.merging.virtual import InOrder, opened
from weightsmith.models.safetensors import open_checkpoint
from weightsmith.models.tensors import CheckpointTensors
from weightsmith.validating.result import Validation
from weightsmith.validating.validate import ValidationRequest, validate

from tests.unit.merging.oracle import run


def merged(base: Path, adapters: tuple, name: str, *, headers_only: bool) -> tuple[Path, dict]:
    out = base.parent / name
    return out, run(base, adapters, out, headers_only=headers_only)


@pytest.fixture(params=["one file", "shards", "cast and patched"])
def both(request, make_model, make_adapter):
    """Base and adapters, and what merging them says with files and without."""
    base = make_model(dtype=torch.bfloat16, shard="20KB" if request.param == "shards" else "5GB")
    options = {"trainable_token_indices": [3, 5]} if "patched" in request.param else {}
    adapters = ((make_adapter(base, **options), 1.0), (make_adapter(base, "second", seed=2), 0.5))
    adapters = adapters[: 1 if options else 2]
    return (
        base,
        adapters,
        merged(base, adapters, "written", headers_only=False),
        merged(base, adapters, "unwritten", headers_only=True),
    )


def test_digests_and_findings_are_those_of_the_files(both):
    _, _, (_, written), (folder, headers_only) = both

    for kept in ("files", "shards", "findings", "tensors", "repairs"):
        assert headers_only[kept] == written[kept]
    empty = list(folder.glob("*.safetensors"))
    assert len(empty) == len(written["shards"])
    assert all(path.stat().st_size < 8192 for path in empty)


def test_the_largest_weights_of_computed_matrices_are_recorded(both):
    base, _, (folder, written), (_, headers_only) = both
    before, after = (CheckpointTensors(one) for one in (base, folder))
    changed = {
        name
        for name in after.names
        if len(after.info(name).shape) == 2
        and not np.array_equal(before.array(name), after.array(name))
    }

    assert headers_only["largest"].keys() >= changed
    for name, most in headers_only["largest"].items():
        assert most == np.abs(after.f32(name)).max(), name
    assert "largest" not in written


def test_the_largest_weights_are_those_of_all_blocks(both, monkeypatch):
    base, adapters, _, (_, whole) = both
    monkeypatch.setattr(engine, "BLOCK", 64)

    _, pieces = merged(base, adapters, "pieces", headers_only=True)

    assert pieces["largest"] == whole["largest"]


def test_data_are_computed_when_they_are_read(both):
    base, adapters, (written, _), (folder, _) = both

    with opened(folder, base, adapters, Merge()):
        ours, theirs = CheckpointTensors(folder), CheckpointTensors(written)
        for name in theirs.names:
            np.testing.assert_array_equal(ours.array(name), theirs.array(name), name)
        for info in open_checkpoint(folder).tensors.values():
            assert info == open_checkpoint(written).tensors[info.name]


def test_zeros_are_never_read_for_weights(both):
    *_, (folder, _) = both
    tensors = CheckpointTensors(folder)

    with pytest.raises(InputRefused, match="no data"):
        tensors.array(min(tensors.names))


@pytest.mark.grid(6)
def test_no_library_loads_it(both):
    import transformers

    *_, (folder, _) = both
    with pytest.raises(Exception, match=r"variant"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def wrong_rows(monkeypatch):
    """Of one tensor."""
    right = blocks.RowMaker._merge

    def wrong(self, output, *rest):
        rows = right(self, output, *rest)
        if "layers.1.mlp.up_proj" in output.name:
            rows[:, 0] += 1
        return rows

    return lambda: monkeypatch.setattr(blocks.RowMaker, "_merge", wrong)


def test_a_wrong_computation_is_noticed(make_model, make_adapter, wrong_rows):
    base = make_model(dtype=torch.bfloat16)
    adapters = ((make_adapter(base), 1.0),)
    wrong_rows()
    with pytest.raises(CheckFailed, match=r"layers\.1\.mlp\.up_proj"):
        merged(base, adapters, "unwritten", headers_only=True)
    assert not list((base.parent / "unwritten").glob("*.safetensors"))


KILLED = """
import os, signal, sys
from pathlib import Path
from weightsmith.merging.engine import MergeRequest, merge
from weightsmith.merging.shards import HeaderOnlyShard
base, adapter, out = map(Path, sys.argv[1:])
finish, done = HeaderOnlyShard.finish, []
def finish_two(shard):
    if len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(shard)
    return finish(shard)
HeaderOnlyShard.finish = finish_two
merge(MergeRequest(base=base, adapters=((adapter, 1.0),), out=out, headers_only=True))
"""


@pytest.mark.parametrize("damaged", [False, True])
def test_a_killed_run_goes_on_at_the_file_that_it_had_reached(
    make_model, make_adapter, monkeypatch, damaged
):
    base = make_model(dtype=torch.bfloat16, shard="20KB")
    adapter = make_adapter(base)
    _, whole = merged(base, ((adapter, 1.0),), "whole", headers_only=True)
    out = base.parent / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, base, adapter, out], check=False)
    assert done.returncode == -signal.SIGKILL
    names = [shard["file"] for shard in whole["shards"]]
    if damaged:
        (out / names[0]).write_bytes(b"")
    computed, right = [], ShardMaker.compute

    def compute(maker, shard, *rest):
        computed.append(shard.name)
        return right(maker, shard, *rest)

    monkeypatch.setattr(ShardMaker, "compute", compute)
    _, again = merged(base, ((adapter, 1.0),), "out", headers_only=True)

    assert computed == [*names[: 1 if damaged else 0], *names[2:]]
    for kept in ("files", "shards", "findings", "tensors", "repairs", "largest"):
        assert again[kept] == whole[kept]


@pytest.mark.grid(6)
def test_the_proof_is_that_of_the_files(both):
    base, adapters, (written, _), (folder, _) = both

    def proven(merged: Path) -> Validation:
        return validate(ValidationRequest(base=base, adapters=adapters, merged=merged))

    with opened(folder, base, adapters, Merge()):
        found = proven(folder)

    assert found.passed
    unlike = {"seconds": 0, "peak_rss_bytes": 0}
    assert replace(found, **unlike) == replace(proven(written), **unlike)


@pytest.mark.grid(6)
def test_a_wrong_row_is_found_by_the_proof(both, wrong_rows):
    base, adapters, _, (folder, _) = both
    wrong_rows()
    with opened(folder, base, adapters, Merge()):
        assert not validate(ValidationRequest(base=base, adapters=adapters, merged=folder)).passed


@pytest.mark.parametrize("order", [list, reversed, lambda names: names[::2], lambda _: ()])
def test_what_is_computed_again_is_compared_with_what_was_merged(make_model, make_adapter, order):
    base = make_model(dtype=torch.bfloat16, shard="20KB")
    folder, made = merged(base, ((make_adapter(base), 1.0),), "out", headers_only=True)
    digests = {shard["file"]: shard["sha256"] for shard in made["shards"]}

    def read_back(adapter):
        with opened(folder, base, ((adapter, 1.0),), Merge(), digests):
            tensors = CheckpointTensors(folder)
            for name in order(sorted(tensors.names)):
                tensors.array(name)

    read_back(base.parent / "adapter")
    another = make_adapter(base, "another", seed=9)
    with pytest.raises(InputRefused, match="not those that were merged") as found:
        read_back(another)
    assert "build again" in found.value.hint


FIRST, SIZE = 100, 1000
DATA = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)


def passing(taken: list[bytes], read: list[int]) -> InOrder:
    def some(start: int) -> np.ndarray:
        read.append(start)
        return DATA[start - FIRST :][:70]

    return InOrder(FIRST, FIRST + SIZE, some, lambda data: taken.append(bytes(data)))


def see(order: InOrder, spans: list[tuple[int, int]]) -> None:
    for start, end in spans:
        order.see(FIRST + start, DATA[start:end])


@pytest.mark.parametrize("seed", range(20))
def test_pieces_in_any_order_that_overlap_and_leave_gaps(seed):
    chosen = random.Random(seed)
    spans = [(start, start + chosen.randint(1, 60)) for start in range(0, SIZE, 40)]
    chosen.shuffle(spans)
    taken, read = [], []

    order = passing(taken, read)
    see(order, spans)
    order.finish()

    assert b"".join(taken) == DATA.tobytes()


def test_what_is_read_in_order_is_not_read_again():
    taken, read = [], []
    order = passing(taken, read)
    see(order, list(itertools.pairwise(range(0, SIZE + 1, 50))))
    order.finish()

    assert (b"".join(taken), read) == (DATA.tobytes(), [])


def test_nothing_waits_for_long(monkeypatch):
    monkeypatch.setattr(virtual, "_EARLY", 100)
    taken, read = [], []
    order = passing(taken, read)
    see(order, [(900, 1000), (700, 800)])
    order.finish()

    assert b"".join(taken) == DATA.tobytes()
    assert len(taken) > 2
    assert order._held == 0


def test_readers_of_several_threads(monkeypatch):
    monkeypatch.setattr(virtual, "_WAITING", 1)
    taken, read = [], []
    order = passing(taken, read)
    halves = [[(at, at + 10) for at in range(start, SIZE, 20)] for start in (0, 10)]
    threads = [threading.Thread(target=see, args=(order, spans)) for spans in halves]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    order.finish()

    assert b"".join(taken) == DATA.tobytes()


def test_an_error_is_raised_at_the_end_and_blocks_nobody():
    def broken(_data: memoryview) -> None:
        raise OSError("full")

    order = InOrder(FIRST, FIRST + SIZE, lambda start: DATA[start - FIRST :], broken)
    see(order, [(0, 10)] * 50)
    with pytest.raises(OSError, match="full"):
        order.finish()


def test_an_empty_file():
    order = InOrder(0, 0, lambda _: DATA, lambda _: None)
    order.finish()
