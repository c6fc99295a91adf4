"""An image that is started without a container engine, from its layout."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from weightsmith.core.errors import CheckFailed
from weightsmith.core.ports import Endpoint, StartSpec
from weightsmith.outside.rootfs import NotAllowed, RootfsLauncher, StartInfo, memory_limit

from tests.fakes.rootfs import copy_python, copy_shell
from tests.fakes.users import as_user

PATIENCE = 120
"""Seconds in which what is sure to come must have come, however busy the machine is."""
ATTACKS = """
import ctypes, json, os, socket, stat, sys, time
victim, host_pid, host_port, host_name = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)

def called(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "")

def written(path):
    with open(path, "a") as file:
        file.write("owned")

def opened(path):  # no more than that: a test that fails must not harm the machine
    open(path, "a").close()

def escape():
    os.mkdir("/tmp/deep"); os.chroot("/tmp/deep")
    for _ in range(64):
        os.chdir("..")
    os.chroot("."); written(victim)

def setuid():
    os.chmod("/bin/sh", 0o4755)

def host_processes():
    own = {"1", str(os.getppid()), str(os.getpid())}
    others = [name for name in os.listdir("/proc") if name.isdecimal() and name not in own]
    if not others:
        raise OSError(0, "")
    return others

def abstract():
    with socket.socket(socket.AF_UNIX) as unix:
        unix.connect("\\0" + host_name)

def devices():
    usual = {"null", "zero", "full", "random", "urandom", "tty", "shm", "pts", "ptmx",
             "fd", "stdin", "stdout", "stderr"}
    if not set(os.listdir("/dev")) - usual:
        raise OSError(0, "")

tries = {
    "write a file of the machine": lambda: written(victim),
    "write it through process 1": lambda: written("/proc/1/root" + victim),
    "write it through its parent": lambda: written(f"/proc/{os.getppid()}/root" + victim),
    "write it through the folder of a process": lambda: written(f"/proc/{host_pid}/root{victim}"),
    "leave the root by chroot": escape,
    "see a device that it has no use for": devices,
    "make a device": lambda: os.mknod("/tmp/device", stat.S_IFCHR | 0o666, os.makedev(1, 3)),
    "make a disk": lambda: os.mknod("/models/disk", stat.S_IFBLK | 0o666, os.makedev(254, 0)),
    "mount": lambda: called(libc.mount(b"proc", b"/tmp", b"proc", 0, None)),
    "make the root writable": lambda: called(libc.mount(None, b"/", None, 32 | 4096, None)),
    "become all-powerful in a namespace": lambda: called(libc.unshare(0x10000000)),
    "leave a program that makes its caller root": setuid,
    "write to its own files": lambda: written("/models/x"),
    "see the machine's processes": host_processes,
    "end one of them": lambda: os.kill(int(host_pid), 0),
    "look into process 1": lambda: os.listdir("/proc/1/fd"),
    "see what process 1 is": lambda: os.readlink("/proc/1/exe"),
    "set the kernel": lambda: opened("/proc/sys/kernel/core_pattern"),
    "set a device": lambda: opened("/sys/kernel/profiling"),
    "become root": lambda: (os.setgroups([]), os.setresuid(0, 0, 0), opened("/proc/1/mem")),
    "reach the internet": lambda: socket.create_connection(("192.0.2.1", 80), 2),
    "reach a service of the machine": lambda: socket.create_connection(
        ("127.0.0.1", int(host_port)), 2),
    "reach it by an abstract name": abstract,
    "name the machine": lambda: socket.sethostname(socket.gethostname()),
}
def succeeds(attempt):  # in a process of its own, so that none helps the next
    child = os.fork()
    if child == 0:
        try:
            attempt()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0

sys.stderr = open("/dev/null", "w")
print("found " + json.dumps([name for name in tries if succeeds(tries[name])]), flush=True)
while True:
    time.sleep(600)
"""


def log_with(endpoint: Endpoint, *words: str) -> str:
    """Return the log once it has one of the words, or the server has ended."""
    deadline = time.monotonic() + PATIENCE
    while endpoint.alive() and not any(word in endpoint.logs(99) for word in words):
        assert time.monotonic() < deadline, endpoint.logs(99)
        time.sleep(0.05)
    return endpoint.logs(99)


def what_it_found(endpoint: Endpoint) -> list[Any]:
    log = log_with(endpoint, "found ")
    _, found, rest = log.partition("found ")
    assert found, log
    return list(json.loads(rest.partition("\n")[0]))


@pytest.mark.slow
@pytest.mark.parametrize("user", ["0", "", "7:8"])
def test_a_program_of_an_image_reaches_nothing_of_the_machine(tmp_path, user):
    """A program tries all that root could do; nothing succeeds, and the report has only that.

    Whoever runs the tests, root or not, and whatever user the image wants to be.
    """
    victim = tmp_path / "victim"
    victim.touch()
    for place in (victim, *victim.parents[:2]):
        place.chmod(0o777)  # only the walls keep it
    roots: list[Path] = []

    def attacker(layout: str, root: Path) -> StartInfo:
        roots.append(root)
        python, env = copy_python(root)
        copy_shell(root)
        argv = (python, "-c", ATTACKS, str(victim), str(os.getpid()))
        port, name = neighbour.getsockname()[1], hidden.getsockname()[1:].decode()
        return StartInfo(argv=(*argv, str(port), name), env=env, user=user)

    launcher = RootfsLauncher(attacker, tmp_path / "cache")
    spec = StartSpec(port=8000, env={}, memory_bytes=1 << 30)
    with (
        socket.create_server(("127.0.0.1", 0)) as neighbour,
        socket.socket(socket.AF_UNIX) as hidden,
    ):
        hidden.bind(f"\0weightsmith-test-{os.getpid()}-{user}")
        hidden.listen()
        with launcher.serve("oci:x", spec) as endpoint:
            if "own processes alone" not in endpoint.confinement:
                pytest.skip("this kernel gives us no namespaces")
            assert what_it_found(endpoint) == []
            said = endpoint.confinement
            bits = [p for p in roots[0].rglob("*") if p.lstat().st_mode & (stat.S_ISUID)]
            assert bits == []
    assert victim.read_text() == ""
    outside = 65532 if os.getuid() == 0 else os.getuid()
    assert said == (
        "user 7:8" if user == "7:8" else f"user 0:0 ({outside} outside)",
        "read-only root",
        "no network",
        "no capabilities",
        "no new privileges",
        "own processes alone",
        "none of your keys",
        f"{memory_limit(spec) >> 20} MiB of memory",
    )


def refuse(*_: object) -> None:
    raise NotAllowed("no namespaces", hint="")


STARTED = """
import ctypes, json, os, sys
from pathlib import Path
from tests.fakes.rootfs import copy_python, copy_shell
from tests.hostile.image_author.test_started import CALLS, log_with, refuse, what_it_found
from weightsmith.core.errors import WeightsmithError
from weightsmith.core.ports import StartSpec
from weightsmith.outside import landlock, rootfs
from weightsmith.outside.rootfs import RootfsLauncher, StartInfo
"""
"""How each program begins that starts an image in a process of its own."""
BY_LESSER_ROOT = """
def image(layout, root):
    copy_shell(root, "head")
    script = "echo hidden > /dev/null; /bin/head -c 9 /dev/urandom | /bin/cat > /dev/full"
    return StartInfo(argv=("/bin/sh", "-c", script + "; echo up; sleep 600"), env={}, user="0")

try:
    with RootfsLauncher(image, Path(sys.argv[1])).serve("oci:x", StartSpec(port=1, env={})) as it:
        print(*it.confinement, sep=", ")
        print(log_with(it, "up"))
except WeightsmithError as error:
    print(error.exit_code, error.message, error.hint)
"""


@pytest.mark.root
@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        # As in a container of Docker's: no namespaces, and no others' rights are needed.
        ("-sys_admin", "user 65532:65532, no capabilities, no new privileges, none of your keys"),
        ("-sys_admin,-setuid", "5 oci:x was not started, because it would not be confined"),
        ("-sys_admin,-setpcap", "5 oci:x was not started, because it would not be confined"),
        ("-sys_admin,-sys_chroot", "5 oci:x was not started, because it would not be confined"),
    ],
)
def test_root_gives_its_rights_away_or_starts_nothing(tmp_path, lacking, said):
    """The tests' user is root without all of root's rights: an image must not get the rest."""
    command = ["setpriv", f"--bounding-set={lacking}", "--inh-caps=-all", sys.executable]
    command += ["-c", STARTED + BY_LESSER_ROOT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.startswith(said), done
    assert ("No space left on device\nup\n" in done.stdout) == said.startswith("user"), done


WITHOUT_NAMESPACES = """
home = Path(sys.argv[1])
(home / "diary").write_text("mine")
os.environ.update(HOME=str(home), SECRET="a token")
us = os.getpid()

def image(layout, root):
    copy_shell(root)
    (root / "tmp").mkdir()
    script = f"cat {home}/diary; echo x > {home}/left; cat /proc/{us}/environ"
    script += "; echo z > $HOME/z; cat $HOME/z; echo up; sleep 600"
    return StartInfo(argv=("/bin/sh", "-c", script), env={}, user="0")

rootfs._in_namespaces = refuse
with RootfsLauncher(image, home / "cache").serve("oci:x", StartSpec(port=1, env={})) as it:
    log = log_with(it, "up")
    print(json.dumps([landlock.abi(), it.confinement, log, (home / "left").exists()]))
"""


def test_without_namespaces_a_user_s_own_files_are_kept_from_an_image(tmp_path):
    """As on machines that refuse them to ordinary users: the program runs as the user."""
    command, env = as_user()
    with tempfile.TemporaryDirectory() as home:  # below folders that another user may enter
        if os.getuid() == 0:
            os.chown(home, 65532, 65532)
        command += ["-c", STARTED + WITHOUT_NAMESPACES, home]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    landlock, said, log, left = json.loads(done.stdout)
    assert "no new privileges" in said
    assert not {"no network", "read-only root", "own processes alone"} & set(said)
    assert log.endswith("z\nup")
    if landlock:
        assert "none of your files" in said
        assert not left
        assert "mine" not in log
        assert "a token" not in log


CALLS = """
import ctypes, json, os, resource, socket, time
libc = ctypes.CDLL(None, use_errno=True)
add_key, keyctl = (248, 250) if os.uname().machine == "x86_64" else (217, 219)
search, read, link, session, of_user = 10, 11, 8, -3, -4

def called_well(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result

def called(*words):
    return called_well(libc.syscall(*words))

def key_of(ring):
    if ring == of_user:
        called(keyctl, link, of_user, session)
    number = called(keyctl, search, ring, b"user", b"weightsmith-test", 0)
    held = ctypes.create_string_buffer(64)
    called(keyctl, read, number, held, 64)

def write(ring):
    called(add_key, b"user", b"weightsmith-test", b"owned", 5, ring)

def many():
    if resource.getrlimit(resource.RLIMIT_NPROC)[1] <= 16384:
        raise OSError(0, "")

def family(name):
    return lambda: socket.socket(getattr(socket, name), socket.SOCK_STREAM).close()

tries = {
    "read the session's key": lambda: key_of(session),
    "read the user's key": lambda: key_of(of_user),
    "overwrite the session's key": lambda: write(session),
    "overwrite the user's key": lambda: write(of_user),
    "set up io_uring": lambda: called(425, 1, ctypes.create_string_buffer(120)),
    "start any number of processes": many,
    "hold memory outside its limit": lambda: os.memfd_create("x"),
    "watch a folder": lambda: called_well(libc.inotify_add_watch(libc.inotify_init(), b"/", 0x100)),
    **{name: family(name) for name in ("AF_VSOCK", "AF_ALG", "AF_PACKET", "AF_KEY", "AF_TIPC")},
}
found = []
for name, action in tries.items():
    try:
        action()
    except (OSError, AttributeError):
        continue
    found.append(name)
print("found " + json.dumps(found), flush=True)
time.sleep(600)
"""
ADD_KEY, KEYCTL = (248, 250) if os.uname().machine == "x86_64" else (217, 219)
WITH_KEYS = f"""
def image(layout, root):
    python, env = copy_python(root)
    return StartInfo(argv=(python, "-c", CALLS), env=env, user="7:8")

libc = ctypes.CDLL(None, use_errno=True)
for ring in (-3, -4):
    if ring == -3:
        assert libc.syscall({KEYCTL}, 1, None) > 0
        assert libc.syscall({KEYCTL}, 8, -4, -3) == 0  # the user's keys, as after a login
    key = libc.syscall({ADD_KEY}, b"user", b"weightsmith-test", b"the user's", 10, ring)
    assert key > 0
    assert libc.syscall({KEYCTL}, 15, key, 600) == 0  # it goes after ten minutes
if sys.argv[2] == "host":
    rootfs._in_namespaces = refuse
launcher = RootfsLauncher(image, Path(sys.argv[1]) / "cache")
with launcher.serve("oci:x", StartSpec(port=1, env={{}}, memory_bytes=1 << 30)) as endpoint:
    print(json.dumps([endpoint.confinement, what_it_found(endpoint)]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["apart", "host"])
@pytest.mark.parametrize("caller", ["as we are", "as a user"])
def test_a_program_gets_no_keys_and_no_rare_sockets_in_any_sandbox(caller, way):
    """The caller's session and user hold a key, as of Kerberos or an encrypted disk."""
    command, env = as_user()
    with tempfile.TemporaryDirectory() as home:
        if caller == "as a user" and os.getuid() == 0:
            os.chown(home, 65532, 65532)
        elif os.getuid() == 0:
            command = command[-1:]
        command += ["-c", STARTED + WITH_KEYS, home, way]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said, found = json.loads(done.stdout)
    assert found == []
    assert "none of your keys" in said
    assert "no network" in said or way == "host"


MEMORY = """
import mmap, sys, time
way, size = sys.argv[1], 700
print("began", flush=True)
try:
    if way == "shared":
        held = mmap.mmap(-1, size << 20)
        for place in range(size):
            held[place << 20:(place + 1) << 20] = b"x" * (1 << 20)
    else:
        with open(way + "/x", "wb", buffering=0) as file:
            for _ in range(size):
                file.write(bytes(1 << 20))
except OSError:
    print("refused", flush=True)
else:
    time.sleep(30)
    print("held", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["shared", "/tmp", "/dev/shm"])
def test_a_program_of_an_image_holds_no_memory_above_its_limit(tmp_path, way):
    """Memory that processes share, and files in memory: the report says 256 MiB."""

    def attacker(layout: str, root: Path) -> StartInfo:
        python, env = copy_python(root)
        return StartInfo(argv=(python, "-c", MEMORY, way), env=env)

    launcher = RootfsLauncher(attacker, tmp_path / "cache")
    spec = StartSpec(port=8000, env={}, memory_bytes=256 << 20)
    with launcher.serve("oci:x", spec) as endpoint:
        if "own processes alone" not in endpoint.confinement and way != "shared":
            pytest.skip("this kernel gives no mounts of its own")
        said = log_with(endpoint, "refused", "held")
    assert "held" not in said.splitlines()
    assert "refused" in said or f"its {memory_limit(spec) >> 20} MiB of memory" in said


def test_an_image_s_variables_rule_nothing_before_its_program(tmp_path):
    """LD_DEBUG_OUTPUT and its like make a loader write files: this machine's must not see them."""
    folder = tmp_path / "debris"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    ruling = {"LD_DEBUG": "statistics", "LD_DEBUG_OUTPUT": str(folder / "x"), "PYTHONSTARTUP": "/x"}

    def attacker(layout: str, root: Path) -> StartInfo:
        copy_shell(root)
        return StartInfo(argv=("/bin/sh", "-c", "echo up; sleep 600"), env=ruling)

    with RootfsLauncher(attacker, tmp_path / "cache").serve(
        "oci:x", StartSpec(port=1, env={})
    ) as endpoint:
        assert "up" in log_with(endpoint, "up")
        if "own processes alone" in endpoint.confinement:
            assert list(folder.iterdir()) == []


def test_links_in_an_image_lead_nowhere_on_the_machine(tmp_path):
    """/dev, /proc, /sys, /tmp and /etc/passwd are links to folders and files of the machine."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "passwd").write_text("admin:x:0:0::/:/bin/sh\n")

    def attacker(layout: str, root: Path) -> StartInfo:
        copy_shell(root, "ls")
        for name in ("dev", "proc", "sys", "tmp", "etc"):
            (root / name).symlink_to(theirs)
        script = "ls /dev/null /proc/self/status && echo up; sleep 600"
        return StartInfo(argv=("/bin/sh", "-c", script), env={}, user=wanted)

    launcher = RootfsLauncher(attacker, tmp_path / "cache")
    wanted = "admin"
    with pytest.raises(CheckFailed, match="'admin'"):
        launcher.serve("oci:x", StartSpec(port=1, env={})).__enter__()
    wanted = "7:8"
    with launcher.serve("oci:x", StartSpec(port=1, env={})) as endpoint:
        if "own processes alone" in endpoint.confinement:
            assert "up" in log_with(endpoint, "up")
    assert [path.name for path in theirs.iterdir()] == ["passwd"]
