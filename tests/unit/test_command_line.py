"""What all commands have in common, by the program itself: JSON, errors, exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    "weightsmith": [sys.executable, "-m", "toolchain"],
    "invoke": [sys.executable, "-m", "invoke", "--search-root", str(ROOT)],
}


def run(program, *words, **environment):
    return subprocess.run(
        [*PROGRAMS[program], *words],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("merge", "--seed", "x"), "--seed x: a whole number is expected"),
        (("evaluate", "--min-score", "half"), "--min-score half: a number is expected"),
        (("merge",), "missing: --base, --adapter, --out"),
    ],
)
def test_a_wrong_use_is_told_as_json_too(program, words, said):
    done = run(program, *words, "--json")

    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["message"] == said
    assert done.stderr.startswith(f"error: {said}\n")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [("merge", "--nosuch"), ("nosuch",), ("inspect",)])
def test_what_the_parser_refuses_is_told_as_json_too(words):
    done = run("weightsmith", *words, "--json")

    assert done.returncode == 2
    error = json.loads(done.stdout)["error"]
    assert done.stderr == f"error: {error['message']}\n  hint: {error['hint']}\n"


def test_letters_that_the_terminal_lacks_are_escaped(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x\nbase: {source: ./bäse}\ntargets: [vllm]\nnö: 1\n", "utf-8")

    done = run("weightsmith", "plan", "--recipe", str(recipe), PYTHONIOENCODING="ascii")

    assert done.returncode == 2
    assert r"unknown key `n\xf6`" in done.stderr


PLAN = ("plan", "--base", "examples/tiny/base", "--target", "vllm")


@pytest.mark.parametrize("words", [("targets",), ("merge",), PLAN], ids=lambda words: words[0])
def test_nobody_reads(words):
    """As after `2>&1 | head`: what is left to say goes nowhere, and nothing else changes."""
    read, write = os.pipe()
    os.close(read)
    silent = subprocess.run(
        [*PROGRAMS["weightsmith"], *words], cwd=ROOT, stdout=write, stderr=write, check=False
    )
    os.close(write)

    assert silent.returncode == run("weightsmith", *words).returncode
