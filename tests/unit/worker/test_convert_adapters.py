"""The program that runs llama.cpp's converter, with another converter in its place."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from weightsmith.quantizers.running import REFUSED

CONVERTER = """
import logging, sys
from pathlib import Path

import pytest

folder, _, base, _, out = sys.argv[1:6]
logging.basicConfig(level=logging.INFO)
logging.warning("it has no name")
if (Path(folder) / "bad").exists():
    logging.error("no such layer")
    logging.error("see elsewhere")
    sys.exit(1)
Path(out).write_text(base)
"""


@pytest.mark.slow
def test_a_refusal_names_its_adapter_and_the_log_has_the_converters_words(tmp_path: Path) -> None:
    converter = tmp_path / "convert.py"
    converter.write_text(CONVERTER)
    pairs = []
    for name in ("good", "bad", "other"):
        (tmp_path / name).mkdir()
        link = tmp_path / "links" / name / "adapter"
        link.parent.mkdir(parents=True)
        link.symlink_to(tmp_path / name)
        pairs.append([str(link), str(tmp_path / "out" / name / "adapter.gguf")])
    (tmp_path / "bad" / "bad").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "list.json").write_text(json.dumps(pairs))
    module = "weightsmith.worker.convert_adapters"

    ended = subprocess.run(
        [sys.executable, "-m", module, str(converter), "base", str(tmp_path / "list.json")],
        check=False,
        capture_output=True,
        text=True,
    )

    *log, last = ended.stderr.strip().splitlines()
    assert ended.returncode == 3
    assert log.count("it has no name") == 2
    assert "no such layer" in log
    message, hint = json.loads(last.removeprefix(REFUSED))
    assert f"{tmp_path / 'bad'}: no such layer see elsewhere" in message
    assert "the job's log has more" in hint
    assert [path.read_text() for path in tmp_path.glob("out/*/*")] == ["base"]
