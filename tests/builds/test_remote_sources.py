"""The command line and sources that are elsewhere: the same bytes as from a folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.fakes.command_line import told as weightsmith
from tests.fakes.sources import SECRET, list_of, web_server
from tests.paths import ROOT

TINY = ROOT / "examples" / "tiny"


@pytest.mark.builders
def test_a_base_behind_a_web_server_merges_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that breaks on the way, and a password: `merge` has the folder's result."""
    rules = tmp_path / "netrc"
    rules.write_text(f"machine 127.0.0.1 login ann password {SECRET}\n")
    monkeypatch.setenv("NETRC", str(rules))
    adapter = TINY / "adapters" / "a"
    files = {path.name: path.read_bytes() for path in (TINY / "base").iterdir()}
    with web_server() as web:
        web.files = {f"/base/{name}": data for name, data in files.items()}
        web.files["/base/SHA256SUMS"] = data = list_of(files)
        web.password = "Basic "
        web.faults = [("model.safetensors", "half")]
        pin = hashlib.sha256(data).hexdigest()
        base = f"{web.url}/base/SHA256SUMS#sha256={pin}"
        words = ("--adapter", adapter, "--runner", "local")

        there = weightsmith(
            "merge", "--base", base, *words, "--out", tmp_path / "there", store=tmp_path / "store"
        )
        here = weightsmith("merge", "--base", TINY / "base", *words, "--out", tmp_path / "here")

    assert there["shards"] == here["shards"]
    assert [row["sha256"] for row in there["files"]] == [row["sha256"] for row in here["files"]]


@pytest.mark.slow
def test_an_address_with_a_password_is_refused_and_not_shown(tmp_path: Path) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "weightsmith.cli.program", "plan", "--target", "vllm"]
    command += ["--base", f"https://ann:{SECRET}@example.com/model.tar#sha256={'0' * 64}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    assert done.returncode == 2, done.stderr
    assert "base.source" in done.stderr
    assert SECRET not in done.stdout + done.stderr
