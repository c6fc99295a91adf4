"""An image's own root file system is entered, or pointed into where that is not allowed."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from toolchain.drivers import process, rootfs
from toolchain.drivers.rootfs import (
    RootfsLauncher,
    StartInfo,
    free_port,
    pointed_into,
    user_ids,
)
from toolchain.errors import EnvironmentFailure, UsageError
from toolchain.ports import StartSpec

SAY = "echo $GREETING; id -u; pwd; cat /models/name; exec sleep 60"


def unpack(layout: str, root: Path) -> StartInfo:
    """Make a root file system of the host's own shell and a few programs."""
    for program in ("sh", "sleep", "cat", "id"):
        copy_with_libraries(Path(shutil.which(program)), root)
    for name in ("models", "tmp"):
        (root / name).mkdir(mode=0o755)
    (root / "models" / "name").write_text(layout + "\n")
    return StartInfo(
        argv=("/bin/sh", "-c", SAY),
        env={"GREETING": "from the image"},
        workdir="/models",
        user="7:8",
    )


def copy_with_libraries(program: Path, root: Path) -> None:
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    (root / "bin").mkdir(exist_ok=True)
    shutil.copy(program.resolve(), root / "bin" / program.name)
    for library in re.findall(r"(/\S+) \(0x", listed):
        target = root / library.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(library).resolve(), target)


def wait_for_lines(endpoint, count: int) -> list[str]:
    deadline = time.monotonic() + 20
    while len(endpoint.logs(99).splitlines()) < count and time.monotonic() < deadline:
        time.sleep(0.02)
    return endpoint.logs(99).splitlines()


def test_the_image_is_started_inside_its_own_files_as_its_own_user(tmp_path):
    if not process.can_enter_root(tmp_path):
        pytest.skip("this kernel lets us enter no root file system")
    spec = StartSpec(port=free_port(), env={"GREETING": "from the caller"})

    with RootfsLauncher(unpack, tmp_path / "cache").serve("oci:some-layout", spec) as endpoint:
        lines = wait_for_lines(endpoint, 4)
        assert lines == ["from the caller", "7", "/models", "some-layout"]
        assert endpoint.alive()
        assert endpoint.url == f"http://127.0.0.1:{spec.port}"
    assert not endpoint.alive()


def test_without_the_right_to_enter_paths_are_pointed_into_the_files(monkeypatch, tmp_path):
    monkeypatch.setattr(process, "can_enter_root", lambda folder: False)

    def simple(layout: str, root: Path) -> StartInfo:
        (root / "models").mkdir()
        (root / "models" / "name").write_text("inside\n")
        return StartInfo(argv=("cat", "/models/name"), env={})

    with RootfsLauncher(simple, tmp_path / "cache").serve(
        "oci:x", StartSpec(port=1, env={})
    ) as endpoint:
        assert wait_for_lines(endpoint, 1) == ["inside"]


def test_only_layouts_are_started_and_only_with_a_program(tmp_path):
    launcher = RootfsLauncher(lambda layout, root: StartInfo(argv=(), env={}), tmp_path / "cache")
    spec = StartSpec(port=1, env={})

    with pytest.raises(UsageError, match="without a container engine"):
        launcher.serve("registry/image:1", spec).__enter__()
    with pytest.raises(EnvironmentFailure, match="no program"):
        launcher.serve("oci:x", spec).__enter__()


def test_only_paths_of_the_image_are_pointed_into_it(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "app").mkdir()
    words = ("/app/serve", "--model=/models/a.gguf", "--port", "8080", "/dev/null", "/etc/hosts")

    assert pointed_into(tmp_path, words) == (
        f"{tmp_path}/app/serve",
        f"--model={tmp_path}/models/a.gguf",
        "--port",
        "8080",
        "/dev/null",
        "/etc/hosts",
    )
    assert pointed_into(tmp_path, ("/app/bin:/usr/bin",)) == (f"{tmp_path}/app/bin:/usr/bin",)


def test_users_are_looked_up_in_the_image(tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "passwd").write_text("root:x:0:0::/:/bin/sh\napp:x:10:20::/:/bin/sh\n")
    (tmp_path / "etc" / "group").write_text("web:x:30:\n")

    assert user_ids(tmp_path, "") == (0, 0)
    assert user_ids(tmp_path, "app") == (10, 20)
    assert user_ids(tmp_path, "10") == (10, 20)
    assert user_ids(tmp_path, "app:web") == (10, 30)
    assert user_ids(tmp_path, "65532:65533") == (65532, 65533)
    for unknown in ("nobody", "app:nogroup"):
        with pytest.raises(EnvironmentFailure, match="not in its /etc/passwd"):
            user_ids(tmp_path, unknown)


def test_two_servers_never_get_one_port(monkeypatch, tmp_path):
    """Free when it was looked for is not free when the server takes it."""
    monkeypatch.setattr(process, "can_enter_root", lambda folder: False)
    found = iter([free_port(), free_port()])
    first = next(found)
    offers = iter([first, first, next(found)])
    monkeypatch.setattr(rootfs, "free_port", lambda: next(offers))
    launcher = RootfsLauncher(
        lambda layout, root: StartInfo(argv=("sleep", "60"), env={}), tmp_path / "cache"
    )
    spec = StartSpec(port=1, env={}, port_variable="PORT")

    with launcher.serve("oci:a", spec) as one, launcher.serve("oci:b", spec) as two:
        assert one.url != two.url
