"""What is added to vLLM's build for CPUs: it says why it cannot start."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.paths import ROOT, loaded

ENGINE = ROOT / "images/engines/vllm-cpu"
NEEDED = 256 << 20


shared_memory = loaded(ENGINE / "shared_memory.py")


def has(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    found = SimpleNamespace(f_blocks=size >> 12, f_frsize=1 << 12)
    monkeypatch.setattr(os, "statvfs", lambda place: found)


def test_too_little_shared_memory_is_said_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = str(tmp_path / "plan.json")
    Path(plan).write_text(json.dumps({"shm_bytes": NEEDED}))
    has(monkeypatch, NEEDED)
    shared_memory.require(plan)
    has(monkeypatch, 64 << 20)
    with pytest.raises(SystemExit) as caught:
        shared_memory.require(plan)
    assert caught.value.code == 5
    said = capsys.readouterr().err
    assert "/dev/shm has 64 MiB, and this server needs 256 MiB" in said
    assert f"--shm-size {NEEDED}" in said


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"shm_bytes": null}'])
def test_an_image_without_a_plan_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    has(monkeypatch, 0)
    path = tmp_path / "plan.json"
    path.write_text(text)
    shared_memory.require(str(path))
    shared_memory.require(str(tmp_path / "none.json"))


def test_the_program_is_the_same_in_the_processes_that_it_starts() -> None:
    """They import it again under another name, and must not be told to end."""
    text = (ENGINE / "assemble.py").read_text()
    command = text.partition('COMMAND = """')[2].partition('"""')[0]
    first, second = command.index("shared_memory.require()"), command.index("import main")
    assert command.index('if __name__ == "__main__":') < first < second
    assert '"shared_memory.py"' in text
