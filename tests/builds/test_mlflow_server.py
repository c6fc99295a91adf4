"""MLflow's own server, and what its client logs there: the same bytes as from a folder."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from weightsmith.core.ports import Silent
from weightsmith.outside.mlflow import MlflowRemote
from weightsmith.outside.remote import RemoteReader
from weightsmith.outside.store import FileStore

from tests.fakes.command_line import told as weightsmith
from tests.fakes.started import free_port, reader, started
from tests.paths import ROOT

TINY = ROOT / "examples" / "tiny"
A, B = TINY / "adapters" / "a", TINY / "adapters" / "b"
pytestmark = [
    pytest.mark.full,  # tests/unit/outside/test_mlflow.py has a server of its own
    pytest.mark.builders,
    pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow-skinny is not installed"),
]
LOG = """
import json, sys
import mlflow

base, a, b = sys.argv[1:]
client = mlflow.MlflowClient()
client.create_registered_model("support bot")
with mlflow.start_run() as run:
    mlflow.log_artifacts(base, "base")
for folder in (a, b):
    with mlflow.start_run() as logged:
        mlflow.log_artifacts(folder, "adapter")
    made = logged.info.run_id
    client.create_model_version("support bot", f"runs:/{made}/adapter", made)
client.set_registered_model_alias("support bot", "champion", "2")


class Echo(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input: list[str], params=None) -> list[str]:
        return model_input


with mlflow.start_run() as last:
    model = mlflow.pyfunc.log_model(
        name="bot", python_model=Echo(), artifacts={"adapter": a}, pip_requirements=["mlflow"],
        registered_model_name="python bot",
    )
print(json.dumps({"run": run.info.run_id, "bot": last.info.run_id, "model": model.model_id}))
"""


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What was logged in a server, which MLFLOW_TRACKING_URI names."""
    found = f"mlflow=={version('mlflow-skinny')}"
    python, home, port = reader(found, found), tmp_path_factory.mktemp("mlflow"), free_port()
    address = f"http://127.0.0.1:{port}"
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "MLFLOW_DISABLE_TELEMETRY": "true"}
    env |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_TRACKING_URI": address}
    words = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words += ["--backend-store-uri", f"sqlite:///{home}/mlflow.db", "--serve-artifacts"]
    words += ["--artifacts-destination", str(home / "artifacts")]
    with (
        started([python, "-m", "mlflow", *words], env, port, home / "server.log"),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("MLFLOW_TRACKING_URI", address)
        done = subprocess.run(
            [python, "-c", LOG, TINY / "base", A, B], env=env, check=True, stdout=subprocess.PIPE
        )
        yield json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("source", "folder", "pin"),
    [
        ("mlflow:runs:/{run}/base", TINY / "base", ""),
        ("mlflow:models:/support bot/1", A, ""),
        ("mlflow:models:/support bot@champion", B, "@2"),
        ("mlflow:models:/python bot/1/artifacts/a", A, ""),
        ("mlflow:runs:/{bot}/bot/artifacts/a", A, ""),
        ("mlflow:models:/{model}/artifacts/a", A, ""),
    ],
)
def test_what_the_server_serves_is_what_was_logged(
    logged: dict[str, str], tmp_path: Path, source: str, folder: Path, pin: str
) -> None:
    source = source.format(**logged)
    found = RemoteReader(FileStore(tmp_path), MlflowRemote()).fetch(source, "", "", Silent())

    assert found.pin == source + pin
    files = {file.path: found.tree.path(file.path).read_bytes() for file in found.tree.files}
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_merge_of_what_the_server_serves(logged: dict[str, str], tmp_path: Path) -> None:
    there = weightsmith(
        "merge", "--base", f"mlflow:runs:/{logged['run']}/base",
        "--adapter", "mlflow:models:/support bot@champion", "--runner", "local",
        "--out", tmp_path / "there", store=tmp_path / "store",
    )  # fmt: skip
    here = weightsmith(
        "merge", "--base", TINY / "base", "--adapter", B, "--runner", "local",
        "--out", tmp_path / "here",
    )  # fmt: skip

    assert [row["sha256"] for row in there["files"]] == [row["sha256"] for row in here["files"]]
