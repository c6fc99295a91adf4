"""Independent programs read what we write: skopeo, umoci and a container engine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.debian_registry import real_registry
from tests.fakes.images import FILES, entry, foreign_image, tar_of, tiny_image
from toolchain.oci.archive import docker_archive
from toolchain.oci.image import Image, ImageConfig, Order, assemble
from toolchain.oci.layers import Member, TarLayer
from toolchain.oci.layout import read_layout, write_layout
from toolchain.oci.references import Reference
from toolchain.oci.registry import Registry
from toolchain.oci.unpack import unpack

AMD64 = "linux/amd64"


def _has(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not shutil.which(program), reason=f"{program} is not installed")


def _run(*words: str | Path) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def _on_base(docker: bool, order: Order = "engine-first") -> Image:
    base = foreign_image(tar_of(entry("bin", b"5", 0o755), (entry("bin/sh"), b"sh")), docker=docker)
    top = TarLayer(members=(Member.of_bytes("/models/w", b"weights"),), epoch=0)
    return assemble([top], config=ImageConfig(user="1000"), base=base, order=order, epoch=0)


@pytest.fixture(params=["scratch", "oci base", "docker base"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Image:
    if request.param == "scratch":
        return tiny_image(tmp_path / "model")
    return _on_base(request.param == "docker base")


@_has("skopeo")
def test_skopeo_copies_it_unchanged(image: Image, tmp_path: Path) -> None:
    write_layout(image, tmp_path / "oci", ref="v1")
    _run(
        "skopeo",
        "copy",
        "-q",
        "--preserve-digests",
        f"oci:{tmp_path}/oci:v1",
        f"dir:{tmp_path}/dir",
    )
    assert (tmp_path / "dir/manifest.json").read_bytes() == image.manifest_bytes
    for layer in image.layers:
        assert (tmp_path / "dir" / layer.digest.hex).stat().st_size == layer.size
    seen = json.loads(_run("skopeo", "inspect", f"oci:{tmp_path}/oci:v1"))
    assert seen["Digest"] == image.digest
    assert seen["Layers"] == [layer.digest for layer in image.layers]
    assert seen["Labels"] == dict(image.labels)
    assert seen["Env"] == image.config["Env"]


@_has("skopeo")
def test_what_skopeo_writes_is_read(image: Image, tmp_path: Path) -> None:
    write_layout(image, tmp_path / "oci", ref="v1")
    _run("skopeo", "copy", "-q", f"oci:{tmp_path}/oci:v1", f"oci:{tmp_path}/again:v2")
    back = read_layout(tmp_path / "again", "v2", platform=AMD64)
    assert [x.diff_id for x in back.layers] == [x.diff_id for x in image.layers]


@_has("umoci")
def test_umoci_unpacks_the_same_files(tmp_path: Path) -> None:
    image = tiny_image(tmp_path / "model")
    write_layout(image, tmp_path / "oci", ref="v1")
    _run("umoci", "unpack", "--rootless", "--image", f"{tmp_path}/oci:v1", tmp_path / "bundle")
    unpack(image, tmp_path / "ours")
    theirs = tmp_path / "bundle/rootfs"

    def facts(root: Path) -> list[tuple[str, int, float, bytes]]:
        found = []
        for path in sorted(root.rglob("*")):
            status = path.lstat()
            data = path.read_bytes() if path.is_file() else b""
            found.append((str(path.relative_to(root)), status.st_mode, status.st_mtime, data))
        return found

    assert facts(tmp_path / "ours") == facts(theirs)
    config = json.loads((tmp_path / "bundle/config.json").read_text())
    assert config["process"]["cwd"] == "/models"


def _docker(*words: str, data: Iterator[bytes] | None = None) -> str:
    # Only a stream that is read to its end shows that the engine accepts it.
    with subprocess.Popen(
        ["docker", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        for chunk in data or ():
            child.stdin.write(chunk)
        child.stdin.close()
        out = child.stdout.read().decode()
    assert child.returncode == 0, out
    return out.strip()


@pytest.fixture
def names() -> Iterator[list[str]]:
    if (
        not shutil.which("docker")
        or subprocess.run(["docker", "info"], capture_output=True).returncode
    ):
        pytest.skip("no container engine answers")
    used = [f"weightsmith-test-{os.getpid()}/app:{n}" for n in (1, 2)]
    yield used
    subprocess.run(["docker", "rmi", "-f", *used], capture_output=True)


@pytest.mark.docker
def test_docker_loads_it(image: Image, names: list[str]) -> None:
    _docker("load", "-q", data=docker_archive(image, Reference.parse(names[0])))
    seen = json.loads(_docker("image", "inspect", names[0]))[0]
    assert seen["RootFS"]["Layers"] == [layer.diff_id for layer in image.layers]
    assert seen["Config"].get("User") == image.config["User"]
    assert seen["Config"].get("Healthcheck") == image.config.get("Healthcheck")


@pytest.mark.docker
def test_docker_accepts_an_archive_without_what_it_holds(names: list[str], tmp_path: Path) -> None:
    first = tiny_image(tmp_path)
    _docker("load", "-q", data=docker_archive(first, Reference.parse(names[0])))
    if "overlay2" not in _docker("info", "-f", "{{.Driver}}"):
        pytest.skip("only Docker's own image store takes archives with layers left out")
    held = json.loads(_docker("image", "inspect", "-f", "{{json .RootFS.Layers}}", names[0]))
    top = TarLayer(members=(Member.of_bytes("/etc/new", b"1"),), epoch=0)
    second = assemble(first.layers, [top], config=ImageConfig(), epoch=0)
    chunks = list(docker_archive(second, Reference.parse(names[1]), held))
    assert sum(map(len, chunks)) < 20_000
    _docker("load", "-q", data=iter(chunks))
    seen = json.loads(_docker("image", "inspect", "-f", "{{json .RootFS.Layers}}", names[1]))
    assert seen == [layer.diff_id for layer in second.layers]
    box = _docker("create", names[1], "x")
    try:
        listed = subprocess.run(["docker", "export", box], check=True, capture_output=True).stdout
        for name in FILES:
            assert f"models/{name}".encode() in listed
    finally:
        _docker("rm", box)


@pytest.mark.docker
@pytest.mark.registry
@pytest.mark.skipif(not shutil.which("docker-registry"), reason="docker-registry is not installed")
@pytest.mark.parametrize("order", ["engine-first", "weights-first"])
@pytest.mark.parametrize("docker", [False, True])
@pytest.mark.usefixtures("names")
def test_docker_pulls_it(docker: bool, order: Order, tmp_path: Path) -> None:
    image = _on_base(docker=docker, order=order)
    with real_registry(tmp_path) as host, Registry() as client:
        reference = f"{host}/weightsmith-test/pulled:1"
        client.push(image, Reference.parse(reference))
        try:
            _docker("pull", "-q", reference)
            seen = json.loads(_docker("image", "inspect", reference))[0]
        finally:
            subprocess.run(["docker", "rmi", "-f", reference], capture_output=True)
    assert seen["RootFS"]["Layers"] == [layer.diff_id for layer in image.layers]
    assert seen["RepoDigests"][0].endswith(image.digest)
