"""Who is blamed when a step's program fails, and when a step counts as finished."""

import errno
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from weightsmith.core.errors import EnvironmentFailure, InputRefused, ran_out_of_memory
from weightsmith.quantizers.layerwise.importance import Measured, Sums, write_importance
from weightsmith.quantizers.quantizer import BuilderCommand
from weightsmith.quantizers.running import progress_line, refusal
from weightsmith.worker.steps import run_steps


def run(code: str, folder: Path, reads: str = "the model", report=lambda *_: None) -> None:
    argv = (sys.executable, "-c", code)
    step = BuilderCommand(title="converting", argv=argv, env={}, reads=reads)
    run_steps((step,), folder, report)


def failing(line: str) -> str:
    """A program that ends with this line."""
    return f"import sys; print({line!r}, file=sys.stderr); sys.exit(3)"


@pytest.mark.parametrize("reads", ["the model", ""])
def test_a_refusal_of_a_program_of_ours_keeps_its_words(tmp_path, reads):
    error = InputRefused("the matrix has 8 values: é", hint="set imatrix to auto")
    with pytest.raises(InputRefused) as found:
        run(failing(refusal(error)), tmp_path, reads)
    assert (found.value.message, found.value.hint) == (error.message, error.hint)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (failing("ValueError: no tokenizer"), "cannot read the model: ValueError: no tokenizer"),
        ("raise ValueError('no map for tensor\\nmodel.x.weight')", "no map for tensor model.x.w"),
        ("import json; json.loads('')", r"json\.decoder\.JSONDecodeError: Expecting value"),
        ("raise Exception('data did not match any variant')", "Exception: data did not match"),
        ("raise NotImplementedError", "cannot read the model: NotImplementedError$"),
        (
            "import logging, sys; logging.basicConfig(); logging.error('Missing it'); sys.exit(1)",
            "the model: Missing it",
        ),
    ],
)
def test_what_the_converter_says_of_its_input_is_a_refusal(tmp_path, code, said):
    with pytest.raises(InputRefused, match=said):
        run(code, tmp_path)


@pytest.mark.parametrize(
    ("code", "reads"),
    [
        (failing("__main__.Fault: ValueError: no offset"), "the model"),
        (failing("ValueError: no offset"), ""),
        ("import nowhere_to_be_found", "the model"),
        ("raise PermissionError(13, 'Permission denied', 'model')", "the model"),
        ("raise OSError('first line\\nsecond: line')", "the model"),
        ("raise ConnectionResetError('by peer')", "the model"),
        ("import sys; sys.exit('convert.py: error: unrecognized arguments: --x')", "the model"),
        ("raise type('Fault', (Exception,), {})('ValueError: a\\nin the plan')", "the model"),
    ],
)
def test_what_it_says_of_the_machine_or_of_us_is_not(tmp_path, code, reads):
    with pytest.raises(EnvironmentFailure, match=r"failed \(exit code [13]\)"):
        run(code, tmp_path, reads)


def test_a_program_that_finds_the_disk_full_is_not_blamed(tmp_path):
    with pytest.raises(OSError, match="No space left") as found:
        run(failing("OSError: [Errno 28] No space left on device"), tmp_path)
    assert found.value.errno == errno.ENOSPC


@pytest.mark.parametrize(
    "code",
    [
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import sys; sys.exit(\"terminate called after throwing 'std::bad_alloc'\")",
        "b'x' * (1 << 62)",
    ],
)
def test_a_program_that_lacked_memory_is_not_an_input_that_cannot_be_read(tmp_path, code):
    with pytest.raises(MemoryError, match="converting"):
        run(code, tmp_path)


def test_torch_says_that_memory_ran_out_with_an_error_of_its_own() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)

    assert ran_out_of_memory(caught.value)
    assert ran_out_of_memory(MemoryError())
    assert not ran_out_of_memory(RuntimeError("the logits are not finite"))


def test_a_step_is_finished_when_its_files_are_on_the_disk(tmp_path, monkeypatch):
    """A program of others does not wait for that, and a power cut would leave half of a file."""
    synced: list[str] = []

    def sync(file: int) -> None:
        assert not (tmp_path / ".done").exists()
        synced.append(Path(f"/proc/self/fd/{file}").readlink().name)

    monkeypatch.setattr(os, "fsync", sync)
    run("import os; os.mkdir('raw'); open('a.gguf', 'w'); open('raw/.b', 'w')", tmp_path)

    assert sorted(synced) == [".b", "a.gguf"]
    assert (tmp_path / ".done").is_file()


@pytest.mark.parametrize("left", [None, 0, 40, -64])
def test_a_step_is_not_finished_whose_program_ends_well_without_its_file(tmp_path, left):
    """So does llama-imatrix on a full disk; a step that counts as finished is not run again."""
    sums = Sums(squares=np.ones((1, 64)), counts=np.ones(1))
    write_importance(tmp_path / "whole", Measured(sums={"x": sums}, chunks=1, window=8))
    code = "import shutil; shutil.copy('whole', 'it')"
    step = BuilderCommand(title="t", argv=(sys.executable, "-c", ""), env={}, makes=tmp_path / "it")
    if left is not None:
        (tmp_path / "it").write_bytes((tmp_path / "whole").read_bytes()[:left])

    with pytest.raises(EnvironmentFailure, match="did not write the whole of it"):
        run_steps((step,), tmp_path, lambda *_: None)
    assert not (tmp_path / ".done").exists()

    run_steps((replace(step, argv=(sys.executable, "-c", code)),), tmp_path, lambda *_: None)
    assert (tmp_path / ".done").is_file()


def test_a_program_says_how_far_it_is(tmp_path, capfd):
    code = f"print({progress_line(3, 30, 'layers')!r}); print('30 of 30 layers')"
    told = []
    run(code, tmp_path, report=lambda *said: told.append(said))

    assert told == [(0, 1, "steps"), (3, 30, "layers"), (1, 1, "steps")]
    assert "30 of 30 layers\n" in capfd.readouterr().err


def test_a_program_of_ours_may_lack_something_else_than_a_good_input(tmp_path):
    line = refusal(EnvironmentFailure("no kernels", hint="make them"))
    code = f"import sys; print({line!r}); sys.exit({EnvironmentFailure.exit_code})"
    with pytest.raises(EnvironmentFailure, match=r"^no kernels$"):
        run(code, tmp_path)
