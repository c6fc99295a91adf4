"""A server that was planned for N requests of L tokens serves N requests of L tokens, at once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from weightsmith.building.wiring import cache_folder
from weightsmith.core.ports import Endpoint
from weightsmith.evaluating.client import ask, find_served
from weightsmith.evaluating.session import ServerSession
from weightsmith.merging.reference import UnmergedModel, prompt_tokens, speaker
from weightsmith.outside.toolset import toolset_folder
from weightsmith.serving.llamacpp_plan import padded

from tests.fakes.command_line import told as weightsmith
from tests.fakes.questioned import BEGUN, ITEM, WORDED, model
from tests.fakes.started import at_once, free_port, started
from tests.paths import ROOT

TINY = ROOT / "examples" / "tiny" / "base"
LENGTH, REQUESTS, ANSWER = 500, 6, 16
pytestmark = pytest.mark.builders


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> tuple[Path, dict]:
    """A GGUF file and what was rendered for it."""
    folder = tmp_path_factory.mktemp("planned")
    made = weightsmith(
        "quantize", "--model", TINY, "--format", "q8_0", "--out", folder / "model",
        "--runner", "local",
    )  # fmt: skip
    weightsmith(
        "render", "--model", folder / "model", "--target", "llamacpp-q8_0", "--name", "planned",
        "--max-model-len", LENGTH, "--max-num-seqs", REQUESTS, "--out", folder / "rendered",
    )  # fmt: skip
    (gguf,) = (
        Path(made["out"]).glob("*.gguf") if Path(made["out"]).is_dir() else [Path(made["out"])]
    )
    return gguf, json.loads((folder / "rendered" / "serving.json").read_text())


@pytest.fixture(scope="module")
def server(planned, tmp_path_factory):
    """The server, started with the rendered environment and nothing else."""
    gguf, config = planned
    port = free_port()
    moved = {
        "LLAMA_ARG_MODEL": str(gguf),
        "LLAMA_ARG_HOST": "127.0.0.1",
        "LLAMA_ARG_PORT": str(port),
        "LLAMA_ARG_THREADS": "1",
    }
    assert set(moved) - {"LLAMA_ARG_THREADS"} <= set(config["env"])
    program = toolset_folder(cache_folder(), "llamacpp") / "app" / "llama-server"
    log = tmp_path_factory.mktemp("log") / "server.log"
    environment = {"PATH": os.environ["PATH"], **config["env"], **moved}
    with started([program, *config["command"]], environment, port, log) as client:
        yield client


def test_it_reports_the_planned_context_and_slots(server, planned):
    _, config = planned
    props = server.get("/props").json()

    assert props["total_slots"] == config["plan"]["max_num_seqs"] == REQUESTS
    assert props["default_generation_settings"]["n_ctx"] == padded(LENGTH)
    assert server.get("/v1/models").json()["data"][0]["id"] == "planned"


def test_all_its_requests_run_at_once_at_full_length(server):
    prompt = [token for number in range(LENGTH - ANSWER) for token in [5 + number % 200]]

    def ask(number: int) -> httpx.Response:
        # No two begin alike, so that none rests on another's cache.
        own = [5 + number, *prompt[1:]]
        body = {"prompt": own, "n_predict": ANSWER, "ignore_eos": True, "temperature": 0}
        return server.post("/completion", json=body)

    answers = at_once(ask, REQUESTS)

    assert [answer.status_code for answer in answers] == [200] * REQUESTS
    for answer in answers:
        told = answer.json()
        assert told["truncated"] is False
        assert (told["tokens_evaluated"], told["tokens_predicted"]) == (LENGTH - ANSWER, ANSWER)
        assert told["stop_type"] == "limit"
    assert len({answer.json()["id_slot"] for answer in answers}) == REQUESTS


def test_one_token_more_than_planned_is_an_error_of_its_own(server):
    asked = server.post("/completion", json={"prompt": [5] * (padded(LENGTH) + 1), "n_predict": 1})

    assert asked.status_code == 400
    assert "exceed" in asked.text
    assert server.get("/health").status_code == 200


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


@pytest.mark.grid(7)
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
