"""One model in every kind of place that a source may name."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import httpx
import pytest
from weightsmith.core.ports import SourceReader, Store
from weightsmith.core.values import Digest, FileEntry, Tree
from weightsmith.oci.image import ImageConfig, assemble
from weightsmith.oci.layers import TarLayer
from weightsmith.oci.modelpack import ModelDescription, model_pack, tar_model_pack
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry
from weightsmith.oci.weights import weight_layers
from weightsmith.outside.https import HttpsRemote
from weightsmith.outside.image_sources import OciRemote
from weightsmith.outside.mlflow import MlflowRemote
from weightsmith.outside.modelscope import ModelScopeRemote
from weightsmith.outside.object_stores import S3, Gcs, ObjectRemote
from weightsmith.outside.remote import RemoteReader

from tests.fakes.images import tree_of
from tests.fakes.serving import Replying, Serving, serving

MODEL: Mapping[str, bytes] = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer/vocab.json": b"{}",
    "model-00001-of-00002.safetensors": bytes(range(256)) * 12_000,
    "model-00002-of-00002.safetensors": b"second" * 1000,
}
BESIDE: Mapping[str, bytes] = {
    "pytorch_model.bin": b"pickle",
    "train.py": b"import os",
    ".cache/x.json": b"{}",
}
"""What lies beside a model and is not read."""
SECRET = "s3cret-of-the-source"


def archive_of(files: Mapping[str, bytes], top: str = "") -> bytes:
    """Return a tar made by Python's own writer."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(top + name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def list_of(files: Mapping[str, bytes]) -> bytes:
    """Return a list as sha256sum writes it."""
    rows = (f"{hashlib.sha256(data).hexdigest()}  ./{name}\n" for name, data in files.items())
    return "".join(rows).encode()


class WebServer:
    """What an HTTP server has, by path, and how it fails."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        """`METHOD PATH RANGE` of every request."""
        self.sent = 0
        """Bytes of bodies."""
        self.faults: list[tuple[str, str]] = []
        """Part of the path, and `reset`, `half`, `short`, `long`, `norange`, `spoil` or a status;
        each once."""
        self.redirects: dict[str, str] = {}
        self.headers: list[dict[str, str]] = []
        self.password = ""
        self.lists: Callable[[str], bytes | None] = lambda _: None
        """Answers some requests in another way, by path and query."""
        self.url = ""

    def fault(self, path: str) -> str:
        for row in self.faults:
            if row[0] in path:
                self.faults.remove(row)
                return row[1]
        return ""


class WebHandler(Replying):
    state: WebServer

    def do_GET(self) -> None:
        state, path = self.state, unquote(urlsplit(self.path).path)
        state.asked.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
        state.headers.append(dict(self.headers))
        if self.path in state.redirects:
            return self.reply(302, b"", {"Location": state.redirects[self.path]})
        if state.password and state.password not in str(self.headers):
            return self.reply(401)
        data = state.lists(self.path)
        data = state.files.get(path) if data is None else data
        fault = state.fault(self.path) if self.command == "GET" else ""
        if data is None or fault.isdecimal():
            return self.reply(int(fault or 404), SECRET.encode())
        if fault == "reset":
            return self.reset()
        return self._send(data, fault)

    def _send(self, data: bytes, fault: str) -> None:
        asked = self.headers.get("Range", "") if fault != "norange" else ""
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, end = int(first or 0), int(last or len(data) - 1) + 1
        body, headers = data[start:end], {}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{start + len(body) - 1}/{len(data)}"
        if fault == "spoil":
            body = bytes(byte ^ 1 for byte in body[:1]) + body[1:]
        body = {"short": body[: len(body) // 2], "long": body + b"more"}.get(fault, body)
        sent = body[: len(body) // 2] if fault == "half" else body
        headers["Content-Length"] = str(len(body))
        self.state.sent += len(sent) if self.command == "GET" else 0
        self.reply(206 if asked else 200, sent, headers)
        if fault == "half":
            self.wfile.flush()
            self.reset()

    do_HEAD = do_GET  # noqa: N815 - the names http.server calls


@contextmanager
def web_server() -> Iterator[WebServer]:
    state = WebServer()
    server = Serving(WebHandler, state=state)
    with serving(server) as state.url:
        yield state


@dataclass
class Scene:
    """One place, with the model in it."""

    reader: SourceReader
    source: str
    """As a recipe names it."""
    put: Callable[[Mapping[str, bytes]], None]
    """Makes these its files: what an honest keeper does."""
    absent: str
    """A source of this kind that does not exist."""
    stop: Callable[[], None]
    """Ends the server."""
    sha256: str = ""
    web: WebServer | None = None
    """The server, if it is ours to fail."""
    moves: bool = True
    """Whether the same name may have other content later."""
    can_list: frozenset[str] = field(default_factory=frozenset)
    """Odd names that its lists may have."""


_CLASHES = frozenset({"Config.json", "config.json/x.json"})
_ODD = _CLASHES | {"../config.json", "a/../../config.json", "a\\b.json"}


def https_list(store: Store, stack: ExitStack) -> Scene:
    web = stack.enter_context(web_server())
    scene = Scene(
        reader=RemoteReader(store, HttpsRemote("http")),
        source=f"{web.url}/models/bot/SHA256SUMS",
        put=lambda _: None,
        absent=f"{web.url}/models/none/SHA256SUMS",
        stop=lambda: stack.close(),
        web=web,
        moves=False,
        can_list=_ODD,
    )

    def put(files: Mapping[str, bytes]) -> None:
        web.files = {f"/models/bot/{name}": data for name, data in files.items()}
        web.files["/models/bot/SHA256SUMS"] = data = list_of(files)
        scene.sha256 = scene.sha256 or hashlib.sha256(data).hexdigest()

    scene.put = put
    return scene


def https_tar(store: Store, stack: ExitStack) -> Scene:
    web = stack.enter_context(web_server())
    scene = Scene(
        reader=RemoteReader(store, HttpsRemote("http")),
        source=f"{web.url}/bot.tar",
        put=lambda _: None,
        absent=f"{web.url}/none.tar",
        stop=lambda: stack.close(),
        web=web,
        moves=False,
        can_list=frozenset({"../config.json", "a/../../config.json", "a\\b.json"}),
    )

    def put(files: Mapping[str, bytes]) -> None:
        web.files["/bot.tar"] = data = archive_of(files, "bot/")
        scene.sha256 = scene.sha256 or hashlib.sha256(data).hexdigest()

    scene.put = put
    return scene


def modelscope(store: Store, stack: ExitStack, patch: pytest.MonkeyPatch) -> Scene:
    web = stack.enter_context(web_server())
    patch.setenv("MODELSCOPE_ENDPOINT", web.url)
    patch.setenv("MODELSCOPE_API_TOKEN", SECRET)
    web.password = f"m_session_id={SECRET}"
    held: dict[str, bytes] = {}

    def answer(path: str) -> bytes | None:
        parts = urlsplit(path)
        asked = {key: values[0] for key, values in parse_qs(parts.query).items()}
        if parts.path == "/api/v1/models/team/bot/repo/files" and asked["Revision"] == "master":
            rows = [
                {
                    "Path": name,
                    "Name": name.rpartition("/")[2],
                    "Type": "blob",
                    "Size": len(data),
                    "Sha256": hashlib.sha256(data).hexdigest(),
                }
                for name, data in held.items()
            ]
            rows.append({"Path": "tokenizer", "Name": "tokenizer", "Type": "tree", "Size": 0})
            return json.dumps({"Code": 200, "Success": True, "Data": {"Files": rows}}).encode()
        if parts.path == "/api/v1/models/team/bot/repo":
            return held.get(asked["FilePath"])
        return None

    def put(files: Mapping[str, bytes]) -> None:
        held.clear()
        held.update(files)

    web.lists = answer
    return Scene(
        reader=RemoteReader(store, ModelScopeRemote()),
        source="modelscope://team/bot",
        put=put,
        absent="modelscope://team/none",
        stop=lambda: stack.close(),
        web=web,
        can_list=_ODD,
    )


def s3_folder(store: Store, variables: Mapping[str, str], patch: pytest.MonkeyPatch) -> Scene:
    """A prefix in a bucket of moto's server; it stays for other tests."""
    for name, value in variables.items():
        patch.setenv(name, value)
    import boto3

    client = boto3.client("s3")
    bucket = hashlib.sha256(str(id(store)).encode()).hexdigest()[:20]
    client.create_bucket(Bucket=bucket)
    there: set[str] = set()

    def put(files: Mapping[str, bytes]) -> None:
        for name in there - files.keys():
            client.delete_object(Bucket=bucket, Key=f"models/bot/{name}")
        for name, data in files.items():
            client.put_object(Bucket=bucket, Key=f"models/bot/{name}", Body=data)
        there.clear()
        there.update(files)

    return Scene(
        reader=RemoteReader(store, ObjectRemote(S3())),
        source=f"s3://{bucket}/models/bot",
        put=put,
        absent=f"s3://{bucket}/models/none",
        stop=lambda: patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1"),
        can_list=_CLASHES,
    )


def gs_folder(store: Store, url: str, patch: pytest.MonkeyPatch) -> Scene:
    """A prefix in a bucket of a local emulator."""
    patch.setenv("STORAGE_EMULATOR_HOST", url)
    # Its six tries take half a minute where nobody answers.
    patch.setattr("gcsfs.retry.random", SimpleNamespace(random=lambda: -32.0))
    bucket = hashlib.sha256(str(id(store)).encode()).hexdigest()[:20]
    httpx.post(f"{url}/storage/v1/b", json={"name": bucket}, timeout=60).raise_for_status()
    there: set[str] = set()

    def put(files: Mapping[str, bytes]) -> None:
        for name in there - files.keys():
            key = f"models/bot/{name}".replace("/", "%2F")
            httpx.delete(f"{url}/storage/v1/b/{bucket}/o/{key}", timeout=60).raise_for_status()
        for name, data in files.items():
            httpx.post(
                f"{url}/upload/storage/v1/b/{bucket}/o",
                params={"uploadType": "media", "name": f"models/bot/{name}"},
                content=data,
                timeout=60,
            ).raise_for_status()
        there.clear()
        there.update(files)

    return Scene(
        reader=RemoteReader(store, ObjectRemote(Gcs())),
        source=f"gs://{bucket}/models/bot",
        put=put,
        absent=f"gs://{bucket}/models/none",
        stop=lambda: patch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1"),
        can_list=_CLASHES,
    )


def model_pack_in(
    store: Store, host: str, writer: Registry, client: Registry, folder: Path, *, tar: bool
) -> Scene:
    place = Reference.parse(f"{host}/team/pack:1")

    def put(files: Mapping[str, bytes]) -> None:
        used = {name: data for name, data in files.items() if not name.startswith(".cache")}
        described = ModelDescription(name="bot", version="1", format="safetensors")
        rows = tuple(
            FileEntry(path=name, size=len(data), digest=Digest.of(data))
            for name, data in used.items()
        )
        held = {name: (data,) for name, data in used.items()}
        if tar:
            layers = weight_layers(tree_of(folder / "packed", used), epoch=0)
            writer.push(tar_model_pack(layers, described, {}), place, force=True)
            return
        writer.push(
            model_pack(Tree(root=folder, files=rows), described, {}, held), place, force=True
        )

    return Scene(
        reader=RemoteReader(store, OciRemote(client)),
        source=f"oci://{place}",
        put=put,
        absent=f"oci://{place.name}-none:1",
        stop=lambda: None,
        can_list=frozenset() if tar else _ODD,
    )


def image_in(
    store: Store, host: str, writer: Registry, client: Registry, folder: Path, *, ours: bool
) -> Scene:
    """Our own image, whose label names its layers, or a modelcar of any other tool."""
    place = Reference.parse(f"{host}/team/{'image' if ours else 'modelcar'}:1")
    engine = TarLayer(
        members=tree_members({"usr/share/x/config.json": b"{}", "bin/sh": b"elf"}), epoch=0
    )

    def put(files: Mapping[str, bytes]) -> None:
        layers = weight_layers(tree_of(folder / place.repository, dict(files)), epoch=0)
        base = assemble((), (engine,), config=ImageConfig(), epoch=0)
        labels = {"dev.weightsmith.layers": f"base:1 weights:{len(layers)} settings:0"}
        writer.push(
            assemble(
                layers, (), config=ImageConfig(labels=labels if ours else {}), base=base, epoch=0
            ),
            place,
            force=True,
        )

    return Scene(
        reader=RemoteReader(store, OciRemote(client)),
        source=f"oci://{place}",
        put=put,
        absent=f"oci://{place.name}-none:1",
        stop=lambda: None,
    )


def tree_members(files: Mapping[str, bytes]) -> tuple:
    from weightsmith.oci.layers import Member

    return tuple(Member.of_bytes(name, data) for name, data in files.items())


def mlflow_run(store: Store, folder: Path, patch: pytest.MonkeyPatch) -> Scene:
    """A run's artifacts in a folder of MLflow's own."""
    mlflow = pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    home = folder / "mlruns"
    patch.setenv("MLFLOW_TRACKING_URI", home.as_uri())
    patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = mlflow.MlflowClient(home.as_uri())
    run = client.create_run(client.create_experiment(folder.name)).info
    artifacts = Path(urlsplit(run.artifact_uri).path)

    def put(files: Mapping[str, bytes]) -> None:
        from weightsmith.core.trees import remove

        remove(artifacts / "model")
        tree_of(artifacts / "model", dict(files))

    return Scene(
        reader=RemoteReader(store, MlflowRemote()),
        source=f"mlflow:runs:/{run.run_id}/model",
        put=put,
        absent="mlflow:runs:/0123456789abcdef0123456789abcdef/model",
        stop=lambda: patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1"),
        moves=False,
        can_list=frozenset({"Config.json"}),
    )
