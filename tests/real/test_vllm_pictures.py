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
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import vllm_parts
from tests.builds.test_gguf_projector import make_adapter
from tests.fakes.pictured import PICTURED, make_pictured
from tests.fakes.started import weightsmith
from tests.real.test_vllm import started_image, weights_of

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
    program = Path(__file__).with_name("vllm_answers.py")
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
