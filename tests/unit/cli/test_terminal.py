"""Where commands are read and asked: terminals, pipes, and streams that are closed or full."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.command_line import PROGRAMS, ROOT, run, started


@pytest.mark.slow
def test_letters_that_the_terminal_lacks_are_escaped(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x\nbase: {source: ./bäse}\ntargets: [vllm]\nnö: 1\n", "utf-8")

    done = started("weightsmith", "plan", "--recipe", str(recipe), PYTHONIOENCODING="ascii")

    assert done.code == 2
    assert r"`n\xf6`" in done.err


def test_help_in_a_terminal_that_lacks_its_letters():
    done = started("weightsmith", "build", "--help", PYTHONIOENCODING="ascii")

    assert (done.code, done.err) == (0, "")
    assert r"awskms://\u2026" in done.out


PLAN = ("plan", "--base", "examples/tiny/base", "--target", "vllm")


def unread(*words, errors):
    """Run a command whose output nobody reads, nor its errors unless there is a pipe for them."""
    read, write = os.pipe()
    os.close(read)
    words = [*PROGRAMS["weightsmith"], *words]
    done = subprocess.run(words, cwd=ROOT, stdout=write, stderr=errors or write, check=False)
    os.close(write)
    return done


@pytest.mark.grid(3)
@pytest.mark.parametrize("words", [("targets",), ("merge",), PLAN], ids=lambda words: words[0])
def test_nobody_reads(words):
    """As after `2>&1 | head`: what is left to say goes nowhere, and nothing else changes."""
    assert unread(*words, errors=None).returncode == run(*words).code


@pytest.mark.parametrize("words", [("--list",), ("--help", "plan")], ids=" ".join)
def test_nobody_reads_a_list(words):
    """As after `| head -1`: no trace of Invoke's, and no fault."""
    done = unread(*words, errors=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.slow
@pytest.mark.parametrize(("answer", "left"), [("", True), ("n", True), ("y", False)])
def test_emptying_the_store_asks_on_a_terminal(tmp_path, answer, left):
    result = tmp_path / "results" / ("a" * 64)
    result.mkdir(parents=True)
    (result / "manifest.json").write_text('{"files": [{"size": 5}]}')
    ours, theirs = pty.openpty()
    os.write(ours, f"{answer}\n".encode())
    done = subprocess.run(
        [*PROGRAMS["weightsmith"], "clean"], cwd=ROOT, stdin=theirs, stderr=theirs,
        stdout=subprocess.PIPE, text=True, check=False,
        env={**os.environ, "WEIGHTSMITH_STORE": str(tmp_path)},
    )  # fmt: skip
    os.close(theirs)
    os.close(ours)

    assert (done.returncode, result.exists()) == (0, left), done.stdout


def test_a_closed_input_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)

    done = run("clean", WEIGHTSMITH_STORE=str(tmp_path / "store"))

    assert (done.code, done.out) == (0, "deleted 0 result(s), 0 B; kept 0 B\n")


@pytest.mark.slow
def test_a_result_that_cannot_be_written_is_reported():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*PROGRAMS["weightsmith"], "targets", "--json"],
            cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip

    assert done.returncode == 5
    assert done.stderr.startswith("error: cannot write the result: No space left on device")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/full", "2>&- <&-"])
def test_nobody_listens_to_the_progress(tmp_path, closed):
    words = f"push oci:{tmp_path}/none --to 127.0.0.1:1/a:1 --json {closed}"
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m weightsmith {words}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 3
    assert json.loads(done.stdout)["error"]["message"].endswith("none does not exist")
