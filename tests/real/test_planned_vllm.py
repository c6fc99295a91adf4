"""A vLLM that was planned for N requests of L tokens has the planned cache, and serves them so.

Needs a vLLM for CPUs: the program that WEIGHTSMITH_VLLM names, else `vllm` on the PATH.
"""

import json
import math
import os
import re
import shutil

import httpx
import pytest
import yaml

from tests.fakes.started import at_once, free_port, started, weightsmith
from tests.paths import TINY

LENGTH, REQUESTS, ANSWER, BLOCK = 500, 6, 16, 32
PROGRAM = os.environ.get("WEIGHTSMITH_VLLM") or shutil.which("vllm") or ""
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not PROGRAM, reason="no vLLM: set WEIGHTSMITH_VLLM to its program"),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(plan, client, log) of a server at its planned limits."""
    folder = tmp_path_factory.mktemp("vllm")
    plan = weightsmith(
        "render", "--model", TINY / "base", "--target", "vllm", "--name", "planned",
        "--max-model-len", LENGTH, "--max-num-seqs", REQUESTS, "--out", folder / "r",
    )["plan"]  # fmt: skip
    port = free_port()
    settings = yaml.safe_load((folder / "r" / "vllm.yaml").read_text())
    moved = {**settings, "model": str(TINY / "base"), "host": "127.0.0.1", "port": port}
    (folder / "v.yaml").write_text(yaml.safe_dump(moved))
    argv = [PROGRAM, "serve", "--config", folder / "v.yaml"]
    env = {
        **json.loads((folder / "r" / "serving.json").read_text())["env"],
        "PATH": os.environ["PATH"], "HOME": str(folder / "r"), "OMP_NUM_THREADS": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }  # fmt: skip
    with started(argv, env, port, folder / "log") as client:
        yield plan, client, folder / "log"


def test_its_cache_is_what_was_planned(served):
    plan, _, log = served
    found = re.search(r"KV cache size: ([\d,]+) tokens", log.read_text())
    each = math.ceil(LENGTH / BLOCK)
    blocks = plan["settings"]["kv-cache-memory-bytes"] // (plan["kv_bytes_per_request"] // each)

    assert found is not None
    assert int(found[1].replace(",", "")) == int(blocks / each * LENGTH)


def test_all_its_requests_run_at_once_at_full_length(served):
    _, client, _ = served

    def ask(number: int) -> httpx.Response:
        # No two begin alike, so that none rests on another's cache.
        prompt = [5 + number, *(5 + place % 200 for place in range(LENGTH - ANSWER - 1))]
        body = {"model": "planned", "prompt": prompt, "max_tokens": ANSWER, "ignore_eos": True}
        return client.post("/v1/completions", json={**body, "temperature": 0})

    answers = at_once(ask, REQUESTS)

    assert [answer.status_code for answer in answers] == [200] * REQUESTS
    assert {answer.json()["usage"]["total_tokens"] for answer in answers} == {LENGTH}
    metrics = client.get("/metrics").text
    assert re.search(r"^vllm:num_preemptions_total\{.*\} 0\.0$", metrics, re.MULTILINE)
