"""What a base says of itself is believed; what it does not say is a warning."""

import hashlib
import io
import json
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.platforms import host_platform
from weightsmith.core.values import key_of
from weightsmith.oci.image import ImageConfig, assemble
from weightsmith.oci.layers import Member, TarLayer
from weightsmith.oci.layout import write_layout
from weightsmith.outside.store import FileStore
from weightsmith.provenance.labels import ENGINE_LABEL
from weightsmith.steps.bases import _root_layers, base_image, base_images

from tests.fakes.journal import RecordingProgress


def layout(folder: Path, labels: dict[str, str]) -> str:
    layer = TarLayer(members=(Member.of_bytes("app/server", b"program"),))
    write_layout(assemble((), (layer,), config=ImageConfig(labels=labels)), folder)
    return f"oci:{folder}"


@pytest.fixture
def tools():
    return SimpleNamespace(progress=RecordingProgress())


def test_what_a_base_says_of_its_engine_is_believed(tmp_path, tools) -> None:
    place = layout(tmp_path / "own", {ENGINE_LABEL: "llamacpp"})
    base_image(place, "llamacpp", tools)
    assert tools.progress.warnings == []
    with pytest.raises(InputRefused, match="vllm") as caught:
        base_image(layout(tmp_path / "vllm", {ENGINE_LABEL: "vllm"}), "llamacpp", tools)
    assert caught.value.hint


def test_a_base_that_says_nothing_is_taken_with_one_warning_for_all_platforms(
    tmp_path, tools
) -> None:
    place = layout(tmp_path, {})
    arm = {"os": "linux", "architecture": "arm64"}
    index_of(tmp_path, {"os": "linux", "architecture": "amd64"}, arm)

    images = base_images(place, "llamacpp", tools)

    assert [len(image.layers) for image in images] == [1, 1]
    (warning,) = tools.progress.warnings
    assert "does not declare its engine" in warning


def index_of(folder: Path, *platforms: dict[str, str] | None) -> str:
    """Put an image's manifest below an index, once for each platform that the index names."""
    index = json.loads((folder / "index.json").read_text())
    (row,) = index["manifests"]
    row.pop("platform", None)
    rows = [row | ({} if said is None else {"platform": said}) for said in platforms]
    kind = "application/vnd.oci.image.index.v1+json"
    data = json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": rows}).encode()
    digest = hashlib.sha256(data).hexdigest()
    (folder / "blobs" / "sha256" / digest).write_bytes(data)
    row = {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data)}
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [row]}))
    return f"oci:{folder}"


UNKNOWN = {"os": "unknown", "architecture": "unknown"}


@pytest.mark.parametrize("platforms", [(None,), ({},), (None, UNKNOWN)])
def test_an_index_need_not_say_the_platform_of_its_only_image(tmp_path, tools, platforms) -> None:
    """The specification leaves it open; an image had been made on no base at all."""
    layout(tmp_path, {ENGINE_LABEL: "llamacpp"})
    (image,) = base_images(index_of(tmp_path, *platforms), "llamacpp", tools)

    assert image.platform == host_platform()
    assert len(image.layers) == 1


def test_an_index_for_other_systems_is_no_base(tmp_path, tools) -> None:
    layout(tmp_path, {ENGINE_LABEL: "llamacpp"})
    windows = {"os": "windows", "architecture": "amd64"}

    with pytest.raises(UsageError, match="has no image for linux/") as caught:
        base_images(index_of(tmp_path, windows), "llamacpp", tools)
    assert "windows/amd64" in caught.value.hint


@pytest.mark.parametrize(("platform", "named"), [("windows/amd64", "windows/amd64"), ("", "say")])
def test_an_image_for_no_linux_machine_is_no_base(tmp_path, tools, platform, named) -> None:
    layer = TarLayer(members=(Member.of_bytes("app/server", b"program"),))
    made = assemble((), (layer,), config=ImageConfig())
    config = {key: text for key, text in made.settings.items() if key not in ("os", "architecture")}
    system, _, machine = platform.partition("/")
    config |= {"os": system, "architecture": machine} if platform else {}
    write_layout(replace(made, settings=config), tmp_path)

    with pytest.raises(InputRefused, match=named):
        base_images(f"oci:{tmp_path}", "llamacpp", tools)


def test_a_layout_without_an_image_is_no_base(tmp_path, tools) -> None:
    layout(tmp_path, {})
    (tmp_path / "index.json").write_text('{"schemaVersion": 2, "manifests": []}')

    with pytest.raises(UsageError, match=r"holds no image$"):
        base_images(f"oci:{tmp_path}", "llamacpp", tools)


PACKAGE = "usr/local/lib/python3.13/dist-packages/torch/lib.so"


@pytest.fixture
def root(tmp_path):
    """Return a store, and a root file system in it with one large package."""

    def make(folder: Path) -> dict[str, str]:
        for name, size in ((PACKAGE, 33 << 20), ("bin/sh", 5), ("etc/os-release", 3)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"x" * size)
        (folder / "bin/sh").chmod(0o755)
        return {}

    store = FileStore(tmp_path)
    return store, store.produce(key_of("root"), {}, make)


def in_a_new_process(root):
    store, entry = root
    return _root_layers(entry, store.memo)


def test_a_root_file_system_has_a_layer_per_large_package(root) -> None:
    rest, large = in_a_new_process(root)

    for layer in (rest, large):
        data = b"".join(layer.open())
        assert (len(data), layer.digest.hex) == (layer.size, hashlib.sha256(data).hexdigest())
    with tarfile.open(fileobj=io.BytesIO(b"".join(rest.open()))) as archive:
        files = {member.name: member.mode for member in archive}
    assert (files["bin/sh"], files["etc/os-release"], files["tmp"]) == (0o755, 0o644, 0o1777)
    assert large.file == PACKAGE


def test_its_layers_are_remembered_and_its_files_left_alone(root) -> None:
    first = in_a_new_process(root)
    shutil.rmtree(root[1].tree.root)

    again = in_a_new_process(root)

    facts = [[(one.digest, one.size, one.file) for one in layers] for layers in (first, again)]
    assert facts[0] == facts[1]


def test_a_file_that_became_another_is_noticed_where_layers_are_remembered(root) -> None:
    in_a_new_process(root)
    file = root[1].tree.path("etc/os-release")
    times = file.stat()
    file.write_bytes(b"abc")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))

    rest, _ = in_a_new_process(root)

    with pytest.raises(InputRefused, match=rest.digest.short):
        list(rest.open())
