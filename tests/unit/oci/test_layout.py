"""Layouts: whole or not at all, read with distrust; for an engine without what it holds."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from weightsmith.core.errors import EnvironmentFailure, InputRefused, UsageError
from weightsmith.core.values import Digest, Json
from weightsmith.oci.image import Image, Index
from weightsmith.oci.layers import Member, TarLayer
from weightsmith.oci.layout import (
    docker_archive,
    read_all,
    read_index,
    read_layout,
    write_layout,
)
from weightsmith.oci.references import Reference

from tests.fakes.images import tiny_image

AMD64 = "linux/amd64"


@pytest.fixture
def folder(tmp_path: Path, image: Image) -> Path:
    write_layout(image, tmp_path / "out", ref="1.2.0")
    return tmp_path / "out"


def _edit(path: Path, change: Json) -> None:
    path.write_bytes(json.dumps({**json.loads(path.read_bytes()), **change}).encode())


def test_written_and_read_back(folder, image):
    back = read_layout(folder)
    assert back.digest == image.digest
    for ours, theirs in zip(image.layers, back.layers, strict=True):
        assert b"".join(ours.open()) == b"".join(theirs.open())
    assert (folder / "blobs/sha256" / image.digest.hex).stat().st_mode & 0o777 == 0o644
    assert not list(folder.rglob(".new-*"))


def test_right_blobs_stay_and_wrong_ones_go(folder, image):
    first, second = (folder / "blobs/sha256" / layer.digest.hex for layer in image.layers[:2])
    before = first.stat().st_ino
    second.write_bytes(bytes(second.stat().st_size))
    seen: list[tuple[int, int]] = []
    write_layout(image, folder, ref="1.2.0", progress=lambda *row: seen.append(row))
    assert first.stat().st_ino == before
    assert Digest.of(second.read_bytes()) == image.layers[1].digest
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("kept", [(), ("mtime",)])
def test_a_file_that_changed_since_it_was_hashed_is_refused(tmp_path, kept):
    """What was just hashed is not hashed again, as long as nothing about its file has changed."""
    (file := tmp_path / "w").write_bytes(b"weights" * 1000)
    layer = TarLayer(members=(Member.of_file("models/w", file),))
    image = Image(layers=(layer,), settings={"os": "linux", "architecture": "amd64"})
    before, digest = file.stat(), image.digest
    file.write_bytes(b"WEIGHTS" * 1000)
    if kept:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    with pytest.raises(InputRefused, match="does not match its digest"):
        write_layout(image, tmp_path / "out")
    assert not (tmp_path / "out/index.json").exists()
    assert not (tmp_path / "out/blobs/sha256" / layer.digest.hex).exists()
    file.write_bytes(b"weights" * 1000)
    assert write_layout(image, tmp_path / "out") == digest


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    """Of the same size, so that only its digest or its times tell."""
    (file := tmp_path / "w").write_bytes(b"weights" * 1_000_000)
    layer = TarLayer(members=(Member.of_file("models/w", file),))
    image = Image(layers=(layer,), settings={"os": "linux", "architecture": "amd64"})
    assert image.digest

    def change(*_: int) -> None:
        with file.open("r+b") as open_file:
            open_file.seek(-7, os.SEEK_END)
            open_file.write(b"WEIGHTS")

    with pytest.raises(InputRefused, match="changed while it was added"):
        write_layout(image, tmp_path / "out", progress=change)
    assert not (tmp_path / "out/blobs/sha256" / layer.digest.hex).exists()


def test_other_names_stay(folder, image, tmp_path):
    other = tiny_image(tmp_path / "model", annotations={"a": "b"})
    write_layout(other, folder, ref="other")
    assert read_layout(folder, "1.2.0").digest == image.digest
    assert read_layout(folder, "other").digest == other.digest
    with pytest.raises(UsageError, match="several"):
        read_layout(folder)
    with pytest.raises(UsageError, match="'none'") as caught:
        read_layout(folder, "none")
    assert "1.2.0, other" in caught.value.hint


def test_an_interrupted_write_leaves_no_image(tmp_path):
    broken = TarLayer(
        members=(Member("/w", 5, 0o644, tmp_path / "absent"),), known_digest=Digest.of(b"")
    )
    with pytest.raises(InputRefused):
        write_layout(Image(layers=(broken,), settings={}), tmp_path / "out")
    assert not (tmp_path / "out/index.json").exists()
    assert not list((tmp_path / "out").rglob(".new-*"))


def test_a_platform_is_chosen(folder, image):
    index = folder / "index.json"
    row = json.loads(index.read_bytes())["manifests"][0]
    arm = row | {
        "digest": "sha256:" + "0" * 64,
        "platform": {"os": "linux", "architecture": "arm64"},
    }
    _edit(index, {"manifests": [arm, row]})
    assert read_layout(folder, platform=AMD64).digest == image.digest
    with pytest.raises(InputRefused, match="cannot be read"):
        read_layout(folder, platform="linux/arm64")
    with pytest.raises(UsageError, match="riscv64"):
        read_layout(folder, platform="linux/riscv64")


def test_a_nested_index_is_followed(folder, image):
    index = folder / "index.json"
    inner = index.read_bytes()
    digest = Digest.of(inner)
    (folder / "blobs/sha256" / digest.hex).write_bytes(inner)
    kind = json.loads(inner)["mediaType"]
    _edit(index, {"manifests": [{"mediaType": kind, "digest": digest, "size": len(inner)}]})
    assert read_layout(folder, platform=AMD64).digest == image.digest


def test_an_index_may_have_two_names(tmp_path, image):
    other = tiny_image(tmp_path / "model", platform="linux/arm64")
    folder = tmp_path / "both"
    write_layout(Index(images=(image, other)), folder, ref="1")
    (row,) = json.loads((folder / "index.json").read_bytes())["manifests"]
    again = {**row, "annotations": {"org.opencontainers.image.ref.name": "2"}}
    _edit(folder / "index.json", {"manifests": [row, again]})
    for ref in (None, "1", "2"):
        assert read_index(folder, ref) == Index(images=(image, other)).manifest_bytes
        assert len(read_all(folder, ref)) == 2


def test_a_layout_may_be_an_index_itself(tmp_path, image):
    whole = Index(images=(image, tiny_image(tmp_path / "model", platform="linux/arm64")))
    folder = tmp_path / "both"
    write_layout(whole, folder)
    index = folder / "index.json"
    index.write_bytes(whole.manifest_bytes)
    assert read_index(folder) == whole.manifest_bytes
    assert [one.digest for one in read_all(folder)] == [one.digest for one in whole.images]
    _edit(index, {"manifests": [{**row, "annotations": {"org.opencontainers.image.ref.name": name}}
                                for row, name in zip(json.loads(index.read_bytes())["manifests"],
                                                     "ab", strict=True)]})  # fmt: skip
    assert read_index(folder) is None, "two images, which is not to be guessed"


def test_changed_blobs_are_noticed_on_use(folder, image):
    layer = folder / "blobs/sha256" / image.layers[0].digest.hex
    layer.write_bytes(bytes(layer.stat().st_size))
    back = read_layout(folder)
    with pytest.raises(InputRefused, match="does not match its digest"):
        list(back.layers[0].open())
    config = folder / "blobs/sha256" / image.config_blob.digest.hex
    config.write_bytes(b" " * config.stat().st_size)
    with pytest.raises(InputRefused, match="does not match its digest"):
        read_layout(folder)


@pytest.mark.parametrize("kind", ["link", "pipe", "longer", "folder"])
def test_blobs_must_be_plain_files(folder, image, tmp_path, kind):
    manifest = folder / "blobs/sha256" / image.digest.hex
    data = manifest.read_bytes()
    manifest.rename(tmp_path / "elsewhere")
    make = {
        "link": lambda: manifest.symlink_to(tmp_path / "elsewhere"),
        "pipe": lambda: os.mkfifo(manifest),
        "longer": lambda: manifest.write_bytes(data + b" "),
        "folder": manifest.mkdir,
    }
    make[kind]()
    with pytest.raises(InputRefused):
        read_layout(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"manifests": {}},
        {"manifests": [5]},
        {"digest": "sha256:../../../../etc/passwd"},
        {"digest": "md5:0"},
        {"size": 5 << 20},
        {"size": "9"},
        {"mediaType": "application/vnd.docker.distribution.manifest.v1+json"},
    ],
)
def test_hostile_indexes_are_refused(folder, change):
    index = folder / "index.json"
    row = json.loads(index.read_bytes())["manifests"][0]
    _edit(index, change if "manifests" in change else {"manifests": [{**row, **change}]})
    with pytest.raises(InputRefused):
        read_layout(folder)


@pytest.mark.parametrize("data", [b"", b"[]", b"[" * 100_000, b"\xff", b" " * (5 << 20)])
def test_indexes_that_are_no_objects(folder, data):
    (folder / "index.json").write_bytes(data)
    with pytest.raises(InputRefused):
        read_layout(folder)


def test_not_a_layout(tmp_path, image):
    with pytest.raises(InputRefused, match="not an OCI layout"):
        read_layout(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(EnvironmentFailure, match="cannot write"):
        write_layout(image, tmp_path / "file")


def _names(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {m.name: archive.extractfile(m).read() for m in archive}


def test_layout_and_docker_manifest_in_one(image):
    found = _names(b"".join(docker_archive(image, Reference.parse("team/app:1"))))
    row = json.loads(found["manifest.json"])[0]
    assert row["RepoTags"] == ["docker.io/team/app:1"]
    assert [Digest.of(found[name]) for name in row["Layers"]] == [x.digest for x in image.layers]
    assert found[row["Config"]] == image.config_bytes
    for name, data in found.items():
        if name.startswith("blobs/"):
            assert name.endswith(Digest.of(data).hex)


@pytest.mark.parametrize(
    ("again", "held", "sent"),
    [(False, (0, 1, 3, 2), (2, 3)), (True, (0, 1, 2, 3), (0,))],
    ids=["another order", "a layer that comes again"],
)
def test_a_common_start_is_left_out(image, again, held, sent):
    layers = (*image.layers, *image.layers[: int(again)])
    skip = [image.layers[n].diff_id for n in held]
    archive = docker_archive(
        Image(layers=layers, settings=image.settings), Reference.parse("a"), skip
    )
    found = _names(b"".join(archive))
    there = [f"blobs/sha256/{layer.digest.hex}" in found for layer in image.layers]
    assert there == [n in sent for n in range(4)]
