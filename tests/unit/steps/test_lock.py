"""What was reached once is what later builds take, until somebody says otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.values import AdapterSnapshot, Digest, FileEntry, Snapshot, Sources, Tree
from weightsmith.oci.image import ImageConfig, assemble
from weightsmith.oci.layout import write_layout
from weightsmith.recipe.file import RecipeFile, read_recipe
from weightsmith.steps.lock import Lock, pinned, read_lock, with_sources, write_lock

from tests.fakes.journal import RecordingProgress

COMMIT = "c" * 40


@pytest.fixture
def file(tmp_path: Path) -> RecipeFile:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: x\nbase: {source: hf://a/b}\nadapters: [{source: ./adapter}]\n")
    return read_recipe(path)


def based_on(file: RecipeFile, **changes: str) -> RecipeFile:
    base = file.recipe.base.changed(**changes)
    return replace(file, recipe=file.recipe.changed(base=base))


def snapshot(source: str, pin: str, content: bytes = b"1") -> Snapshot:
    entry = FileEntry(path="f", size=1, digest=Digest.of(content))
    return Snapshot(tree=Tree(root=Path(), files=(entry,)), source=source, pin=pin, pinned=False)


def sources(content: bytes = b"1") -> Sources:
    base = snapshot("hf://a/b", f"hf://a/b@{COMMIT}")
    adapter = AdapterSnapshot(snapshot=snapshot("/abs/adapter", str(Digest.of(content)), content))
    return Sources(base=base, adapters=(adapter,))


def locked(
    file: RecipeFile,
    found: Sources,
    *,
    only: bool = False,
    update: bool = False,
    told: RecordingProgress | None = None,
) -> Lock:
    before, progress = read_lock(file), told or RecordingProgress()
    after = with_sources(before, file, found, locked=only, update=update, progress=progress)
    write_lock(before, after, progress)
    return read_lock(file)


def test_a_revision_found_once_is_the_one_taken(file: RecipeFile) -> None:
    assert pinned(file, read_lock(file)).recipe.base.revision == ""
    lock = locked(file, sources())
    assert pinned(file, lock).recipe.base.revision == COMMIT
    assert lock.path is not None
    assert "/abs" not in lock.path.read_text()
    assert pinned(based_on(file, revision="mine"), lock).recipe.base.revision == "mine"


def test_the_file_is_byte_stable(file: RecipeFile) -> None:
    path = locked(file, sources()).path
    assert path is not None
    before = path.stat()
    locked(file, sources())
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_a_change_is_reported_or_refused(file: RecipeFile) -> None:
    with pytest.raises(InputRefused, match="hf://a/b"):
        locked(file, sources(), only=True)
    locked(file, sources())
    locked(file, sources(), only=True)
    with pytest.raises(InputRefused, match="adapter"):
        locked(file, sources(b"2"), only=True)
    told = RecordingProgress()
    locked(file, sources(b"2"), told=told)
    assert "changed since" in told.said[0]


@pytest.mark.parametrize(
    ("source", "was", "now"),
    [
        ("hf://a/b", f"hf://a/b@{COMMIT}", f"hf://a/b@{COMMIT}"),
        ("pypi://a==1", f"pypi://a==1#sha256={'0' * 64}", f"pypi://a==1#sha256={'1' * 64}"),
    ],
)
def test_other_content_of_what_is_pinned_is_refused(
    file: RecipeFile, source: str, was: str, now: str
) -> None:
    adapter = file.recipe.adapters[0].model_copy(update={"source": source})
    file = replace(file, recipe=file.recipe.model_copy(update={"adapters": (adapter,)}))

    def found(pin: str, content: bytes) -> Sources:
        made = AdapterSnapshot(snapshot=snapshot(source, pin, content))
        return Sources(base=snapshot("hf://a/b", f"hf://a/b@{COMMIT}", content), adapters=(made,))

    before = locked(file, found(was, b"1"))
    with pytest.raises(InputRefused, match=r"recipe\.lock") as caught:
        locked(file, found(now, b"2"))
    assert "--update-lock" in caught.value.hint
    assert read_lock(file) == before
    told = RecordingProgress()
    assert locked(file, found(now, b"2"), update=True, told=told) != before
    assert all("by --update-lock" in text for text in told.said)
    assert told.said


def test_a_build_that_takes_no_other_source_names_one_that_does(file: RecipeFile) -> None:
    """`build --from` cannot update the lock that it writes; a build by its recipe can."""
    locked(file, sources())
    base = snapshot("hf://a/b", f"hf://a/b@{COMMIT}", b"read otherwise")
    found = replace(sources(), base=base)
    for only in (True, False):
        with pytest.raises(InputRefused, match="hf://a/b") as caught:
            locked(file, found, only=only)
        assert f"`build --recipe {file.path} --update-lock`" in caught.value.hint
    locked(file, found, update=True)
    locked(file, found, only=True)


def test_a_pin_that_the_recipe_changed_is_taken(file: RecipeFile) -> None:
    locked(file, sources())
    file = based_on(file, revision="d" * 40)
    told = RecordingProgress()
    new = replace(sources(), base=snapshot("hf://a/b", "hf://a/b@" + "d" * 40, b"2"))
    assert locked(file, new, told=told).sources["hf://a/b"]["pin"].endswith("d")
    assert "changed since" in told.said[0]


def test_what_was_converted_is_known_by_what_came(file: RecipeFile) -> None:
    came = snapshot("hf://a/b", f"hf://a/b@{COMMIT}", b"gguf")
    for converted in (b"one", b"by another converter"):
        base = replace(snapshot("hf://a/b", came.pin, converted), made_from=(came.digest,))
        found = replace(sources(), base=base)
        assert locked(file, found).sources["hf://a/b"]["digest"] == came.digest
    row = {"pin": came.pin, "digest": str(base.digest)}
    lock = replace(read_lock(file), sources={"hf://a/b": row})
    after = with_sources(lock, file, found, progress=RecordingProgress())
    assert after.sources["hf://a/b"] == row


def test_a_wheel_found_once_is_the_one_taken(file: RecipeFile) -> None:
    file = based_on(file, source="pypi://a==1")
    found = replace(sources(), base=snapshot("pypi://a==1", f"pypi://a==1#sha256={'0' * 64}"))
    assert pinned(file, locked(file, found)).recipe.base.sha256 == "0" * 64


def test_a_base_is_pinned_when_it_is_reached(file: RecipeFile) -> None:
    image = assemble((), (), config=ImageConfig(), platform="linux/amd64", epoch=0)
    lock = read_lock(file)
    name = "r.example/engine:1"
    write_lock(lock, lock.with_base(name, image), RecordingProgress())
    lock = read_lock(file)
    assert lock.bases == {name: {"linux/amd64": image.digest}}
    write_layout(image, file.folder / "engine")
    own = (f"{name}@{image.digest}", "engine:llamacpp", "oci:engine", str(file.folder / "engine"))
    assert [lock.with_base(one, image) for one in own] == [lock] * 4


def test_no_file_no_lock(file: RecipeFile) -> None:
    found = locked(replace(file, path=None), sources())
    assert found == Lock(path=None)
    assert read_recipe(file.folder / "recipe.yaml", ["base.source=./x"]).path is None


def test_a_damaged_lock_is_named(file: RecipeFile) -> None:
    (file.folder / "recipe.lock").write_text('{"bases": {"a": {"linux/amd64": "sha256:1"}}}')
    with pytest.raises(UsageError, match=r"recipe\.lock"):
        read_lock(file)


def test_a_pin_that_no_recipe_could_have_is_refused(file: RecipeFile) -> None:
    file = based_on(file, source="pypi://a==1")
    damaged = {"pypi://a==1": {"pin": "pypi://a==1#sha256=zz", "digest": str(Digest.of(b"a"))}}

    with pytest.raises(UsageError, match="the pin 'zz'") as refused:
        pinned(file, Lock(path=file.path, sources=damaged))

    assert "pin again" in refused.value.hint
