"""The parts of a job's sandbox: rules for files, the filter of system calls, and the way in."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import signal
import sys
import tempfile
from pathlib import Path

import pytest
from weightsmith.outside import landlock, process, sandbox_probe, seccomp
from weightsmith.outside.confinement import (
    Confinement,
    confinement,
    interpreter,
    job_sandbox,
    targets,
)
from weightsmith.outside.job_sandbox import ALL, LEVELS

BASE_PYTHON = Path(getattr(sys, "_base_executable", sys.executable))
PIECES = str(Path(seccomp.__file__).parent)
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


@pytest.mark.parametrize("machine", HEADERS)
def test_numbers_of_system_calls_are_the_kernels(machine):
    if not HEADERS[machine].is_file():
        pytest.skip("no kernel headers are installed")
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", HEADERS[machine].read_text())
    known = {name: int(number) for name, number in found}

    assert {name: known[name] for name in seccomp.NUMBERS[machine]} == seccomp.NUMBERS[machine]


def tried(folder: Path, code: str, abi: int) -> dict[str, str]:
    """Return what each of some attempts ended with, under the rules of an older kernel."""
    (folder / "given").mkdir()
    (folder / "given" / "model").write_text("weights")
    script = f"""
import ctypes, errno, json, os, socket, sys
sys.path.insert(0, {PIECES!r})
import seccomp, landlock
ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)
rules = [(path, landlock.RUN) for path in sys.path + ["/usr", "/lib", "/lib64"]]
rules += [({str(folder / "given")!r}, landlock.READ), ({str(folder / "own")!r}, landlock.WRITE)]
os.mkdir({str(folder / "own")!r})
os.chdir({str(folder)!r})
landlock.restrict(rules, {abi})
seccomp.install(seccomp.job_filter(seccomp.machine(), landlock={abi}))
answers = {{}}
def attempt(name, action):
    try:
        action()
    except OSError as problem:
        answers[name] = errno.errorcode[problem.errno]
    else:
        answers[name] = ""
{code}
print(json.dumps(answers))
"""
    done = process.run([BASE_PYTHON, "-S", "-c", script])
    assert done.returncode == 0, done.tail
    return json.loads(done.tail[-1])


FILES = """
attempt("read", lambda: open("given/model").read())
attempt("write", lambda: open("given/model", "w"))
attempt("truncate", lambda: os.truncate("given/model", 0))
attempt("cut off", lambda: os.open("given/model", os.O_RDONLY | os.O_TRUNC))
attempt("other", lambda: open("other").read())
attempt("own", lambda: open("own/result", "w").write("x"))
attempt("again", lambda: open("own/result", "w").truncate())
"""


@pytest.mark.parametrize("abi", [1, 2, 3, 6])
def test_inputs_can_be_read_and_not_changed_by_the_rules_of_each_kernel(abi, tmp_path):
    if landlock.abi() < abi:
        pytest.skip(f"this kernel's Landlock is of ABI {landlock.abi()}")
    (tmp_path / "other").write_text("the user's")

    answers = tried(tmp_path, FILES, abi)

    refused = {name for name, problem in answers.items() if problem in ("EACCES", "EPERM")}
    assert refused == {"write", "truncate", "cut off", "other"}
    assert answers["read"] == answers["own"] == answers["again"] == ""
    assert (tmp_path / "given" / "model").read_text() == "weights"


SOCKETS = """
for name in ("AF_INET", "AF_INET6", "AF_NETLINK", "AF_PACKET", "AF_VSOCK"):
    attempt(name, lambda: socket.socket(getattr(socket, name), socket.SOCK_STREAM))
attempt("pair", socket.socketpair)
local = socket.socket(socket.AF_UNIX)
attempt("connect", lambda: local.connect("/run/docker.sock"))
attempt("bind", lambda: local.bind("own/socket"))
attempt("datagram", lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
attempt("pair of datagrams", lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))
call = ctypes.CDLL(None, use_errno=True).syscall
def raw(*words):
    if call(*words) < 0:
        raise OSError(ctypes.get_errno(), "")
attempt("io_uring", lambda: raw(425, 1, None))
attempt("clone3", lambda: raw(435, None, 0))
attempt("x32", lambda: raw(0x40000000 + 41, 2, 1, 0))
attempt("unshare", lambda: raw(272, 0x10000000))
attempt("keys", lambda: raw(250, 0, -3, 0))
libc = ctypes.CDLL(None, use_errno=True)
def watch():
    if libc.inotify_add_watch(libc.inotify_init(), b"/tmp", 0x100) < 0:
        raise OSError(ctypes.get_errno(), "")
attempt("watch", watch)
attempt("memfd", lambda: os.memfd_create("x"))
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are x86-64's")
def test_there_are_no_sockets_but_pairs_of_its_own(tmp_path):
    if landlock.abi() == 0:
        pytest.skip("this kernel has no Landlock")

    answers = tried(tmp_path, SOCKETS, 1)

    families = {answers[name] for name in answers if name.startswith("AF_")}
    assert families == {"EAFNOSUPPORT"}
    assert answers["pair"] == ""
    assert answers["connect"] == "ECONNREFUSED"
    assert answers["bind"] == "EPERM"
    assert answers["datagram"] == answers["pair of datagrams"] == "EAFNOSUPPORT"
    assert answers["io_uring"] == answers["clone3"] == answers["x32"] == "ENOSYS"
    assert answers["unshare"] == answers["keys"] == answers["watch"] == "EPERM"
    assert answers["memfd"] == "ENOSYS"


def sandboxed(folder: Path, code: str) -> process.Completed:
    """Run a few lines of Python in the strongest sandbox of this machine."""
    sandbox = job_sandbox(confinement(), run=interpreter(BASE_PYTHON), read=[], write=[folder])
    return run_in(sandbox, folder, code)


def run_in(sandbox, folder: Path, code: str, *words: str | Path, **limits) -> process.Completed:
    argv = [BASE_PYTHON, "-I", "-S", "-c", code, *words]
    most = process.ResourceLimits(sandbox=sandbox, **limits)
    return process.run(argv, cwd=folder, limits=most)


def test_a_program_ends_in_a_sandbox_as_it_does_outside(tmp_path):
    assert sandboxed(tmp_path, "raise SystemExit(7)").returncode == 7
    crash = "import ctypes; ctypes.string_at(0)"
    assert sandboxed(tmp_path, crash).returncode == -signal.SIGSEGV


@pytest.mark.parametrize("namespaces", LEVELS)
def test_a_job_changes_nothing_that_it_reads(namespaces, tmp_path):
    """With a mount namespace, and by Landlock's rules alone."""
    if namespaces != ALL and landlock.abi() == 0:
        pytest.skip("this kernel has no Landlock")
    given, own = tmp_path / "given", tmp_path / "own"
    for folder in (given, own):
        folder.mkdir()
        (folder / "model").write_text("weights")
    sandbox = job_sandbox(
        Confinement(namespaces=namespaces, filtered=False),
        run=interpreter(BASE_PYTHON), read=[], inputs=[given], write=[own],
    )  # fmt: skip
    code = (
        "import sys; path = sys.argv[1]\n"
        "print(open(path).read(), flush=True); open(path, 'w').write('else')"
    )

    first, second = (run_in(sandbox, own, code, folder / "model") for folder in (given, own))

    if "cannot prepare" in " ".join(first.tail):
        pytest.skip("this kernel refuses namespaces")
    assert (first.tail[0], (given / "model").read_text()) == ("weights", "weights")
    assert first.returncode == 1
    assert (second.returncode, (own / "model").read_text()) == (0, "else")


def test_no_capability_is_left_but_roots_to_read(tmp_path):
    """Its output is the job's own, and its inputs may be another user's."""
    code = "print(*(x for x in open('/proc/self/status') if x.startswith('Cap')))"

    rights = {line.split()[1] for line in sandboxed(tmp_path, code).tail if line.strip()}

    assert rights <= {"0" * 16, f"{4:016x}", f"{2:016x}"}  # the last in Docker's containers
    assert os.getuid() == 0 or rights == {"0" * 16}


def test_a_job_sets_no_limits_of_others(tmp_path):
    """No time at all would end any process of the user."""
    code = (
        "import ctypes, os, resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        "limits = (ctypes.c_uint64 * 2)(); libc = ctypes.CDLL(None, use_errno=True)\n"
        "print(libc.prlimit(1, 0, None, limits), ctypes.get_errno())"
    )
    if not confinement().filtered:
        pytest.skip("this kernel has no seccomp of system calls")

    assert sandboxed(tmp_path, code).tail[-1] == "-1 1"


def test_a_server_of_somebody_else_asks_nobody(tmp_path):
    """It runs as the user where there are no namespaces: D-Bus would do anything for it."""
    code = (
        "import socket\n"
        "from weightsmith.outside import seccomp, privileges\n"
        "privileges.forbid_privileges()\n"
        "seccomp.install(seccomp.job_filter(\n"
        "    seccomp.machine(), landlock=6, sockets=True, serves=True))\n"
        "server = socket.create_server(('127.0.0.1', 0))\n"
        "for make in (lambda: socket.socket(socket.AF_UNIX),\n"
        "             lambda: socket.create_connection(server.getsockname())):\n"
        "    try: make(); print('made')\n"
        "    except OSError as error: print(error.errno)\n"
    )
    done = process.run([sys.executable, "-c", code], cwd=tmp_path)

    assert list(done.tail) == [str(errno.EAFNOSUPPORT), str(errno.ECONNREFUSED)], done.tail


def test_a_job_has_no_keys_of_its_user(tmp_path):
    """Neither by a call nor by the list of those that its number may see."""
    libc = ctypes.CDLL(None, use_errno=True)
    add_key = 248 if os.uname().machine == "x86_64" else 217
    libc.syscall(add_key + 2, 8, -4, -3)  # as after a login: a session has its user's keys
    key = libc.syscall(add_key, b"user", b"weightsmith-job", b"secret", 6, -4)
    assert key > 0
    assert libc.syscall(add_key + 2, 15, key, 600) == 0  # it goes after ten minutes
    code = (
        f"import ctypes; libc = ctypes.CDLL(None, use_errno=True); number = {add_key + 2}\n"
        "print(libc.syscall(number, 10, -4, b'user', b'weightsmith-job', 0), ctypes.get_errno())\n"
        "print('weightsmith-job' in open('/proc/keys').read())"
    )
    if not confinement().filtered:
        pytest.skip("this kernel has no seccomp of system calls")

    done = sandboxed(tmp_path, code)

    assert done.tail[-2] == "-1 1"
    assert done.tail[-1] == "False" or confinement().namespaces != ALL


def test_a_jobs_shared_memory_is_within_its_limit(tmp_path):
    """Files in memory too: they are refused above the limit, and with the rest they end the job."""
    if confinement().namespaces != ALL:
        pytest.skip("this kernel gives no mounts of its own")
    most = 200 << 20
    sandbox = job_sandbox(
        confinement(), run=interpreter(BASE_PYTHON), read=[], write=[tmp_path], shared_bytes=most
    )
    code = (
        "import sys, time; file = open('/dev/shm/x', 'wb', buffering=0)\n"
        "try:\n"
        "    for _ in range(int(sys.argv[1])): file.write(bytes(1 << 20))\n"
        "except OSError as problem: print(problem.errno)\n"
        "held = b'x' * (int(sys.argv[2]) << 20); print('held', flush=True)\n"
        "time.sleep(int(sys.argv[3]))"
    )
    limits = process.ResourceLimits(resident_bytes=most, sandbox=sandbox)

    within, above, together = (
        process.run([BASE_PYTHON, "-I", "-S", "-c", code, *sizes], cwd=tmp_path, limits=limits)
        for sizes in (("50", "50", "1"), ("300", "0", "0"), ("150", "100", "60"))
    )

    assert (within.returncode, within.tail) == (0, ("held",))
    assert above.tail[0] == str(errno.ENOSPC)
    assert together.returncode == -9


def test_a_job_learns_no_names_of_other_files(tmp_path):
    """Neither by listing a folder nor by watching it; it sees the size of a file that it names."""
    other, own = tmp_path / "other", tmp_path / "own"
    for folder in (other, own):
        folder.mkdir()
    (other / "diary").write_text("the user's")
    code = (
        "import ctypes, os; libc = ctypes.CDLL(None, use_errno=True)\n"
        f"folder = {str(other)!r}\n"
        "try: print(os.listdir(folder))\n"
        "except OSError as problem: print(problem.errno)\n"
        "print(libc.inotify_add_watch(libc.inotify_init(), folder.encode(), 0x20))\n"
        "print(libc.fanotify_init(0x200, 0))\n"
        "print(os.stat(folder + '/diary').st_size)"
    )
    if landlock.abi() == 0 or not confinement().filtered:
        pytest.skip("this kernel has no Landlock, or no seccomp of system calls")

    assert list(sandboxed(own, code).tail) == [str(errno.EACCES), "-1", "-1", "10"]


def test_a_job_sees_no_process_but_its_own(tmp_path):
    if confinement().namespaces != ALL:
        pytest.skip("this kernel gives no namespace of processes")

    done = sandboxed(tmp_path, "import os; print(*(x for x in os.listdir('/proc') if x.isdigit()))")

    assert done.tail[-1] == "1"


def test_a_model_of_links_is_readable_with_what_they_lead_to(tmp_path):
    """As the hub's cache is: a folder of links to blobs beside it."""
    home = tmp_path / "hub" / "models--a--b"
    snapshot, blobs = home / "snapshots" / "1", home / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "ab").write_text("{}")
    (blobs / "cd").write_text("another model's")
    (snapshot / "config.json").symlink_to("../../blobs/ab")

    sandbox = job_sandbox(Confinement(), run=[], read=[], write=[], inputs=[snapshot])

    assert str(blobs / "ab") in sandbox.read
    assert str(blobs) not in sandbox.read
    assert str(blobs / "cd") not in sandbox.read


def test_a_long_path_of_temporary_files_finds_the_same_sandbox(tmp_path, monkeypatch):
    """A socket's address has 107 bytes, its path may have 4,095."""
    deep = tmp_path.joinpath(*["a folder of a job of a pipeline"] * 6)
    deep.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(deep))

    assert confinement.__wrapped__() == confinement()
    with targets() as outside:
        script = [BASE_PYTHON, "-I", "-S", sandbox_probe.__file__, json.dumps(outside)]
        answers = json.loads(process.run(script).tail[-1])
    assert answers["sockets"], "without a sandbox they are reached"
