"""A Python package index in this process, which may send other files than it lists."""

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tests.fakes.serving import Replying, Serving, serving

_JSON = "application/vnd.pypi.simple.v1+json"


def wheel_of(files: Mapping[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


class PackageIndex:
    """State that tests set: the simple API in JSON (PEP 691)."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        """Wheels by file name, of which the part before the first dash is the project."""
        self.rows: list[object] | None = None
        """What is answered instead of the list of files."""
        self.url = ""

    def listed(self, project: str) -> list[object]:
        if self.rows is not None:
            return self.rows
        return [
            {
                "filename": name,
                "url": f"/files/{name}",
                "hashes": {"sha256": hashlib.sha256(data).hexdigest()},
                "size": len(data),
            }
            for name, data in self.files.items()
            if name.partition("-")[0].replace("_", "-") == project
        ]


class _Handler(Replying):
    state: PackageIndex

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.strip("/").split("/")
        if parts[0] == "files":
            self.reply(200, self.state.files[parts[1]], {"Content-Type": "application/zip"})
            return
        rows = self.state.listed(parts[1])
        meta = {"meta": {"api-version": "1.0"}, "name": parts[1], "files": rows}
        self.reply(200, json.dumps(meta).encode(), {"Content-Type": _JSON})


@contextmanager
def package_index() -> Iterator[PackageIndex]:
    state = PackageIndex()
    with serving(Serving(_Handler, state=state)) as url:
        state.url = f"{url}/simple"
        yield state
