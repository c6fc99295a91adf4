"""vLLM itself reads what is rendered for it, has the planned cache, and serves all of it at once.

Needs a vLLM for CPUs: the program that WEIGHTSMITH_VLLM names, else `vllm` on the PATH.
"""

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import yaml

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny" / "base"
LENGTH, REQUESTS, ANSWER, BLOCK = 500, 6, 16, 32
PROGRAM = os.environ.get("WEIGHTSMITH_VLLM") or shutil.which("vllm") or ""
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not PROGRAM, reason="no vLLM: set WEIGHTSMITH_VLLM to its program"),
]

# Parses as `vllm serve` does, and starts nothing.
PARSE = """
import json, sys
from vllm.entrypoints.cli.serve import ServeSubcommand
names = json.loads(sys.argv[1])
def told(args): print("TOLD", json.dumps({name: getattr(args, name) for name in names}))
ServeSubcommand.cmd = staticmethod(told)
ServeSubcommand.validate = lambda self, args: None
sys.argv = ["vllm", "serve", *sys.argv[2:]]
from vllm.entrypoints.cli.main import main
main()
"""


def rendered(folder: Path, *flags: str) -> dict:
    words = ("render", "--model", TINY, "--target", "vllm", "--name", "planned", "--out", folder)
    done = subprocess.run(
        [sys.executable, "-m", "toolchain.cli.program", *map(str, words), *flags, "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)["plan"]


def environment(folder: Path) -> dict[str, str]:
    own = json.loads((folder / "serving.json").read_text())["env"]
    return {**own, "PATH": os.environ["PATH"], "HOME": str(folder), "OMP_NUM_THREADS": "2"}


@pytest.mark.parametrize(
    "flags",
    [
        ("--max-model-len", "512", "--max-num-seqs", "4"),
        ("--gpu", "nvidia-l4", "--set", "serve.kv_cache_dtype=fp8"),
        ("--gpu", "nvidia-h100-80gb", "--gpu-count", "2", "--max-num-seqs", "8"),
        ("--gpu", "nvidia-l4", "--set", "serve.extra.enable_prefix_caching=false"),
    ],
)
def test_its_own_command_line_reads_every_setting(tmp_path, flags):
    rendered(tmp_path / "r", *flags)
    path = tmp_path / "r" / "vllm.yaml"
    settings = yaml.safe_load(path.read_text())
    names = {key.replace("-", "_"): value for key, value in settings.items()}
    python = Path(PROGRAM).with_name("python")
    done = subprocess.run(
        [python, "-c", PARSE, json.dumps([n for n in names if n[:3] != "no_"]), "--config", path],
        env=environment(tmp_path / "r"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    (line,) = [row for row in done.stdout.splitlines() if row.startswith("TOLD")] or [done.stderr]
    told = json.loads(line.removeprefix("TOLD "))

    assert told.pop("served_model_name") == [names.pop("served_model_name")]
    assert told == {name: value for name, value in names.items() if name[:3] != "no_"}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(plan, client, log) of a server at its planned limits."""
    folder = tmp_path_factory.mktemp("vllm")
    wished = ("--max-model-len", str(LENGTH), "--max-num-seqs", str(REQUESTS))
    plan = rendered(folder / "r", *wished)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = yaml.safe_load((folder / "r" / "vllm.yaml").read_text())
    moved = {**settings, "model": str(TINY), "host": "127.0.0.1", "port": port}
    (folder / "v.yaml").write_text(yaml.safe_dump(moved))
    with (folder / "log").open("w") as stream:
        process = subprocess.Popen(
            [PROGRAM, "serve", "--config", folder / "v.yaml"],
            env=environment(folder / "r") | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    log = folder / "log"
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
            wait(client, process, log)
            yield plan, client, log
    finally:
        process.terminate()
        process.wait()


def wait(client, process, log) -> None:
    for _ in range(1200):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


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

    with ThreadPoolExecutor(REQUESTS) as pool:
        answers = list(pool.map(ask, range(REQUESTS)))

    assert [answer.status_code for answer in answers] == [200] * REQUESTS
    assert {answer.json()["usage"]["total_tokens"] for answer in answers} == {LENGTH}
    metrics = client.get("/metrics").text
    assert re.search(r"^vllm:num_preemptions_total\{.*\} 0\.0$", metrics, re.MULTILINE)
