"""Folders that transformers 5 saves lack settings; their GGUF files compute what they computed."""

import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    ExaoneMoeConfig,
    FalconConfig,
    FalconH1Config,
    GPT2Config,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    GraniteMoeHybridConfig,
    MiniMaxM2Config,
    NemotronHConfig,
    PreTrainedTokenizerFast,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
)

from tests.fakes.ggufs import IDS, SHAPE, made, make_random, program

pytestmark = pytest.mark.builders
CHUNKS, LENGTH = 2, 64
TEXT = "The quick brown fox jumps over the lazy dog. " * 40
PARTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FOURFOLD = {**SHAPE, **IDS, "intermediate_size": 256}
STATES = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
NEMOTRON = {
    **SHAPE, **IDS, "head_dim": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1,
    "ssm_state_size": 16,
}  # fmt: skip
LINEAR = {
    **SHAPE, **IDS, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
TURNED = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
SAVED = {
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=128, **IDS),
    "gpt_bigcode": GPTBigCodeConfig(n_embd=64, n_layer=2, n_head=4, n_positions=128, **IDS),
    "gpt_neox": GPTNeoXConfig(**SHAPE, **IDS),
    "falcon": FalconConfig(**FOURFOLD),
    "falcon, own heads": FalconConfig(**FOURFOLD, multi_query=False),
    "falcon, new": FalconConfig(**FOURFOLD, new_decoder_architecture=True, num_kv_heads=2),
    "falcon_h1": FalconH1Config(**SHAPE, **IDS, **STATES, mamba_d_ssm=128),
    "cohere2": Cohere2Config(**SHAPE, **IDS),
    "minimax_m2": MiniMaxM2Config(
        **SHAPE, **IDS, head_dim=16, num_local_experts=4, num_experts_per_tok=2
    ),
    "exaone_moe": ExaoneMoeConfig(
        **SHAPE, **IDS, **PARTS, head_dim=16, num_shared_experts=1, num_nextn_predict_layers=1
    ),
    "granitemoehybrid": GraniteMoeHybridConfig(
        **SHAPE, **IDS, **STATES, num_local_experts=4, num_experts_per_tok=2,
        shared_intermediate_size=32, layer_types=["mamba", "attention"],
    ),
    "nemotron_h": NemotronHConfig(**NEMOTRON, layers_block_type=["mamba", "attention", "mlp"]),
    "nemotron_h, experts": NemotronHConfig(
        **NEMOTRON, n_routed_experts=4, moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32, layers_block_type=["mamba", "attention", "moe"],
    ),
    "qwen3_next": Qwen3NextConfig(**LINEAR, **PARTS, shared_expert_intermediate_size=32),
    "qwen3_5": Qwen3_5TextConfig(**LINEAR, rope_parameters={**TURNED, "mrope_section": [1, 1, 0]}),
}  # fmt: skip


@pytest.mark.grid(5)
@pytest.mark.parametrize("name", SAVED)
def test_llama_cpp_computes_what_transformers_does(name, tmp_path, pieces):
    config = SAVED[name]
    config.vocab_size = 272
    model = make_random(tmp_path / "model", config, pieces, torch.float32)
    (file,) = made(model, tmp_path / "out", "f32")

    tokens, found = log_probabilities(file, tmp_path)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = network(torch.from_numpy(tokens)).logits.double()
    wanted = torch.log_softmax(logits, -1).numpy()[:, LENGTH // 2 : -1]

    # llama.cpp stores 16 bits of each number. A wrong setting gives 0.005 and more.
    assert (np.exp(wanted) * (wanted - found)).sum(-1).max() < 1e-4


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """Return a folder with a tokenizer of pieces of bytes, as GPT-2's, of 272 tokens at most."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=272,
        special_tokens=["<unk>", "<s>", "</s>"],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    made.train_from_iterator([TEXT], trainer)
    folder = tmp_path_factory.mktemp("pieces")
    PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def log_probabilities(file: Path, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of some chunks, and those of the next one behind their second halves.

    Layout: llama.cpp's tools/perplexity/perplexity.cpp, `log_softmax` and `_logits_`.
    """
    (folder / "text").write_text(TEXT)
    words = ("-f", folder / "text", "-c", LENGTH, "--chunks", CHUNKS, "-t", 1, "-fit", "off")
    command = [program("llama-perplexity"), "-m", file, *words, "--save-all-logits", "logits"]
    subprocess.run([*map(str, command)], check=True, capture_output=True, cwd=folder)
    data = (folder / "logits").read_bytes()
    length, vocab, chunks = struct.unpack("<3i", data[8:20])
    tokens = np.frombuffer(data, "<i4", chunks * length, 20).reshape(chunks, length)
    rows = np.frombuffer(data, "<u2", offset=20 + tokens.nbytes).reshape(chunks, -1, vocab + 4)
    scales = np.ascontiguousarray(rows[..., :4]).view("<f4")
    return tokens.astype(np.int64), scales[..., :1] * rows[..., 4:] + scales[..., 1:]
