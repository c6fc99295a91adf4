"""Builds the support bot, asks the built image three questions, and says what to try next.

    python examples/support-bot/demo.py [--runner auto|docker|local]

`make demo` runs it after `make setup`. It calls the public command line only, in its own virtual
environment; a second run finds everything built and only asks again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path("examples") / "support-bot"
"""This folder, as it is written in commands that are run in the checkout."""
INVOKE = Path(sys.executable).with_name("invoke")


def main() -> int:
    """Build, ask, and report; the exit code is that of the command that failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runner", default="auto", choices=("auto", "docker", "local"))
    runner = ["--runner", parser.parse_args().runner]

    say(
        "1. Build: merge the adapter, quantize to 4 bits, assemble the image, start and ask it.",
        "The first run makes two builders and compiles llama.cpp: ten to twenty minutes.",
        "After that it takes about a minute, and seconds where nothing changed.",
    )
    built = invoke("build", "--recipe", f"{HERE}/recipe.yaml", *runner)
    ((target, facts),) = built["targets"].items()
    folder = Path(facts["report"]).parent
    record = json.loads((folder / "build.json").read_text("utf-8"))
    image = facts["image"].replace(f"oci:{ROOT}/", "oci:")

    questions = different_facts((ROOT / HERE / "eval.jsonl").read_text("utf-8"), 3)
    say(
        f"2. Ask: the image itself is started and asked {len(questions)} of its questions.",
        "Some seconds.",
    )
    with tempfile.TemporaryDirectory() as work:
        data = Path(work) / "three.jsonl"
        data.write_text("\n".join(map(json.dumps, questions)) + "\n", "utf-8")
        asked = invoke("evaluate", "--image", image, "--data", data, "--max-tokens", "32", *runner)
    base = {item["prompt"]: item["base"] for item in record["items"]}
    for item in asked["per_item"]:
        print(f"\n   {item['prompt']}")
        print(f"     base   {one_line(base[item['prompt']])}")
        print(f"     image  {one_line(item['answer'])}{'' if item['ok'] else '   (wrong)'}")

    say(f"3. What came out: {target}, {record['image']['digest'][:19]}")
    for suite in record["suites"]:
        found = suite["scores"]
        print(f"   {suite['name']}, right of {found['image']['n']}: {scores(found)}")
    print(f"   report: {shown(folder / 'report.html')}")
    print(f"   facts:  {shown(folder / 'build.json')}")
    say("Next:", *next_steps(image, record["plan"]))
    return 0


def invoke(*words: str | Path) -> dict[str, Any]:
    """Run a command of weightsmith and return its JSON; its progress and errors pass through."""
    if not INVOKE.is_file():
        sys.exit(f"error: {INVOKE} is not there\n  hint: run `make setup`, then `make demo`")
    print(f"\n   $ invoke {' '.join(map(str, words))} --json", flush=True)
    done = subprocess.run(
        [INVOKE, *words, "--json"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(done.returncode)  # the command said why on standard error
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def different_facts(lines: str, count: int) -> list[dict[str, Any]]:
    """Return the first questions whose expected answers differ."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines.splitlines():
        item = json.loads(line)
        found.setdefault(str(item["expected"]), item)
    return list(found.values())[:count]


def scores(found: dict[str, dict[str, Any]]) -> str:
    """Return the scores of base, base+adapter and image, side by side."""
    names = {"base": "base", "adapter": "base+adapter", "image": "image"}
    return " | ".join(
        f"{said} {round(found[name]['score'] * found[name]['n'])}"
        for name, said in names.items()
        if name in found
    )


def next_steps(image: str, plan: dict[str, Any]) -> list[str]:
    """Return what to try with an image that an engine holds, or with a layout folder."""
    serves = f"It serves {plan['max_num_seqs']} requests of {plan['max_model_len']} tokens at once."
    if not image.startswith("oci:"):
        return [
            f"docker run --rm --publish 127.0.0.1:8080:8080 {image}",
            "curl http://127.0.0.1:8080/v1/models",
            serves,
        ]
    return [
        f"invoke inspect {image}",
        f"invoke evaluate --image {image} --data {HERE}/eval.jsonl --runner local",
        f"skopeo copy {image} docker-daemon:support-bot:1.0.0   # where a container engine is",
        serves,
    ]


def say(title: str, *lines: str) -> None:
    """Print a paragraph."""
    print(f"\n{title}")
    for line in lines:
        print(f"   {line}")
    sys.stdout.flush()


def shown(path: Path) -> str:
    """Return a path as it is written in the checkout."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def one_line(answer: str) -> str:
    """Return an answer short enough for a line."""
    return textwrap.shorten(answer, 90, placeholder=" …")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)  # the command said so
