"""Models that see, in vLLM on a CPU: they read pictures, and see what transformers sees.

One architecture in an image with an adapter; the others as the image's packages read a checkpoint,
because an engine of 1.9 GB is packed for each image.
"""

import base64
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import vllm_parts
from tests.builds.test_gguf_projector import make_adapter
from tests.fakes.seeing import TEXT, add_tokens, make_seeing, publish_names
from tests.fakes.started import weightsmith
from tests.real.test_vllm import started_image, weights_of


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


def make_pictured(folder: Path, architecture: str) -> Path:
    """Write a model that reads pictures, with its published tensor names; return its folder."""
    needs = _NEEDS[architecture]
    first = int(TEXT["vocab_size"])
    ids = {name: first + place for place, name in enumerate(needs.tokens)}
    told = {f"{name}_{end}": number for name, number in ids.items() for end in ("id", "index")}
    make_seeing(folder, architecture, also={**told, **needs.model}, **needs.eyes)
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


PROBE = Path(__file__).with_name("picture_probe.py")
Ask = Callable[[Mapping[str, Any]], Any]
IN_AN_IMAGE = "Qwen3VLForConditionalGeneration"
GEMMA, SMOL = "Gemma3ForConditionalGeneration", "SmolVLMForConditionalGeneration"
ANSWERING = [name for name in PICTURED if name not in {IN_AN_IMAGE, GEMMA, SMOL}]
COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 220)}
MOST = 0.1
"""Nats between bfloat16 in vLLM and float32 in transformers, of the most likely tokens."""

pytestmark = [
    pytest.mark.real,
    pytest.mark.builders,
    pytest.mark.vllm,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the engine's packages are for it"),
]


def test_the_image_sees_what_transformers_sees(tmp_path: Path) -> None:
    base = make_pictured(tmp_path / "base", IN_AN_IMAGE)
    make_adapter(base, tmp_path / "adapter")
    recipe = {
        "name": "eyes", "version": "1.0.0", "base": {"source": "./base"},
        "adapters": [{"source": "./adapter"}], "targets": ["vllm"],
        "serve": {"max_model_len": 256, "max_num_seqs": 2, "memory": "4GB"},
        "image": {"repository": "localhost/eyes"}, "validate": {"enabled": False},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    weightsmith("build", "--recipe", tmp_path / "recipe.yaml", "--runner", "local", "--dist",
                tmp_path / "dist", "--layout", tmp_path / "image",
                store=store_with_engine(tmp_path / "store"))  # fmt: skip

    record = json.loads((tmp_path / "dist/eyes/1.0.0/vllm/build.json").read_text())
    seen = {check["name"]: check["seen"] for check in record["checks"]}
    assert seen["picture"] == "answered"
    assert record["image"]["takes_pictures"]
    model = weights_of(tmp_path / "image", tmp_path)
    pictures = [picture(tmp_path / f"{name}.png", name) for name in COLOURS]
    with started_image(tmp_path / "image") as client:
        answers = [ask(client, path) for path in pictures]
    check(model, pictures, answers)


def check(
    model: Path, pictures: Sequence[Path], answers: Sequence[tuple[dict[int, float], list[int]]]
) -> None:
    """Hold what vLLM says of each picture against transformers: the same, and not of both."""
    assert max(errors(model, pictures, answers)) < MOST
    first, second = (told for told, _ in answers)
    assert any(abs(first[token] - second.get(token, 0)) > MOST for token in first)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """The image's vLLM, which answers a line by a line."""
    program = Path(__file__).with_name("picture_engine.py")
    with vllm_parts.answering(program, tmp_path_factory.mktemp("engine")) as ask:
        yield ask


@pytest.mark.parametrize("architecture", ANSWERING)
def test_vllm_sees_what_transformers_sees(engine: Ask, tmp_path: Path, architecture: str) -> None:
    model = make_pictured(tmp_path / "model", architecture)
    pictures = [picture(tmp_path / f"{name}.png", name) for name in COLOURS]
    check(model, pictures, read(engine, model, pictures))


def test_on_a_cpu_the_tokens_of_gemmas_pictures_see_only_those_before(
    engine: Ask, tmp_path: Path
) -> None:
    model = make_pictured(tmp_path / "model", GEMMA)
    pictures = [picture(tmp_path / f"{name}.png", name) for name in COLOURS]
    answers = read(engine, model, pictures)
    one_way = max(errors(model, pictures, answers))
    assert one_way < MOST
    assert one_way < max(errors(model, pictures, answers, "both ways")) / 2


def test_smolvlm_lacks_a_package(engine: Ask, tmp_path: Path) -> None:
    model = make_pictured(tmp_path / "model", SMOL)
    assert "num2words" in read(engine, model, [])


def read(engine: Ask, model: Path, pictures: Sequence[Path]) -> Any:
    """Return what the image's vLLM says of each picture, as `ask`, or its error."""
    told = engine({"model": str(model), "pictures": [str(path) for path in pictures]})
    if isinstance(told, str):
        return told
    return [({int(token): value for token, value in row.items()}, ids) for row, ids in told]


def errors(
    model: Path,
    pictures: Sequence[Path],
    answers: Sequence[tuple[dict[int, float], list[int]]],
    *words: str,
) -> list[float]:
    """Return how far transformers is from the likeliest tokens, in nats."""
    found = []
    for (told, ids), path in zip(answers, pictures, strict=True):
        assert len(told) == 5
        right = by_transformers(model, path, ids, *words)
        found += [abs(value - right[token]) for token, value in told.items()]
    return found


def store_with_engine(store: Path) -> Path:
    held = vllm_parts.packages().parents[5]
    (store / "results").mkdir(parents=True)
    (store / "results" / held.name).symlink_to(held)
    return store


def picture(path: Path, name: str) -> Path:
    """Write a square of a colour that darkens to the right, as PNG (RFC 2083)."""
    row = b"\0" + bytes(part * (56 - x) // 56 for x in range(56) for part in COLOURS[name])
    header = struct.pack(">2I5B", 56, 56, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(row * 56)), (b"IEND", b""))
    written = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + written)
    return path


def ask(client: httpx.Client, path: Path) -> tuple[dict[int, float], list[int]]:
    """Return the likeliest next tokens after a picture, and the prompt's tokens."""
    address = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": address}},
        {"type": "text", "text": "Which colour is this?"},
    ]
    body = {
        "model": "eyes", "messages": [{"role": "user", "content": content}], "max_tokens": 1,
        "temperature": 0, "logprobs": True, "top_logprobs": 5, "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }  # fmt: skip
    told = client.post("/v1/chat/completions", json=body).raise_for_status().json()
    (first,) = told["choices"][0]["logprobs"]["content"]
    rows = {int(row["token"].rpartition(":")[2]): row["logprob"] for row in first["top_logprobs"]}
    return rows, told["prompt_token_ids"]


def by_transformers(model: Path, path: Path, ids: Sequence[int], *words: str) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-S", PROBE, model, path, json.dumps(ids), *words],
        env={"PATH": os.environ["PATH"], "HOME": str(path.parent),
             "PYTHONPATH": str(vllm_parts.packages())},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
