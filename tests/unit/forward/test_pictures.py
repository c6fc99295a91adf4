"""Answers about pictures, read from files, are those of the whole model in transformers."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForImageTextToText
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils.import_utils import DummyObject
from weightsmith.core.errors import InputRefused
from weightsmith.core.jobs import SeenPicture
from weightsmith.evaluating.pictures import UNPREPARED
from weightsmith.forward.greedy import Questions
from weightsmith.forward.libraries import load_tokenizer
from weightsmith.forward.pictures import load_processor, sight_of

from tests.fakes.drawn import draw
from tests.fakes.pictured import make_pictured
from tests.unit.forward.answering import MOST, walked

pytestmark = pytest.mark.skipif(find_spec("PIL") is None, reason="the merge builder's Pillow")
SEEING = [
    "Gemma3ForConditionalGeneration",
    "Idefics3ForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "SmolVLMForConditionalGeneration",
]
WORDS = ("Which colour is this?", "Say it, please.", "And now?")
SIZES = ((56, 56), (56, 56), (84, 42))


def asked_of(model: Path, folder: Path) -> tuple[Any, Questions, list[str]]:
    processor = load_processor(model, load_tokenizer(model))
    sights, texts = {}, []
    for number, (words, size) in enumerate(zip(WORDS, SIZES, strict=True)):
        seen = drawn(folder, number, size)
        parts = [{"type": "image"}, {"type": "text", "text": words}]
        texts.append(
            processor.tokenizer.apply_chat_template(
                [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
            )
        )
        sights[number] = sight_of(processor, texts[-1], folder, [seen])
    prompts = [one.tokens for one in sights.values()]
    return processor, Questions(prompts=prompts, ends=[2], most=MOST, sights=sights), texts


def drawn(folder: Path, number: int, size: tuple[int, int]) -> SeenPicture:
    colour = ((200, 30, 30), (30, 30, 220), (20, 160, 40))[number]
    path = draw(folder / f"{number}.png", "square", colour, size)
    return SeenPicture(file=path.name, name=path.name, width=size[0], height=size[1])


def by_transformers(model: Path, processor: Any, texts: list[str], folder: Path) -> list[list[int]]:
    from PIL import Image

    network = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    found = []
    for number, text in enumerate(texts):
        with Image.open(folder / f"{number}.png") as image:
            given = processor(
                text=[text], images=[[image]], return_tensors="pt", add_special_tokens=False
            )
        made = network.generate(**given, do_sample=False, max_new_tokens=MOST, pad_token_id=3)
        row = made[0, given["input_ids"].shape[1] :].tolist()
        found.append(row[: row.index(2) + 1] if 2 in row else row)
    return found


@pytest.mark.slow
@pytest.mark.grid(3)
@pytest.mark.parametrize("architecture", SEEING)
def test_they_are_those_of_the_whole_model(tmp_path: Path, architecture: str) -> None:
    """Of several sizes, together and apart, with right and wrong drafts and without any."""
    model = make_pictured(tmp_path / "model", architecture)
    processor, asked, texts = asked_of(model, tmp_path)
    right = by_transformers(model, processor, texts, tmp_path)

    (plain,) = walked(model, asked, ())
    assert plain.tokens == right
    asked.drafts = {0: right[0], 1: [*right[1][:3], 9, 9], 2: [9]}
    first, second = walked(model, asked, (), ())
    assert first.tokens == second.tokens == right


@pytest.mark.slow
def test_a_picture_changes_what_is_said(tmp_path: Path) -> None:
    model = make_pictured(tmp_path / "model", SEEING[4])
    processor = load_processor(model, load_tokenizer(model))
    text = "<|vision_start|><|image_pad|><|vision_end|>Which colour?"
    seen = [drawn(tmp_path, number, (56, 56)) for number in (0, 1, 0)]
    sights = {n: sight_of(processor, text, tmp_path, [one]) for n, one in enumerate(seen)}
    prompts = [one.tokens for one in sights.values()]
    asked = Questions(prompts=prompts, ends=[2], most=1, sights=sights)

    (said,) = walked(model, asked, ())
    red, blue, again = said.margins
    assert red == pytest.approx(again, abs=1e-4)
    assert red != pytest.approx(blue, abs=1e-4)


def test_a_picture_that_is_not_what_its_header_said_is_refused(tmp_path: Path) -> None:
    model = make_pictured(tmp_path / "model", SEEING[0])
    processor = load_processor(model, load_tokenizer(model))
    seen = drawn(tmp_path, 0, (56, 56))
    whole = (tmp_path / seen.file).read_bytes()
    for data, words in (
        (whole[:60], "cannot be loaded"),
        (b"GIF89a" + whole[6:], "cannot be loaded"),
        ((tmp_path / drawn(tmp_path, 1, (40, 56)).file).read_bytes(), "40 x 56 pixels"),
    ):
        (tmp_path / seen.file).write_bytes(data)
        with pytest.raises(InputRefused, match=words) as caught:
            sight_of(processor, "<start_of_image>", tmp_path, [seen])
        assert seen.name in caught.value.message


def test_a_model_without_a_processor_is_refused(tmp_path: Path) -> None:
    model = make_pictured(tmp_path / "model", SEEING[0])
    (model / "preprocessor_config.json").unlink()
    (model / "processor_config.json").write_text(json.dumps({"processor_class": "NoProcessor"}))
    with pytest.raises(InputRefused, match="picture processor"):
        load_processor(model, load_tokenizer(model))


def test_the_processors_that_need_more_than_pillow_are_known() -> None:
    """Of all models that transformers knows for pictures and text."""
    lacking = set[str]()
    for kind, architecture in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items():
        found = IMAGE_PROCESSOR_MAPPING_NAMES.get(kind)
        name = PROCESSOR_MAPPING_NAMES.get(kind)
        if (isinstance(found, dict) and "pil" not in found) or (
            name and isinstance(getattr(transformers, name), DummyObject)
        ):
            lacking.add(architecture)
    assert lacking == UNPREPARED
