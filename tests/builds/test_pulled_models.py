"""Every form of a model, pulled from a registry by a client that is not ours, and served."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from weightsmith.building.wiring import cache_folder
from weightsmith.outside.toolset import toolset_folder

from tests.fakes.command_line import told as weightsmith
from tests.fakes.real_registries import real_registry
from tests.fakes.started import free_port, reader, started
from tests.paths import ROOT

TINY = ROOT / "examples" / "tiny" / "base"
KINDS = ("volume", "modelpack", "modelpack-tar", "ollama")
pytestmark = [
    pytest.mark.builders,
    pytest.mark.registry,
    pytest.mark.skipif(not shutil.which("docker-registry"), reason="docker-registry is missing"),
]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pulled")
    words = ("--model", TINY, "--format", "q8_0", "--out", folder / "model", "--runner", "local")
    return Path(weightsmith("quantize", *words)["files"][0])


@pytest.fixture(scope="module")
def host(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry with the model in every form, under its kind as tag."""
    with real_registry(tmp_path_factory.mktemp("registry")) as found:
        for kind in KINDS:
            weightsmith(
                "bake", "--model", gguf, "--target", "llamacpp-q8_0", "--kind", kind,
                "--push", f"{found}/team/bot:{kind}",
            )  # fmt: skip
        yield found


@pytest.fixture(scope="session")
def kserve() -> Path:
    """Python with KServe's own downloader: without clients of clouds, which it does not need."""
    return reader("kserve-storage==0.21.0", "oras==0.2.42", "requests", "certifi", "pyyaml")


def answer(file: Path, log: Path) -> str:
    """Return what llama.cpp's server says with a file."""
    port = free_port()
    program = toolset_folder(cache_folder(), "llamacpp") / "app" / "llama-server"
    words = ["--model", str(file), "--port", str(port), "--no-ui"]
    words += ["-np", "1", "-c", "256", "-t", "1"]
    body = {"prompt": [5, 6, 7, 8], "n_predict": 8, "temperature": 0, "ignore_eos": True}
    with started([program, *words], dict(os.environ), port, log) as client:
        reply: httpx.Response = client.post("/completion", json=body)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["content"])


@pytest.fixture(scope="module")
def expected(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    said = answer(gguf, tmp_path_factory.mktemp("log") / "server.log")
    assert said
    return said


def by_kserve(host: str, folder: Path, kserve: Path) -> Path:
    code = (
        "import sys; from kserve_storage import Storage; "
        "Storage._download_oci(sys.argv[1], sys.argv[2])"
    )
    environment = {"PATH": os.environ["PATH"], "KSERVE_OCI_INSECURE_REGISTRY": "true"}
    words = [kserve, "-c", code, f"oci://{host}/team/bot:volume", folder]
    subprocess.run(words, check=True, env=environment)
    return folder


def by_oras(host: str, folder: Path, _: Path) -> Path:
    words = ["oras", "pull", "--plain-http", f"{host}/team/bot:modelpack", "-o", folder]
    subprocess.run(words, check=True, capture_output=True)
    return folder


def by_tar(host: str, folder: Path, _: Path) -> Path:
    """As readers of ModelPacks unpack an archive: a blob by its digest, and tar."""
    address = f"http://{host}/v2/team/bot"
    accept = {"Accept": "application/vnd.oci.image.manifest.v1+json"}
    manifest = httpx.get(f"{address}/manifests/modelpack-tar", headers=accept).json()
    folder.mkdir()
    for row in manifest["layers"]:
        assert row["mediaType"].endswith(".tar")
        data = httpx.get(f"{address}/blobs/{row['digest']}").content
        subprocess.run(["tar", "-x", "-C", folder], input=data, check=True)
    return folder / "models"


def by_ollama(host: str, folder: Path, _: Path) -> Path:
    """As ollama pulls: one manifest type, and the layer whose type is a model."""
    address = f"http://{host}/v2/team/bot"
    accept = {"Accept": "application/vnd.docker.distribution.manifest.v2+json"}
    reply = httpx.get(f"{address}/manifests/ollama", headers=accept)
    assert reply.headers["content-type"] == accept["Accept"]
    kinds = {row["mediaType"]: row["digest"] for row in json.loads(reply.text)["layers"]}
    digest = kinds["application/vnd.ollama.image.model"]
    folder.mkdir()
    (folder / "model.gguf").write_bytes(httpx.get(f"{address}/blobs/{digest}").content)
    return folder


@pytest.mark.parametrize("pull", [by_kserve, by_oras, by_tar, by_ollama])
def test_a_pulled_model_is_served(
    pull: Callable[[str, Path, Path], Path],
    host: str,
    gguf: Path,
    expected: str,
    kserve: Path,
    tmp_path: Path,
) -> None:
    if pull is by_oras and not shutil.which("oras"):
        pytest.skip("oras is not installed")
    (file,) = pull(host, tmp_path / "model", kserve).rglob("*.gguf")

    assert file.read_bytes() == gguf.read_bytes()
    assert answer(file, tmp_path / "server.log") == expected


OLOT = """
import sys
from olot.modelpack.model_config import Model
from olot.oci.oci_image_manifest import OCIImageManifest
Model.model_validate_json(sys.argv[2])
print(len(OCIImageManifest.model_validate_json(sys.argv[1]).layers))
"""
"""Its pydantic classes are made from the specification's JSON Schema."""
RAMALAMA = """
import json, sys
from ramalama.transports.oci.spec import Manifest
print(len(Manifest.from_dict(json.loads(sys.argv[1])).layers))
"""
READERS = {
    OLOT: ("olot==1.2.1", "pydantic", "click"),
    RAMALAMA: ("ramalama==0.25.0", "jinja2", "pyyaml", "jsonschema", "argcomplete"),
}


@pytest.mark.grid(2)
@pytest.mark.parametrize("kind", ["modelpack-tar", "modelpack"])
@pytest.mark.parametrize("code", READERS, ids=["olot", "ramalama"])
def test_other_readers_classes_take_a_model_pack(host: str, kind: str, code: str) -> None:
    manifest, config = documents(host, kind)
    words = [reader(*READERS[code]), "-c", code, manifest, config]
    said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    assert int(said) == len(json.loads(manifest)["layers"])


def documents(host: str, kind: str) -> tuple[str, str]:
    """Return a form's manifest and configuration."""
    address = f"http://{host}/v2/team/bot"
    accept = {"Accept": "application/vnd.oci.image.manifest.v1+json"}
    manifest = httpx.get(f"{address}/manifests/{kind}", headers=accept).text
    digest = json.loads(manifest)["config"]["digest"]
    return manifest, httpx.get(f"{address}/blobs/{digest}").text
