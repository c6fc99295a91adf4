"""Transfers that break off, and what registries keep of them."""

from __future__ import annotations

import threading

import pytest
from weightsmith.core.errors import EnvironmentFailure, InputRefused
from weightsmith.oci.image import Image
from weightsmith.oci.layers import Member, TarLayer

from tests.fakes.registry import at


@pytest.mark.parametrize("then", ["503", "norange"])
def test_a_broken_download_goes_on_where_it_stopped(fake, client, image, pauses, then):
    client.push(image, at(fake))
    pulled = client.pull(at(fake), platform="linux/amd64")
    fake.faults = [("GET", "/blobs/", "half"), ("GET", "/blobs/", then)]
    assert b"".join(pulled.layers[0].open()) == b"".join(image.layers[0].open())
    assert len(pauses) == (2 if then == "503" else 1)


@pytest.mark.parametrize("chunk_min", [0, 20_000])
def test_a_broken_upload_goes_on_where_the_registry_kept_it(
    fake, client, image, chunk_min, monkeypatch
):
    monkeypatch.setattr("weightsmith.oci.uploads._CHUNK", 20_000)
    fake.chunk_min = chunk_min
    method = "PATCH" if chunk_min else "PUT"
    fake.faults = [(method, "/uploads/", "keep:10001")] + [("PATCH", "/uploads/", "keep:777")] * 9
    sent: list[int] = []
    client.push(image, at(fake), parallel=1, progress=lambda done, _: sent.append(done))
    assert not fake.faults
    opened = sum(1 for m, path in fake.log if m == "POST")
    assert opened == len(list(image.blobs())), "no upload was begun a second time"
    assert client.digest_of(at(fake)) == image.digest
    for layer in client.pull(at(fake), platform="linux/amd64").layers:
        b"".join(layer.open())


def test_a_registry_that_kept_something_else(fake, client, image, monkeypatch):
    """What it kept is not what was sent: the layer starts again, and comes whole."""
    fake.faults = [("PUT", "/uploads/", "keep:30000"), ("GET", "/uploads/", "spoil")]
    client.push(image, at(fake))
    assert client.digest_of(at(fake)) == image.digest
    assert not fake.faults


@pytest.mark.parametrize("stays", [False, True])
def test_a_registry_that_has_half_of_a_layer(fake, client, image, stays):
    """Pulp keeps what came of an upload that broke off under the digest of the whole."""
    layer = image.layers[0]
    fake.blobs["team/app", layer.digest] = b"".join(layer.open())[:30_000]
    fake.keeps_first = stays
    if stays:
        with pytest.raises(EnvironmentFailure, match=f"30000 of its {layer.size} bytes") as caught:
            client.push(image, at(fake))
        assert "delete" in caught.value.hint
        assert client.digest_of(at(fake)) is None
    else:
        client.push(image, at(fake))
        assert len(fake.blobs["team/app", layer.digest]) == layer.size


def test_a_large_blob_is_a_part_first(fake, client, tmp_path):
    """Of a broken whole some registries keep what came as if it were all."""
    (tmp_path / "w").write_bytes(bytes(2 << 20))
    layer = TarLayer(members=(Member.of_file("/w", tmp_path / "w"),), epoch=0)
    fake.faults = [("PATCH", "/uploads/", "keep:1000000"), ("PATCH", "/uploads/", "reset")]
    client.push(Image(layers=(layer,), settings={}), at(fake))
    assert len(fake.blobs["team/app", layer.digest]) == layer.size
    assert not fake.faults


def test_a_failed_layer_stops_the_others(fake, client, tmp_path):
    before = threading.active_count()
    layers = tuple(
        TarLayer(members=(Member("/w", 5, 0o644, tmp_path / f"{n}"),)) for n in range(20)
    )
    with pytest.raises(InputRefused, match="changed"):
        client.push(Image(layers=layers, settings={"os": "linux"}), at(fake), parallel=3)
    assert threading.active_count() <= before + 10
    assert not fake.manifests
