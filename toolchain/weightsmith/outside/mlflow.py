"""Sources in an MLflow server or folder (`mlflow:runs:/…`, `mlflow:models:/…`), by its own client.

The client says where the artifacts are. A folder is read in place of a download, and object stores
by the readers of `s3://` and `gs://`; everything else, such as a server's own store, by the client.
A run and a version of a model are immutable names; an alias is pinned to the version that it names.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from weightsmith.core.errors import EnvironmentFailure, InputRefused, UsageError, WeightsmithError
from weightsmith.core.ports import Progress
from weightsmith.core.trees import below
from weightsmith.core.values import without_passwords
from weightsmith.models.folder import scan
from weightsmith.outside.object_stores import S3, Gcs, ObjectRemote
from weightsmith.outside.remote import Place, RemoteFile, require_packages
from weightsmith.recipe.sources import BUCKET, MLFLOW

if TYPE_CHECKING:
    from mlflow import MlflowClient

_CHUNK = 1 << 20
_MOST_FILES = 20_000
_DEEPEST = 16
_STORES = (ObjectRemote(S3()), ObjectRemote(Gcs()))
_HINT = (
    "check MLFLOW_TRACKING_URI, the network, and MLFLOW_TRACKING_TOKEN or MLFLOW_TRACKING_USERNAME "
    "and its password"
)
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
}
"""Of the client, unless the user says otherwise: it reports home and shows bars of its own."""


class MlflowRemote:
    """Runs and registered models of MLFLOW_TRACKING_URI."""

    scheme = "mlflow"
    packages = ("mlflow",)
    extra = "mlflow"

    @property
    def where(self) -> str:
        """Return the server or folder, without credentials."""
        return str(without_passwords(os.environ.get("MLFLOW_TRACKING_URI", "")))

    def pin_of(self, source: str, revision: str, sha256: str) -> str:
        """Return the source, of an alias with its version."""
        del sha256
        found = MLFLOW.fullmatch(source)
        if not found or not found["alias"]:
            return source
        return f"{source}@{revision}" if revision else ""

    def open(self, source: str, revision: str, sha256: str, progress: Progress) -> Place:
        """Find the artifacts and list them."""
        del sha256
        found = MLFLOW.fullmatch(source)
        if not found:
            raise AssertionError("a recipe's sources are checked")
        is_alias, version = bool(found["alias"]), found["version"] or revision
        with _asked(source):
            client = _client()
            if is_alias and not version:
                alias = found["alias"].removeprefix("@")
                version = str(client.get_model_version_by_alias(found["name"], alias).version)
            location = _location(client, found, version)
        pin = f"{source}@{version}" if is_alias else source
        pinned = bool(revision) or not is_alias
        parts = urlsplit(location)
        for store in _STORES:
            if parts.scheme == store.scheme:
                require_packages(store, source)
                if not BUCKET.fullmatch(location):
                    raise InputRefused(
                        f"{source}: {_server()} says that it is in a bucket, at an address that "
                        "is none",
                        hint="download it, and give its folder as the source",
                    )
                there = store.open(location, "", "", progress)
                return Place(
                    pin=pin, pinned=pinned, files=there.files, read=there.read, hint=there.hint
                )
        if parts.scheme in ("", "file"):
            files, read = _in_folder(Path(unquote(parts.path)), source)
            return Place(pin=pin, pinned=pinned, files=files, read=read, hint=_HINT)
        if parts.scheme in ("runs", "models"):  # the client would follow them to any folder here
            raise InputRefused(
                f"{source}: {_server()} says that it is in {location[:200]}",
                hint="name that as the source",
            )
        return Place(
            pin=pin,
            pinned=pinned,
            files=_on_server(location, source),
            read=lambda *_: iter(()),
            hint=_HINT,
            take=lambda file, folder: _taken(f"{location}/{file.path}", folder, source),
        )


def _client() -> MlflowClient:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    # Imported here: it loads for a second.
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    return mlflow.MlflowClient()


def _location(client: MlflowClient, found: re.Match[str], version: str) -> str:
    """Return the address of a source's artifacts."""
    path = found["path"].strip("/")
    if not found["run"] and not found["id"]:
        named = str(client.get_model_version_download_uri(found["name"], version))
        place = f"{named.rstrip('/')}/{path}".rstrip("/")
        # It may be of a run, or of a logged model.
        inner = MLFLOW.fullmatch(f"mlflow:{place}")
        if not inner or not (inner["run"] or inner["id"]):
            return place
        found, path = inner, inner["path"].strip("/")
    if found["run"]:
        root, path = _of_run(client, found["run"], path)
    else:
        root = client.get_logged_model(found["id"]).artifact_location
    return f"{str(root).rstrip('/')}/{path}".rstrip("/")


def _of_run(client: MlflowClient, run: str, path: str) -> tuple[str, str]:
    """Return where the artifacts of a run are, or of a model that it logged, and the path there."""
    from mlflow.artifacts import list_artifacts

    found = client.get_run(run).info
    name, _, rest = path.partition("/")
    if not name or list_artifacts(artifact_uri=f"{found.artifact_uri.rstrip('/')}/{path}"):
        return found.artifact_uri, path
    # Since MLflow 3 a model that a run logs has a folder of its own.
    token = None
    while True:
        page = client.search_logged_models(
            experiment_ids=[found.experiment_id],
            filter_string=f"name = '{name.replace(chr(39), '')}'",
            page_token=token,
        )
        for model in page:
            if model.source_run_id == run:
                return model.artifact_location, rest
        token = page.token
        if not token:
            return found.artifact_uri, path


def _in_folder(
    root: Path, source: str
) -> tuple[tuple[RemoteFile, ...], Callable[[RemoteFile, int, int], Iterator[bytes]]]:
    """Return the files below a folder, and what reads them as `Place.read` says."""
    import mlflow

    if urlsplit(mlflow.get_tracking_uri()).scheme in ("http", "https"):
        raise InputRefused(
            f"{source}: its server keeps the artifacts in a folder of a machine ({root})",
            hint="if it is on this one, give the folder as the source; else let the server serve "
            "them (mlflow server --serve-artifacts)",
        )
    if not root.is_dir():
        raise InputRefused(f"{source}: {root} is not a folder", hint="check the path")
    scan(root)  # refuses links that leave the folder
    files = tuple(
        RemoteFile(
            path=path.relative_to(root).as_posix(),
            size=path.stat().st_size,
            version=str(path.stat().st_mtime_ns),
        )
        for path in below(root)
        if path.is_file()
    )

    def read(file: RemoteFile, start: int, _end: int) -> Iterator[bytes]:
        with (root / file.path).open("rb") as content:
            content.seek(start)
            while chunk := content.read(_CHUNK):
                yield chunk

    return files, read


def _on_server(location: str, source: str) -> tuple[RemoteFile, ...]:
    """List the artifacts below a location; the server is asked folder by folder."""
    from mlflow.artifacts import list_artifacts

    found: list[RemoteFile] = []
    folders = [""]
    while folders:
        folder = folders.pop()
        with _asked(source):
            rows = list_artifacts(artifact_uri=f"{location}/{folder}".rstrip("/"))
        for row in rows:
            # Its paths start from the parent of what was asked for, or from that itself.
            name = str(row.path).rstrip("/").rpartition("/")[2]
            path = f"{folder}/{name}".lstrip("/")
            if not name or path.count("/") > _DEEPEST or len(found) + len(folders) > _MOST_FILES:
                raise InputRefused(
                    f"{source} has too many files or folders, or one without a name",
                    hint="give the path of the folder with a single model",
                )
            if row.is_dir:
                folders.append(path)
            else:
                size = row.file_size if isinstance(row.file_size, int) else -1
                found.append(RemoteFile(path=path, size=size))
    if not found:
        raise InputRefused(f"{source} does not exist, or is empty", hint="check its path")
    return tuple(found)


def _taken(address: str, folder: Path, source: str) -> Path:
    """Let the client fetch an artifact into a folder."""
    from mlflow.artifacts import download_artifacts

    folder.mkdir()
    with _asked(source):
        return Path(download_artifacts(artifact_uri=address, dst_path=str(folder)))


@contextmanager
def _asked(source: str) -> Iterator[None]:
    """Turn the client's errors into ours, without its texts, which may hold signed addresses."""
    try:
        yield
    except WeightsmithError:
        raise
    except Exception as error:  # noqa: BLE001 - it passes on those of a dozen libraries
        if type(error).__name__ == "UnsupportedModelRegistryStoreURIException":
            raise UsageError(
                f"{source}: mlflow-skinny does not read {_server()}",
                hint="start `mlflow server` on it and name its address in MLFLOW_TRACKING_URI, or "
                "install the package mlflow, which reads databases",
            ) from None
        code = str(getattr(error, "error_code", ""))
        if code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND"):
            raise InputRefused(
                f"{source} does not exist in {_server()}", hint="check its name; " + _HINT
            ) from None
        if code in ("PERMISSION_DENIED", "UNAUTHENTICATED"):
            raise InputRefused(f"{source}: {_server()} denies access", hint=_HINT) from None
        raise EnvironmentFailure(
            f"{source}: {_server()} could not be asked: {type(error).__name__} {code}".rstrip(),
            hint=_HINT,
        ) from None


def _server() -> str:
    import mlflow  # which chooses a folder or a database here where no variable names one

    return str(
        without_passwords(os.environ.get("MLFLOW_TRACKING_URI") or mlflow.get_tracking_uri())
    )
