"""The replay set of a real image: it answers alike when started again, and others do not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from weightsmith.building.wiring import cache_folder
from weightsmith.outside.toolset import toolset_folder

from tests.conftest import TinyBuild
from tests.fakes.started import free_port, started, weightsmith
from tests.paths import ROOT

TINY = ROOT / "examples" / "tiny"
pytestmark = pytest.mark.builders


@contextmanager
def served(model: Path, log: Path, variant: str = "") -> Iterator[str]:
    """Yield the address of llama.cpp's server with a model, as the image starts it."""
    app, port = toolset_folder(cache_folder(), "llamacpp") / "app", free_port()
    program = app / "cpu" / variant / "llama-server" if variant else app / "llama-server"
    words = [program, "--model", model, "--alias", "tiny-capitals", "--ctx-size", 512, "--jinja"]
    words += ["--parallel", 1, "--threads", 1, "--host", "127.0.0.1", "--port", port]
    with started([*map(str, words)], dict(os.environ), port, log):
        yield f"http://127.0.0.1:{port}"


@pytest.mark.full  # test_replay_in_memory.py proves, and test_replay_faults.py asks real servers
def test_a_started_image_is_proven_and_another_one_is_not(
    tiny_build: TinyBuild, shared_store: Path, tmp_path: Path
) -> None:
    """The base alone, in the same format and under the same name, is asked the same set."""
    image, statement = tiny_build.told["image"], tmp_path / "proof.jsonl"
    ask = ("prove", "--image", image, "--runner", "local")
    proven = weightsmith(*ask, "--statement", statement, store=shared_store)
    weightsmith(
        "quantize", "--model", TINY / "base", "--format", "q4_k_m", "--no-gate", "--out",
        tmp_path / "base.gguf", "--runner", "local", store=shared_store,
    )  # fmt: skip
    with served(tmp_path / "base.gguf", tmp_path / "log") as url:
        other = weightsmith(*ask, "--url", url, store=shared_store, code=4)

    assert proven["verdict"] == "proven"
    assert proven["by_tokens"] == proven["questions"] == 20
    assert proven["explained"] == []  # the same machine computes the same bits
    assert proven["tokens_per_s"] > 0
    assert len(statement.read_text().splitlines()) == 2
    assert other["verdict"] == "different"
    assert other["differences"][0]["excess"] > 0
