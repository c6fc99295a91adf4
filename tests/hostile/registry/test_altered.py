"""A proxy, mirror, hub or registry alters what passes through it; somebody changed a cache."""

from __future__ import annotations

import gzip

import pytest
from weightsmith.api.commands.verify import verify_image
from weightsmith.core.errors import Altered, CheckFailed, EnvironmentFailure, InputRefused
from weightsmith.core.ports import Silent
from weightsmith.oci.connections import display_proxy
from weightsmith.oci.unpack import unpack
from weightsmith.outside.hub import HubReader
from weightsmith.outside.store import FileStore

from tests.fakes.hub import COMMIT
from tests.fakes.images import entry, foreign_image, tar_of, tiny_image
from tests.fakes.registry import at


def test_an_altered_layer(fake, client, tmp_path):
    """A proxy changes a byte of a layer: the way is at fault, not the image."""
    client.push(tiny_image(tmp_path), at(fake))
    image = client.pull(at(fake), platform="linux/amd64")
    fake.faults = [("GET", "/blobs/", "digest")]
    with pytest.raises(EnvironmentFailure, match=image.layers[0].digest.short) as caught:
        list(image.layers[0].open())
    assert "try again" in caught.value.hint


def test_the_proxy_is_named(monkeypatch):
    """The hint about altered bytes names the proxy, and not the password that its address holds."""
    monkeypatch.setenv("HTTPS_PROXY", "http://ann:s3cr@t@proxy.example:3128")
    assert display_proxy("https://r.example/v2/") == "proxy.example:3128"
    monkeypatch.setenv("HTTPS_PROXY", "proxy.example:3128")
    assert display_proxy("https://r.example/v2/") == "proxy.example:3128"
    assert display_proxy("https://127.0.0.1/v2/") == ""


def test_an_altered_layer_that_unpacks_no_more(fake, client, tmp_path):
    """A proxy changes bytes inside a compressed layer: what cannot be unpacked is not blamed."""
    content = tar_of((entry("a"), b"1" * 5000), (entry("../b"), b"2"))
    client.push(foreign_image(content), at(fake))
    image = client.pull(at(fake), platform="linux/amd64")
    (key,) = (key for key in fake.blobs if key[1] == image.layers[0].digest)
    right = fake.blobs[key]
    for wrong in (right[:20] + b"XXXX" + right[24:], gzip.compress(content, 1), b"no gzip"):
        fake.blobs[key] = wrong.ljust(len(right), b"\0")
        with pytest.raises(EnvironmentFailure, match=image.layers[0].digest.short):
            unpack(image, tmp_path / "root")
    fake.blobs[key] = right
    with pytest.raises(InputRefused, match=r"\.\./b"):
        unpack(image, tmp_path / "root")


@pytest.mark.parametrize("part", ["/manifests/", "/blobs/"])
def test_an_altered_manifest_or_configuration(fake, client, tmp_path, part):
    image = tiny_image(tmp_path)
    client.push(image, at(fake))
    name = at(fake).at(image.digest)
    fake.faults = [("GET", part, "digest")]
    with pytest.raises(EnvironmentFailure, match=fake.host) as caught:
        client.pull(name, platform="linux/amd64")
    assert caught.value.exit_code == 5
    fake.faults = [("GET", part, "digest")]
    with pytest.raises(CheckFailed) as failed:
        verify_image(str(name), None, client, Silent())
    assert failed.value.exit_code == 4


@pytest.mark.parametrize("part", ["/uploads/", "/manifests/"])
def test_what_is_stored_is_something_else(fake, client, tmp_path, part):
    """A registry keeps something else than was sent: exit 5, as nothing sent was wrong."""
    fake.faults = [("PUT", part, "digest")]
    with pytest.raises(EnvironmentFailure, match=fake.host):
        client.push(tiny_image(tmp_path), at(fake))


@pytest.mark.parametrize("names", [["model.safetensors"], ["config.json", "model.safetensors"]])
def test_a_mirror_changes_files(hub, tmp_path, names):
    reader = HubReader(FileStore(tmp_path / "store"))
    name = names[0]
    hub.sent |= {one: bytes(len(hub.files[one])) for one in names}
    with pytest.raises(Altered, match=name):
        reader.fetch("hf://team/model", COMMIT, "", Silent())
    assert reader.known("hf://team/model", COMMIT, "") is None
    hub.sent.clear()
    snapshot = reader.fetch("hf://team/model", COMMIT, "", Silent())
    assert snapshot.tree.path(name).read_bytes() == hub.files[name]


def test_the_cache_of_the_hub_was_changed(hub, tmp_path):
    """Somebody writes into the hub's cache: what lies there is held against the list again."""
    reader = HubReader(FileStore(tmp_path / "store"))
    first = reader.fetch("hf://team/model", COMMIT, "", Silent())
    first.tree.path("config.json").resolve().write_bytes(b"{}")
    assert reader.known("hf://team/model", COMMIT, "") is None
    (first.tree.root.parents[1] / "trees" / f"{COMMIT}.json").unlink()
    with pytest.raises(Altered, match="config"):
        reader.fetch("hf://team/model", COMMIT, "", Silent())
    again = reader.fetch("hf://team/model", COMMIT, "", Silent())
    assert again.digest == first.digest


def test_a_hub_that_answers_nonsense(hub, tmp_path):
    """A list of another shape than a hub's is the environment's fault, not a bug of ours."""
    hub.row = lambda name: {"type": "file", "path": name}
    with pytest.raises(EnvironmentFailure, match="hf://team/model"):
        HubReader(FileStore(tmp_path / "store")).fetch("hf://team/model", COMMIT, "", Silent())
