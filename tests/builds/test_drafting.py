"""A llama.cpp image that drafts: what it accepts, and greedy text as without drafts."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml
from weightsmith.building.wiring import cache_folder
from weightsmith.oci.layout import read_layout
from weightsmith.outside.toolset import toolset_folder

from tests.fakes.drafting import deepened
from tests.fakes.started import free_port, started, weightsmith
from tests.paths import ROOT

TINY = ROOT / "examples" / "tiny"
TARGET = "llamacpp-q8_0"
pytestmark = [pytest.mark.builders, pytest.mark.full]  # in memory: test_speculative_in_memory.py


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a build whose image drafts."""
    home = tmp_path_factory.mktemp("drafting")
    deepened(TINY / "base", home / "base")
    recipe = {
        "name": "drafting", "version": "1.0.0", "base": {"source": "./base"},
        "evaluate": {"data": str(TINY / "eval-a.jsonl"), "metric": "contains", "max_drop": 0.5,
                     "max_tokens": 16},
        "targets": [TARGET], "image": {"repository": "drafting"},
        "serve": {"max_model_len": 512, "max_num_seqs": 2,
                  "speculative": {"method": "draft", "draft": str(TINY / "base"), "tokens": 3}},
        "bench": {"concurrency": 1, "prompt_tokens": 16, "output_tokens": 16},
    }  # fmt: skip
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    weightsmith(
        "build", "--recipe", home / "recipe.yaml", "--runner", "local", "--dist", home / "dist",
        store=home / "store",
    )  # fmt: skip
    return home / "dist" / "drafting" / "1.0.0" / TARGET


def test_acceptance_and_speed_are_recorded(built: Path) -> None:
    record = json.loads((built / "build.json").read_text())
    [seen] = [check["seen"] for check in record["checks"] if check["name"] == "drafts"]
    found = record["bench"]["drafts"]
    accepted, _, drafted, *_ = seen.split()

    assert int(accepted) > 0.8 * int(drafted) > 0
    assert found["verdict"] in {"pay", "do not pay", "not shown"}  # it depends on the machine
    assert "as long as a token without" in found["reason"]  # so both counters were read
    assert found["reason"] in (built / "report.md").read_text()


def test_greedy_text_is_the_same_without_drafts(built: Path, tmp_path: Path) -> None:
    settings = unpack(built / "image", tmp_path)
    with served(settings, tmp_path / "with") as client:
        texts, counted = asked(client), drafts(client)
    with served(settings | {"LLAMA_ARG_SPEC_TYPE": "none"}, tmp_path / "bare") as client:
        plain, none = asked(client), drafts(client)

    assert texts == plain
    assert counted > 0 == none


def unpack(layout: Path, folder: Path) -> dict[str, str]:
    """Unpack an image's models; return its server's settings with their place."""
    image = read_layout(layout)
    for layer in image.layers:
        with tarfile.open(fileobj=io.BytesIO(b"".join(layer.open()))) as archive:
            members = [one for one in archive if one.name.startswith("models/")]
            archive.extractall(folder, members, filter="data")
    told = dict(line.partition("=")[::2] for line in image.config["Env"])
    return {
        key: value.replace("/models/", f"{folder}/models/")
        for key, value in told.items()
        if key.startswith("LLAMA_ARG_")
    }


@contextmanager
def served(settings: dict[str, str], log: Path) -> Iterator[httpx.Client]:
    program, port = toolset_folder(cache_folder(), "llamacpp") / "app" / "llama-server", free_port()
    here = {"LLAMA_ARG_HOST": "127.0.0.1", "LLAMA_ARG_PORT": str(port), "LLAMA_ARG_THREADS": "1"}
    with started([str(program)], {**os.environ, **settings, **here}, port, log) as client:
        yield client


def asked(client: httpx.Client) -> list[str]:
    found = []
    for line in (TINY / "eval-a.jsonl").read_text().splitlines()[:8]:
        message = {"role": "user", "content": json.loads(line)["prompt"]}
        body = {"messages": [message], "temperature": 0, "max_tokens": 24}
        answer = client.post("/v1/chat/completions", json=body).json()
        found.append(answer["choices"][0]["message"]["content"])
    return found


def drafts(client: httpx.Client) -> int:
    """How many tokens the server drafted, by its own counter."""
    name = "llamacpp:spec_decode_num_draft_tokens_total "
    lines = client.get("/metrics").text.splitlines()
    return sum(int(line.removeprefix(name)) for line in lines if line.startswith(name))
