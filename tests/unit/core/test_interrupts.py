"""Ctrl-C or SIGTERM before a command begins and while it runs: exit code 130, no traceback."""

import signal
import subprocess
import sys

import pytest

from tests.paths import ROOT

STRIKE = """
import builtins, os, signal, sys, time
true = builtins.__import__
def strike(name, *rest):
    if name.split(".")[0] == {module!r}:
        builtins.__import__ = true
        os.kill(os.getpid(), signal.{number})
        time.sleep(1)
    return true(name, *rest)
builtins.__import__ = strike
sys.argv = [{program!r}, "targets"]
{start}
"""
"""Send this process a signal in the moment in which it begins to import a module."""
AWAKE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
"""
"""As in the foreground: a test run that a shell started with `&` or `nohup` ignores such signals,
and so do its children."""
STARTS = {
    "weightsmith": "from weightsmith.__main__ import main; main()",
    "invoke": "sys.path.insert(0, '.'); import tasks",
}
SAID = "error: interrupted\n  hint: run the same command again: what was finished is kept\n"


def run(source, **options):
    return subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=False,
        **options,
    )  # fmt: skip


@pytest.mark.grid(4)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("module", ["invoke", "json"])
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_it_ends_at_once_while_python_imports(start, module, number):
    strike = STRIKE.format(module=module, number=number, program=start, start=STARTS[start])
    done = run(AWAKE + strike)

    assert (done.returncode, done.stderr, done.stdout) == (130, SAID, "")


@pytest.mark.slow
@pytest.mark.parametrize("number", ["SIGINT", "SIGHUP"])
def test_a_background_job_stays_deaf(number):
    """As a shell's `&` and `nohup` start it."""
    start = {"program": "weightsmith", "start": STARTS["weightsmith"]}
    done = run(
        STRIKE.format(module="invoke", number=number, **start),
        preexec_fn=lambda: signal.signal(getattr(signal, number), signal.SIG_IGN),
    )

    assert done.returncode == 0
    assert "llamacpp" in done.stdout


LATE = """
import os, signal, sys
from weightsmith.core.interrupts import {start}, interruptible
{start}()
with interruptible():
    pass
class Late:
    def __del__(self):
        os.kill(os.getpid(), signal.{number})
if {cleared_up}:
    late = Late()
else:
    os.kill(os.getpid(), signal.{number})
"""


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_once_a_command_has_ended(number):
    """The program ends as after Ctrl-C; while Python clears up, with the command's own code."""
    words = {"number": number, "start": "leave_quietly"}
    between = run(AWAKE + LATE.format(cleared_up=False, **words))
    at_end = run(AWAKE + LATE.format(cleared_up=True, **words))

    assert (between.returncode, between.stderr) == (130, SAID)
    assert (at_end.returncode, at_end.stderr) == (0, "")


def test_tasks_after_ours_are_interrupted_as_python_does():
    done = run(
        AWAKE + LATE.format(cleared_up=False, number="SIGINT", start="leave_quietly_at_first")
    )

    assert done.stderr.endswith("KeyboardInterrupt\n")


HANG_UP = """
import os, signal, sys
signal.signal(signal.SIGHUP, getattr(signal, sys.argv[1]))
from weightsmith.cli.command import _guarded
_guarded(lambda: (os.kill(os.getpid(), signal.SIGHUP), print("went on")) and ({}, ""), {})
"""


@pytest.mark.parametrize(("before", "goes_on"), [("SIG_DFL", False), ("SIG_IGN", True)])
def test_a_closed_terminal_ends_a_command_as_ctrl_c_does(before: str, goes_on: bool) -> None:
    """Under `nohup` it goes on."""
    done = subprocess.run(
        [sys.executable, "-c", HANG_UP, before], check=False, capture_output=True, text=True
    )

    assert ("went on" in done.stdout) == goes_on, done
    assert ("KeyboardInterrupt" in done.stderr) != goes_on
    assert (done.returncode == 0) == goes_on


AGAIN = """
import atexit, os, signal, sys
from weightsmith.cli.command import command
atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))
@command()
def body():
    "Wait for Ctrl-C."
    os.kill(os.getpid(), signal.SIGINT)
try:
    body.body(None, json=False)
except Exception as ended:
    sys.exit(ended.code)
"""


def test_a_second_ctrl_c_while_python_ends_is_not_heard() -> None:
    done = run(AWAKE + AGAIN)

    assert done.returncode == 130
    assert done.stderr.startswith("error: interrupted\n  hint: ")
    assert "Traceback" not in done.stderr


IMPATIENT = """
import os, signal, sys, time
from weightsmith.core import interrupts
from weightsmith.cli.command import command
interrupts._CLEANING = float(sys.argv[1])
@command()
def body():
    "Clean up, and be interrupted in it."
    try:
        os.kill(os.getpid(), signal.{number})
    finally:
        time.sleep(0.01)
        os.kill(os.getpid(), signal.{number})
        os.write(1, b"cleaned up")
try:
    body.body(None, json=False)
except Exception as ended:
    os.kill(os.getpid(), signal.{number})  # as the command ends
    sys.exit(ended.code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(("seconds", "cleaned"), [("1000", "cleaned up"), ("0", "")])
def test_a_second_one_interrupts_only_a_long_clean_up(number, seconds, cleaned):
    source = AWAKE + IMPATIENT.format(number=number)
    done = subprocess.run(
        [sys.executable, "-c", source, seconds],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert (done.returncode, done.stdout) == (130, cleaned), done.stderr
    assert done.stderr.startswith("error: interrupted\n  hint: ")
    assert "Traceback" not in done.stderr
