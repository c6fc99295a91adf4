"""A function in a copy of this process: its result is what it leaves, its errors come back."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from weightsmith.core.errors import EnvironmentFailure, InputRefused
from weightsmith.outside.process import forked

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def raising(error):
    def work():
        raise error

    return work


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except OSError:
        return True


def test_the_copy_has_what_this_process_has_and_works_beside_it(tmp_path):
    found, here = {"a": 1}, os.getpid()
    with forked(lambda: (tmp_path / "b").write_text(f"{found} {os.getpid()}"), "work") as copy:
        pid = copy.pid
        copy.join()

    assert (tmp_path / "b").read_text() == f"{{'a': 1}} {pid}"
    assert pid != here


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (InputRefused("no 'text' — here", hint="add some"), InputRefused, "no 'text' — here"),
        (EnvironmentFailure("no kernels", hint="make them"), EnvironmentFailure, "no kernels"),
        (MemoryError(), MemoryError, "counting"),
        (KeyError("a"), EnvironmentFailure, "counting failed"),
    ],
)
def test_its_error_is_raised_here(error, kind, said, capfd):
    with pytest.raises(kind, match=said) as raised, forked(raising(error), "counting") as copy:
        copy.join()

    if isinstance(error, InputRefused):
        assert raised.value.hint == "add some"
    assert ("KeyError" in capfd.readouterr().err) == isinstance(error, KeyError)


def test_a_copy_that_was_killed_lacked_memory():
    with forked(lambda: time.sleep(600), "counting") as copy:
        os.kill(copy.pid, signal.SIGKILL)
        with pytest.raises(MemoryError):
            copy.join()


def test_it_ends_with_the_block():
    with forked(lambda: time.sleep(600), "counting") as copy:
        pid = copy.pid

    assert gone(pid)


PROGRAM = """
import os, sys, time
from weightsmith.outside.process import forked
with forked(lambda: time.sleep(600), "counting") as copy:
    print(copy.pid, flush=True)
    time.sleep(600)
"""


def test_it_ends_with_this_process():
    program = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
    pid = int(program.stdout.readline())
    program.kill()
    program.wait()
    program.stdout.close()
    while not gone(pid):
        time.sleep(0.01)
