"""Convert a GGUF file of the llama architecture to a Hugging Face checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from gguf import ReaderTensor, dequantize

from weightsmith.core.errors import InputRefused
from weightsmith.core.values import JsonValue
from weightsmith.models.gguf_facts import count_of, number_of, texts_of, token_id
from weightsmith.models.gguf_reader import GGUFReader
from weightsmith.models.gguf_tokenizer import json_text, tokenizer_files

_GLOBAL_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_TENSORS = {
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
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_ROWS_PER_BLOCK = 4096


def import_gguf(source: Path, out: Path) -> None:
    """Write the model in `source` as a float16 Hugging Face checkpoint to the folder `out`."""
    reader, facts = _open(source)
    try:
        tensors = {_hugging_face_name(tensor.name): tensor for tensor in reader.tensors}
        shape = _Shape.of(facts, tied="lm_head.weight" not in tensors)
        config = _model_config(facts, shape)
        _check_tensors(shape, tensors)
        texts = tokenizer_files(facts, config)
    except KeyError as missing:
        raise InputRefused(
            f"{source.name} has no GGUF key {missing}",
            hint="convert the model again with a current llama.cpp",
        ) from None
    texts["config.json"] = json_text(config)
    texts["generation_config.json"] = json_text(_generation_config(facts, config))
    out.mkdir(parents=True, exist_ok=True)
    _write_weights(out / "model.safetensors", tensors, shape.head)
    for name, text in texts.items():
        (out / name).write_bytes(text.encode())
        (out / name).chmod(0o644)


def _open(source: Path) -> tuple[GGUFReader, Mapping[str, JsonValue]]:
    """Open a GGUF file and return its metadata; raise InputRefused unless it is a valid llama."""
    if not source.is_file():
        raise InputRefused(f"{source} is not a file", hint="give the path of one .gguf file")
    try:
        reader = GGUFReader(source)
        facts = {name: field.contents() for name, field in reader.fields.items()}
    except ValueError as problem:
        raise InputRefused(
            f"{source.name} is not a valid GGUF file: {problem}",
            hint="download the file again and compare its sha256 with the publisher's",
        ) from problem
    architecture = facts.get("general.architecture")
    if architecture != "llama":
        raise InputRefused(
            f"{source.name} has architecture {architecture!r}; only 'llama' can be imported",
            hint="start from the model's original Hugging Face checkpoint instead",
        )
    return reader, facts


def _hugging_face_name(name: str) -> str:
    """Return a GGUF tensor's Hugging Face name; raise InputRefused if Llama has no such tensor."""
    if name in _GLOBAL_TENSORS:
        return _GLOBAL_TENSORS[name]
    match = _LAYER_NAME.fullmatch(name)
    if match is None or match[2] not in _LAYER_TENSORS:
        raise InputRefused(
            f"the GGUF tensor {name!r} does not exist in a plain Llama checkpoint",
            hint="biases, experts and long-context rope factors cannot be imported; "
            "start from the original Hugging Face checkpoint",
        )
    return f"model.layers.{int(match[1])}.{_LAYER_TENSORS[match[2]]}.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """The numbers of a Llama model from which its tensors' shapes follow."""

    hidden: int
    inner: int
    vocabulary: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    tied: bool

    @classmethod
    def of(cls, facts: Mapping[str, JsonValue], *, tied: bool) -> Self:
        """Read them; raises InputRefused for an invalid one, and KeyError for a missing one."""
        heads = count_of(facts, "llama.attention.head_count")
        hidden = count_of(facts, "llama.embedding_length")
        return cls(
            hidden=hidden,
            inner=count_of(facts, "llama.feed_forward_length"),
            vocabulary=len(texts_of(facts, "tokenizer.ggml.tokens")),
            layers=count_of(facts, "llama.block_count"),
            heads=heads,
            kv_heads=count_of(facts, "llama.attention.head_count_kv", heads),
            head=count_of(facts, "llama.attention.key_length", hidden // heads),
            tied=tied,
        )


def _model_config(facts: Mapping[str, JsonValue], shape: _Shape) -> dict[str, JsonValue]:
    """Return the model's config.json."""
    if facts.get("llama.rope.scaling.type", "none") != "none":
        raise InputRefused(
            f"rope scaling {facts['llama.rope.scaling.type']!r} cannot be imported",
            hint="start from the original Hugging Face checkpoint",
        )
    config: dict[str, JsonValue] = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": token_id(facts, "bos"),
        "eos_token_id": token_id(facts, "eos"),
        "head_dim": shape.head,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.inner,
        "max_position_embeddings": count_of(facts, "llama.context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pad_token_id": token_id(facts, "padding"),
        "rms_norm_eps": number_of(facts, "llama.attention.layer_norm_rms_epsilon"),
        "rope_scaling": None,
        "rope_theta": number_of(facts, "llama.rope.freq_base", 10000.0),
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": shape.vocabulary,
    }
    if shape.head % 2:
        raise InputRefused(
            f"the attention head size {shape.head} is odd, but rope needs pairs",
            hint="the file is damaged; convert or download it again",
        )
    if facts.get("llama.rope.dimension_count", shape.head) != shape.head:
        raise InputRefused(
            "rope covers only part of each attention head, which a Llama configuration cannot "
            "express",
            hint="start from the original Hugging Face checkpoint",
        )
    return config


def _check_tensors(shape: _Shape, tensors: Mapping[str, ReaderTensor]) -> None:
    """Refuse a file whose tensors do not match its configuration."""
    if shape.layers > len(tensors):
        raise InputRefused(
            f"{shape.layers} layers need more than {len(tensors)} tensors",
            hint="the file is incomplete or was not made from a plain Llama model",
        )
    expected = dict(_expected_shapes(shape))
    found = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in tensors.items()}
    wrong = [
        f"{name} should be {expected.get(name, 'absent')}, but is {found.get(name, 'absent')}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
    if wrong:
        raise InputRefused(
            f"{len(wrong)} tensors do not match the GGUF's configuration: {wrong[0]}",
            hint="the file is incomplete or was not made from a plain Llama model",
        )


def _expected_shapes(shape: _Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = shape.hidden, shape.inner
    queries, keys = shape.heads * shape.head, shape.kv_heads * shape.head
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    yield "model.embed_tokens.weight", (shape.vocabulary, hidden)
    yield "model.norm.weight", (hidden,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocabulary, hidden)
    for number in range(shape.layers):
        for part, sides in layer.items():
            yield f"model.layers.{number}.{part}.weight", sides


def _generation_config(
    facts: Mapping[str, JsonValue], config: Mapping[str, JsonValue]
) -> dict[str, JsonValue]:
    """Return generation_config.json with the end token and, if set, the end-of-turn token."""
    ends = [config["eos_token_id"], token_id(facts, "eot")]
    ends = [token for token in dict.fromkeys(ends) if token is not None]
    return {
        "_from_model_config": True,
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": config["pad_token_id"],
    }


def _write_weights(path: Path, tensors: Mapping[str, ReaderTensor], head: int) -> None:
    """Write the tensors in float16, sorted by name, one block of rows at a time."""
    header: dict[str, JsonValue] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in sorted(tensors):
        shape = [int(n) for n in reversed(tensors[name].shape)]
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            for block in _float16_blocks(name, tensors[name], head):
                file.write(block.tobytes())
    path.chmod(0o644)


def _float16_blocks(
    name: str, tensor: ReaderTensor, head: int
) -> Iterator[npt.NDArray[np.float16]]:
    """Yield a tensor's rows in the checkpoint's order, in small blocks."""
    half = head // 2
    rotated = name.endswith(("q_proj.weight", "k_proj.weight"))
    rows = 2 * half if rotated else _ROWS_PER_BLOCK
    for start in range(0, len(tensor.data), rows):
        # Overflow is checked below, so suppress numpy's warning.
        with np.errstate(over="ignore"):
            exact = _exact(name, tensor, start, rows)
            block = exact.astype(np.dtype("<f2"))
        if not np.isfinite(block).all():
            raise InputRefused(f"{name} overflows float16", hint="start from a bfloat16 checkpoint")
        if rotated:
            # For rope, llama.cpp pairs neighbouring rows of a head; Hugging Face pairs the halves.
            block = block.reshape(half, 2, -1).swapaxes(0, 1).reshape(2 * half, -1)
        yield block


def _exact(name: str, tensor: ReaderTensor, start: int, rows: int) -> npt.NDArray[np.float32]:
    try:
        found: npt.NDArray[np.float32] = dequantize(
            tensor.data[start : start + rows], tensor.tensor_type
        )
    except NotImplementedError:
        raise InputRefused(
            f"{name} has the unsupported type {tensor.tensor_type.name}",
            hint="start from the original Hugging Face checkpoint",
        ) from None
    return found
