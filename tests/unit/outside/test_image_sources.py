"""Images and artifacts as sources: what is read of them, and what is refused."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from weightsmith.core.errors import Altered, InputRefused
from weightsmith.core.ports import Silent
from weightsmith.core.values import Digest
from weightsmith.oci.attachments import Attachment, AttachmentPart
from weightsmith.oci.image import ImageConfig, assemble, index_of
from weightsmith.oci.layers import TITLE, Member, TarLayer
from weightsmith.oci.registry import Registry
from weightsmith.outside.image_sources import OciRemote
from weightsmith.outside.remote import RemoteReader
from weightsmith.outside.store import FileStore

from tests.fakes.images import entry, foreign_image, tar_of
from tests.fakes.registry import FakeRegistry, at, fake_registry

CONFIG, WEIGHTS = (entry("models/config.json"), b"{}"), (entry("models/m.safetensors"), b"w" * 99)


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with fake_registry() as state:
        yield state


@pytest.fixture
def client() -> Iterator[Registry]:
    with Registry(pause=lambda _: None) as made:
        yield made


@pytest.fixture
def reader(tmp_path: Path, client: Registry) -> RemoteReader:
    return RemoteReader(FileStore(tmp_path / "store"), OciRemote(client))


def read(reader: RemoteReader, source: object) -> dict[str, bytes]:
    tree = reader.fetch(f"oci://{source}", "", "", Silent()).tree
    return {file.path: tree.path(file.path).read_bytes() for file in tree.files}


def pushed(client: Registry, registry: FakeRegistry, *tars: bytes, **more: object) -> object:
    place = at(registry)
    client.push(foreign_image(*tars, **more), place, force=True)
    return place


def test_layers_above_hide_those_below(
    client: Registry, registry: FakeRegistry, reader: RemoteReader
) -> None:
    lower = tar_of(
        CONFIG,
        WEIGHTS,
        (entry("models/old.json"), b"1"),
        (entry("models/a/b.json"), b""),
        (entry("models/folder.json/x.json"), b""),
        (entry("models/file.json"), b""),
        (entry("models/link/x.json"), b""),
    )
    upper = tar_of(
        (entry("models/.wh.old.json"), b""),
        (entry("models/a/.wh..wh..opq"), b""),
        (entry("models/a/c.json"), b"{}"),
        (entry("models/config.json"), b'{"new": 1}'),
        (entry("models/folder.json"), b"1"),
        (entry("models/file.json/y.json"), b"2"),
        entry("models/link", b"2", to="elsewhere"),
    )

    found = read(reader, pushed(client, registry, lower, upper))

    assert found == {
        "config.json": b'{"new": 1}', "m.safetensors": b"w" * 99, "a/c.json": b"{}",
        "folder.json": b"1", "file.json/y.json": b"2",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([entry("models/tokenizer.json", b"2", to="/etc/passwd")], "a link"),
        ([entry("models/tokenizer.json", b"1", to="models/config.json")], "a link"),
        ([(entry("models/../../x.json"), b"{}")], "path"),
        ([(entry("other/config.json"), b"{}")], "several models"),
    ],
)
def test_what_is_refused(
    client: Registry, registry: FakeRegistry, reader: RemoteReader, rows: list, said: str
) -> None:
    place = pushed(client, registry, tar_of(CONFIG, WEIGHTS, *rows))

    with pytest.raises(InputRefused, match=said):
        read(reader, place)


def test_links_elsewhere_are_of_no_interest(
    client: Registry, registry: FakeRegistry, reader: RemoteReader
) -> None:
    row = entry("etc/alternatives/x.json", b"2", to="/etc/passwd")

    assert "config.json" in read(reader, pushed(client, registry, tar_of(CONFIG, WEIGHTS, row)))


def test_a_layer_that_is_not_the_configurations(
    client: Registry, registry: FakeRegistry, reader: RemoteReader
) -> None:
    """Its digest is right, and its content is not what the configuration names."""
    place = pushed(client, registry, tar_of(CONFIG, WEIGHTS), packed=False)
    repository = place.repository
    (kind, body) = registry.manifests[repository, "1"]
    manifest = json.loads(body)
    config = json.loads(registry.blobs[repository, manifest["config"]["digest"]])
    config["rootfs"]["diff_ids"] = [f"sha256:{'0' * 64}"]
    data = json.dumps(config).encode()
    manifest["config"] |= {"digest": str(Digest.of(data)), "size": len(data)}
    registry.blobs[repository, str(Digest.of(data))] = data
    changed = json.dumps(manifest).encode()
    for name in ("1", str(Digest.of(changed))):
        registry.manifests[repository, name] = (kind, changed)

    with pytest.raises(InputRefused, match="its configuration names"):
        read(reader, place)


def test_an_image_for_another_platform(
    client: Registry, registry: FakeRegistry, reader: RemoteReader
) -> None:
    layer = TarLayer(
        members=(
            Member.of_bytes("models/config.json", b"{}"),
            Member.of_bytes("models/m.safetensors", b"w"),
        ),
        epoch=0,
    )
    both = [
        assemble((layer,), (), config=ImageConfig(), epoch=0, platform=f"linux/{machine}")
        for machine in ("s390x", "riscv64")
    ]
    client.push(index_of(both), at(registry))

    assert read(reader, at(registry)) == {"config.json": b"{}", "m.safetensors": b"w"}


def test_an_adapter_that_is_attached_to_an_image(
    client: Registry, registry: FakeRegistry, reader: RemoteReader
) -> None:
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"w" * 70}
    parts = tuple(
        AttachmentPart.of_bytes(data, "application/octet-stream", **{TITLE: name})
        for name, data in files.items()
    )
    image = foreign_image(tar_of(CONFIG))
    client.push(image, at(registry))
    subject = image.manifest_blob
    attached = Attachment(
        artifact_type="application/vnd.weightsmith.adapter.v1", subject=subject, parts=parts
    )
    client.attach(at(registry), attached)

    place = at(registry).at(attached.blob.digest)
    assert read(reader, place) == files
    snapshot = reader.fetch(f"oci://{place}", "", "", Silent())
    assert (snapshot.pin, snapshot.pinned) == (f"oci://{place}", True)


def test_layers_that_were_read_are_not_read_again(
    client: Registry, registry: FakeRegistry, reader: RemoteReader
) -> None:
    place = pushed(client, registry, tar_of(CONFIG), tar_of(WEIGHTS))
    image = client.pull(place, platform="linux/amd64")

    class Stops(Silent):
        def advance(self, done: int, total: int, unit: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reader.fetch(f"oci://{place}", "", "", Stops())
    registry.log.clear()

    assert read(reader, place) == {"config.json": b"{}", "m.safetensors": b"w" * 99}
    asked = [path for _, path in registry.log if "/blobs/" in path]
    assert not [path for path in asked if image.layers[0].digest in path]
    assert [path for path in asked if image.layers[1].digest in path]


LIES = {
    "other bytes": [(entry("config.json"), b'{"lie": 1}')],
    "another file": [(entry("extra.json"), b'{"lie": 1}')],
    "a file fewer": [entry(".wh.config.json")],
    "no file": [entry(".wh..wh..opq")],
    "a folder of a file's name": [(entry("tokenizer.json/x.json"), b"{}")],
}


@pytest.mark.parametrize("lie", LIES)
def test_a_registry_that_sends_another_layer_once(
    client: Registry, registry: FakeRegistry, reader: RemoteReader, lie: str
) -> None:
    """Nothing of that layer is in what the next try reads."""
    files = {"config.json": b"{}", "m.safetensors": b"w" * 99, "tokenizer.json": bytes(3 << 20)}
    lower, upper = (
        tar_of(*((entry(name), files[name]) for name in names))
        for names in (("config.json", "m.safetensors"), ("tokenizer.json",))
    )
    place = pushed(client, registry, lower, upper, packed=False)
    key = place.repository, client.pull(place, platform="linux/amd64").layers[1].digest
    registry.blobs[key] = tar_of(*LIES[lie], (entry("train.py"), bytes(3 << 20)))

    with pytest.raises(Altered, match="does not match its digest"):
        read(reader, place)
    registry.blobs[key] = upper

    assert read(reader, place) == files
