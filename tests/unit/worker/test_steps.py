"""Who is blamed when a step's program fails, and when a step counts as finished."""

import errno
import os
import sys
from pathlib import Path

import pytest
from weightsmith.core.errors import EnvironmentFailure, InputRefused
from weightsmith.quantizers.quantizer import BuilderCommand
from weightsmith.quantizers.running import progress_line, refusal
from weightsmith.worker.steps import run_steps


def failing(line: str, reads: str = "the model") -> tuple[BuilderCommand]:
    """A program that ends with this line."""
    code = f"import sys; print({line!r}, file=sys.stderr); sys.exit(3)"
    return (
        BuilderCommand(title="quantizing", argv=(sys.executable, "-c", code), env={}, reads=reads),
    )


@pytest.mark.parametrize("reads", ["the model", ""])
def test_a_refusal_of_a_program_of_ours_keeps_its_words(tmp_path, reads):
    error = InputRefused("the matrix has 8 values: é", hint="set imatrix to auto")
    with pytest.raises(InputRefused) as found:
        run_steps(failing(refusal(error), reads), tmp_path, lambda *_: None)
    assert (found.value.message, found.value.hint) == (error.message, error.hint)


def test_an_exception_of_the_converter_is_the_models_fault(tmp_path):
    with pytest.raises(InputRefused, match="cannot read the model: ValueError: no tokenizer"):
        run_steps(failing("ValueError: no tokenizer"), tmp_path, lambda *_: None)


@pytest.mark.parametrize(
    ("line", "reads"),
    [("__main__.Fault: ValueError: no offset", "the model"), ("ValueError: no offset", "")],
)
def test_other_exceptions_are_not(tmp_path, line, reads):
    with pytest.raises(EnvironmentFailure, match="ValueError: no offset"):
        run_steps(failing(line, reads), tmp_path, lambda *_: None)


def raising(statement: str) -> tuple[BuilderCommand]:
    """A program of Python that ends with this exception's traceback."""
    argv = (sys.executable, "-c", statement)
    return (BuilderCommand(title="converting", argv=argv, env={}, reads="the model"),)


@pytest.mark.parametrize(
    ("statement", "said"),
    [
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
def test_what_the_converter_says_of_its_input_is_a_refusal(tmp_path, statement, said):
    with pytest.raises(InputRefused, match=said):
        run_steps(raising(statement), tmp_path, lambda *_: None)


@pytest.mark.parametrize(
    "statement",
    [
        "import nowhere_to_be_found",
        "raise PermissionError(13, 'Permission denied', 'model')",
        "raise OSError('first line\\nsecond: line')",
        "raise ConnectionResetError('by peer')",
        "import sys; sys.exit('convert_hf_to_gguf.py: error: unrecognized arguments: --mmproj')",
        "raise type('Fault', (Exception,), {})('ValueError: no offset\\nin the plan')",
    ],
)
def test_what_it_says_of_the_machine_or_of_us_is_not(tmp_path, statement):
    with pytest.raises(EnvironmentFailure, match=r"failed \(exit code 1\)"):
        run_steps(raising(statement), tmp_path, lambda *_: None)


def test_a_program_that_finds_the_disk_full_is_not_blamed(tmp_path):
    with pytest.raises(OSError, match="No space left") as found:
        run_steps(failing("OSError: [Errno 28] No space left on device"), tmp_path, lambda *_: None)
    assert found.value.errno == errno.ENOSPC


def test_a_step_is_finished_when_its_files_are_on_the_disk(tmp_path, monkeypatch):
    """A program of others does not wait for that, and a power cut would leave half of a file."""
    synced: list[str] = []

    def sync(file: int) -> None:
        assert not (tmp_path / ".done").exists()
        synced.append(Path(f"/proc/self/fd/{file}").readlink().name)

    monkeypatch.setattr(os, "fsync", sync)
    code = "import os; os.mkdir('raw'); open('a.gguf', 'w'); open('raw/.b', 'w')"
    step = BuilderCommand(title="converting", argv=(sys.executable, "-c", code), env={})

    run_steps((step,), tmp_path, lambda *_: None)

    assert sorted(synced) == [".b", "a.gguf"]
    assert (tmp_path / ".done").is_file()


def test_a_program_says_how_far_it_is(tmp_path, capfd):
    code = f"print({progress_line(3, 30, 'layers')!r}); print('30 of 30 layers')"
    told = []

    step = BuilderCommand(title="measuring", argv=(sys.executable, "-c", code), env={})
    run_steps((step,), tmp_path, lambda *said: told.append(said))

    assert told == [(0, 1, "steps"), (3, 30, "layers"), (1, 1, "steps")]
    assert "30 of 30 layers\n" in capfd.readouterr().err


def test_a_program_of_ours_may_lack_something_else_than_a_good_input(tmp_path):
    line = refusal(EnvironmentFailure("no kernels", hint="make them"))
    code = f"import sys; print({line!r}); sys.exit({EnvironmentFailure.exit_code})"
    step = BuilderCommand(title="a", argv=(sys.executable, "-c", code), env={}, reads="the model")
    with pytest.raises(EnvironmentFailure, match=r"^no kernels$"):
        run_steps((step,), tmp_path, lambda *_: None)
