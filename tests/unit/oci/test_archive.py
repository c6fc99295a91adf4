"""The docker archive: complete by itself, or without what the engine holds."""

import io
import json
import tarfile

import pytest
from weightsmith.core.values import Digest
from weightsmith.oci.archive import docker_archive
from weightsmith.oci.image import Image
from weightsmith.oci.references import Reference

from tests.fakes.images import tiny_image


def _names(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {m.name: archive.extractfile(m).read() for m in archive}


def test_layout_and_docker_manifest_in_one(tmp_path):
    image = tiny_image(tmp_path)
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
def test_a_common_start_is_left_out(tmp_path, again, held, sent):
    image = tiny_image(tmp_path)
    layers = (*image.layers, *image.layers[: int(again)])
    skip = [image.layers[n].diff_id for n in held]
    archive = docker_archive(
        Image(layers=layers, settings=image.settings), Reference.parse("a"), skip
    )
    found = _names(b"".join(archive))
    there = [f"blobs/sha256/{layer.digest.hex}" in found for layer in image.layers]
    assert there == [n in sent for n in range(4)]
