"""`push --to hf://…` against a hub that takes commits and large files."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from weightsmith.api.commands.upload import preview_push, push_to_hub
from weightsmith.core.errors import EnvironmentFailure, InputRefused, UsageError, WeightsmithError
from weightsmith.core.values import Digest, FileEntry, Tree, Uploaded
from weightsmith.oci.attachments import Attachment, AttachmentPart
from weightsmith.oci.layers import TITLE
from weightsmith.oci.layout import write_layout
from weightsmith.oci.modelpack import ModelDescription, model_pack
from weightsmith.oci.references import Reference
from weightsmith.provenance.bills import MEDIA_TYPE
from weightsmith.stages.upload import HubDestination, repository_of
from weightsmith.steps.tools import Tools

from tests.fakes.baking import Bakery, bake
from tests.fakes.hub import (
    READER,
    TOKEN,
    Repository,
    WritableHub,
    environment,
    writable_hub,
)  # fmt: skip
from tests.fakes.memory import memory_tools
from tests.fakes.tiny import write_model

DESTINATION = HubDestination(repository="team/bot")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[WritableHub]:
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between the client's tries
    with writable_hub(monkeypatch) as state:
        yield state


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    (tmp_path / "work").mkdir()
    return memory_tools(tmp_path / "work")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@dataclass
class Scene:
    hub: WritableHub
    tools: Tools
    model: Path

    def push(self, source: str | Path = "", **options: bool) -> Uploaded:
        to = HubDestination(repository="team/bot", **options)
        return push_to_hub(str(source or self.model), to, self.tools)

    @property
    def repository(self) -> Repository:
        return self.hub.repositories["team/bot"]


@pytest.fixture
def scene(hub: WritableHub, tools: Tools, model: Path) -> Scene:
    return Scene(hub, tools, model)


def front(text: bytes) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.decode().split("---")[1])
    return found


def test_a_checkpoint_is_one_commit_with_a_card(scene: Scene) -> None:
    (scene.model / "notes.py").write_text("print()")
    result = scene.push()

    repository = scene.repository
    assert result.digest == repository.commits[-1]
    assert result.reference == "hf://team/bot"
    assert repository.private
    names = {path.name for path in scene.model.iterdir()} - {"notes.py"}
    assert set(repository.files) == names | {".gitattributes", "README.md"}
    for name in names:
        assert repository.files[name] == (scene.model / name).read_bytes()
    sent = sum(len(data) for name, data in repository.files.items() if name != ".gitattributes")
    assert result.uploaded_bytes == sent
    card = repository.files["README.md"]
    assert front(card)["library_name"] == "transformers"
    assert b"vllm serve team/bot" in card


@pytest.mark.slow
def test_a_dry_run_shows_what_a_push_would_do_and_does_nothing(scene: Scene) -> None:
    shown, _ = preview_push(str(scene.model), DESTINATION, scene.tools)
    assert scene.hub.repositories == {}
    assert shown["dry_run"]
    assert not shown["exists"]

    done = scene.push()
    repository = scene.repository
    assert shown["card"] == repository.files["README.md"].decode()
    assert shown["uploaded_bytes"] == done.uploaded_bytes
    assert {row["path"]: row["size"] for row in shown["files"]} == {
        path: len(data) for path, data in repository.files.items() if path != ".gitattributes"
    }
    assert all(row["sent"] for row in shown["files"])

    repository.files["old.bin"] = b"old"
    (scene.model / "config.json").write_text((scene.model / "config.json").read_text() + " ")
    before = (dict(repository.files), list(repository.commits))
    with pytest.raises(UsageError, match="already holds other files"):
        preview_push(str(scene.model), DESTINATION, scene.tools)
    forced = replace(DESTINATION, force=True)
    shown, text = preview_push(str(scene.model), forced, scene.tools)
    assert (repository.files, repository.commits) == before
    assert [row["path"] for row in shown["files"] if row["sent"]] == ["config.json"]
    assert [*shown["deleted"]] == ["old.bin"]
    assert shown["uploaded_bytes"] == (scene.model / "config.json").stat().st_size
    assert "send    " in text
    assert "delete  old.bin" in text
    assert shown["card"].rstrip() in text
    assert scene.push(force=True).uploaded_bytes == shown["uploaded_bytes"]


def test_other_content_needs_force_and_is_replaced(scene: Scene) -> None:
    first = scene.push()
    again = scene.push()
    assert (again.digest, again.uploaded_bytes) == (first.digest, 0)
    scene.repository.files["old.txt"] = b"stays in the history only"
    with pytest.raises(UsageError, match=r"old\.txt") as caught:
        scene.push()
    assert "--force" in caught.value.hint

    result = scene.push(force=True)
    repository = scene.repository
    assert "old.txt" not in repository.files
    assert first.digest in repository.commits
    assert ".gitattributes" in repository.files
    assert result.digest != first.digest
    assert result.uploaded_bytes == 0


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_that_exists_keeps_its_visibility(scene: Scene, private: bool) -> None:
    scene.hub.repositories["team/bot"] = Repository(private=private)
    scene.hub.repositories["team/bot"].add("initial commit")
    scene.push(public=private)

    assert scene.repository.private is private
    assert not [line for line in scene.hub.requests if "settings" in line]


def test_a_gguf_file_has_the_lines_of_its_runners(scene: Scene, tmp_path: Path) -> None:
    file = tmp_path / "bot-q8_0.gguf"
    file.write_bytes(b"GGUF" + bytes(5000))
    scene.push(file, public=True)

    repository = scene.repository
    assert set(repository.files) == {".gitattributes", "README.md", "bot-q8_0.gguf"}
    assert scene.hub.received == [hashlib.sha256(file.read_bytes()).hexdigest()]
    assert not repository.private
    text = repository.files["README.md"].decode()
    assert "llama-server --hf-repo team/bot --hf-file bot-q8_0.gguf" in text
    assert "ollama run hf.co/team/bot" in text
    assert "gguf" in front(text.encode())["tags"]


def test_a_gguf_file_in_parts_is_published_with_all_of_them(scene: Scene, tmp_path: Path) -> None:
    names = [f"bot-0000{n}-of-00002.gguf" for n in (1, 2)]
    for name in names:
        (tmp_path / name).write_bytes(b"GGUF" + name.encode() * 500)
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    scene.push(tmp_path / names[1])

    files = scene.repository.files
    assert set(files) == {".gitattributes", "README.md", *names}
    assert f"--hf-file {names[0]}" in files["README.md"].decode()


def _with_link(model: Path) -> None:
    outside = model.parent / "secret.json"
    outside.write_text("{}")
    (model / "tokenizer.json").unlink(missing_ok=True)
    (model / "tokenizer.json").symlink_to(outside)


def _with_code(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.Y"}}))


def _gguf_with_code(model: Path) -> None:
    (model / "model.safetensors").rename(model / "bot.gguf")
    _with_code(model)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda model: (model / "pytorch_model.bin").write_bytes(b"\x80"), "pytorch_model"),
        (_with_link, "link"),
        (_with_code, "auto_map"),
        (_gguf_with_code, "auto_map"),
        (lambda model: (model / "model.safetensors").unlink(), "no weights"),
        (lambda model: (model / "config.json").unlink(), r"config\.json"),
    ],
)
def test_what_must_not_be_published_is_refused_before_anything_is_made(
    scene: Scene, damage: Any, message: str
) -> None:
    damage(scene.model)
    with pytest.raises(InputRefused, match=message) as caught:
        scene.push()

    assert caught.value.hint
    assert scene.hub.repositories == {}


@pytest.mark.parametrize(
    ("part", "status", "kind", "hint"),
    [
        ("GET /api/models", 401, EnvironmentFailure, "HF_TOKEN"),
        ("POST /api/repos/create", 403, EnvironmentFailure, "write access"),
        ("/commit/main", 403, EnvironmentFailure, "write access"),
        ("/commit/main", 412, EnvironmentFailure, "push again"),
        ("POST /api/repos/create", 404, InputRefused, "owner"),
        ("PUT /lfs", 403, EnvironmentFailure, "write access"),
        ("/commit/main", 500, EnvironmentFailure, "later"),
        ("validate-yaml", 400, InputRefused, "card"),
    ],
)
def test_what_a_hub_refuses_is_said_without_the_token(
    scene: Scene, part: str, status: int, kind: type[WeightsmithError], hint: str
) -> None:
    scene.hub.fail[part] = status
    with pytest.raises(kind) as caught:
        scene.push()

    assert hint in caught.value.hint
    assert "team/bot" in caught.value.message
    said = caught.value.message + caught.value.hint
    assert TOKEN not in said
    assert "s3cret" not in said
    assert caught.value.__suppress_context__
    assert all(len(repository.files) == 1 for repository in scene.hub.repositories.values())


@pytest.mark.parametrize("kind", ["volume", "modelpack", "modelpack-tar"])
def test_a_checkpoint_in_a_layout_is_what_it_was(scene: Scene, tmp_path: Path, kind: str) -> None:
    layout = tmp_path / "layout"
    uncut = {"kind": kind, "target": "vllm", "layout": layout, "max_layer_size": "none"}
    bake(scene.tools.registry, scene.model, "", **uncut)
    scene.push(f"oci:{layout}")

    repository = scene.repository
    names = {path.name for path in scene.model.iterdir()}
    assert set(repository.files) == names | {".gitattributes", "README.md"}
    for name in names:
        assert repository.files[name] == (scene.model / name).read_bytes()
    assert b"vllm serve team/bot" in repository.files["README.md"]


def licensed(bakery: Bakery, name: str, kind: str, license_: str) -> None:
    """Attach a bill of materials of something with a licence to an image."""
    place, image = Reference.parse(f"{bakery.fake.host}/{name}"), bakery.image(name)
    bill = {"metadata": {"component": {"type": kind, "licenses": [{"license": {"id": license_}}]}}}
    title = {TITLE: "engine.cdx.json"}
    part = AttachmentPart.of_bytes(json.dumps(bill).encode(), MEDIA_TYPE, **title)
    subject = image.manifest_blob
    made = Attachment(artifact_type=MEDIA_TYPE, subject=subject, parts=(part,))
    bakery.client.attach(place, made)


@pytest.mark.parametrize("own", ["", "apache-2.0"])
@pytest.mark.parametrize("kind", ["application", "machine-learning-model"])
def test_only_the_bill_of_the_model_states_its_licence(
    scene: Scene, bakery: Bakery, own: str, kind: str
) -> None:
    licensed(bakery, "base/engine:1", kind, "MIT")
    if own:
        (bakery.model / "README.md").write_text(f"---\nlicense: {own}\n---\n")
    bakery.bake("team/app:1")
    licensed(bakery, "team/app:1", kind, "MIT")
    place = replace(scene.tools, registry=bakery.client)
    push_to_hub(f"{bakery.fake.host}/team/app:1", DESTINATION, place)
    assert front(scene.repository.files["README.md"]).get("license", "") == own


def write_pack(folder: Path, *paths: str) -> str:
    """Write a ModelPack whose files are all the same but have these paths."""
    data = b"GGUF"
    (folder / "x.gguf").write_bytes(data)
    files = (FileEntry(path="x.gguf", size=4, digest=Digest.of(data)),)
    facts = ModelDescription(name="x", version="1", format="gguf")
    pack = model_pack(Tree(root=folder, files=files), facts, {})
    pack = replace(pack, layers=pack.layers * len(paths))
    manifest = json.loads(pack.manifest_bytes)
    for row, path in zip(manifest["layers"], paths, strict=True):
        row["annotations"] = {"org.cncf.model.filepath": path}
    raw = (json.dumps(manifest).encode(), pack.config_bytes, pack.media_type)
    write_layout(replace(pack, raw=raw), folder / "layout")
    return f"oci:{folder / 'layout'}"


@pytest.mark.parametrize(
    ("paths", "why"),
    [
        *(
            ((path,), "leaves the model's folder")
            for path in ("../evil.gguf", "/evil.gguf", "a/../../evil.gguf", "")
        ),
        *(
            (paths, "too long or another file's")
            for paths in (("a", "a"), ("a", "a/b.gguf"), ("a/b.gguf", "a"), (f"{'a' * 300}.gguf",))
        ),
    ],
)
def test_a_pack_whose_files_cannot_be_in_the_folder(
    scene: Scene, tmp_path: Path, paths: tuple[str, ...], why: str
) -> None:
    with pytest.raises(InputRefused, match=why):
        scene.push(write_pack(tmp_path, *paths))
    assert not list(tmp_path.rglob("evil*"))
    assert scene.hub.repositories == {}


def test_a_token_that_may_only_read(
    tools: Tools, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with writable_hub(monkeypatch, READER) as hub:
        with pytest.raises(EnvironmentFailure, match="may not do that"):
            push_to_hub(str(model), DESTINATION, tools)
        assert hub.repositories == {}


def test_a_commit_that_lacks_a_file_is_noticed(scene: Scene) -> None:
    scene.hub.drop = "config.json"
    with pytest.raises(EnvironmentFailure, match=r"lacks config\.json"):
        scene.push()


def test_a_hub_that_is_down(tools: Tools, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with writable_hub(monkeypatch):
        pass
    with pytest.raises(EnvironmentFailure, match="could not be reached") as caught:
        push_to_hub(str(model), DESTINATION, tools)
    assert "HF_ENDPOINT" in caught.value.hint


def test_the_public_hub_is_not_asked_without_a_token(
    tools: Tools, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    for name in ("HF_ENDPOINT", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with pytest.raises(EnvironmentFailure, match="token") as caught:
        push_to_hub(str(model), DESTINATION, tools)
    assert "hf auth login" in caught.value.hint


@pytest.mark.parametrize(
    "text",
    ["hf://bot", "hf://team/bot/file", "hf://", "hf://a/../b", "hf://a b/c", "hf://a/b@main"],
)
def test_a_place_that_is_no_repository(text: str) -> None:
    with pytest.raises(UsageError, match="not a repository"):
        repository_of(text)


@pytest.mark.slow
def test_the_command_prints_one_object_and_no_token(
    hub: WritableHub, model: Path, tmp_path: Path
) -> None:
    words = [sys.executable, "-m", "weightsmith", "push", str(model), "--to", "hf://team/bot"]
    mine = {"WEIGHTSMITH_HOME": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf")}

    def run(*more: str, status: int = 0) -> dict[str, Any]:
        done = subprocess.run(
            [*words, "--json", *more], capture_output=True, text=True, check=False,
            env={**os.environ, **environment(hub), **mine},
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        assert TOKEN not in done.stdout + done.stderr
        return json.loads(done.stdout)

    result = run()
    assert result["digest"] == hub.repositories["team/bot"].commits[-1]
    assert {"reference", "digest", "uploaded_bytes"} <= result.keys()
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    assert "--force" in run(status=2)["error"]["hint"]
    hub.fail["GET /api/models"] = 401
    assert "HF_TOKEN" in run(status=5)["error"]["hint"]
