"""An image's own root file system is entered, or pointed into where that is not allowed."""

from __future__ import annotations

import os
import re
import socket
import tempfile
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from weightsmith.core.errors import CheckFailed, UsageError
from weightsmith.core.ports import StartSpec
from weightsmith.outside import rootfs
from weightsmith.outside.rootfs import (
    NotAllowed,
    RootfsLauncher,
    StartInfo,
    free_port,
    memory_limit,
    relocated,
    user_ids,
)

from tests.fakes.rootfs import copy_python, copy_shell

PATIENCE = 120
"""Seconds in which what is sure to come must have come, however busy the machine is."""
SAY = "echo $GREETING; id -u; pwd; cat /models/name; exec sleep 600"


def unpack(layout: str, root: Path) -> StartInfo:
    """Make a root file system of the host's own shell and a few programs."""
    copy_shell(root)
    for name in ("models", "tmp"):
        (root / name).mkdir(mode=0o755)
    (root / "models" / "name").write_text(layout + "\n")
    return StartInfo(
        argv=("/bin/sh", "-c", SAY),
        env={"GREETING": "from the image"},
        workdir="/models",
        user="7:8",
    )


def serve(unpack, folder: Path, image: str = "oci:x", **spec):
    start = StartSpec(**{"port": 1, "env": {}, **spec})
    return RootfsLauncher(unpack, folder / "cache").serve(image, start)


def wait_for_lines(endpoint, count: int) -> list[str]:
    deadline = time.monotonic() + PATIENCE
    while len(endpoint.logs(99).splitlines()) < count and time.monotonic() < deadline:
        time.sleep(0.02)
    return endpoint.logs(99).splitlines()


def need_namespaces(endpoint) -> None:
    if "own processes alone" not in endpoint.confinement:
        pytest.skip("this kernel gives us no namespaces")


def test_the_image_is_started_inside_its_own_files_as_its_own_user(tmp_path, monkeypatch):
    """And without room in the temporary folder, which is often a small file system of its own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "full"))
    env = {"GREETING": "from the caller"}

    with serve(unpack, tmp_path, "oci:some-layout", env=env) as endpoint:
        need_namespaces(endpoint)
        lines = wait_for_lines(endpoint, 4)
        assert lines == ["from the caller", "7", "/models", "some-layout"]
        assert endpoint.alive()
        assert "user 7:8" in endpoint.confinement
    assert not endpoint.alive()


def test_further_arguments_follow_the_images_own(tmp_path):
    def image(layout: str, root: Path) -> StartInfo:
        say = 'echo "$0 $1"; exec sleep 600'
        return replace(unpack(layout, root), argv=("/bin/sh", "-c", say, "own"))

    with serve(image, tmp_path, arguments=("--more",)) as endpoint:
        need_namespaces(endpoint)
        assert wait_for_lines(endpoint, 1) == ["own --more"]


def test_a_program_for_a_gpu_finds_this_machines_driver(tmp_path, monkeypatch):
    """No image has it, since it must be of the kernel module's version."""
    driver = tmp_path / "driver"
    driver.mkdir()
    (driver / "libcuda.so.1").write_text("the driver\n")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(driver))

    def image(layout: str, root: Path) -> StartInfo:
        info = unpack(layout, root)
        (root / "usr").mkdir(exist_ok=True)
        (root / "usr/local").symlink_to(tmp_path)  # leads out of the image
        show = 'echo "$LD_LIBRARY_PATH"; cat "${LD_LIBRARY_PATH%%:*}/libcuda.so.1"; exec sleep 600'
        env = {"LD_LIBRARY_PATH": "/opt/own"}
        return replace(info, argv=("/bin/sh", "-c", show), env=env)

    with serve(image, tmp_path, use_gpu=True) as endpoint:
        need_namespaces(endpoint)
        lines = wait_for_lines(endpoint, 2)
    assert lines == ["/usr/local/nvidia/lib64:/opt/own", "the driver"]
    assert not (tmp_path / "nvidia").exists()


LISTEN = """
import http.server, json, os, pathlib, socket, sys
def attempt(action):
    try:
        action()
    except OSError as error:
        return error.strerror or str(error)
    return "done"
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        said = {
            "root": attempt(lambda: pathlib.Path("/models/x").touch()),
            "tmp": attempt(lambda: pathlib.Path("/tmp/x").touch()),
            "out": attempt(lambda: socket.create_connection(("192.0.2.1", 80), 2)),
            "host": attempt(lambda: socket.create_connection(("127.0.0.1", int(self.path[1:])), 2)),
        }
        data = json.dumps(said).encode()
        self.send_response(200); self.end_headers(); self.wfile.write(data)
    def log_message(self, *args): pass
print("listens", flush=True)
http.server.ThreadingHTTPServer(("0.0.0.0", 8000), Handler).serve_forever()
"""


def python_root(layout: str, root: Path) -> StartInfo:
    """Make a root file system of this Python."""
    python, env = copy_python(root)
    return StartInfo(argv=(python, "-c", LISTEN), env=env, user="7:8")


def ask(endpoint, port: int) -> dict[str, str]:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return httpx.get(f"{endpoint.url}/{port}", timeout=60, trust_env=False).json()
        except httpx.HTTPError:
            assert endpoint.alive(), endpoint.logs(20)
            assert time.monotonic() < deadline, endpoint.logs(20)
            time.sleep(0.05)


def wait_until_nothing_runs_for(folder: Path) -> None:
    """The relays too have ended: one that outlives its server would stay for good."""
    deadline = time.monotonic() + PATIENCE
    while True:
        left = []
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                if str(folder).encode() in file.read_bytes():
                    left.append(file.parent.name)
        if not left:
            return
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_server_is_reached_and_reaches_nothing(tmp_path):
    with (
        socket.create_server(("127.0.0.1", 0)) as neighbour,
        serve(python_root, tmp_path, port=8000) as endpoint,
    ):
        need_namespaces(endpoint)
        said = ask(endpoint, neighbour.getsockname()[1])
        assert endpoint.stop(PATIENCE) == -15
        assert not endpoint.alive()
        again = endpoint.restart()
        assert again.url != endpoint.url
        assert ask(again, neighbour.getsockname()[1]) == said

    assert said["root"] == "Read-only file system"
    assert said["tmp"] == "done"
    assert "unreachable" in said["out"]
    assert "refused" in said["host"]
    assert {"no network", "read-only root", "user 7:8"} <= set(endpoint.confinement)
    assert not again.alive()
    wait_until_nothing_runs_for(tmp_path)


@pytest.fixture
def no_namespaces(monkeypatch):
    def refuse(*_):
        raise NotAllowed("no namespaces", hint="")

    monkeypatch.setattr(rootfs, "_in_namespaces", refuse)


@pytest.mark.usefixtures("no_namespaces")
def test_without_namespaces_a_program_still_has_the_image_s_files_and_no_rights(tmp_path):
    def simple(layout: str, root: Path) -> StartInfo:
        copy_shell(root)
        (root / "models").mkdir()
        (root / "models" / "name").write_text("inside\n")
        return StartInfo(argv=("/bin/cat", "/models/name"), env={})

    with serve(simple, tmp_path) as endpoint:
        assert wait_for_lines(endpoint, 1) == ["inside"]
        assert "no new privileges" in endpoint.confinement
        assert not {"no network", "read-only root"} & set(endpoint.confinement)


def test_only_layouts_are_started_and_only_with_a_program(tmp_path):
    with pytest.raises(UsageError, match="without a container engine"):
        serve(unpack, tmp_path, "registry/image:1").__enter__()
    with pytest.raises(CheckFailed, match="neither an entrypoint nor"):
        serve(lambda layout, root: StartInfo(argv=(), env={}), tmp_path).__enter__()


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (("/app/serve",), "'/app/serve': the program, or its loader"),
        (("serve",), "'serve': the program, or its loader"),
        (("/models/name",), "'/models/name': the image's user may not execute it"),
        (("/models/other-machine",), "it is not a program for this machine"),
        (("/models/lost-loader",), "the program, or its loader or interpreter"),
    ],
)
def test_a_program_that_cannot_run_is_the_image_s_fault(tmp_path, argv, why):
    def broken(layout: str, root: Path) -> StartInfo:
        info = unpack(layout, root)
        for name, content in (("other-machine", b"\x7fELF\2\1\1" + bytes(57)),
                              ("lost-loader", b"#!/lib/ld-none.so\n")):  # fmt: skip
            (root / "models" / name).write_bytes(content)
            (root / "models" / name).chmod(0o755)
        return replace(info, argv=argv)

    with pytest.raises(CheckFailed, match=re.escape(why)):
        serve(broken, tmp_path).__enter__()


@pytest.mark.parametrize("workdir", ["/not/yet", "/models/name"])
def test_a_working_directory_is_made_where_that_can_be(tmp_path, workdir):
    def elsewhere(layout: str, root: Path) -> StartInfo:
        return replace(unpack(layout, root), workdir=workdir)

    refused = pytest.raises(CheckFailed, match="not in the image")
    with (
        refused if workdir == "/models/name" else nullcontext(),  # a file
        serve(elsewhere, tmp_path) as endpoint,
    ):
        need_namespaces(endpoint)
        assert wait_for_lines(endpoint, 4)[2] == workdir


def test_a_server_in_a_session_of_its_own_is_stopped_and_its_orphans_end_with_it(tmp_path):
    """What process 1 of a container has to do: hand on the signal, and take in what is left."""

    def detached(layout: str, root: Path) -> StartInfo:
        copy_shell(root, "setsid")
        script = "trap 'exit 7' TERM; (sleep 600 &); echo up; while :; do sleep 0.05; done"
        return StartInfo(argv=("/bin/sh", "-c", f'exec /bin/setsid /bin/sh -c "{script}"'), env={})

    with serve(detached, tmp_path) as endpoint:
        need_namespaces(endpoint)
        assert wait_for_lines(endpoint, 1) == ["up"]
        assert endpoint.stop(PATIENCE) == 7
    wait_until_nothing_runs_for(tmp_path)


def test_only_paths_of_the_image_are_relocated(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "app").mkdir()
    words = ("/app/serve", "--model=/models/a.gguf", "--port", "8080", "/dev/null", "/etc/hosts")

    moved = (f"{tmp_path}/app/serve", f"--model={tmp_path}/models/a.gguf", *words[2:])
    assert relocated(tmp_path, words) == moved
    assert relocated(tmp_path, ("/app/bin:/usr/bin",)) == (f"{tmp_path}/app/bin:/usr/bin",)


def test_users_are_looked_up_in_the_image(tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "passwd").write_text("root:x:0:0::/:/bin/sh\napp:x:10:20::/:/bin/sh\n")
    (tmp_path / "etc" / "group").write_text("web:x:30:\n")

    known = {"": (0, 0), "app": (10, 20), "10": (10, 20), "app:web": (10, 30)}
    for user, ids in {**known, "65532:65533": (65532, 65533)}.items():
        assert user_ids(tmp_path, user) == ids
    for unknown in ("nobody", "app:nogroup", "4294967295", "7:99999999999"):
        with pytest.raises(CheckFailed, match="not in its /etc/passwd"):
            user_ids(tmp_path, unknown)


@pytest.mark.usefixtures("no_namespaces")
def test_two_servers_never_get_one_port(monkeypatch, tmp_path):
    """Free when it was looked for is not free when the server takes it."""
    first = second = free_port()
    while second == first:
        second = free_port()
    offers = iter([first, first, second])
    monkeypatch.setattr(rootfs, "free_port", lambda: next(offers))
    with (
        serve(unpack, tmp_path, port_variable="PORT") as one,
        serve(unpack, tmp_path, port_variable="PORT") as two,
    ):
        assert one.url != two.url


@pytest.mark.parametrize(("cpus", "more"), [(2, 288 << 20), (16, 512 << 20), (64, 1280 << 20)])
def test_a_server_has_room_for_the_stacks_of_its_threads(monkeypatch, cpus, more):
    monkeypatch.setattr(os, "cpu_count", lambda: cpus)
    spec = StartSpec(port=1, env={}, memory_bytes=192 << 20)
    assert memory_limit(spec) == (192 << 20) + more
