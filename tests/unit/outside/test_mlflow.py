"""MLflow's own client against a folder of its own, and a server in this process."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from weightsmith.core.errors import Altered, EnvironmentFailure, InputRefused, UsageError
from weightsmith.core.ports import Silent
from weightsmith.core.trees import remove
from weightsmith.outside.mlflow import MlflowRemote
from weightsmith.outside.remote import RemoteReader
from weightsmith.outside.store import FileStore

from tests.fakes.images import tree_of
from tests.fakes.s3_server import s3_server
from tests.fakes.serving import Replying, Serving, serving
from tests.fakes.sources import BESIDE, MODEL, SECRET

if find_spec("mlflow") is None:
    pytest.skip("mlflow-skinny is not installed", allow_module_level=True)


def client_of(home: Path) -> Any:
    """Importing it takes a second, of each process that collects tests."""
    from mlflow import MlflowClient

    return MlflowClient(home.as_uri())


@pytest.fixture
def reader(tmp_path: Path) -> RemoteReader:
    return RemoteReader(FileStore(tmp_path / "store"), MlflowRemote())


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return tmp_path / "mlruns"


def registered(home: Path, name: str = "support bot") -> object:
    """Register a model of two versions; the alias `champion` names the first."""
    client = client_of(home)
    client.create_registered_model(name)
    experiment = client.create_experiment("x")
    for last in (b"first", b"second"):
        run = client.create_run(experiment).info
        files = {**MODEL, "model-00002-of-00002.safetensors": last, **BESIDE}
        tree_of(Path(urlsplit(run.artifact_uri).path) / "m" / "model", files)
        client.create_model_version(name, f"runs:/{run.run_id}/m", run.run_id)
    client.set_registered_model_alias(name, "champion", "1")
    return client


def last_of(snapshot: object) -> bytes:
    return snapshot.tree.path("model-00002-of-00002.safetensors").read_bytes()


def test_a_version_and_an_alias(home: Path, reader: RemoteReader) -> None:
    client = registered(home)
    alias = "mlflow:models:/support bot@champion/model"

    assert (
        last_of(reader.fetch("mlflow:models:/support bot/2/model", "", "", Silent())) == b"second"
    )
    first = reader.fetch(alias, "", "", Silent())
    client.set_registered_model_alias("support bot", "champion", "2")

    assert (first.pin, first.pinned, last_of(first)) == (f"{alias}@1", False, b"first")
    assert last_of(reader.fetch(alias, "1", "", Silent())) == b"first"
    assert last_of(reader.fetch(alias, "", "", Silent())) == b"second"


def test_the_model_that_a_run_logged(home: Path, reader: RemoteReader) -> None:
    client = client_of(home)
    experiment = client.create_experiment("x")
    run = client.create_run(experiment).info
    model = client.create_logged_model(experiment, name="bot", source_run_id=run.run_id)
    tree_of(Path(urlsplit(model.artifact_location).path) / "model", dict(MODEL))

    for source in (
        f"mlflow:runs:/{run.run_id}/bot/model",
        f"mlflow:models:/{model.model_id}/model",
    ):
        snapshot = reader.fetch(source, "", "", Silent())
        assert {file.path for file in snapshot.tree.files} == MODEL.keys()
        assert snapshot.pinned


@pytest.mark.parametrize("name", ["config.json", "tokenizer"])
def test_a_link_out_of_a_runs_folder(home: Path, reader: RemoteReader, name: str) -> None:
    client = registered(home)
    run = client.get_run(client.get_model_version("support bot", "1").run_id).info
    place = Path(urlsplit(run.artifact_uri).path) / "m" / "model" / name
    remove(place)
    place.symlink_to("/etc/passwd")

    with pytest.raises(InputRefused, match="link"):
        reader.fetch("mlflow:models:/support bot/1/model", "", "", Silent())


@pytest.mark.parametrize(
    "source",
    [
        "mlflow:runs:/0123456789abcdef0123456789abcdef/model",
        "mlflow:models:/none/1",
        "mlflow:models:/none@champion",
        "mlflow:models:/support bot@none",
        "mlflow:models:/support bot/1/none",
        "mlflow:models:/m-0123456789abcdef0123456789abcdef",
    ],
)
def test_what_is_not_there(home: Path, reader: RemoteReader, source: str) -> None:
    registered(home)

    with pytest.raises(InputRefused) as caught:
        reader.fetch(source, "", "", Silent())
    assert caught.value.hint


@pytest.mark.parametrize("uri", ["postgresql://ann:s3cret@db/mlflow", ""])
def test_a_database_that_the_client_does_not_read(
    reader: RemoteReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    """Since MLflow 3 it is where runs go if no variable says otherwise."""
    if find_spec("sqlalchemy") is not None:
        pytest.skip("with sqlalchemy the client reads databases")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)

    with pytest.raises(
        UsageError, match=r"does not read (postgresql|sqlite:///.*mlflow\.db)"
    ) as caught:
        reader.fetch("mlflow:models:/support bot/1", "", "", Silent())
    assert "mlflow server" in caught.value.hint
    assert "s3cret" not in caught.value.message


def test_artifacts_in_an_object_store(
    home: Path, reader: RemoteReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server("artifacts") as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        import boto3

        client = client_of(home)
        run = client.create_run(client.create_experiment("x", "s3://artifacts/runs")).info
        for name, data in {**MODEL, **BESIDE}.items():
            key = f"{run.artifact_uri.removeprefix('s3://artifacts/')}/model/{name}"
            boto3.client("s3").put_object(Bucket="artifacts", Key=key, Body=data)

        snapshot = reader.fetch(f"mlflow:runs:/{run.run_id}/model", "", "", Silent())

    assert {file.path for file in snapshot.tree.files} == MODEL.keys()
    assert snapshot.pin == f"mlflow:runs:/{run.run_id}/model"


class Server:
    """What a tracking server says of one run, and the artifacts that it serves itself."""

    def __init__(self) -> None:
        self.files = {f"1/run/artifacts/model/{name}": data for name, data in MODEL.items()}
        self.artifact_uri = "mlflow-artifacts:/1/run/artifacts"
        self.sizes = True
        self.odd = ""
        self.fetched: list[str] = []
        self.sent: dict[str, bytes] = {}
        """What it sends of a file instead."""
        self.folders: set[str] = set()
        """Files that it lists as folders when they are asked for alone."""
        self.status = 0


class Handler(Replying):
    state: Server

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        asked = {key: values[0] for key, values in parse_qs(parts.query).items()}
        path = unquote(parts.path)
        if self.state.status:
            return self.reply(self.state.status, b'{"error_code": "PERMISSION_DENIED"}')
        if self.headers.get("Authorization") != f"Bearer {SECRET}":
            return self.reply(401)
        if path == "/api/2.0/mlflow/runs/get":
            info = {"run_id": "run", "run_uuid": "run", "experiment_id": "1", "status": "FINISHED"}
            info |= {"artifact_uri": self.state.artifact_uri, "lifecycle_stage": "active"}
            run = {"info": info, "data": {}}
            return self.reply(200, json.dumps({"run": run}).encode())
        if path == "/api/2.0/mlflow-artifacts/artifacts":
            return self.reply(200, json.dumps({"files": self.rows(asked.get("path", ""))}).encode())
        name = path.removeprefix("/api/2.0/mlflow-artifacts/artifacts/")
        if name not in {*self.state.files, *self.state.sent}:
            return self.reply(404, b'{"error_code": "RESOURCE_DOES_NOT_EXIST"}')
        self.state.fetched.append(name)
        return self.reply(200, self.state.sent.get(name) or self.state.files[name])

    def rows(self, folder: str) -> list[dict[str, object]]:
        rows: dict[str, dict[str, object]] = {}
        if folder in self.state.folders:
            return [{"path": "x.json", "is_dir": False, "file_size": 2}]
        for name, data in self.state.files.items():
            if not name.startswith(f"{folder}/"):
                continue
            first, slash, _ = name.removeprefix(f"{folder}/").partition("/")
            size = {"file_size": len(data)} if self.state.sizes else {}
            rows[first] = {"path": first, "is_dir": bool(slash), **({} if slash else size)}
        if self.state.odd:
            rows["odd"] = {"path": self.state.odd, "is_dir": False, "file_size": 2}
        return list(rows.values())


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server()
    with serving(Serving(Handler, state=state)) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        yield state


def test_a_server_that_serves_its_artifacts(server: Server, reader: RemoteReader) -> None:
    server.files["1/run/artifacts/model/pytorch_model.bin"] = b"pickle"

    snapshot = reader.fetch("mlflow:runs:/run/model", "", "", Silent())

    found = {file.path: snapshot.tree.path(file.path).read_bytes() for file in snapshot.tree.files}
    assert found == MODEL
    assert not [name for name in server.fetched if name.endswith(".bin")]


@pytest.mark.parametrize("sent", [b"{}", MODEL["config.json"] + b" "])
def test_one_that_lists_other_sizes(server: Server, reader: RemoteReader, sent: bytes) -> None:
    """It is asked again the next time, and nothing of the first remains."""
    server.sent["1/run/artifacts/model/config.json"] = sent
    with pytest.raises(Altered, match=r"config\.json"):
        reader.fetch("mlflow:runs:/run/model", "", "", Silent())
    server.sent.clear()

    tree = reader.fetch("mlflow:runs:/run/model", "", "", Silent()).tree

    assert {file.path: tree.path(file.path).read_bytes() for file in tree.files} == MODEL


def test_a_file_that_is_a_folder_when_it_is_fetched(server: Server, reader: RemoteReader) -> None:
    server.folders.add("1/run/artifacts/model/config.json")
    server.sent["1/run/artifacts/model/config.json/x.json"] = b"{}"
    with pytest.raises(Altered, match=r"config\.json"):
        reader.fetch("mlflow:runs:/run/model", "", "", Silent())


@pytest.mark.parametrize(
    "place", ["s3://b", "s3://bucket/a?x=1", "gs://ann:s3cret@bucket/a", "s3:///x"]
)
def test_one_that_names_no_bucket(server: Server, reader: RemoteReader, place: str) -> None:
    server.artifact_uri = place
    with pytest.raises(InputRefused, match="an address that is none") as caught:
        reader.fetch("mlflow:runs:/run", "", "", Silent())
    assert "s3cret" not in caught.value.message


def test_a_run_that_changes_after_an_interruption(home: Path, reader: RemoteReader) -> None:
    """What the first try fetched is of another list, so nothing of it is in the model."""
    client = client_of(home)
    run = client.create_run(client.create_experiment("x")).info
    model = Path(urlsplit(run.artifact_uri).path) / "model"
    tree_of(model, {**MODEL, "old.json": b"{}"})

    class Stops(Silent):
        def advance(self, done: int, total: int, unit: str) -> None:
            if done > 1 << 20:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reader.fetch(f"mlflow:runs:/{run.run_id}/model", "", "", Stops())
    remove(model)
    large = "model-00001-of-00002.safetensors"
    now = {**MODEL, large: MODEL[large][::-1]}
    tree_of(model, now)

    tree = reader.fetch(f"mlflow:runs:/{run.run_id}/model", "", "", Silent()).tree

    assert {file.path: tree.path(file.path).read_bytes() for file in tree.files} == now


@pytest.mark.parametrize("odd", ["../../etc/x.json", "a/../../x.json", "/etc/x.json"])
def test_one_that_lists_what_is_elsewhere(server: Server, reader: RemoteReader, odd: str) -> None:
    """Of a path only the last part is taken, and it must be there."""
    server.odd = odd
    with pytest.raises((InputRefused, EnvironmentFailure)):
        reader.fetch("mlflow:runs:/run/model", "", "", Silent())


def test_one_that_names_a_folder_of_this_machine(
    server: Server, reader: RemoteReader, tmp_path: Path
) -> None:
    tree_of(tmp_path / "private" / "model", dict(MODEL))
    server.artifact_uri = (tmp_path / "private").as_uri()

    with pytest.raises(InputRefused, match="a folder of a machine"):
        reader.fetch("mlflow:runs:/run/model", "", "", Silent())


def test_one_that_denies_access_shows_no_token(server: Server, reader: RemoteReader) -> None:
    server.status = 403
    with pytest.raises((InputRefused, EnvironmentFailure)) as caught:
        reader.fetch("mlflow:runs:/run/model", "", "", Silent())
    assert SECRET not in caught.value.message + caught.value.hint
    assert "MLFLOW_TRACKING" in caught.value.hint
