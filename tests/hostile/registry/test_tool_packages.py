"""The packages that the tool itself is installed from are installed by hash."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from weightsmith.core.ports import Silent
from weightsmith.outside import environment
from weightsmith.outside.environment import Pins
from weightsmith.outside.process import Completed

from tests import locked
from tests.fakes.package_index import package_index, wheel_of
from tests.paths import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("lists_it", [True, False])
def test_an_exchanged_package_is_not_installed(tmp_path, lists_it):
    """An index has another file under a locked version, and says so or does not: pip refuses it."""
    name = "annotated_types-0.8.0-py3-none-any.whl"
    text = (ROOT / "requirements.lock").read_text()
    (row,) = re.findall(r"^annotated-types==.*?(?:\\\n.*?)*$", text, re.MULTILINE)
    (tmp_path / "one.lock").write_text(row + "\n")
    forged = {
        "annotated_types/__init__.py": b"print('run')",
        "annotated_types-0.8.0.dist-info/METADATA": b"Metadata-Version: 2.1\n"
        b"Name: annotated-types\nVersion: 0.8.0\n",
        "annotated_types-0.8.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nTag: py3-none-any\n",
        "annotated_types-0.8.0.dist-info/RECORD": b"",
    }

    def install(*flags: str) -> subprocess.CompletedProcess[str]:
        words = ["install", "--isolated", "--no-cache-dir", "--index-url", index.url, *flags]
        words += ["--no-input", "--disable-pip-version-check", "--retries", "0"]
        return subprocess.run(
            [sys.executable, "-m", "pip", *words, "--target", str(tmp_path / "there")],
            # No configuration of this machine: `--isolated` reads that of all users, which may
            # name another index, and pip waits for one that does not answer for minutes.
            env={
                "PATH": os.environ["PATH"], "HOME": str(tmp_path), "PIP_CONFIG_FILE": os.devnull,
            },
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip

    with package_index() as index:
        index.files[name] = wheel_of(forged)
        if not lists_it:
            sha256 = row.rpartition("sha256:")[2].strip()
            told = {"filename": name, "url": f"/files/{name}", "hashes": {"sha256": sha256}}
            index.rows = [told]
        refused = install("--require-hashes", "-r", str(tmp_path / "one.lock"))
        index.rows = None
        assert install("annotated-types==0.8.0").returncode == 0, "by its version it would be"
    assert refused.returncode != 0
    assert "DO NOT MATCH THE HASHES" in refused.stderr


def setup(*words: str) -> str:
    """Return what `make setup` would run."""
    command = ["make", "--dry-run", "--always-make", "setup", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_the_tool_is_installed_by_hash_wherever_a_page_says_how():
    """`make setup`, the action for GitHub and its template install the lock first, no more."""
    pages = [".github/actions/build/action.yml", "examples/ci/github-actions.yml"]
    for text in [setup(), *((ROOT / page).read_text() for page in pages)]:
        rows = [row for row in text.splitlines() if re.search(r"\bpip install\b", row)]
        assert len(rows) == 2, rows
        assert re.search(r"--require-hashes -r \S*(requirements(-keyless)?\.lock|\$lock)", rows[0])
        assert "--no-deps --no-build-isolation" in rows[1]


def test_a_folder_of_wheels_is_installed_from_by_hash_too():
    """`make setup WEIGHTSMITH_WHEELS=DIR` looks in the folder, and asks for the same hashes."""
    made = setup("WEIGHTSMITH_WHEELS=/some/wheels")
    rows = [row for row in made.splitlines() if "pip install" in row]
    assert all("--find-links /some/wheels" in row for row in rows)
    assert [row for row in rows if "--require-hashes -r requirements.lock" in row]


def test_all_that_builders_and_engines_install_has_a_hash():
    """Each pinned package of images/ names its SHA-256, and each pip that installs asks for it."""
    files = sorted((ROOT / "images").rglob("requirements*.txt"))
    assert len(files) > 10
    for file in files:
        text = file.read_text("utf-8").replace("\\\n", " ")
        rows = [row for row in text.splitlines() if re.match(r"[A-Za-z0-9]", row)]
        assert rows, file
        assert all("--hash=sha256:" in row for row in rows), file
    for file in [*(ROOT / "images").rglob("Containerfile"), *(ROOT / "images").rglob("*.py")]:
        text = file.read_text("utf-8").replace("\\\n", " ")
        pips = re.findall(r'(?:pip"?,? "?install|uv"?,? "?build)"?(?s:.{0,300})', text)
        assert all("--require-hashes" in words for words in pips), file


def test_the_local_runners_builders_are_installed_by_hash(tmp_path, monkeypatch):
    """Whatever pip is started for a builder, it takes nothing but files with a pinned hash."""
    started: list[list[str]] = []

    def run(words: Sequence[str | Path], **_: object) -> Completed:
        started.append([str(word) for word in words])
        if "venv" in words:
            Path(words[-1]).mkdir(parents=True)
        return Completed(argv=(), returncode=0, seconds=0, tail=())

    monkeypatch.setattr(environment.process, "run", run)
    monkeypatch.setattr(environment, "check_compiler", lambda _: None)
    for name in ("merge", "gguf", "autoawq", "gptqmodel"):
        environment.make_environment(tmp_path, Pins(name=name, flavour="cpu"), Silent())
    pips = [words for words in started if "install" in words]
    assert len(pips) >= 9
    assert all({"--require-hashes", "--no-deps"} <= set(words) for words in pips)


def test_the_lock_is_what_the_tool_needs():
    """All that pyproject.toml asks for, and what that asks for, is locked, on every Python."""
    assert [*locked.faults()] == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda text: re.sub(r"(?m)^h11==[^\\]*(\\\n[^\\\n]*)*", "", text), "h11"),
        (lambda text: text.replace("rich==15.0.0", "rich==12.0.0"), "rich"),
        (lambda text: text.replace("rich==15.0.0", "rich>=15.0.0"), "rich"),
        (lambda text: re.sub(r"(?m)^(idna==\S+)[^\\]*(\\\n[^\\\n]*)*", r"\1", text), "idna"),
    ],
)
def test_a_lock_that_lacks_something_is_noticed(tmp_path, change, fault):
    """A package left out, of another version, or without a hash: `make check` says which."""
    locks = ("requirements.lock", "requirements-keyless.lock")
    for name in (*locks, "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    path = tmp_path / "requirements.lock"
    path.write_text(change(path.read_text()))
    assert any(fault in said for said in locked.faults(tmp_path))
