"""Debian's packages are taken as pinned, from wherever they still are."""

import hashlib
import io
import tarfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.fakes.serving import serving
from tests.paths import ROOT, loaded

PATH = "pool/main/x/x_1_amd64.deb"


debs = loaded(ROOT / "images" / "engines" / "debs.py")


def deb(*members: tuple[str, bytes]) -> bytes:
    """An ar archive: each member's header of 60 bytes, and its content to an even length."""
    rows = [
        f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
        + data + b"\n" * (len(data) % 2)
        for name, data in members
    ]  # fmt: skip
    return b"!<arch>\n" + b"".join(rows)


def data_tar(**files: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:xz") as out:
        for name, data in files.items():
            member = tarfile.TarInfo(f"./usr/bin/{name}")
            member.size = len(data)
            out.addfile(member, io.BytesIO(data))
    return stream.getvalue()


WHOLE = deb(("debian-binary", b"2.0"), ("data.tar.xz/", data_tar(sh=b"a shell")))


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def place(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A lock whose mirror and archive are two folders served on loopback."""
    for name in ("mirror", "archive"):
        (tmp_path / name / PATH).parent.mkdir(parents=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    with serving(server) as host:
        yield {"mirror": f"{host}/mirror", "archive": f"{host}/archive"}


PACKAGE = {"path": PATH, "sha256": hashlib.sha256(WHOLE).hexdigest()}


@pytest.mark.parametrize("mirror", ["as pinned", "another release", "out of reach"])
def test_a_package_comes_from_the_mirror_or_the_archive(
    place: dict[str, str], mirror: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(debs.time, "sleep", lambda _: None)
    as_pinned = mirror == "as pinned"
    (tmp_path / "mirror" / PATH).write_bytes(WHOLE if as_pinned else b"another release")
    (tmp_path / "archive" / PATH).write_bytes(b"nothing" if as_pinned else WHOLE)
    if mirror == "out of reach":
        place["mirror"] = "http://127.0.0.1:9"
    with debs.open_package(place, PACKAGE) as archive:
        debs.write(archive, "./usr/bin/sh", tmp_path / "root" / "bin" / "sh", 0o755)
    written = tmp_path / "root" / "bin" / "sh"
    assert (written.read_bytes(), written.stat().st_mode & 0o777) == (b"a shell", 0o755)


def test_what_is_nowhere_as_pinned_is_named(place: dict[str, str], tmp_path: Path) -> None:
    for name in ("mirror", "archive"):
        (tmp_path / name / PATH).write_bytes(b"another release")
    with pytest.raises(SystemExit, match=f"error: {PATH} cannot be had from .*/mirror: its sha256"):
        debs.fetch(place, PACKAGE)


def test_a_package_without_files_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"without data\.tar"):
        debs.data_member(deb(("debian-binary", b"2.0\n")))


def test_packages_are_those_of_the_machine() -> None:
    arm = {"path": "pool/main/x/x_1_arm64.deb"}
    every = {"path": "pool/main/x/x_1_all.deb"}
    lock = {"packages": [PACKAGE, arm, every]}
    assert debs.packages_for(lock, "x86_64") == [PACKAGE, every]
    assert debs.packages_for(lock, "aarch64") == [arm, every]
    with pytest.raises(SystemExit, match="no packages are pinned for aarch64"):
        debs.packages_for({"packages": [PACKAGE]}, "aarch64")


def test_unpacking_resolves_links_and_keeps_to_what_is_wanted(tmp_path: Path) -> None:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        for name, content, mode in (
            ("./bin/dash", b"dash", 0o755),
            ("./usr/share/doc", b"", 0o644),
        ):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), mode
            archive.addfile(member, io.BytesIO(content))
        for name, target in (("./bin/sh", "dash"), ("./bin/gone", "/elsewhere")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    whole.seek(0)
    with tarfile.open(fileobj=whole) as archive:
        debs.unpack(archive, lambda path: path.startswith("usr/bin/"), tmp_path)
    written = {str(p.relative_to(tmp_path)): p for p in tmp_path.rglob("*") if not p.is_dir()}
    assert sorted(written) == ["usr/bin/dash", "usr/bin/sh"]
    assert not written["usr/bin/sh"].is_symlink()
    assert written["usr/bin/sh"].read_bytes() == b"dash"


def test_a_path_that_leaves_the_image_is_refused() -> None:
    with pytest.raises(SystemExit, match="leaves the image"):
        debs.place("usr/../../etc/passwd")
