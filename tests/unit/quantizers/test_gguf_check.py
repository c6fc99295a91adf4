"""A finished GGUF file read back: good ones are described, faulty ones refused.

Also its tensors by the names of the checkpoint, whole and a few rows at a time.
"""

import json

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.numpy import save_file
from weightsmith.core.errors import CheckFailed
from weightsmith.quantizers import of_format
from weightsmith.quantizers.gguf import output_file
from weightsmith.quantizers.gguf_file import open_view

from tests.unit.quantizers.conftest import finish, request

TEMPLATE = "{{ messages[0].content }}"
TENSORS = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


def write_gguf(
    path, *, file_type=7, template=TEMPLATE, tokens=32, names=None, basename=None, half=False
):
    writer = GGUFWriter(path, "llama")
    if basename:
        writer.add_basename(basename)
    writer.add_file_type(file_type)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(tokens)])
    if template:
        writer.add_chat_template(template)
    for name in names or ("token_embd.weight", "output_norm.weight", "output.weight"):
        if name == "output_norm.weight":
            writer.add_tensor(name, np.ones(64, dtype=np.float32))
        elif half or file_type == 1:
            writer.add_tensor(name, np.zeros((32, 64), dtype=np.float16))
        else:
            rows = np.zeros((32, 64 // 32 * 34), dtype=np.uint8)
            writer.add_tensor(name, rows, raw_dtype=GGMLQuantizationType.Q8_0)
    finish(writer)


def write_checkpoint(model, *, names=TENSORS, template=TEMPLATE):
    header = {name: {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]} for name in names}
    blob = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(len(blob).to_bytes(8, "little") + blob)
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))


@pytest.fixture
def asked(tmp_path):
    made = request(tmp_path)
    write_checkpoint(made.model)
    return made


def check(made):
    return of_format(made.format.name).check(made)


def test_a_good_file_is_described(asked):
    write_gguf(output_file(asked))

    facts = check(asked)

    assert facts["types"] == {"F32": 1, "Q8_0": 2}
    assert facts["tokens"] == 32
    # (2 x 32 x 64 x 8.5 + 64 x 32) bits / (2 x 32 x 64 + 64) elements
    assert facts["bits_per_weight"] == round((4096 * 8.5 + 64 * 32) / 4160, 3)
    assert facts["warnings"] == []


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda _: b"", "valid GGUF"),
        (lambda data: data[:-100], r"valid GGUF|bytes"),
        (lambda data: data + b"x" * 5000, "tensors end at"),
        # The scale of the last block is not a number.
        (lambda data: data[:-34] + b"\x00\x7e" + data[-32:], r"\(Q8_0\) has NaN or infinite scal"),
    ],
)
def test_a_damaged_file_is_refused(asked, damage, says):
    path = output_file(asked)
    with pytest.raises(CheckFailed, match="no GGUF file found"):
        check(asked)
    write_gguf(path)
    path.write_bytes(damage(path.read_bytes()))

    with pytest.raises(CheckFailed, match=says):
        check(asked)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"file_type": 1}, "file type 1"),
        ({"basename": "tmp"}, r"general\.basename"),
        ({"template": "{{ 'other' }}"}, "chat template differs"),
        ({"template": None}, "chat template is missing"),
        ({"tokens": 31}, "31 tokens but 32 embedding rows"),
    ],
)
def test_another_model_is_refused(asked, other, says):
    write_gguf(output_file(asked), **other)

    with pytest.raises(CheckFailed, match=says):
        check(asked)


def test_a_missing_tensor_is_refused_and_a_tied_output_may_be_stored_once(asked):
    write_gguf(output_file(asked), names=("token_embd.weight", "output_norm.weight"))
    assert check(asked)["tensors"] == 2

    write_checkpoint(asked.model, names=(*TENSORS, "model.layers.0.mlp.up_proj.weight"))
    with pytest.raises(CheckFailed, match="has 2 tensors, but the checkpoint has 4"):
        check(asked)


def test_a_template_file_wins_over_the_tokenizers_and_none_is_a_warning(asked):
    (asked.model / "chat_template.jinja").write_text("{{ 'file' }}")
    write_gguf(output_file(asked), template="{{ 'file' }}")
    assert check(asked)["chat_template"] is True

    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (asked.model / name).unlink()
    write_gguf(output_file(asked), template=None)
    assert "chat template" in check(asked)["warnings"][0]


def test_weights_beyond_float16_are_refused(tmp_path):
    made = request(tmp_path, "f16")
    write_checkpoint(made.model)
    write_gguf(output_file(made), file_type=1)
    assert check(made)["types"]["F16"] == 2
    blob = bytearray(output_file(made).read_bytes())
    blob[-64:-62] = b"\x00\x7c"  # infinity, inside the last tensor
    output_file(made).write_bytes(blob)

    with pytest.raises(CheckFailed, match="overflows float16"):
        check(made)


def test_a_matrix_left_unquantized_is_refused(asked):
    write_gguf(output_file(asked), names=("token_embd.weight", "output_norm.weight"), half=True)

    with pytest.raises(CheckFailed, match=r"left unquantized, such as token_embd\.weight"):
        check(asked)


def test_fallbacks_are_listed_with_their_reason(tmp_path):
    made = request(tmp_path, "q4_k_m")
    write_checkpoint(made.model)
    write_gguf(output_file(made), file_type=15)

    facts = check(made)

    assert facts["fallbacks"][0] == {
        "tensor": "token_embd.weight",
        "type": "Q8_0",
        "reason": "rows of 64 weights are not a multiple of 256",
    }
    assert "2 of 3 tensors" in facts["warnings"][0]


def test_the_checkpoints_tokens_pass_and_others_are_refused(asked):
    vocab = {f"t{i}": i for i in range(32)}
    write_gguf(output_file(asked))
    for names in (vocab, {("wrong" if i == 7 else t): i for t, i in vocab.items()}):
        told = {"model": {"vocab": names, "merges": []}, "added_tokens": []}
        (asked.model / "tokenizer.json").write_text(json.dumps(told))
        if names is vocab:
            assert check(asked)["tokens"] == 32

    with pytest.raises(CheckFailed, match="token 7 is 't7' in the file, but 'wrong'"):
        check(asked)


def test_parts_of_one_model_are_read_together(asked):
    for number, names in enumerate(
        (("token_embd.weight", "output.weight"), ("output_norm.weight",))
    ):
        write_gguf(asked.output / f"demo-0000{number + 1}-of-00002.gguf", names=names)

    facts = check(asked)

    assert facts["tensors"] == 3
    assert len(facts["files"]) == 2
    (asked.output / "demo-00002-of-00002.gguf").unlink()
    with pytest.raises(CheckFailed, match="not all the parts"):
        check(asked)


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
