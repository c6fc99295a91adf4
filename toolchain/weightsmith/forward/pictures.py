"""Questions with pictures: prepared by the model's own processor, answered by transformers.

Pillow decodes them here, in a builder without a network, and nowhere else. Each question's pixels
are prepared when its batch is answered, because those of a thousand pictures take ten gigabytes.
Its tokens are counted once before.

They are answered by transformers' own `generate`, which knows each model's positions and masks of
pictures: our cache counts positions in one dimension, and Qwen's have three.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weightsmith.core.errors import InputRefused
from weightsmith.core.jobs import SeenPicture
from weightsmith.forward.libraries import reading, stay_offline

if TYPE_CHECKING:
    from PIL.Image import Image

    from weightsmith.forward.kinds import Tokenizer

ACTIVATIONS = 20
"""Bytes that a tower takes for one byte of pixels: SigLIP has 40 KB for a patch of 2.3 KB."""
_FORMATS = ("PNG", "JPEG", "WEBP")
_one_at_a_time = threading.Lock()
"""A tokenizer of Rust refuses two threads that set how it pads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """A question with pictures, as the model's processor has prepared it."""

    tokens: Sequence[int]
    marks: Mapping[str, Sequence[int]]
    """Name -> one number for each token, such as which ones stand for a picture."""
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    """Name of each tensor of pixels -> its dimensions behind the first, at which batches join."""
    size: int
    """Bytes of these tensors."""
    load: Callable[[], Mapping[str, torch.Tensor]]
    """Prepares the pixels again."""


def load_processor(root: Path, tokenizer: Tokenizer) -> Any:
    """Return what prepares a model's pictures, with a tokenizer that words its questions.

    From local files only. Raises InputRefused if transformers cannot load it.
    """
    stay_offline()
    from transformers import AutoProcessor

    hint = (
        "check preprocessor_config.json and processor_config.json; the builder has Pillow, and no"
        " torchvision, which the processors of a few models need"
    )
    with reading(f"the picture processor of {root}", hint), _without_videos():
        found: Any = AutoProcessor.from_pretrained(
            root, local_files_only=True, trust_remote_code=False
        )
        if not hasattr(found, "image_processor"):
            raise ValueError("it is none of pictures and text")
        found.tokenizer = tokenizer
    return found


@contextmanager
def _without_videos() -> Iterator[None]:
    """Let processors do without the part for videos, which needs torchvision and num2words."""
    import transformers
    from transformers.models.auto import video_processing_auto
    from transformers.models.smolvlm import processing_smolvlm

    # Where they look for the part, and for what the part must be.
    with (
        _patched(processing_smolvlm, "num2words", _NoVideos),
        _patched(video_processing_auto, "AutoVideoProcessor", _NoVideos),
        _patched(transformers, "VideoProcessorMixin", _NoVideos),
    ):
        yield


@contextmanager
def _patched(module: Any, name: str, value: object) -> Iterator[None]:
    """Give a module's attribute another value, also one that the module lacks."""
    lacking = object()
    own = module.__dict__.get(name, lacking)
    setattr(module, name, value)
    try:
        yield
    finally:
        if own is lacking:
            delattr(module, name)
        else:
            setattr(module, name, own)


class _NoVideos(dict[str, str]):
    """Stands for a processor's part for videos; processors are written to logs as JSON."""

    @classmethod
    def from_pretrained(cls, *_: object, **__: object) -> _NoVideos:
        return cls()


def sight_of(processor: Any, text: str, folder: Path, pictures: Sequence[SeenPicture]) -> Sight:
    """Return a question as the processor prepares it.

    `text` is rendered by the chat template, with the processor's own marks for pictures. Raises
    InputRefused for a picture that cannot be decoded, or that the processor refuses.
    """

    def prepare() -> Mapping[str, torch.Tensor]:
        images = [_decoded(folder, one) for one in pictures]
        names = ", ".join(one.name for one in pictures)
        hint = "compare the chat template's mark for a picture with the processor's"
        with _one_at_a_time, reading(f"a question with {names}", hint):
            found = processor(
                text=[text], images=[images], add_special_tokens=False, return_tensors="pt"
            )
            return {name: data for name, data in found.items() if torch.is_tensor(data)}

    found = prepare()
    ids = found["input_ids"]
    marks = {name: data for name, data in found.items() if data.shape == ids.shape}
    others = sorted(found.keys() - marks.keys())
    return Sight(
        tokens=ids[0].tolist(),
        marks={
            name: data[0].tolist()
            for name, data in marks.items()
            if name not in ("input_ids", "attention_mask")
        },
        shapes=tuple((name, tuple(found[name].shape[1:])) for name in others),
        size=sum(found[name].nbytes for name in others),
        load=lambda: {name: data for name, data in prepare().items() if name in others},
    )


def _decoded(folder: Path, picture: SeenPicture) -> Image:
    from PIL import Image

    again = "save it again as PNG, JPEG or WebP"
    with (
        reading(f"the picture {picture.name}", again),
        Image.open(folder / picture.file, formats=_FORMATS) as image,
    ):
        if image.size != (picture.width, picture.height):  # before any pixel is decoded
            raise InputRefused(
                f"the picture {picture.name} has {image.size[0]} x {image.size[1]} pixels, and its"
                f" header says {picture.width} x {picture.height}",
                hint=again,
            )
        return image.convert("RGB")


def joined(
    sights: Sequence[Sight], lengths: Sequence[int], width: int, *, left: bool
) -> dict[str, torch.Tensor]:
    """Return what a model is called with beside the tokens of a batch, whose shapes are the same.

    Each text has its length, and is padded to the width, on the left or on the right.
    """
    given = {
        name: torch.tensor(
            [
                [*[0] * before, *one.marks[name], *[0] * (width - before - len(one.tokens))]
                for one, length in zip(sights, lengths, strict=True)
                for before in [width - length if left else 0]
            ]
        )
        for name in sights[0].marks
    }
    loaded = [one.load() for one in sights]
    return given | {name: torch.cat([one[name] for one in loaded]) for name in loaded[0]}


def alike(
    rows: Mapping[int, Sequence[int]], sights: Mapping[int, Sight]
) -> Iterator[dict[int, Sequence[int]]]:
    """Yield the rows whose tensors of pixels can be joined; those without any are apart, too."""

    def shapes(number: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
        return sights[number].shapes if number in sights else ()

    for _, group in groupby(sorted(rows, key=shapes), key=shapes):
        yield {number: rows[number] for number in group}
