"""A proxy, mirror or registry alters what passes through it."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from weightsmith.api.commands.verify import verify_image
from weightsmith.core.errors import CheckFailed, EnvironmentFailure, InputRefused
from weightsmith.core.ports import Silent
from weightsmith.oci.connections import display_proxy
from weightsmith.oci.registry import Registry
from weightsmith.oci.unpack import unpack

from tests.fakes.images import entry, foreign_image, tar_of, tiny_image
from tests.fakes.registry import FakeRegistry, at


def test_an_altered_layer(fake: FakeRegistry, client: Registry, tmp_path: Path) -> None:
    """A proxy changes a byte of a layer: the way is at fault, not the image."""
    client.push(tiny_image(tmp_path), at(fake))
    image = client.pull(at(fake), platform="linux/amd64")
    fake.faults = [("GET", "/blobs/", "digest")]
    with pytest.raises(EnvironmentFailure, match=image.layers[0].digest.short) as caught:
        list(image.layers[0].open())
    assert "try again" in caught.value.hint


def test_the_proxy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hint about altered bytes names the proxy, and not the password that its address holds."""
    monkeypatch.setenv("HTTPS_PROXY", "http://ann:s3cr@t@proxy.example:3128")
    assert display_proxy("https://r.example/v2/") == "proxy.example:3128"
    monkeypatch.setenv("HTTPS_PROXY", "proxy.example:3128")
    assert display_proxy("https://r.example/v2/") == "proxy.example:3128"
    assert display_proxy("https://127.0.0.1/v2/") == ""


def test_an_altered_layer_that_unpacks_no_more(
    fake: FakeRegistry, client: Registry, tmp_path: Path
) -> None:
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
def test_an_altered_manifest_or_configuration(
    fake: FakeRegistry, client: Registry, tmp_path: Path, part: str
) -> None:
    """A mirror answers a digest with something else: exit 5, and to `verify` a failed check."""
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
def test_what_is_stored_is_something_else(
    fake: FakeRegistry, client: Registry, tmp_path: Path, part: str
) -> None:
    """A registry keeps something else than was sent: exit 5, as nothing sent was wrong."""
    fake.faults = [("PUT", part, "digest")]
    with pytest.raises(EnvironmentFailure, match=fake.host):
        client.push(tiny_image(tmp_path), at(fake))
