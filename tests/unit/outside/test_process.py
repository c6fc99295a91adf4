"""Programs start without secrets, are heard line by line, and end with us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from weightsmith.core.errors import EnvironmentFailure
from weightsmith.core.files import folder_lock
from weightsmith.outside import process
from weightsmith.outside.lines import Lines

from tests.fakes.awake import hear_interrupts
from tests.paths import ROOT


def sh(text: str, **options):
    return process.run(["/bin/sh", "-c", text], **options)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


PATIENCE = 120
"""Seconds in which what is sure to come must have come, however busy the machine is."""


def wait_until_gone(pid: int) -> bool:
    deadline = time.monotonic() + PATIENCE
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)


def test_lines_of_both_streams_are_handed_on_in_order():
    heard = []

    done = sh("echo one; echo two >&2; printf three", on_line=heard.append)

    assert heard == ["one", "two", "three"]
    assert done.returncode == 0


def test_streams_can_be_told_apart():
    out, err = [], []

    sh("echo out; echo err >&2", on_line=out.append, on_error_line=err.append)

    assert (out, err) == (["out"], ["err"])


def test_the_exit_code_is_returned_and_required_on_demand():
    done = sh("echo the reason; exit 7")

    assert done.returncode == 7
    with pytest.raises(EnvironmentFailure, match=r"compiling failed \(exit code 7\)") as caught:
        done.require("compiling", hint="look")
    assert "the reason" in caught.value.message
    assert caught.value.hint == "look"


def test_a_signal_is_named():
    assert process.describe_exit(-9) == "killed by SIGKILL"
    assert sh("kill -9 $$").returncode == -9


def test_only_the_last_lines_are_kept():
    done = sh("seq 1 1000")

    assert done.tail[-1] == "1000"
    assert len(done.tail) == 200


def test_input_is_given_and_ends():
    assert process.run(["cat"], input=b"a\nb\n").tail == ("a", "b")


def test_without_input_there_is_nothing_to_read():
    assert sh("cat; echo done").tail == ("done",)


def test_a_missing_program_is_named():
    with pytest.raises(EnvironmentFailure, match="no-such-program") as caught:
        process.run(["no-such-program"])
    assert "PATH" in caught.value.hint


def test_a_file_that_is_no_program_is_named(tmp_path):
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF nonsense")
    broken.chmod(0o755)

    with pytest.raises(EnvironmentFailure, match="broken could not be started"):
        process.run([broken])


def test_a_timeout_ends_the_program_and_its_children():
    # On a busy machine a shell may need longer than the shortest of these to start.
    for seconds in (0.5, 5, 60):
        pids = []
        with pytest.raises(EnvironmentFailure, match=rf"did not end within {seconds:g} s"):
            sh(
                "echo $$; sleep 600 & echo $!; wait",
                timeout=seconds,
                on_line=lambda line, pids=pids: pids.append(int(line)),
            )
        assert all(wait_until_gone(pid) for pid in pids)
        if len(pids) == 2:
            return
    pytest.fail("the program did not start")


def test_a_timeout_of_months_is_waited_for_in_turns():
    assert sh("echo done", timeout=1e8).tail == ("done",)


def test_an_exception_of_a_listener_ends_the_program():
    pids = []

    def hear(line):
        pids.append(int(line))
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        sh("echo $$; sleep 600", on_line=hear)
    assert wait_until_gone(pids[0])


def test_a_program_that_ignores_the_polite_signal_is_killed(monkeypatch):
    monkeypatch.setattr(process, "_PATIENCE", 0.3)
    pids = []

    def hear(line):
        pids.append(int(line))  # it ignores the signal by now
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        sh("trap '' TERM; echo $$; while :; do sleep 0.1; done", on_line=hear)

    assert wait_until_gone(pids[0])


def test_children_left_behind_do_not_hold_us_up():
    """Waiting for this one would take longer than a test may."""
    done = sh("sleep 3600 & echo $!")

    assert wait_until_gone(int(done.tail[0]))


def test_secrets_do_not_reach_the_program(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("PIP_INDEX_URL", "https://index.example")

    assert "hf_secret" not in "\n".join(process.run(["env"]).tail)
    assert "PIP_INDEX_URL" not in process.scrubbed(network=True)
    assert process.scrubbed(prefixes=["PIP_"])["PIP_INDEX_URL"] == "https://index.example"


def test_an_allocation_beyond_the_limit_fails():
    limits = process.ResourceLimits(memory_bytes=200 << 20)
    wanted = [sys.executable, "-c", "bytearray(1 << 30)"]

    done = process.run(wanted, limits=limits)

    assert done.returncode == 1
    assert "MemoryError" in done.tail[-1]


PARENT = """
from weightsmith.outside import process
process.run(["/bin/sh", "-c", "echo $$; exec sleep 600"], on_line=lambda x: print(x, flush=True))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_the_program_dies_with_us(number):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'toolchain'}:{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=hear_interrupts,
    )
    with parent:
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.send_signal(number)

    assert wait_until_gone(pid)


IN_ANOTHER_SESSION = """
import fcntl, os, signal, sys
from pathlib import Path
from weightsmith.outside import process
from weightsmith.core.files import folder_lock
code = '''
import os, sys, time
if os.fork(): time.sleep(600)
os.setsid()
if os.fork(): os._exit(0)
print(os.getpid(), flush=True)
while True:
    open("written", "a").write("x"); time.sleep(0.01)
'''
with folder_lock(Path(sys.argv[1])):
    argv = [sys.executable, "-c", code]
    process.run(argv, cwd=sys.argv[1], on_line=lambda line: print(line, flush=True))
"""


def test_what_a_program_started_in_a_session_of_its_own_dies_with_us(tmp_path):
    """And the folder that it writes to stays locked until then."""
    parent = subprocess.Popen(
        [sys.executable, "-c", IN_ANOTHER_SESSION, tmp_path],
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'toolchain'}:{ROOT}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        pid = int(parent.stdout.readline())
        parent.kill()
    with folder_lock(tmp_path):
        assert not is_running(pid)


def test_what_a_program_left_in_a_session_of_its_own_ends_with_it():
    code = "import os\nif not os.fork():\n    os.setsid(); print(os.getpid(), flush=True)\n"
    done = process.run([sys.executable, "-c", code + "    import time; time.sleep(600)\n"
                        "else: import time; time.sleep(1)"])  # fmt: skip

    assert not is_running(int(done.tail[0]))


def test_a_program_has_no_lock_of_ours_and_an_ended_block_holds_none(tmp_path):
    code = "import os; print(*os.listdir('/proc/self/fd'))"
    with folder_lock(tmp_path):
        done = process.run([sys.executable, "-c", code])
        server = process.start(["sleep", "600"])
        server.__enter__()
    try:
        with folder_lock(tmp_path, wait=False):
            pass
    finally:
        server.__exit__(None, None, None)

    assert len(done.tail[0].split()) == 4  # the last is the listed folder


def test_a_server_is_heard_and_stopped():
    with process.start(["/bin/sh", "-c", "echo up; sleep 600"]) as server:
        deadline = time.monotonic() + PATIENCE
        while "up" not in server.logs(5) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.logs(5) == "up"
        assert server.alive()
    assert not server.alive()


def test_a_server_that_ended_by_itself_is_not_alive():
    with process.start(["/bin/sh", "-c", "echo sorry; exit 3"]) as server:
        deadline = time.monotonic() + PATIENCE
        while server.alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not server.alive()
    assert server.logs(1) == "sorry"


def test_a_line_without_an_end_does_not_grow_for_ever():
    lines = Lines()

    assert lines.feed(b"a\rb") == ["a"]
    assert lines.feed(b"c\n") == ["bc"]
    assert lines.feed(b"x" * (1 << 20) + b"x") == ["x" * ((1 << 20) + 1)]
    assert lines.feed(b"rest") == []
    assert lines.feed(b"") == ["rest"]


def test_a_line_of_megabytes_is_one_where_that_is_asked_for():
    text = "print('x' * 3_000_000)"
    heard = []

    done = process.run([sys.executable, "-c", text], on_line=heard.append, longest_line=4_000_000)

    assert heard == ["x" * 3_000_000]
    assert [len(line) for line in done.tail] == [1 << 20]  # what is kept of it for a message


WITH_A_WORKER = """
import os, signal, sys, time

def told(who, status):
    def end(*_):
        print(who, "was told", flush=True)
        os._exit(status)
    signal.signal(signal.SIGTERM, end)

worker = os.fork()
told("worker" if not worker else "server", 3)
print("ready", flush=True)
while True:
    time.sleep(0.01)
"""


def test_a_server_is_told_to_stop_and_its_workers_are_not():
    """As by a container engine: vLLM's workers would drop the requests that the server finishes."""
    with process.start([sys.executable, "-c", WITH_A_WORKER]) as server:
        deadline = time.monotonic() + PATIENCE
        while server.logs(9).count("ready") < 2 and time.monotonic() < deadline:
            time.sleep(0.02)

        assert server.stop(PATIENCE) == 3
        assert "worker was told" not in server.logs(9)

    assert "server was told" in server.logs(9)
