"""Programs start without secrets, are heard line by line, and end with us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from weightsmith.core.errors import EnvironmentFailure, InputRefused
from weightsmith.core.files import folder_lock
from weightsmith.outside import process
from weightsmith.outside.lines import Lines

from tests.fakes.started import hear_interrupts
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


def test_lines_of_both_streams_are_handed_on_in_order_or_apart():
    both, out, err = [], [], []

    assert sh("echo one; echo two >&2; printf three", on_line=both.append).returncode == 0
    sh("echo out; echo err >&2", on_line=out.append, on_error_line=err.append)

    assert (both, out, err) == (["one", "two", "three"], ["out"], ["err"])


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
    assert sh("seq 1 1000").tail == tuple(map(str, range(801, 1001)))


def test_input_is_given_and_ends():
    assert process.run(["cat"], input=b"a\nb\n").tail == ("a", "b")
    assert sh("cat; echo done").tail == ("done",)


def test_what_is_no_program_is_named(tmp_path):
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF nonsense")
    broken.chmod(0o755)

    with pytest.raises(EnvironmentFailure, match="broken could not be started"):
        process.run([broken])
    with pytest.raises(EnvironmentFailure, match="no-such-program") as caught:
        process.run(["no-such-program"])
    assert "PATH" in caught.value.hint


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


@pytest.mark.parametrize(
    "program", ["echo $$; sleep 600", "trap '' TERM; echo $$; while :; do sleep 0.1; done"]
)
def test_an_exception_of_a_listener_ends_the_program_whatever_it_ignores(monkeypatch, program):
    monkeypatch.setattr(process, "_PATIENCE", 0.3)
    pids = []

    def hear(line):
        pids.append(int(line))
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        sh(program, on_line=hear)
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

    done = process.run([sys.executable, "-c", "bytearray(1 << 30)"], limits=limits)

    assert done.returncode == 1
    assert "MemoryError" in done.tail[-1]


PARENT = """
from weightsmith.outside import process
process.run(["/bin/sh", "-c", "echo $$; exec sleep 600"], on_line=lambda x: print(x, flush=True))
"""
FORKING = """
import time
from weightsmith.outside.process import forked
with forked(lambda: time.sleep(600), "counting") as copy:
    print(copy.pid, flush=True)
    time.sleep(600)
"""


def start_ours(code: str, *words: Path, **options) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'toolchain'}:{ROOT}"}
    argv = [sys.executable, "-c", code, *words]
    return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize(
    ("code", "number"),
    [
        *((PARENT, number) for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)),
        (FORKING, signal.SIGKILL),
    ],
)
def test_what_we_started_dies_with_us(code, number):
    with start_ours(code, stderr=subprocess.DEVNULL, preexec_fn=hear_interrupts) as parent:
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
    with start_ours(IN_ANOTHER_SESSION, tmp_path) as parent:
        pid = int(parent.stdout.readline())
        parent.kill()
    with folder_lock(tmp_path):
        assert not is_running(pid)


def test_what_a_program_left_in_a_session_of_its_own_ends_with_it():
    code = (
        "import os, time\n"
        "there, said = os.pipe()\n"
        "if not os.fork():\n"
        "    os.setsid(); print(os.getpid(), flush=True); os.write(said, b'.'); time.sleep(600)\n"
        "os.read(there, 1)"
    )
    done = process.run([sys.executable, "-c", code])

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


def wait_until(there) -> None:
    deadline = time.monotonic() + PATIENCE
    while not there() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert there()


def test_a_server_is_heard_and_stopped_or_ends_by_itself():
    with process.start(["/bin/sh", "-c", "echo up; sleep 600"]) as server:
        wait_until(lambda: server.logs(5) == "up")
        assert server.alive()
    assert not server.alive()
    with process.start(["/bin/sh", "-c", "echo sorry; exit 3"]) as ended:
        wait_until(lambda: not ended.alive())
    assert ended.logs(1) == "sorry"


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
        wait_until(lambda: server.logs(9).count("ready") == 2)
        assert server.stop(PATIENCE) == 3
        assert "worker was told" not in server.logs(9)

    assert "server was told" in server.logs(9)


IN_A_COPY = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@IN_A_COPY
def test_a_copy_has_what_this_process_has_and_works_beside_it(tmp_path):
    found, here = {"a": 1}, os.getpid()
    text = tmp_path / "b"
    with process.forked(lambda: text.write_text(f"{found} {os.getpid()}"), "work") as copy:
        pid = copy.pid
        copy.join()

    assert text.read_text() == f"{{'a': 1}} {pid}"
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
@IN_A_COPY
def test_the_error_of_a_copy_is_raised_here(error, kind, said, capfd):
    def work():
        raise error

    with pytest.raises(kind, match=said) as raised, process.forked(work, "counting") as copy:
        copy.join()

    if isinstance(error, InputRefused):
        assert raised.value.hint == "add some"
    assert ("KeyError" in capfd.readouterr().err) == isinstance(error, KeyError)


@IN_A_COPY
def test_a_copy_that_was_killed_lacked_memory_and_one_ends_with_its_block():
    with process.forked(lambda: time.sleep(600), "counting") as copy:
        os.kill(copy.pid, signal.SIGKILL)
        with pytest.raises(MemoryError):
            copy.join()
    with process.forked(lambda: time.sleep(600), "counting") as copy:
        pid = copy.pid

    assert not is_running(pid)
