"""Base and adapters read as the merged checkpoint: the bytes that the merge writes.

`conftest.py` compares both after every merge of this folder's tests.
"""

import pytest
import torch
from weightsmith.core.errors import InputRefused
from weightsmith.core.merge_options import Merge
from weightsmith.merging.blocks import Settings
from weightsmith.merging.engine import MergeRequest, merge
from weightsmith.merging.virtual import opened
from weightsmith.models.tensors import CheckpointTensors

EXACT = Settings(device="cpu", workers=1)


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
