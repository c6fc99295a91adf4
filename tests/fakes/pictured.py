"""Small random models with all that they need to read pictures, of several architectures."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fakes.seeing import TEXT, add_tokens, make_seeing, publish_names


@dataclass(frozen=True)
class _Needs:
    """What a model of an architecture needs besides, before a prompt can have a picture."""

    processor: str
    """transformers' class that prepares prompts, and the one that prepares pictures."""
    pictures: str
    place: str
    """What the chat template writes for a picture."""
    tokens: Mapping[str, str]
    """Name of a token in the configurations -> its text."""
    eyes: Mapping[str, Any]
    """Settings of the tower, of the preparing of pictures and of prompts, and of the model."""
    preparing: Mapping[str, Any]
    prompts: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)


_QWEN_PLACE = "<|vision_start|><|image_pad|><|vision_end|>"
_QWEN_TOKENS = {
    "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>",
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
}  # fmt: skip
_QWEN_SIZE = {"patch_size": 14, "min_pixels": 3136, "max_pixels": 12544}
_IDEFICS_TOKENS = {
    "image_token": "<image>", "fake_image_token": "<fake_token_around_image>",
    "end_of_utterance_token": "<end_of_utterance>", "global_image_token": "<global-img>",
    **{f"row_{y}_col_{x}": f"<row_{y}_col_{x}>" for y in (1, 2) for x in (1, 2)},
}  # fmt: skip
_NEEDS = {
    "Gemma3ForConditionalGeneration": _Needs(
        "Gemma3Processor", "Gemma3ImageProcessor", "<start_of_image>",
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
         "image_token": "<image_soft_token>", **{f"newlines_{n}": "\n" * n for n in range(1, 5)}},
        {"image_size": 56, "num_hidden_layers": 2}, {"size": {"height": 56, "width": 56}},
        {"image_seq_length": 4}, {"mm_tokens_per_image": 4},
    ),
    "Idefics3ForConditionalGeneration": _Needs(
        "Idefics3Processor", "Idefics3ImageProcessor", "<image>", _IDEFICS_TOKENS,
        {"image_size": 56, "num_hidden_layers": 2},
        {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}},
        {"image_seq_len": 4},
    ),
    "Llama4ForConditionalGeneration": _Needs(
        "Llama4Processor", "Llama4ImageProcessorFast", "<|image|>",
        {"boi_token": "<|image_start|>", "eoi_token": "<|image_end|>", "image_token": "<|patch|>",
         "fake_image_token": "<|image|>", "tile_x_token": "<|tile_x_separator|>",
         "tile_y_token": "<|tile_y_separator|>"},
        {"num_hidden_layers": 2}, {"size": {"height": 28, "width": 28}, "max_patches": 4},
        {"patch_size": 14},
    ),
    "LlavaNextForConditionalGeneration": _Needs(
        "LlavaNextProcessor", "LlavaNextImageProcessor", "<image>", {"image_token": "<image>"},
        {"num_hidden_layers": 2},
        {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28},
         "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]},
        {"patch_size": 14, "vision_feature_select_strategy": "default",
         "num_additional_image_tokens": 1},
        {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]},
    ),
    "Mistral3ForConditionalGeneration": _Needs(
        "PixtralProcessor", "PixtralImageProcessor", "[IMG]",
        {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]",
         "image_end_token": "[IMG_END]"},
        {"image_size": 56, "num_hidden_layers": 2},
        {"patch_size": 28, "size": {"longest_edge": 56}},
        {"patch_size": 14, "spatial_merge_size": 2},
    ),
    "Qwen2VLForConditionalGeneration": _Needs(
        "Qwen2VLProcessor", "Qwen2VLImageProcessor", _QWEN_PLACE, _QWEN_TOKENS, {"depth": 2},
        _QWEN_SIZE,
    ),
    "Qwen2_5_VLForConditionalGeneration": _Needs(
        "Qwen2_5_VLProcessor", "Qwen2VLImageProcessor", _QWEN_PLACE, _QWEN_TOKENS,
        {"depth": 2, "fullatt_block_indexes": [1]}, _QWEN_SIZE,
    ),
    "Qwen3VLForConditionalGeneration": _Needs(
        "Qwen3VLProcessor", "Qwen2VLImageProcessor", _QWEN_PLACE, _QWEN_TOKENS,
        {"depth": 2, "deepstack_visual_indexes": [0, 1]},
        {"patch_size": 16, "size": {"shortest_edge": 3136, "longest_edge": 12544}},
    ),
    "SmolVLMForConditionalGeneration": _Needs(
        "SmolVLMProcessor", "SmolVLMImageProcessor", "<image>", _IDEFICS_TOKENS,
        {"image_size": 56, "num_hidden_layers": 2},
        {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}},
        {"image_seq_len": 4},
    ),
}  # fmt: skip
PICTURED = sorted(_NEEDS)
_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' }}"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}{{ 'PLACE' }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""The tiny example's, for contents in parts too, as published models that see have it."""


def make_pictured(folder: Path, architecture: str, **eyes: Any) -> Path:
    """Write a model that reads pictures, with its published tensor names; return its folder.

    `eyes` are further settings of its tower.
    """
    needs = _NEEDS[architecture]
    first = int(TEXT["vocab_size"])
    ids = {name: first + place for place, name in enumerate(needs.tokens)}
    told = {f"{name}_{end}": number for name, number in ids.items() for end in ("id", "index")}
    make_seeing(folder, architecture, also={**told, **needs.model}, **{**needs.eyes, **eyes})
    publish_names(folder, architecture)
    add_tokens(folder, {text: ids[name] for name, text in needs.tokens.items()})
    template = _TEMPLATE.replace("PLACE", needs.place)
    (folder / "chat_template.jinja").write_text(template)
    named = {name: text for name, text in needs.tokens.items() if text.strip()}
    _add(folder / "tokenizer_config.json", processor_class=needs.processor,
         extra_special_tokens=named, chat_template=template)  # fmt: skip
    _add(folder / "preprocessor_config.json", processor_class=needs.processor,
         image_processor_type=needs.pictures, image_mean=[0.5] * 3, image_std=[0.5] * 3,
         **needs.preparing)  # fmt: skip
    _add(folder / "processor_config.json", processor_class=needs.processor, **needs.prompts)
    return folder


def _add(path: Path, **settings: Any) -> None:
    told = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(told | settings))
