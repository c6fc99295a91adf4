"""A GGUF file is planned with the types that llama-quantize gives to its tensors."""

import math
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
from weightsmith.models.facts import ModelFacts
from weightsmith.quantizers import formats
from weightsmith.quantizers.gguf_pass import read_targets
from weightsmith.quantizers.gguf_types import FILE_TYPES
from weightsmith.steps.sizes import estimated_bytes

from tests.fakes.configs import config
from tests.fakes.ggufs import program

pytestmark = pytest.mark.builders
MODELS = {
    "small and tied": config("LlamaForCausalLM", 16, 2048, 32, 8, tie_word_embeddings=True),
    "as many keys as queries": config("LlamaForCausalLM", 9, 1024, 16, 16, intermediate_size=2816),
    "odd rows": config("LlamaForCausalLM", 24, 896, 14, 2, intermediate_size=4864),
    "odd rows of one matrix": config("LlamaForCausalLM", 8, 1024, 16, 4, intermediate_size=2720),
    "eight experts": config("MixtralForCausalLM", 32, 512, 8, 2, num_local_experts=8),
    "more experts": config("MixtralForCausalLM", 4, 512, 8, 4, num_local_experts=16),
    "of 70 B": config("LlamaForCausalLM", 80, 512, 8, 1, intermediate_size=512, vocab_size=1024),
    "Falcon": config("FalconForCausalLM", 32, 512, 8, 8, intermediate_size=2048, vocab_size=1024),
    "GPTBigCode": config(
        "GPTBigCodeForCausalLM", 24, 512, 4, 1, intermediate_size=2048, vocab_size=1024
    ),
    "some layers without experts": config(
        "Glm4MoeForCausalLM", 8, 512, 8, 2, head_dim=64, n_routed_experts=8, n_shared_experts=1,
        moe_intermediate_size=256, first_k_dense_replace=3, vocab_size=1024,
    ),
    "Nemotron-H": config(
        "NemotronHForCausalLM", 24, 512, 8, 2, model_type="nemotron_h", head_dim=64,
        hybrid_override_pattern="M-M-*-" * 4, vocab_size=1024, intermediate_size=1536,
        n_routed_experts=8,
    ),
    "linear attention": config(
        "Qwen3_5ForCausalLM", 24, 512, 8, 2, head_dim=64, vocab_size=1024, intermediate_size=1536,
        layer_types=[*["linear_attention"] * 3, "full_attention"] * 6, linear_num_key_heads=4,
        linear_num_value_heads=8, linear_key_head_dim=64, linear_value_head_dim=64,
    ),
    "an embedding for each layer": config(
        "Gemma3nForCausalLM", 8, 512, 8, 2, head_dim=64, vocab_size=4096, intermediate_size=1536,
        hidden_size_per_layer_input=64, tie_word_embeddings=True,
    ),
}  # fmt: skip
AS = {"FalconForCausalLM": "falcon", "GPTBigCodeForCausalLM": "starcoder"}
JOINED = frozenset(AS)
UNGATED = JOINED | {"NemotronHForCausalLM"}
STATES = {"ssm_in": (2320, 512), "ssm_out": (512, 1024)}
"""The matrices of a layer that has states."""
PLANNED = [row.name for row in FILE_TYPES.values() if not row.direct and row.name != "q1_0"]


@pytest.mark.parametrize("name", MODELS)
def test_every_type_is_planned_as_llama_quantize_has_it(name, tmp_path):
    facts = ModelFacts.of(MODELS[name])
    shapes = shapes_of(facts)
    write_hole(tmp_path / "model.gguf", facts, shapes)
    write_importance(tmp_path / "imatrix.gguf", shapes)
    size = 2 * sum(math.prod(shape) for shape in shapes.values())

    off = {}
    for format_ in PLANNED:
        bytes_ = sum(
            math.prod(shapes[tensor]) // block * block_bytes
            for tensor, kind in targets(tmp_path, format_).items()
            for block, block_bytes in [gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]]
        )
        off[format_] = estimated_bytes(size, formats()[format_], facts) / bytes_ - 1

    assert {format_: share for format_, share in off.items() if abs(share) > 0.01} == {}


def shapes_of(facts: ModelFacts) -> dict[str, tuple[int, ...]]:
    """Return llama.cpp's names of a decoder's matrices, and their shapes."""
    shape, parts, name = facts.shape, facts.matrices, facts.architecture
    hidden, inner, width = shape.hidden, shape.intermediate, shape.heads * shape.head_dim
    keys, kinds = shape.kv_heads * shape.head_dim, "*-"
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (shape.vocab, hidden)}
    if not facts.tied_embeddings and name not in JOINED:
        found["output.weight"] = (shape.vocab, hidden)
    if name == "Gemma3nForCausalLM":
        found["per_layer_token_embd.weight"] = (shape.vocab, 64 * shape.layers)
    for layer in range(shape.layers):
        if shape.layer_types:
            kinds = "*-" if shape.layer_types[layer] == "full_attention" else "L-"
        if name == "NemotronHForCausalLM":
            kinds = MODELS["Nemotron-H"]["hybrid_override_pattern"][layer]
        own: dict[str, tuple[int, ...]] = {**STATES} if kinds == "M" else {}
        if "L" in kinds:
            own["attn_qkv"] = (1024, hidden)
        if "*" in kinds and name in JOINED:
            own["attn_qkv"] = (width + 2 * keys, hidden)
        elif "*" in kinds:
            own |= {"attn_q": (width, hidden), "attn_k": (keys, hidden), "attn_v": (keys, hidden)}
        if "*" in kinds:
            own["attn_output"] = (hidden, width)
        sparse = parts.experts and layer >= shape.layers - parts.sparse_layers
        networks: dict[str, tuple[tuple[int, ...], int]] = {"": ((), inner)}
        if sparse:
            each = parts.expert_width or inner
            networks = {"_exps": ((parts.experts,), each)}
            networks |= {"_shexp": ((), each)} if parts.shared_experts else {}
        for end, (stack, size) in networks.items() if "-" in kinds else ():
            own |= {} if name in UNGATED else {f"ffn_gate{end}": (*stack, size, hidden)}
            own[f"ffn_up{end}"] = (*stack, size, hidden)
            own[f"ffn_down{end}"] = (*stack, hidden, size)
        found |= {f"blk.{layer}.{part}.weight": size for part, size in own.items()}
    return found


def write_hole(path: Path, facts: ModelFacts, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write a file whose header is a model's, and whose tensors are a hole."""
    shape, experts = facts.shape, facts.matrices.experts
    writer = gguf.GGUFWriter(path, AS.get(facts.architecture, "llama"))
    writer.add_block_count(shape.layers)
    writer.add_context_length(512)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(shape.vocab)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
    for name, size in shapes.items():
        writer.add_tensor_info(name, size, np.dtype(np.float16), 2 * math.prod(size))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 64 + 2 * sum(map(math.prod, shapes.values())))


def write_importance(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write an importance matrix, of ones, as llama-imatrix does."""
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 8)
    for name, size in shapes.items():
        stack = size[0] if len(size) > 2 else 1
        writer.add_tensor(f"{name}.in_sum2", np.ones((stack, size[-1]), np.float32))
        writer.add_tensor(f"{name}.counts", np.ones((stack, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def targets(folder: Path, format_: str) -> dict[str, str]:
    """Return the types that llama-quantize says it would give."""
    row = FILE_TYPES[format_]
    measured = row.takes_imatrix and row.named_bits < 5
    command = [program("llama-quantize"), "--dry-run"]
    command += ["--imatrix", "imatrix.gguf"] if measured else []
    command += ["model.gguf", format_.upper()]
    ran = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return {one.name: one.target for one in read_targets((ran.stdout + ran.stderr).splitlines())}
