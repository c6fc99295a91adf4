"""Our overhead of asking a server, and the cost of a report.

The server is a fake that replies after a fixed time, so that the rest is our overhead (and the
machine's). The report has 1,000 questions.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
BODY = json.dumps(
    {"model": "m", "choices": [{"message": {"content": "7481 it is"}, "finish_reason": "stop"}]}
).encode()
MODELS = json.dumps({"data": [{"id": "m"}]}).encode()


async def serve(seconds: float) -> None:
    """Reply to every request after some seconds; print the port on standard output."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().lower().split("\r\n")
                length = next((int(x.split(":")[1]) for x in lines if "content-length" in x), 0)
                await reader.readexactly(length)
                if lines[0].startswith("post"):
                    await asyncio.sleep(seconds)
                body = BODY if lines[0].startswith("post") else MODELS
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def timed(*words: str | Path) -> tuple[float, float, float]:
    """Run a command; return wall seconds, CPU seconds, and peak memory of children in MiB."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "weightsmith", *words], cwd=ROOT, check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    wall = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu, after.ru_maxrss / 1024


def asking(folder: Path, rounds: int, requests: int, seconds: float) -> list[dict[str, Any]]:
    """Time `evaluate` with several numbers of parallel requests, minus the time without any."""
    data, one = folder / "eval.jsonl", folder / "one.jsonl"
    rows = [json.dumps({"prompt": f"q{n}", "expected": "7481"}) for n in range(requests)]
    data.write_text("\n".join(rows))
    one.write_text(rows[0])
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve", str(seconds)], stdout=subprocess.PIPE, text=True
    )
    found = []
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        for at_once in (1, 4, 16):
            count = requests if at_once > 1 else requests // 4
            data.write_text("\n".join(rows[:count]))
            walls, cpus = [], []
            for _ in range(rounds):
                words = ("evaluate", "--url", url, "--concurrency", str(at_once), "--json")
                start_wall, start_cpu, _ = timed(*words, "--data", one)
                wall, cpu, _ = timed(*words, "--data", data)
                walls.append(wall - start_wall + seconds)
                cpus.append((cpu - start_cpu) / (count - 1))
            ideal = count * seconds / at_once
            found.append(
                {
                    "at once": at_once,
                    "requests": count,
                    "server s": round(ideal, 2),
                    "wall s": round(median(walls), 2),
                    "overhead": f"{100 * (median(walls) / ideal - 1):.1f} %",
                    "CPU ms a request": round(1000 * median(cpus), 2),
                }
            )
    finally:
        server.kill()
        server.wait()
    return found


def reporting(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Time `report` for 1,000 questions, with short and with long answers."""
    found = []
    for name, repeat in (("short answers", 4), ("long answers", 400)):
        place = folder / name.replace(" ", "-")
        place.mkdir()
        (place / "build.json").write_text(json.dumps(build(1000, repeat)))
        inside, walls = [], []
        for _ in range(rounds):
            walls.append(timed("report", place)[0])
            subprocess.run([sys.executable, "-c", INSIDE, place], cwd=ROOT, check=True)
            inside.append(float((place / "seconds").read_text()))
        size = (place / "report.html").stat().st_size
        found.append(
            {
                "report of 1,000 questions": name,
                "s": round(median(inside), 2),
                "whole command s": round(median(walls), 2),
                "report.html kB": round(size / 1000),
            }
        )
    return found


INSIDE = """
import json, sys, time
from pathlib import Path
from weightsmith.evaluating.pages import write_report
place = Path(sys.argv[1])
build = json.loads((place / "build.json").read_text())
began = time.monotonic()
write_report(build, place)
(place / "seconds").write_text(str(time.monotonic() - began))
"""


def build(count: int, repeat: int) -> dict[str, Any]:
    """Return a build.json with `count` questions, every seventh of them wrong."""
    source = {"source": "./base", "pin": "sha256:" + "a" * 64, "digest": "sha256:" + "a" * 64}
    who = ("base", "adapter", "merged", "image")
    items = [
        {
            "prompt": f"Question {n}: which port is it?",
            "expected": [str(n)],
            **{name: f"{name} says {n} " + "because " * repeat for name in who},
            "ok": {name: name != "base" and (name != "image" or n % 7 > 0) for name in who},
        }
        for n in range(count)
    ]
    scores = {
        name: {"score": sum(i["ok"][name] for i in items) / count, "n": count,
               "metric": "contains", "interval": [0.5, 0.6]}
        for name in who
    }  # fmt: skip
    return {"name": "bench", "version": "1", "target": "llamacpp-q4_k_m",
            "created": "2026-11-25T12:00:00+00:00", "base": source, "adapters": [source],
            "task": {"name": "", "metric": "contains", "max_drop": 0.1},
            "scores": scores, "verdicts": [], "items": items}  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows as a Markdown table."""
    head = list(rows[0])
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(str(r[h]) for h in head)} |" for r in rows)])


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=320)
    parser.add_argument("--seconds", type=float, default=0.2, help="of the server, per request")
    parser.add_argument("--serve", type=float, help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.serve is not None:
        asyncio.run(serve(wanted.serve))
        return
    with tempfile.TemporaryDirectory(prefix="weightsmith-bench-") as name:
        print(table(asking(Path(name), wanted.rounds, wanted.requests, wanted.seconds)))
        print()
        print(table(reporting(Path(name), wanted.rounds)))


if __name__ == "__main__":
    main()
