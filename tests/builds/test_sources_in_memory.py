"""Whole builds whose base and adapter lie elsewhere: planned from headers, pinned, fetched once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from weightsmith.building import wiring
from weightsmith.core.errors import InputRefused
from weightsmith.core.values import Digest, FileEntry, Tree
from weightsmith.oci.image import layers_by_role
from weightsmith.oci.modelpack import ModelDescription, model_pack
from weightsmith.oci.references import Reference

from tests.fakes.memory import Memory
from tests.fakes.sources import WebServer, list_of, web_server


@pytest.fixture
def web() -> Iterator[WebServer]:
    with web_server() as state:
        yield state


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def publish(memory: Memory, name: str, files: Mapping[str, bytes]) -> str:
    """Push an adapter as an artifact of files; return its source."""
    rows = tuple(
        FileEntry(path=path, size=len(data), digest=Digest.of(data)) for path, data in files.items()
    )
    held = {path: (data,) for path, data in files.items()}
    about = ModelDescription(name=name, version="1", format="safetensors")
    place = Reference.parse(f"{memory.registry.host}/adapters/{name}:1")
    tree = Tree(root=memory.home, files=rows)
    memory.client.push(model_pack(tree, about, {}, held), place, force=True)
    return f"oci://{place}"


@pytest.fixture
def away(memory: Memory, web: WebServer, monkeypatch: pytest.MonkeyPatch) -> Memory:
    """Base and adapter are not on this machine."""
    tools_of = Memory.tools.fget

    def tools(self: Memory) -> object:
        found = tools_of(self)
        scratch = self.folder / "glanced"
        readers = wiring.make_readers(found.store, self.client, lambda: scratch)
        return replace(found, readers=readers)

    monkeypatch.setattr(Memory, "tools", property(tools))
    base = files_in(memory.home / "base")
    web.files = {f"/base/{name}": data for name, data in base.items()}
    web.files["/base/SHA256SUMS"] = data = list_of(base)
    (name,) = memory.adapters
    adapter = publish(memory, name, files_in(memory.home / name))
    pin = hashlib.sha256(data).hexdigest()
    memory.write_recipe(
        base={"source": f"{web.url}/base/SHA256SUMS#sha256={pin}"},
        adapters=[{"source": adapter, "version": "v1"}],
    )
    return memory


def test_the_same_model_as_from_folders(
    away: Memory, web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = away.forecast("base.source=./base", f"adapters.0.source=./{away.adapters[0]}")
    planned = away.forecast()
    assert {**planned, "stages": []} == {**here, "stages": []} | {
        key: planned[key] for key in ("read_bytes",)
    }
    asked = [row for row in web.asked if "model.safetensors" in row and row.startswith("GET")]
    assert all("bytes=0-" in row for row in asked)
    assert not (away.home / "recipe.lock").exists()

    away.build()
    record = away.record()
    fetched = [row for row in web.asked if row.startswith("GET") and "model.safetensors" in row]
    assert len(fetched) == len(asked) + 1
    assert record["base"]["digest"] == str(
        Tree(
            root=away.home,
            files=tuple(
                FileEntry(path=path, size=len(data), digest=Digest.of(data))
                for path, data in files_in(away.home / "base").items()
            ),
        ).digest
    )
    locked = json.loads((away.home / "recipe.lock").read_text())["sources"]
    assert all(name in row["pin"] for name, row in locked.items())


def test_a_second_build_asks_nobody(away: Memory, web: WebServer) -> None:
    away.build()
    web.asked.clear()
    away.registry.log.clear()

    away.build()

    assert web.asked == []
    assert not [path for _, path in away.registry.log if "/adapters/" in path]


def test_what_the_lock_has_is_taken_and_a_new_tag_is_not(away: Memory) -> None:
    """The tag has moved: the lock's digest still names the first one."""
    away.build()
    first = away.record()["adapters"][0]["digest"]
    away.store.entries.clear()
    (name,) = away.adapters
    other = {**files_in(away.home / name), "README.md": b"# another"}
    publish(away, name, other)

    away.build()
    assert away.record()["adapters"][0]["digest"] == first

    lock = away.home / "recipe.lock"
    lock.unlink()
    away.build()
    assert away.record()["adapters"][0]["digest"] != first


def test_a_plan_without_the_server_says_so(away: Memory, web: WebServer) -> None:
    web.faults = [("SHA256SUMS", "reset")] * 9

    (row,) = (row for row in away.forecast()["stages"] if row["stage"] == "resolve")

    assert "not on this machine" in row["why"]
    assert "SHA256SUMS" in row["why"]


def test_a_plan_refuses_what_the_build_would(away: Memory, web: WebServer) -> None:
    config = json.loads(web.files["/base/config.json"])
    files = {name.removeprefix("/base/"): data for name, data in web.files.items()}
    files["config.json"] = json.dumps({**config, "auto_map": {"AutoModel": "x.X"}}).encode()
    del files["SHA256SUMS"]
    web.files = {f"/base/{name}": data for name, data in files.items()}
    web.files["/base/SHA256SUMS"] = data = list_of(files)
    pin = hashlib.sha256(data).hexdigest()

    for ask in (away.forecast, away.build):
        with pytest.raises(InputRefused, match="auto_map"):
            ask(f"base.source={web.url}/base/SHA256SUMS#sha256={pin}")
    assert not [
        r for r in web.asked if "GET" in r and "model.safetensors" in r and "bytes" not in r
    ]


def test_an_adapter_that_a_build_published(away: Memory) -> None:
    """`outputs.kinds: [adapter]` makes an artifact of files, which another recipe takes."""
    away.build("outputs.kinds=[image, adapter]", push=True)
    before = away.record()["adapters"][0]["digest"]
    (tag,) = [tag for _, tag in away.registry.manifests if tag.endswith("-adapter")]
    again = f"oci://{away.repository}:{tag}"

    away.build(f"adapters.0.source={again}")

    adapter = away.record()["adapters"][0]
    assert (adapter["source"], adapter["digest"]) == (again, before)


def test_a_base_from_an_image_that_a_build_published(away: Memory) -> None:
    """Of our own image only the layers with weights are read: its merged model is the next base."""
    image = {"repository": away.repository, "base": away.use_vllm("vllm")}
    away.write_recipe(targets=["vllm"], image=image)
    away.build(push=True)
    first = away.record("vllm")
    made = away.client.pull(Reference.parse(first["image"]["reference"]))
    engine = layers_by_role(made)["base"]
    away.write_recipe(base={"source": f"oci://{first['image']['reference']}"}, evaluate=None)
    away.registry.log.clear()

    away.build()

    files = {file["path"] for file in away.record()["base"]["files"]}
    assert {"config.json", "model.safetensors.index.json"} <= files
    asked = [path for _, path in away.registry.log if "/blobs/" in path]
    assert not [path for path in asked if any(layer.digest in path for layer in engine)]
