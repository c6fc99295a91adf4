"""What a source may be, what pins it, and that no secret is in it."""

import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from weightsmith.core.errors import UsageError
from weightsmith.core.values import Digest, FileEntry, Snapshot, Sources, Tree
from weightsmith.outside.mlflow import MlflowRemote
from weightsmith.outside.object_stores import S3, Gcs, ObjectRemote
from weightsmith.outside.remote import RemoteReader
from weightsmith.outside.store import FileStore
from weightsmith.recipe.file import read_recipe
from weightsmith.recipe.schema import Adapter, Base
from weightsmith.recipe.sources import (
    has_own_pin,
    is_remote,
    pin_fields,
    scheme_of,
    without_pin,
)
from weightsmith.steps.lock import Lock, pinned, read_lock, with_sources, write_lock

from tests.fakes.journal import RecordingProgress

HEX = "0123456789abcdef" * 4
LIST = f"sha256:{HEX}"


@pytest.mark.parametrize(
    "source",
    [
        "./folder",
        "/a/folder",
        "hf://acme/model@main",
        "pypi://x==1",
        "oci://registry.example.com:5000/team/bot:1",
        f"oci://registry.example.com/team/bot@{LIST}",
        "s3://bucket",
        "s3://bucket/a/b c/model@2",
        "gs://bucket_1/model.tar.gz",
        f"https://example.com/a/SHA256SUMS#sha256={HEX}",
        f"https://example.com:8443/model.tgz#sha256={HEX}",
        f"https://example.com/model.gguf#sha256={HEX}",
        f"http://127.0.0.1:8000/model.tar#sha256={HEX}",
        "modelscope://team/bot",
        "modelscope://team/bot@v1.0",
        "mlflow:runs:/0123abcd",
        "mlflow:runs:/0123abcd/model/peft",
        "mlflow:models:/support-bot/3",
        "mlflow:models:/support bot@champion/model",
        "mlflow:models:/m-0123abcd/model",
    ],
)
def test_a_source_is_taken(source: str) -> None:
    assert Base(source=source).source == source
    assert Adapter(source=source).source == source
    assert is_remote(source) == (not source.startswith((".", "/")))


@pytest.mark.parametrize(
    "source",
    [
        "oci://registry.example.com/TEAM/bot",
        "oci://",
        "s3://b",
        "s3://bucket/a/../b",
        "s3://bucket/model?versionId=1",
        "gs://-bucket/model",
        f"https://example.com/folder/#sha256={HEX}",
        f"https://example.com/model.bin#sha256={HEX}",
        f"https:///model.tar#sha256={HEX}",
        f"http://example.com/model.tar#sha256={HEX}",
        "https://example.com/model.tar#sha256=0",
        "https://example.com/model.tar#md5=0",
        f"https://example.com/a/../model.tar#sha256={HEX}",
        f"https://[::1/model.tar#sha256={HEX}",
        "https://example.com/model.tar",
        "modelscope://bot",
        "modelscope://team/bot/more",
        "mlflow:runs:/",
        "mlflow:models:/bot",
        "mlflow:models:/bot/latest",
        "mlflow:models:/bot/Production",
        "mlflow:runs:/0123abcd/../x",
        "mlflow:x",
        "hf:/acme/model",
        "S3:/bucket/model",
        "HTTPS://example.com/model.tar",
        "s3://bucket/a\x00b",
        "s3://bucket/a\\b",
    ],
)
def test_a_source_that_is_none(source: str) -> None:
    with pytest.raises(ValidationError):
        Base(source=source)


@pytest.mark.parametrize(
    "source",
    [
        f"https://ann:s3cret@example.com/model.tar#sha256={HEX}",
        f"https://s3cret@example.com/model.tar#sha256={HEX}",
        f"https://example.com/model.tar?X-Amz-Signature=s3cret#sha256={HEX}",
        f"https://example.com/model.tar?token=s3cret#sha256={HEX}",
        "s3://AKIA:s3cret@bucket/model",
        "gs://bucket/model?sig=s3cret",
        "oci://ann:s3cret@registry.example.com/team/bot",
        f"HTTPS://ann:s3cret@example.com/model.tar#sha256={HEX}",
        "hf://ann:s3cret@hub.example.com/acme/bot",
        "hf://ann:s3cret/more@acme/bot@main",
        "HF://ann:s3cret@acme/bot",
        "pypi://ann:s3cret@index.example.com/simple/bot==1",
        "ftp://ann:s3cret@example.com/bot",
        "mlflow://ann:s3cret@example.com/bot",
        "mlflow:models:/ann:s3cret@example/bot",
        "modelscope://ann:s3cret@acme/bot",
    ],
)
def test_no_secret_in_a_source(source: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: bot\nbase: {{source: '{source}'}}\ntargets: [vllm]\n")

    with pytest.raises(UsageError) as caught:
        read_recipe(recipe)

    assert "base.source" in caught.value.message
    assert "s3cret" not in caught.value.message + caught.value.hint


def test_a_missing_slash_is_named(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: bot\nbase: {source: hf:/acme/bot}\ntargets: [vllm]\n")

    with pytest.raises(UsageError, match="hf:// needs two slashes"):
        read_recipe(recipe)


@pytest.mark.parametrize(
    ("source", "values"),
    [
        ("s3://bucket/x", {"revision": "main"}),
        ("s3://bucket/x", {"sha256": HEX}),
        ("oci://example.com/a/b", {"revision": HEX}),
        ("mlflow:models:/bot/3", {"revision": "4"}),
        ("mlflow:models:/bot@champion", {"revision": LIST}),
        (f"https://example.com/x.tar#sha256={HEX}", {"sha256": "0" * 64}),
        (f"https://example.com/x.tar#sha256={HEX}", {"revision": LIST}),
        ("modelscope://a/b", {"revision": "a b"}),
    ],
)
def test_a_pin_that_such_a_source_cannot_have(source: str, values: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        Base(source=source, **values)


@pytest.mark.parametrize(
    ("source", "given"),
    [
        ("hf://acme/model", f"@{HEX[:40]}"),
        ("pypi://x==1", f"#sha256={HEX}"),
        ("oci://example.com/a/b:1", f"@{LIST}"),
        ("s3://bucket/model@2", f"@{LIST}"),
        ("modelscope://a/b@v1", f"@{LIST}"),
        ("mlflow:models:/bot@champion/model", "@3"),
    ],
)
def test_the_lock_gives_the_pin_back(tmp_path: Path, source: str, given: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"name: bot\nbase: {{source: '{source}'}}\ntargets: [vllm]\n")
    file = read_recipe(path)
    tree = Tree(root=tmp_path, files=(FileEntry(path="x", size=1, digest=Digest.of(b"x")),))
    found = Sources(
        base=Snapshot(tree=tree, source=source, pin=source + given, pinned=False), adapters=()
    )
    progress = RecordingProgress()
    assert not has_own_pin(source, "")
    write_lock(
        Lock(path=path.with_suffix(".lock")),
        with_sources(read_lock(file), file, found, progress=progress),
        progress,
    )

    base = pinned(file, read_lock(file)).recipe.base

    assert (base.revision or f"#sha256={base.sha256}") == given.removeprefix("@")
    assert pin_fields(source, source) == {}


def test_a_lock_whose_pin_is_none(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: bot\nbase: {source: 's3://bucket/x'}\ntargets: [vllm]\n")
    row = f'{{"pin": "s3://bucket/x@evil", "digest": "{LIST}"}}'
    path.with_suffix(".lock").write_text(
        f'{{"bases": {{}}, "sources": {{"s3://bucket/x": {row}}}}}'
    )
    file = read_recipe(path)

    with pytest.raises(UsageError, match="the pin 'evil'"):
        pinned(file, read_lock(file))


def test_names_without_pins() -> None:
    assert (
        without_pin(f"oci://example.com:5000/team/bot:1@{LIST}")
        == "oci://example.com:5000/team/bot"
    )
    assert without_pin(f"https://example.com/bot.tar#sha256={HEX}") == "https://example.com/bot.tar"
    assert without_pin("hf://acme/bot@main") == "hf://acme/bot"
    assert scheme_of("mlflow:runs:/x") == "mlflow"


@pytest.mark.parametrize(
    ("remote", "source", "extra"),
    [
        (ObjectRemote(S3()), "s3://bucket/x", "s3"),
        (ObjectRemote(Gcs()), "gs://bucket/x", "gs"),
        (MlflowRemote(), "mlflow:runs:/x", "mlflow"),
    ],
)
def test_a_missing_package_is_named_before_any_work(
    remote: object, source: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightsmith.outside.remote.find_spec", lambda _: None)
    reader = RemoteReader(FileStore(tmp_path), remote)

    with pytest.raises(UsageError, match="is not installed") as caught:
        reader.check(source)
    assert f"weightsmith[{extra}]" in caught.value.hint


def test_no_client_is_loaded_before_it_is_needed() -> None:
    """Readers are made for every command, and each client takes a second to load."""
    import subprocess

    code = (
        "import sys, weightsmith.building.wiring\n"
        "print(*{name.partition('.')[0] for name in sys.modules} "
        "& {'mlflow', 's3fs', 'gcsfs', 'aiobotocore', 'botocore', 'huggingface_hub', 'google'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
