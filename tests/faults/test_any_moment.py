"""SIGTERM and kill -9 at random moments of push, load, publish and pull: nothing half-visible."""

import random
import shutil
import signal
import uuid
from pathlib import Path

import pytest
from weightsmith.core.values import Digest
from weightsmith.oci.image import Image, ImageConfig
from weightsmith.oci.layout import held_digest, read_layout, write_layout
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry
from weightsmith.outside.docker import DockerEngine
from weightsmith.outside.ownership import is_dead
from weightsmith.steps.outputs import check_layout as before_work

from tests.fakes.images import tiny_image
from tests.fakes.registry import FakeRegistry, fake_registry
from tests.faults.moments import Moments
from tests.faults.workshop import check_layout

SEED = 20261127
SIGNALS = (signal.SIGTERM, signal.SIGKILL)


def chosen(whole: int, count: int) -> list[int]:
    return sorted(random.Random(SEED).sample(range(1, whole), count))


def ended(code: int, number: int) -> bool:
    """Say whether a signal ended an operation; one that takes fewer pieces this time goes on."""
    assert code in (0, 130 if number == signal.SIGTERM else -number), code
    return code != 0


def images(folder: Path) -> tuple[Image, Image]:
    first = tiny_image(folder / "model")
    return first, tiny_image(folder / "model", config=ImageConfig(labels={"score": "1"}))


@pytest.mark.slow
@pytest.mark.parametrize(("swap", "count"), [(True, 4), (False, 4)])
def test_a_layout_that_is_published(
    moments: Moments, tmp_path: Path, swap: bool, count: int
) -> None:
    """There is a whole layout at every moment; without `renameat2`, from the next run's start."""
    old, new = images(tmp_path)
    write_layout(old, tmp_path / "old")
    write_layout(new, tmp_path / "new")
    results = tmp_path / "results"
    words = {"source": str(tmp_path / "new"), "layout": str(results / "image"), "swap": swap}

    def prepare() -> None:
        shutil.rmtree(results, ignore_errors=True)
        results.mkdir()
        shutil.copytree(tmp_path / "old", results / "image")

    prepare()
    for moment in chosen(moments.count("publish", **words), count):
        for number in SIGNALS:
            prepare()
            assert ended(moments.end_at(moment, number, "publish", **words), number)
            if not swap:
                before_work(results / "image")
            assert held_digest(results / "image") in (old.digest, new.digest)
            check_layout(results / "image")
            moments.count("publish", **words)
            assert held_digest(results / "image") == new.digest
            check_layout(results / "image")
            check_nothing_is_left(results, "image")


@pytest.mark.slow
def test_an_image_that_is_pulled(moments: Moments, tmp_path: Path) -> None:
    """What has a name is whole, and the next pull leaves nothing else in layout or cache."""
    image, _ = images(tmp_path)
    with fake_registry() as fake, Registry() as client:
        place = Reference.parse(f"{fake.host}/app:1")
        client.push(image, place)
        layout, cache = tmp_path / "out" / "layout", tmp_path / "cache"
        words = {"source": str(place), "layout": str(layout), "root": str(cache)}
        hit = 0
        for moment in chosen(moments.count("pull", **words), 4):
            for number in SIGNALS:
                shutil.rmtree(layout)
                hit += ended(moments.end_at(moment, number, "pull", **words), number)
                if (layout / "index.json").exists():
                    assert read_layout(layout).digest == image.digest
                    check_layout(layout)
                moments.count("pull", **words)
                check_layout(layout)
                check_nothing_is_left(layout, "blobs", "index.json", "oci-layout")
                assert len(list((layout / "blobs" / "sha256").iterdir())) == 2 + len(image.layers)
                assert not list((cache / "jobs").iterdir())
        assert hit


@pytest.mark.slow
def test_an_image_that_is_pushed(moments: Moments, tmp_path: Path) -> None:
    """A tag is there with all its blobs or it is not, and the next push makes it whole."""
    image, _ = images(tmp_path)
    write_layout(image, tmp_path / "layout")
    with fake_registry() as fake:
        words = {"layout": str(tmp_path / "layout"), "to": f"{fake.host}/app:1"}
        hit = 0
        for moment in chosen(moments.count("push", **words), 5):
            for number in SIGNALS:
                fake.manifests.clear()
                fake.blobs.clear()
                hit += ended(moments.end_at(moment, number, "push", **words), number)
                assert pushed(fake) in (None, image.digest)
                moments.count("push", **words)
                assert pushed(fake) == image.digest
        assert hit


def pushed(fake: FakeRegistry) -> Digest | None:
    """Return what a registry's tag names, read with all its layers; None where it names nothing."""
    place = Reference.parse(f"{fake.host}/app:1")
    with Registry() as client:
        found = client.digest_of(place)
        if found is not None:
            for layer in client.pull(place, platform="linux/amd64").layers:
                b"".join(layer.open())
    return found


@pytest.mark.docker
def test_an_image_that_is_loaded(moments: Moments, tmp_path: Path) -> None:
    """The engine has the image by its name or has not, and keeps no name of a dead load's."""
    image, _ = images(tmp_path)
    write_layout(image, tmp_path / "layout")
    engine = DockerEngine()
    name = f"weightsmith-test/{uuid.uuid4().hex[:12]}:1"
    words = {"source": str(tmp_path / "layout"), "name": name}
    try:
        hit = 0
        for moment in chosen(moments.count("load", **words), 5):
            for number in SIGNALS:
                engine.untag(name)
                hit += ended(moments.end_at(moment, number, "load", **words), number)
                assert engine.inspect(name).get("Id") in (None, image.config_blob.digest)
                moments.count("load", **words)
                assert engine.inspect(name)["Id"] == image.config_blob.digest
        assert hit
        held = [tag for row in engine.client.api.images("weightsmith-candidate")  # type: ignore[no-untyped-call]
                for tag in row["RepoTags"] or ()]  # fmt: skip
        assert not [tag for tag in held if is_dead(tag.rpartition(":")[2].partition("-")[2])]
    finally:
        engine.untag(name)


def check_nothing_is_left(folder: Path, *names: str) -> None:
    """Check that a folder has nothing but what was made, and no writer's unfinished files below."""
    assert {path.name for path in folder.iterdir()} == set(names)
    assert not list(folder.rglob(".*"))
