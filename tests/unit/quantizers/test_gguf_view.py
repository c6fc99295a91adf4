"""A GGUF file's tensors by the checkpoint's names, whole and a few rows at a time."""

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file
from weightsmith.quantizers.gguf_file import open_view

from tests.unit.quantizers.conftest import finish

HEADS, KEY_HEADS, HIDDEN = 4, 2, 64
NAMES = {
    "model.layers.0.self_attn.q_proj.weight": ("blk.0.attn_q.weight", HEADS),
    "model.layers.0.self_attn.k_proj.weight": ("blk.0.attn_k.weight", KEY_HEADS),
    "model.layers.0.mlp.up_proj.weight": ("blk.0.ffn_up.weight", 0),
}


def permuted(weights, heads):
    """LlamaModel.permute of llama.cpp's conversion/llama.py."""
    pairs = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weights.shape)


@pytest.fixture
def written(tmp_path):
    random = np.random.default_rng(0)
    # Whole numbers up to 127, one of them 127 in each block, are exact in Q8_0.
    heights = {name: (heads or 6) * 16 for name, (_, heads) in NAMES.items()}
    made = {
        name: random.integers(-100, 100, (rows, HIDDEN)).astype(np.float32)
        for name, rows in heights.items()
    }
    for values in made.values():
        values[:, ::32] = 127
    save_file(made, tmp_path / "model.safetensors")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    for name, (stored, heads) in NAMES.items():
        values = permuted(made[name], heads) if heads else made[name]
        packed = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(stored, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    finish(writer)
    return tmp_path, made


@pytest.mark.parametrize(("start", "stop"), [(0, 16), (5, 23), (31, 32)])
def test_rows_are_the_checkpoints(written, start, stop):
    folder, made = written
    view = open_view(folder / "x.gguf", folder)

    assert view.names == set(made)
    for name, values in made.items():
        np.testing.assert_array_equal(view.tensor(name), values)
        np.testing.assert_array_equal(view.rows(name, start, stop), values[start:stop])
