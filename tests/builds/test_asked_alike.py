"""The token ids that reach llama.cpp's server are those of the reference answers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from weightsmith.building.wiring import cache_folder
from weightsmith.core.ports import Endpoint
from weightsmith.evaluating.client import ask, find_served
from weightsmith.evaluating.session import ServerSession
from weightsmith.merging.reference import UnmergedModel, prompt_tokens, speaker
from weightsmith.outside.toolset import toolset_folder

from tests.fakes.questioned import BEGUN, ITEM, WORDED, model
from tests.fakes.started import free_port, started, weightsmith

pytestmark = pytest.mark.builders


@dataclass
class Running:
    """A server, and the tokens that the reference is asked with."""

    client: httpx.Client
    expected: list[int]


@pytest.fixture(
    scope="module",
    params=[
        (WORDED, False, False),
        ("", False, False),
        (BEGUN, True, False),
        ("", True, False),
        (WORDED, True, False),
        (WORDED, False, True),
        ("", False, True),
    ],
    ids=[
        "template",
        "plain",
        "template and begin token",
        "plain and begin token",
        "begin token that the template leaves out",
        "template, saved by transformers",
        "plain, saved by transformers",
    ],
)
def running(request: Any, tmp_path_factory: Any) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("alike")
    template, begins, saved = request.param
    root = model(folder / "model", template, begins=begins)
    if saved:  # without `add_bos_token`, as beside an adapter
        speaker(UnmergedModel(model=root)).save_pretrained(root)
    made = weightsmith(
        "quantize", "--model", root, "--format", "f16", "--out", folder / "gguf",
        "--runner", "local",
    )  # fmt: skip
    port = free_port()
    program = toolset_folder(cache_folder(), "llamacpp") / "app" / "llama-server"
    words = ["--model", made["files"][0], "--port", str(port), "--jinja", "--no-ui"]
    words += ["-np", "1", "-t", "1"]
    with started([program, *words], dict(os.environ), port, folder / "log") as client:
        tokenizer = speaker(UnmergedModel(model=root))
        yield Running(client, prompt_tokens(tokenizer, ITEM.messages, root))


@pytest.mark.grid(3)
def test_the_server_gets_the_references_tokens(running: Running) -> None:
    """The server keeps the tokens of its last prompt: all but one of the same ones are reused."""
    url = str(running.client.base_url)
    endpoint = Endpoint(url=url, logs=lambda _: "", alive=lambda: True)
    with ServerSession(endpoint) as session:
        name = running.client.get("/v1/models").json()["data"][0]["id"]
        answer = ask(session, find_served(session, name), ITEM, 1)

    same = {"prompt": running.expected, "n_predict": 1, "cache_prompt": True}
    told = running.client.post("/completion", json=same).json()

    assert answer["prompt_tokens"] == len(running.expected)
    assert told["timings"]["cache_n"] == len(running.expected) - 1
