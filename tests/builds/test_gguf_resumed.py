"""A killed pass over the weights goes on where it was, if what it wrote is still there."""

import json
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from weightsmith.quantizers.gguf_header import read_header
from weightsmith.quantizers.gguf_pass import (
    GgufOutput,
    GgufSource,
    Wanted,
    finish,
    read_targets,
    write_files,
)
from weightsmith.quantizers.gguf_rows import StoredRows

from tests.fakes.ggufs import program, run, same, theirs

pytestmark = pytest.mark.builders


def written(middle: Path, out: Path, broken_at: str = "", key: str = "") -> list[str]:
    """Write a file by our pass; return the tensors that were read, up to the one that fails."""
    command = [program("llama-quantize"), "--dry-run", middle, "Q4_K_M"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    header, read = read_header(middle), []

    def rows(entry, kind):
        read.append(entry.name)
        if entry.name == broken_at:
            raise KeyboardInterrupt
        at = header.size + entry.offset
        size = {"rows": entry.rows, "columns": entry.columns}
        return StoredRows(path=middle, kind=kind, offset=at, **size).read

    lines = (printed.stdout + printed.stderr).splitlines()
    source = GgufSource(header=header, rows=rows, stored=lambda *_: np.zeros(0))
    wanted = Wanted(file_type=15, key=key)
    write_files(source, [GgufOutput(path=out, targets=read_targets(lines), wanted=wanted)], 2)
    finish([out])
    return read


@pytest.mark.usefixtures("kernels")
def test_an_interrupted_file_goes_on_at_the_tensor_that_it_had_reached(middle, tmp_path):
    out = tmp_path / "demo.gguf"
    broken = "blk.1.ffn_up.weight"
    with pytest.raises(KeyboardInterrupt):
        written(middle, out, broken)
    assert not out.exists()
    journal = tmp_path / ".demo.gguf.journal"
    with journal.open("a") as file:
        file.write("output.wei")  # cut off while it was written

    again = written(middle, out)

    assert again[0] == broken
    assert same([out], theirs(middle, tmp_path / "theirs", "q4_k_m"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.gguf", "theirs"]


@pytest.mark.usefixtures("kernels")
def test_what_follows_a_line_that_was_cut_off_counts_too(middle, tmp_path):
    out, first = tmp_path / "demo.gguf", "blk.1.ffn_up.weight"
    with pytest.raises(KeyboardInterrupt):
        written(middle, out, first)
    with (tmp_path / ".demo.gguf.journal").open("a") as file:
        file.write("output.wei")
    with pytest.raises(KeyboardInterrupt):
        written(middle, out, "blk.3.ffn_up.weight")

    assert first not in written(middle, out)


WATCHED = """
import os, signal
from weightsmith.quantizers.gguf_pass import _Writer
from weightsmith.worker.quantize_gguf import main
add, note, noted = _Writer.add, _Writer._note, []
def tell(writer, source, entry, files):
    print("reads", entry.name, flush=True)
    add(writer, source, entry, files)
def note_some(writer, *given):
    note(writer, *given)
    noted.append(given)
    if len(noted) == LIMIT:
        os.kill(os.getpid(), signal.SIGKILL)
_Writer.add, _Writer._note = tell, note_some
main()
"""


def test_a_killed_program_goes_on_at_the_tensor_that_it_had_reached(middle, tmp_path):
    killed = run(middle, tmp_path, "q4_k_m", ("-c", WATCHED.replace("LIMIT", "7")))
    assert killed.returncode == -signal.SIGKILL
    _, *lines = (tmp_path / ".demo.gguf.journal").read_text().splitlines()
    noted = [json.loads(line)[0] for line in lines]
    assert len(noted) == 7

    again = run(middle, tmp_path, "q4_k_m", ("-c", WATCHED.replace("LIMIT", "0")))

    assert again.returncode == 0, again.stderr
    read = [line.split()[1] for line in again.stdout.splitlines() if line.startswith("reads ")]
    assert not set(read) & set(noted)
    assert {*read, *noted} == set(read_header(middle).tensors)
    assert same([tmp_path / "demo.gguf"], theirs(middle, tmp_path / "theirs", "q4_k_m"))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("damage", ["a bit", "the header", "the end", "a line"])
def test_what_an_interrupted_run_wrote_is_read_back_before_it_is_trusted(middle, tmp_path, damage):
    out, broken = tmp_path / "demo.gguf", "blk.1.ffn_up.weight"
    with pytest.raises(KeyboardInterrupt):
        written(middle, out, broken)
    partial, journal = tmp_path / ".demo.gguf.partial", tmp_path / ".demo.gguf.journal"
    key, *lines = journal.read_text().splitlines()
    name, (at, size, _), *_ = json.loads(lines[-1])
    data = bytearray(partial.read_bytes())
    match damage:
        case "a bit":
            data[at + size // 2] ^= 1
        case "the header":
            data[100] ^= 1
        case "the end":
            del data[at + size // 2 :]
        case "a line":
            lines[-1] = lines[-1].replace("]]", "")
    partial.write_bytes(data)
    journal.write_text("\n".join([key, *lines]) + "\n")

    again = written(middle, out)

    assert damage == "the header" or name in again
    assert json.loads(lines[0])[0] not in again or damage == "the end"
    assert same([out], theirs(middle, tmp_path / "theirs", "q4_k_m"))


@pytest.mark.usefixtures("kernels")
def test_what_was_begun_from_other_weights_is_begun_anew(middle, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        written(middle, tmp_path / "demo.gguf", "blk.1.ffn_up.weight", key="other")

    assert "token_embd.weight" in written(middle, tmp_path / "demo.gguf", key="these")
