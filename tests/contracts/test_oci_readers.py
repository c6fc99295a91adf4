"""Others read what we write: skopeo, umoci, podman, oras, container engines, and as Ollama does."""

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from weightsmith.core.errors import InputRefused, UsageError, WeightsmithError
from weightsmith.core.values import Tree
from weightsmith.oci.attachments import Attachment, AttachmentPart
from weightsmith.oci.image import Image, ImageConfig, Order, assemble
from weightsmith.oci.layers import Member, TarLayer
from weightsmith.oci.layout import LayoutLocation, docker_archive, read_layout, write_layout
from weightsmith.oci.modelpack import ModelDescription, model_pack, ollama_model, tar_model_pack
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry, open_location
from weightsmith.oci.unpack import unpack
from weightsmith.oci.weights import weight_layers

from tests.fakes.images import FILES, entry, foreign_image, tar_of, tiny_image, tree_of
from tests.fakes.real_registries import real_registry

AMD64 = "linux/amd64"
WEIGHTS = b"GGUF" + bytes(range(256)) * 5000
DOCKER = "application/vnd.docker.distribution.manifest.v2+json"
PACK = ModelDescription(name="tiny", version="1", format="safetensors")


def _has(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not shutil.which(program), reason=f"{program} is not installed")


def _run(*words: str | Path) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def _on_base(docker: bool, order: Order = "engine-first") -> Image:
    base = foreign_image(tar_of(entry("bin", b"5", 0o755), (entry("bin/sh"), b"sh")), docker=docker)
    top = TarLayer(members=(Member.of_bytes("/models/w", b"weights"),), epoch=0)
    return assemble([top], config=ImageConfig(user="1000"), base=base, order=order, epoch=0)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[tuple[Registry, str]]:
    (tmp_path / "registry").mkdir()
    with real_registry(tmp_path / "registry") as host, Registry() as client:
        yield client, host


@pytest.fixture(params=["scratch", "oci base", "docker base"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Image:
    if request.param == "scratch":
        return tiny_image(tmp_path / "model")
    return _on_base(request.param == "docker base")


@_has("skopeo")
def test_skopeo_copies_it_unchanged(image: Image, tmp_path: Path) -> None:
    write_layout(image, tmp_path / "oci", ref="v1")
    _run("skopeo", "copy", "-q", "--preserve-digests", f"oci:{tmp_path}/oci:v1",
         f"dir:{tmp_path}/dir")  # fmt: skip
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


@_has("umoci")
@_has("skopeo")
def test_a_docker_base_gives_an_oci_image(tmp_path: Path) -> None:
    """umoci refuses Docker's media types below an OCI manifest; the bytes are the same."""
    image = _on_base(docker=True)
    write_layout(image, tmp_path / "oci")
    kinds = {layer.media_type.partition("+")[0] for layer in image.layers}
    assert kinds == {"application/vnd.oci.image.layer.v1.tar"}
    _run("umoci", "unpack", "--rootless", "--image", tmp_path / "oci", tmp_path / "bundle")
    assert (tmp_path / "bundle/rootfs/bin/sh").read_bytes() == b"sh"
    assert (tmp_path / "bundle/rootfs/models/w").read_bytes() == b"weights"


@pytest.fixture
def said(tmp_path: Path) -> tuple[Image, Attachment]:
    """An image in a layout, and what hangs on it there."""
    image = tiny_image(tmp_path / "model")
    write_layout(image, tmp_path / "oci", ref="v1")
    parts = (AttachmentPart.of_bytes(b"said", "text/plain"),)
    about = Attachment(artifact_type="text/plain", subject=image.manifest_blob, parts=parts)
    LayoutLocation(tmp_path / "oci").attach(about)
    return image, about


@_has("skopeo")
def test_a_layout_with_attachments_needs_no_name(
    said: tuple[Image, Attachment], tmp_path: Path
) -> None:
    image, about = said
    seen = json.loads(_run("skopeo", "inspect", f"oci:{tmp_path}/oci"))
    assert seen["Digest"] == image.digest
    assert LayoutLocation(tmp_path / "oci").attached(image.digest) == [(about.blob, "")]


@_has("umoci")
@_has("oras")
def test_what_knows_only_the_index_leaves_attachments_behind(
    said: tuple[Image, Attachment], tmp_path: Path
) -> None:
    """As the pages and `verify` say; in the index, they would make skopeo ask for a name."""
    image, _ = said
    _run("oras", "copy", "-r", "--from-oci-layout", f"{tmp_path}/oci:v1",
         "--to-oci-layout", f"{tmp_path}/copy:v1")  # fmt: skip
    assert LayoutLocation(tmp_path / "copy").attached(image.digest) == []

    _run("umoci", "gc", "--layout", tmp_path / "oci")
    assert read_layout(tmp_path / "oci", "v1").digest == image.digest
    with pytest.raises(InputRefused, match="1 of 1 attachments"):
        LayoutLocation(tmp_path / "oci").attached(image.digest)


@_has("skopeo")
def test_a_layout_of_several_names_needs_one(image: Image, tmp_path: Path) -> None:
    write_layout(image, tmp_path / "one")
    other = tiny_image(tmp_path / "other", annotations={"a": "b"})
    write_layout(other, tmp_path / "two")
    for folder, name in (("one", "x"), ("two", "y")):
        _run("skopeo", "copy", "-q", "--preserve-digests",
             f"oci:{tmp_path}/{folder}", f"oci:{tmp_path}/both:{name}")  # fmt: skip
    with Registry() as client:
        place = open_location(f"{tmp_path}/both:x", client)
        assert place.image().digest == image.digest
        assert open_location(f"oci:{tmp_path}/both:y", client).image().digest == other.digest
        with pytest.raises(UsageError, match="several") as caught:
            open_location(f"{tmp_path}/both", client).image()
        assert "x, y" in caught.value.hint


@pytest.fixture
def podman(tmp_path: Path) -> Iterator[Callable[..., str]]:
    if not shutil.which("podman") or os.geteuid() != 0:
        pytest.skip("podman is not installed, or this is not root")
    store = ["--root", tmp_path / "store", "--runroot", tmp_path / "run",
             "--storage-driver", "vfs", "--log-level", "error"]  # fmt: skip
    yield lambda *words: _run("podman", *store, *words)
    # What podman wrote belongs to other users in part.
    subprocess.run(["podman", *store, "system", "reset", "-f"], capture_output=True)


@pytest.mark.root
def test_podman_pulls_from_a_layout(
    image: Image, podman: Callable[..., str], tmp_path: Path
) -> None:
    write_layout(image, tmp_path / "oci")
    found = podman("pull", "-q", f"oci:{tmp_path}/oci").strip()
    assert found == image.config_blob.digest.hex
    seen = json.loads(podman("image", "inspect", found))[0]
    assert seen["RootFS"]["Layers"] == [layer.diff_id for layer in image.layers]


@pytest.mark.root
def test_podman_loads_what_docker_loads(podman: Callable[..., str], tmp_path: Path) -> None:
    image = tiny_image(tmp_path / "model")
    with (tmp_path / "image.tar").open("wb") as file:
        file.writelines(docker_archive(image, Reference.parse("example.com/app:1")))
    podman("load", "-q", "-i", tmp_path / "image.tar")
    seen = json.loads(podman("image", "inspect", "example.com/app:1"))[0]
    assert seen["RootFS"]["Layers"] == [layer.diff_id for layer in image.layers]


@pytest.mark.root
@pytest.mark.registry
def test_podman_pulls_from_a_registry(podman: Callable[..., str], tmp_path: Path) -> None:
    image = _on_base(docker=True)
    with real_registry(tmp_path) as host, Registry() as client:
        client.push(image, Reference.parse(f"{host}/a/b:1"))
        podman("pull", "-q", "--tls-verify=false", f"{host}/a/b:1")
        seen = json.loads(podman("image", "inspect", f"{host}/a/b:1"))[0]
    assert seen["Digest"] == image.digest


def _docker(*words: str, data: Iterator[bytes] | None = None) -> str:
    # Only a stream that is read to its end shows that the engine accepts it.
    with subprocess.Popen(
        ["docker", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as child:
        for chunk in data or ():
            child.stdin.write(chunk)
        child.stdin.close()
        out = child.stdout.read().decode()
    assert child.returncode == 0, out
    return out.strip()


@pytest.fixture
def names() -> Iterator[list[str]]:
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
@pytest.mark.registry
@pytest.mark.parametrize(("docker", "order"), [(False, "weights-first"), (True, "engine-first")])
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


@pytest.fixture
def model(tmp_path: Path) -> Image:
    return model_pack(tree_of(tmp_path / "pack", FILES), PACK, {})


@_has("oras")
@pytest.mark.registry
def test_oras_pulls_a_model_packs_files(model: Image, tmp_path: Path) -> None:
    with real_registry(tmp_path) as host, Registry() as client:
        client.push(model, Reference.parse(f"{host}/models/tiny:1"))
        _run("oras", "pull", "--plain-http", f"{host}/models/tiny:1", "-o", tmp_path / "pulled")

    assert {name: (tmp_path / "pulled" / name).read_bytes() for name in FILES} == FILES


@_has("oras")
@pytest.mark.registry
@pytest.mark.parametrize("form", ["image", "modelpack-tar"])
def test_oras_pulls_archives_that_are_named_so(form: str, tmp_path: Path) -> None:
    """What it writes has the layer's title as its name, so a tar's title has to end as a tar's."""
    image = tiny_image(tmp_path / "model")
    if form == "modelpack-tar":
        image = tar_model_pack([x for x in image.layers if isinstance(x, TarLayer)], PACK, {})
    with real_registry(tmp_path) as host, Registry() as client:
        name = f"{host}/models/tiny:1"
        client.push(image, Reference.parse(name))
        _run("oras", "pull", "--plain-http", name, "-o", tmp_path / "pulled")
        held = client.pull(Reference.parse(name))

    pulled = [path for path in (tmp_path / "pulled").rglob("*") if path.is_file()]
    assert {path.suffix for path in pulled} == {".tar"}
    assert len(pulled) == len(image.layers)
    listed: set[str] = set()
    for path in pulled:
        with tarfile.open(path) as archive:
            listed.update(archive.getnames())
    assert {f"models/{name}" for name in FILES} <= listed
    assert [layer.file for layer in held.layers] == [layer.file for layer in image.layers]


@_has("skopeo")
def test_skopeo_copies_a_model_pack_unchanged(model: Image, tmp_path: Path) -> None:
    write_layout(model, tmp_path / "oci", ref="v1")
    _run("skopeo", "copy", "-q", "--preserve-digests", f"oci:{tmp_path}/oci:v1",
         f"oci:{tmp_path}/copy:v1")  # fmt: skip

    assert read_layout(tmp_path / "copy", "v1").digest == model.digest


@_has("podman")
@pytest.mark.registry
@pytest.mark.root
def test_podman_pulls_a_model_pack_as_an_artifact(model: Image, tmp_path: Path) -> None:
    with real_registry(tmp_path) as host, Registry() as client:
        client.push(model, Reference.parse(f"{host}/models/tiny:1"))
        podman = ("podman", "--root", tmp_path / "podman", "--storage-driver", "vfs")
        name = f"{host}/models/tiny:1"
        _run(*podman, "artifact", "pull", "-q", "--tls-verify=false", name)
        said = json.loads(_run(*podman, "artifact", "inspect", name))

    manifest = said["Manifest"]
    assert manifest["artifactType"] == model.artifact_type
    titles = [row["annotations"]["org.opencontainers.image.title"] for row in manifest["layers"]]
    assert titles == sorted(FILES)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return tree_of(tmp_path, {"bot.gguf": WEIGHTS, "LICENSE": b"Free.\n"})


def for_ollama(tree: Tree, **more: Any) -> Image:
    facts: dict[str, Any] = {
        "family": "llama", "file_type": "Q4_K_M", "parameters": 134_515_008, "context": 2048,
        "licenses": ("Free.\n",), "labels": {"a": "b"},
    }  # fmt: skip
    return ollama_model(tree, tree.files[0], **(facts | more))


def as_ollama_pulls(host: str, name: str, tag: str, models: Path) -> dict[str, bytes]:
    """Pull as ollama's server/images.go does: one media type accepted, each blob checked."""
    address = f"http://{host}/v2/{name}"
    request = Request(f"{address}/manifests/{tag}", headers={"Accept": DOCKER})
    with urlopen(request) as reply:
        assert reply.headers["Content-Type"] == DOCKER
        manifest = json.loads(reply.read())
    found = {}
    for row in (*manifest["layers"], manifest["config"]):
        with urlopen(f"{address}/blobs/{row['digest']}") as reply:
            data = reply.read()
        assert hashlib.sha256(data).hexdigest() == row["digest"].removeprefix("sha256:")
        assert len(data) == row["size"]
        found[row["mediaType"]] = data
        (models / row["digest"].replace(":", "-")).write_bytes(data)
    return found


@pytest.mark.registry
def test_ollama_pulls_a_model(registry: tuple[Registry, str], tree: Tree, tmp_path: Path) -> None:
    client, host = registry
    image = for_ollama(tree)
    client.push(image, Reference.parse(f"{host}/team/bot:1"))
    (tmp_path / "blobs").mkdir()
    found = as_ollama_pulls(host, "team/bot", "1", tmp_path / "blobs")

    prefix = "application/vnd.ollama.image."
    assert found[f"{prefix}model"] == WEIGHTS
    assert found[f"{prefix}license"] == b"Free.\n"
    assert json.loads(found[f"{prefix}params"]) == {"num_ctx": 2048}
    config = json.loads(found["application/vnd.docker.container.image.v1+json"])
    expected = {
        "model_format": "gguf", "model_family": "llama", "model_families": ["llama"],
        "model_type": "134.52M", "file_type": "Q4_K_M", "architecture": "amd64", "os": "linux",
        "requires": "0.30.0",
    }  # fmt: skip
    assert expected.items() <= config.items()
    back = client.pull(Reference.parse(f"{host}/team/bot:1"))
    assert back.digest == image.digest
    assert back.has_files
    assert dict(back.labels) == {"a": "b"}


@pytest.mark.parametrize(
    ("count", "shown"), [(8_030_261_248, "8.0B"), (134_515_008, "134.52M"), (900, "900")]
)
def test_sizes_are_written_as_ollama_writes_them(tree: Tree, count: int, shown: str) -> None:
    settings = for_ollama(tree, parameters=count).settings
    assert settings["model_type"] == shown


@pytest.mark.registry
def test_a_tar_pack_sends_no_weights_again(registry: tuple[Registry, str], tree: Tree) -> None:
    client, host = registry
    layers = weight_layers(tree)
    facts = ModelDescription(name="bot", version="1", format="gguf")
    first = client.push(
        assemble(layers, config=ImageConfig()), Reference.parse(f"{host}/team/bot:1")
    )
    again = client.push(
        tar_model_pack(layers, facts, {}), Reference.parse(f"{host}/team/bot:1-modelpack-tar")
    )
    raw = client.push(model_pack(tree, facts, {}), Reference.parse(f"{host}/team/bot:1-modelpack"))
    ollama = client.push(for_ollama(tree), Reference.parse(f"{host}/team/bot:1-ollama"))

    assert first.uploaded_bytes > len(WEIGHTS)
    assert again.uploaded_bytes < 2000
    assert raw.uploaded_bytes > len(WEIGHTS)
    assert ollama.uploaded_bytes < 2000  # its model is the ModelPack's blob
    back = client.pull(Reference.parse(f"{host}/team/bot:1-modelpack-tar"))
    assert [layer.digest for layer in back.layers] == [layer.digest for layer in layers]
    assert [layer.media_type for layer in back.layers] == [
        "application/vnd.cncf.model.weight.v1.tar",
        "application/vnd.cncf.model.weight.config.v1.tar",
    ]


@_has("oras")
@pytest.mark.registry
def test_oras_copies_ollamas_form(
    registry: tuple[Registry, str], tree: Tree, tmp_path: Path
) -> None:
    """skopeo refuses Ollama's media types below a manifest of Docker's."""
    client, host = registry
    image = for_ollama(tree)
    client.push(image, Reference.parse(f"{host}/team/bot:1"))
    words = ["oras", "cp", "--from-plain-http", f"{host}/team/bot:1"]
    subprocess.run([*words, "--to-oci-layout", f"{tmp_path}/copy:1"], check=True)
    assert read_layout(tmp_path / "copy", "1").digest == image.digest


@pytest.mark.registry
def test_a_media_type_that_nobody_knows_is_refused(
    registry: tuple[Registry, str], tree: Tree
) -> None:
    client, host = registry
    image = for_ollama(tree)
    other = image.manifest_bytes.replace(b"ollama.image.params", b"ollama.image.script")
    client.push(image, Reference.parse(f"{host}/team/bot:1"))
    client.push_manifest(Reference.parse(f"{host}/team/bot:2"), other, DOCKER)
    with pytest.raises(WeightsmithError, match="media type"):
        client.pull(Reference.parse(f"{host}/team/bot:2"))
