"""Small random models that see, of every architecture that is quantized here."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.fakes.decoders import add_tokenizer

TEXT = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32,
    "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip
_TOWER = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
_QWEN = {
    "depth": 1,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 2,
    "out_hidden_size": 128,
}
_SECTIONS = {"rope_type": "default", "mrope_section": [4, 6, 6]}
_KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Gemma3ForConditionalGeneration": ("gemma3", {}, _TOWER),
    "Idefics3ForConditionalGeneration": ("idefics3", {"model_type": "llama"}, _TOWER),
    "LlavaNextForConditionalGeneration": (
        "llava_next", {"model_type": "llama"}, {**_TOWER, "model_type": "clip_vision_model"}
    ),
    "Llama4ForConditionalGeneration": (
        "llama4",
        {"num_local_experts": 4, "intermediate_size_mlp": 256, "interleave_moe_layer_step": 2},
        {**_TOWER, "intermediate_size": 256, "vision_output_dim": 64, "projector_input_dim": 64,
         "projector_output_dim": 64},
    ),
    "Mistral3ForConditionalGeneration": (
        "mistral3", {"model_type": "mistral"}, {**_TOWER, "model_type": "pixtral", "head_dim": 32}
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        "qwen2_5_vl", {"rope_scaling": _SECTIONS}, {**_QWEN, "fullatt_block_indexes": [0]}
    ),
    "Qwen2VLForConditionalGeneration": (
        "qwen2_vl", {"rope_scaling": _SECTIONS},
        {"depth": 1, "embed_dim": 64, "hidden_size": 128, "num_heads": 2},
    ),
    "Qwen3VLForConditionalGeneration": (
        "qwen3_vl", {"rope_scaling": _SECTIONS},
        {**_QWEN, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    ),
    "Qwen3VLMoeForConditionalGeneration": (
        "qwen3_vl_moe",
        {"rope_scaling": _SECTIONS, "num_experts": 4, "num_experts_per_tok": 2,
         "moe_intermediate_size": 256, "norm_topk_prob": True},
        {**_QWEN, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    ),
    "SmolVLMForConditionalGeneration": (
        "smolvlm", {"model_type": "llama", "architectures": ["VLlama3ForCausalLM"]}, _TOWER
    ),
}  # fmt: skip
"""Architecture -> model type, and what its text and its tower have beside the others'."""


_AROUND = ("<fake_token_around_image>", "<global-img>", "<row_1_col_1>", "\n", "\n\n")
"""What llama.cpp writes around SmolVLM's pictures, and the tiny tokenizer lacks."""
_SPECIAL = 7
"""Tokens of the tiny example's tokenizer that are no text; the first ones."""


def make_seeing(
    folder: Path, architecture: str, also: dict[str, Any] | None = None, **eyes: Any
) -> Path:
    """Write a model in bfloat16 that has the tiny example's tokenizer; return its folder.

    `also` are further settings of the whole model, `eyes` of its tower.
    """
    kind, text, tower = _KINDS[architecture]
    numbers = [value for value in (also or {}).values() if isinstance(value, int)]
    rows = {"vocab_size": max(TEXT["vocab_size"], 16 + max(numbers, default=0))}
    config = CONFIG_MAPPING[kind](
        text_config={**TEXT, **text, **rows}, vision_config={**tower, **eyes}, **(also or {})
    )
    torch.manual_seed(0)
    network = getattr(transformers, architecture)._from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.06)
    network.save_pretrained(folder)
    if architecture == "Qwen3VLMoeForConditionalGeneration":
        turn_experts(folder)
    add_tokenizer(folder)
    return folder


def turn_experts(folder: Path) -> None:
    """Store stacked experts as [experts, inputs, outputs], as published files do, or back."""
    path = folder / "model.safetensors"
    tensors = {
        name: data.transpose(1, 2).contiguous() if ".experts." in name else data
        for name, data in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


def make_projected(folder: Path, architecture: str) -> Path:
    """Write such a model as the hub has it, with all that llama.cpp's converter needs to see.

    Of Qwen2.5-VL, it finds the projection by the number of layers, which must be above two, and its
    server needs layers that see windows of the picture alone.
    """
    eyes: dict[str, Any] = {"num_hidden_layers": 3, "image_size": 56}
    if "depth" in _KINDS[architecture][2]:
        eyes = {"depth": 3}
    if "fullatt_block_indexes" in _KINDS[architecture][2]:
        eyes["fullatt_block_indexes"] = [1]
    named = _AROUND if architecture == "SmolVLMForConditionalGeneration" else ()
    tokens = {text: int(TEXT["vocab_size"]) + place for place, text in enumerate(named)}
    make_seeing(folder, architecture, tokens, **eyes)
    add_tokens(folder, tokens)
    told = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_seq_length": 1}
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    publish_names(folder, architecture, mute=True)
    return folder


def publish_names(folder: Path, architecture: str, *, mute: bool = False) -> None:
    """Give the tensors their published names; `mute` tokens that are no text of an answer."""
    path, tensors = folder / "model.safetensors", {}
    if mute:
        mute_tokens(folder)
    for name, data in load_file(path).items():
        # transformers reads the published name, and writes its own.
        if architecture in {"Gemma3ForConditionalGeneration", "LlavaNextForConditionalGeneration"}:
            name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
        tensors[name] = data
    save_file(tensors, path, metadata={"format": "pt"})


def mute_tokens(folder: Path) -> None:
    """Let a model with random weights write text alone, and no special tokens."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, data in tensors.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            data[:_SPECIAL] = data[512:] = 0
    save_file(tensors, path, metadata={"format": "pt"})


def add_tokens(folder: Path, tokens: dict[str, int]) -> None:
    """Give the tokenizer special tokens behind its own."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    rows = [{"id": number, "content": text, **plain, "special": text.strip() != ""}
            for text, number in tokens.items()]  # fmt: skip
    tokenizer["added_tokens"] += rows
    path.write_text(json.dumps(tokenizer))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    for row in rows:
        settings["added_tokens_decoder"][str(row.pop("id"))] = row
    path.write_text(json.dumps(settings))
