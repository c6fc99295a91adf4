"""Starts programs, and copies of this process; nothing else in the toolchain does.

Every program runs without a shell, with an environment made here, in its own process group. It
ends, with all that it started, on an exception, on Ctrl-C, and when this process is killed: the
sandbox launcher (`sandbox_launcher.py`) guards it, and asks the kernel for a signal when we end.
The kernel ties that signal to the *thread* that started the program, so start programs from a
thread that outlives them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

from weightsmith.core.errors import (
    CheckFailed,
    EnvironmentFailure,
    WeightsmithError,
    from_code,
    of_panic,
    ran_out_of_memory,
    too_many_processes,
)
from weightsmith.core.escape import passed_on
from weightsmith.core.safe_parse import parse
from weightsmith.core.waiting import locks_for_programs
from weightsmith.outside.job_sandbox import JobSandbox
from weightsmith.outside.lines import LONGEST, Lines, pump
from weightsmith.outside.memory_watchdog import memory_limit
from weightsmith.outside.sandbox_launcher import END, SET_DEATH_SIGNAL, STOP, libc

_LAUNCHER = Path(__file__).with_name("sandbox_launcher.py")
_NOT_STARTED = 125
"""The sandbox launcher's exit code for failures before the program runs."""
_TAIL_LINES = 200
_PATIENCE = 5.0
"""Seconds between SIGTERM and SIGKILL for a group."""
_LONGEST_END = 15.0
"""Seconds in which the launcher ends all that a program started."""

_KEPT = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR")
_KEPT_FOR_NETWORK = (
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY"),
    *("http_proxy", "https_proxy", "no_proxy", "all_proxy"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
)

OnLine = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceLimits:
    """Limits for a program."""

    memory_bytes: int = 0
    """Bytes that it may allocate, with private mappings of files. 0 for no limit."""
    resident_bytes: int = 0
    """Bytes that it and what it starts may hold, without files; it is killed then. 0 for none."""
    shared: bool = True
    """Whether memory that they share counts; not where the files that they use lie in memory."""
    grouped: bool = False
    """Whether the kernel holds them to it too, pages of files included, where it may be asked."""
    sandbox: JobSandbox | None = None
    """For jobs: isolates it from everything else, as chosen by `confinement`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """A program that has ended by itself."""

    argv: tuple[str, ...]
    returncode: int
    """Negative if a signal ended it."""
    seconds: float
    tail: tuple[str, ...]
    """The last lines of its output, both streams."""

    def require(self, what: str, *, hint: str) -> Completed:
        """Return itself; raises EnvironmentFailure with the end of the output if it failed."""
        if self.returncode == 0:
            return self
        last = "\n".join(f"  {line}" for line in self.tail[-12:] if line.strip())
        raise EnvironmentFailure(
            f"{what} failed ({describe_exit(self.returncode)})" + (f":\n{last}" if last else ""),
            hint=hint,
        )


class TookTooLong(EnvironmentFailure):
    """A program was ended because it exceeded its time limit."""


NO_LIMITS = ResourceLimits()


def describe_exit(returncode: int) -> str:
    """Describe how a program ended, for people."""
    if returncode >= 0:
        return f"exit code {returncode}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-returncode).name}"
    return f"killed by signal {-returncode}"


def scrubbed(
    extra: Mapping[str, str] | None = None, *, network: bool = False, prefixes: Sequence[str] = ()
) -> dict[str, str]:
    """Return an environment of a few harmless variables, without tokens and passwords.

    `network` adds proxies and certificate files, `prefixes` adds whole families such as `PIP_`.
    """
    names = {*_KEPT, *(_KEPT_FOR_NETWORK if network else ())}
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in names or name.startswith(tuple(prefixes))
    }
    return {"PATH": os.defpath, **kept, **(extra or {})}


def run(
    argv: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    input: bytes | None = None,  # noqa: A002 - as subprocess.run calls it
    on_line: OnLine | None = None,
    on_error_line: OnLine | None = None,
    longest_line: int = LONGEST,
    hold_stdin: bool = False,
    timeout: float | None = None,
    limits: ResourceLimits = NO_LIMITS,
    stop: int | None = None,
) -> Completed:
    """Run a program to its end, passing on its output line by line.

    Standard error is merged into standard output unless there is `on_error_line`. A line of
    standard output longer than `longest_line` bytes is split. `hold_stdin` keeps the program's
    standard input open and silent, so that it sees end of file when we die. `timeout` is in
    seconds. The callbacks run on the caller's thread; an exception in them ends the program.
    So does the open file `stop` once it can be read, with InterruptedError. Raises
    EnvironmentFailure if the program is missing or takes too long; a failing exit code is returned,
    not raised.
    """
    words = tuple(str(word) for word in argv)
    name = Path(words[0]).name
    started = time.monotonic()
    deadline = None if timeout is None else started + timeout
    tail: deque[str] = deque(maxlen=_TAIL_LINES)

    def remembering(listener: OnLine | None) -> OnLine:
        def keep(line: str) -> None:
            tail.append(line[:LONGEST])
            if listener is not None:
                listener(line)

        return keep

    with _stdin(input, hold=hold_stdin) as stdin:
        merge = on_error_line is None
        process = _spawn(words, cwd=cwd, env=env, stdin=stdin, limits=limits, merge=merge)
        both = (
            (process.stdout, Lines(longest_line), remembering(on_line)),
            (process.stderr, Lines(), remembering(on_error_line)),
        )
        streams = [(stream, lines, to) for stream, lines, to in both if stream is not None]
        kill = partial(_end, process)
        most = {"shared": limits.shared, "grouped": limits.grouped}
        with _ended(process), memory_limit(process.pid, limits.resident_bytes, kill, **most):
            try:
                pump(process.pid, streams, deadline, kill, stop)
            except TimeoutError:
                raise TookTooLong(
                    f"{name} did not end within {timeout:g} s",
                    hint="check whether the machine is overloaded, then run the command again",
                ) from None
    code = process.wait()
    said = tail[-1] if code == _NOT_STARTED and tail else ""
    if said.startswith("cannot ") and (limited := too_many_processes(said)):
        raise limited
    if said.startswith("cannot start"):
        raise EnvironmentFailure(
            f"{name} could not be started: {said}",
            hint="check that the file is a program for this machine",
        )
    return Completed(
        argv=words, returncode=code, seconds=time.monotonic() - started, tail=tuple(tail)
    )


@dataclass(slots=True)
class Server:
    """A started program that serves until its context ends."""

    process: subprocess.Popen[bytes]
    look: Callable[[], None] = lambda: None
    """Notes whether it was ended for its memory."""
    _lines: deque[str] = field(default_factory=lambda: deque(maxlen=2000))

    def logs(self, count: int) -> str:
        """Return the last `count` lines of its output, both streams."""
        return "\n".join(list(self._lines)[-count:])

    def alive(self) -> bool:
        """Say whether it is running."""
        if self.process.poll() is None:
            return True
        self.look()
        return False

    def stop(self, seconds: float) -> int | None:
        """Send SIGTERM to it alone, as container engines do; return its exit code.

        None if it still runs. A server's workers must not get it: they would drop the requests that
        the server lets them finish.
        """
        if self.process.returncode is None:
            os.kill(self.process.pid, STOP)
        return self.process.wait() if _exited(self.process, seconds) else None

    def note(self, line: str) -> None:
        """Add a line to its output, such as one of our own."""
        self._lines.append(line)


@contextlib.contextmanager
def start(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    limits: ResourceLimits = NO_LIMITS,
    inherited: Sequence[int] = (),
) -> Iterator[Server]:
    """Start a server; it is stopped with all its children when the context ends.

    `inherited` are numbers of open files that it inherits. Raises EnvironmentFailure if the program
    is missing; the caller must check whether it serves.
    """
    words = tuple(str(word) for word in argv)
    process = _spawn(words, env=env, limits=limits, inherited=inherited)
    server = Server(process)

    def kill() -> None:
        server.note(f"ended: it held more than its {limits.resident_bytes >> 20} MiB of memory")
        _end(process)

    def listen() -> None:
        with process.stdout or open(os.devnull, "rb") as stream:  # noqa: PTH123
            for raw in stream:
                server.note(raw.decode(errors="replace").rstrip("\r\n"))

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        most = {"shared": limits.shared, "grouped": limits.grouped}
        limited = memory_limit(process.pid, limits.resident_bytes, kill, **most)
        with _ended(process), limited as server.look:
            yield server
    finally:
        listener.join(_PATIENCE)


def _spawn(
    words: tuple[str, ...],
    *,
    env: Mapping[str, str] | None,
    limits: ResourceLimits,
    cwd: Path | None = None,
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    merge: bool = True,
    inherited: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    environment = dict(scrubbed() if env is None else env)
    if shutil.which(words[0], path=environment.get("PATH")) is None:
        raise EnvironmentFailure(
            f"program not found: {words[0]!r}",
            hint="install it and make sure that it is in PATH",
        )
    with locks_for_programs() as locks:
        settings: dict[str, object] = {
            "parent": os.getpid(),
            "locks": locks,
            "inherited": list(inherited),
            "memory_bytes": limits.memory_bytes,
            "sandbox": limits.sandbox and asdict(limits.sandbox),
        }
        try:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", str(_LAUNCHER), json.dumps(settings), *words],
                cwd=cwd,
                env=environment,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT if merge else subprocess.PIPE,
                start_new_session=True,
                pass_fds=(*inherited, *locks),
            )
        except OSError as problem:
            raise too_many_processes(str(problem)) or problem from None


@contextlib.contextmanager
def _stdin(content: bytes | None, *, hold: bool) -> Iterator[int | IO[bytes]]:
    """Yield standard input: nothing, some bytes, or a pipe that stays open while we live."""
    if content is not None:
        # A file, not a pipe: a program that does not read cannot block us.
        with tempfile.TemporaryFile() as file:
            file.write(content)
            file.seek(0)
            yield file
    elif hold:
        reading, writing = os.pipe()
        try:
            yield reading
        finally:
            os.close(reading)
            os.close(writing)
    else:
        yield subprocess.DEVNULL


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """End the whole group when the block ends; with SIGTERM first if the leader still runs."""
    try:
        yield
    finally:
        try:
            if not _exited(process, 0):
                _signal_group(process, signal.SIGTERM)
                _exited(process, _PATIENCE)
        finally:
            try:
                _end(process)
                _exited(process, _LONGEST_END)
            finally:
                # The leader is not reaped yet, so its number cannot mean another group.
                _signal_group(process, signal.SIGKILL)
                process.wait()


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is None:
        os.kill(process.pid, END)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)


def _exited(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait for the leader's end without reaping it."""
    if process.returncode is not None:
        return True
    until = time.monotonic() + seconds
    flags = os.WEXITED | os.WNOWAIT | os.WNOHANG
    while os.waitid(os.P_PID, process.pid, flags) is None:
        if time.monotonic() >= until:
            return False
        time.sleep(0.02)
    return True


_OUTPUT_BYTES = 64 << 20


def run_command(
    argv: Sequence[str], environment: Mapping[str, str], stdin: bytes, seconds: float
) -> str:
    """Return the program's standard output; its standard error is passed on.

    Unlike our own programs it keeps the user's whole environment, including tokens. Raises
    CheckFailed for an exit code other than 0, too much output or too long a run;
    EnvironmentFailure if the program does not exist.
    """
    lines: list[str] = []
    size = 0

    def keep(line: str) -> None:
        nonlocal size
        size += len(line)
        if size > _OUTPUT_BYTES:
            raise CheckFailed(
                f"{argv[0]} printed more than {_OUTPUT_BYTES} bytes",
                hint="print one JSON object on standard output, and the rest on standard error",
            )
        lines.append(line)

    try:
        done = run(
            argv,
            env={**os.environ, **environment},
            input=stdin,
            on_line=keep,
            on_error_line=lambda line: print(passed_on(line), file=sys.stderr, flush=True),  # noqa: T201
            timeout=seconds,
        )
    except TookTooLong as error:
        raise CheckFailed(
            error.message, hint="give it fewer questions, or more time: evaluate.command_seconds"
        ) from None
    if done.returncode != 0:
        # Of a traceback, only the last line.
        lines = [line for line in done.tail if line.strip() and not line[0].isspace()]
        last = "\n".join(f"  {line}" for line in lines[-4:])
        raise CheckFailed(
            f"{argv[0]} failed ({describe_exit(done.returncode)})" + (f":\n{last}" if last else ""),
            hint="run it by hand; it must exit with 0 whatever the score",
        )
    return "\n".join(lines)


_NO_MEMORY = "no memory"


@dataclass(slots=True)
class Forked:
    """A copy of this process that does some work."""

    pid: int
    what: str
    _answer: int
    """Open file, at whose end the copy has ended; it has the work's error."""

    def join(self) -> None:
        """Wait until the work is done, once.

        Raises the WeightsmithError that it raised, MemoryError if it lacked memory or was killed,
        EnvironmentFailure if it ended otherwise; then its traceback is on standard error.
        """
        with os.fdopen(os.dup(self._answer), "rb") as answer:
            said = answer.read().decode()
        pid, self.pid = self.pid, 0
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code == -signal.SIGKILL or said == _NO_MEMORY:
            raise MemoryError(self.what)
        if said:
            message, hint = parse(said)
            raise from_code(code, message, hint)
        if code:
            raise EnvironmentFailure(
                f"{self.what} failed ({describe_exit(code)})",
                hint="the job's log has the traceback",
            )


@contextlib.contextmanager
def forked(work: Callable[[], object], what: str) -> Iterator[Forked]:
    """Do `work` in a copy of this process, which ends with the block or with this process.

    Call it before other threads are started: the copy has none of them, but their locks.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = os.fork()
    if not pid:
        code, said = 1, ""
        try:
            libc.prctl(SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:
                os._exit(1)
            work()
            code = 0
        except WeightsmithError as error:
            code, said = error.exit_code, json.dumps([error.message, error.hint])
        except BaseException as error:  # noqa: BLE001 - nothing of the copy may run on
            traceback.print_exc()
            said = _NO_MEMORY if ran_out_of_memory(error) else ""
            if refused := of_panic(error, what):
                code, said = refused.exit_code, json.dumps([refused.message, refused.hint])
        with contextlib.suppress(OSError):
            os.write(writing, said.encode())
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    os.close(writing)
    copy = Forked(pid, what, reading)
    try:
        yield copy
    finally:
        os.close(reading)
        if copy.pid:
            os.kill(copy.pid, signal.SIGKILL)
            os.waitpid(copy.pid, 0)
