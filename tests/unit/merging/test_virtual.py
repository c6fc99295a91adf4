"""Base and adapters read as the merged checkpoint: the bytes that the merge writes.

`conftest.py` compares both after every merge of this folder's tests.
"""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from weightsmith.core.errors import InputRefused
from weightsmith.core.merge_options import Merge
from weightsmith.merging import blocks
from weightsmith.merging.blocks import Settings
from weightsmith.merging.engine import MergeRequest, merge
from weightsmith.merging.plan import make_plan
from weightsmith.merging.virtual import VirtualCheckpoint, opened
from weightsmith.models.tensors import CheckpointTensors

from tests.unit.merging.conftest import stored

EXACT = Settings(device="cpu", workers=1)


def test_rows_may_be_read_in_any_order(make_model, make_adapter):
    base = make_model(dtype=torch.bfloat16)
    adapter, out = make_adapter(base), base.parent / "out"
    merge(MergeRequest(base=base, adapters=((adapter, 1.0),), out=out))
    name = "model.layers.0.mlp.down_proj.weight"
    written = np.frombuffer(stored(out, name), np.uint8).reshape(32, -1)

    checkpoint = VirtualCheckpoint(make_plan(base, [(adapter, 1.0)]), EXACT)
    tensor = checkpoint.tensor(name)

    for first, count in ((30, 2), (0, 32), (7, 1), (3, 20), (0, 1)):
        np.testing.assert_array_equal(tensor.read(first, count), written[first : first + count])
    checkpoint.close()


def test_what_the_merge_refuses_is_refused(make_model, make_adapter):
    base = make_model()
    adapter = make_adapter(base)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    damaged = min(name for name in tensors if "layers.0.mlp.up_proj.lora_A" in name)
    tensors[damaged][0, 0] = float("nan")
    save_file(tensors, file)
    checkpoint = VirtualCheckpoint(make_plan(base, [(adapter, 1.0)]), EXACT)
    tensor = checkpoint.tensor("model.layers.0.mlp.up_proj.weight")

    with pytest.raises(InputRefused, match=r"not finite|NaN"):
        tensor.read(0, 4)
    checkpoint.close()


def read_back(folder, base, adapter, digests, order):
    with opened(folder, base, ((adapter, 1.0),), Merge(), digests):
        tensors = CheckpointTensors(folder)
        for name in order(sorted(tensors.names)):
            tensors.array(name)


@pytest.mark.parametrize("order", [list, reversed, lambda names: names[::2], lambda _: ()])
def test_what_is_computed_again_is_compared_with_what_was_merged(make_model, make_adapter, order):
    base = make_model(dtype=torch.bfloat16, shard="20KB")
    adapter, out = make_adapter(base), base.parent / "out"
    adapters = ((adapter, 1.0),)
    made = merge(MergeRequest(base=base, adapters=adapters, out=out, headers_only=True))
    digests = {shard["file"]: shard["sha256"] for shard in made["shards"]}

    read_back(out, base, adapter, digests, order)

    another = make_adapter(base, "another", seed=9)
    with pytest.raises(InputRefused, match="not those that were merged") as found:
        read_back(out, base, another, digests, order)
    assert "build again" in found.value.hint


def test_a_single_wrong_weight_is_noticed(make_model, make_adapter, monkeypatch):
    base = make_model(dtype=torch.bfloat16)
    adapter, out = make_adapter(base), base.parent / "out"
    adapters = ((adapter, 1.0),)
    made = merge(MergeRequest(base=base, adapters=adapters, out=out, headers_only=True))
    digests = {shard["file"]: shard["sha256"] for shard in made["shards"]}
    right = blocks.RowMaker._merge

    def wrong(self, output, sketch, addition, offset, first, count):
        rows = right(self, output, sketch, addition, offset, first, count)
        if first == 0 and "layers.1.mlp.up_proj" in output.name:
            rows.view(np.uint16)[0, 0] ^= 1
        return rows

    monkeypatch.setattr(blocks.RowMaker, "_merge", wrong)
    with pytest.raises(InputRefused, match="not those that were merged"):
        read_back(out, base, adapter, digests, list)
