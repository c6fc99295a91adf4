"""What CI draws from a commit, and the part of the tests that this runs."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT


def run(*words: str | Path, cwd: Path) -> str:
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_commit_draws_the_same_part_in_a_shallow_clone(tmp_path: Path) -> None:
    author = ("-c", "user.name=x", "-c", "user.email=x@example.com")
    whole = tmp_path / "whole"
    (whole / ".ci").mkdir(parents=True)
    (whole / ".ci" / "draw").write_bytes((ROOT / ".ci" / "draw").read_bytes())
    run("git", "init", "-q", ".", cwd=whole)
    run("git", "add", ".", cwd=whole)
    drawn = set()
    for number in range(10):
        run("git", *author, "commit", "-q", "--allow-empty", "-m", f"{number}", cwd=whole)
        drawn.add(run("bash", ".ci/draw", cwd=whole))
    run("git", "clone", "-q", "--depth=1", f"file://{whole}", tmp_path / "shallow", cwd=tmp_path)

    assert run("bash", ".ci/draw", cwd=tmp_path / "shallow") == run("bash", ".ci/draw", cwd=whole)
    assert drawn <= {str(part) for part in range(1, 13)}
    assert len(drawn) > 2


@pytest.mark.full  # it starts pytest three times
def test_every_test_is_in_one_part(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n")
    (tmp_path / "test_some.py").write_text(
        "import pytest\n@pytest.mark.parametrize('n', range(9))\ndef test_it(n): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    command += ["--rootdir", tmp_path, "-c", ROOT / "pyproject.toml", tmp_path / "test_some.py"]

    parts = [run(*command, f"--part={n}/3", cwd=ROOT).split() for n in (1, 2, 3)]

    found = [word for part in parts for word in part if "test_some.py::" in word]
    assert len(found) == len(set(found)) == 9
