"""What users do with an image, in every registry: bake, sign, verify, copy, rebase, break off."""

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from weightsmith.api.commands.affected import find_affected, withdraw_all
from weightsmith.api.commands.images import copy_image
from weightsmith.api.commands.rebase import rebase_image
from weightsmith.api.commands.requests import RebaseCommand
from weightsmith.api.commands.verify import verify_image
from weightsmith.core.errors import CheckFailed, UsageError, WeightsmithError
from weightsmith.core.ports import Silent
from weightsmith.oci.attachments import fallback_tag
from weightsmith.oci.image import Image, Index
from weightsmith.oci.layers import Member, TarLayer
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry, RegistryLocation
from weightsmith.outside.signer import open_signer
from weightsmith.provenance import signing
from weightsmith.provenance.origins import wanted

from tests.fakes.baking import bake, make_key, make_model, push_base
from tests.fakes.faulty_proxy import Faults, faulty_proxy
from tests.fakes.images import tiny_image
from tests.fakes.memory import memory_tools
from tests.fakes.real_registries import Given
from tests.fakes.registry import fake_registry

AMD64 = "linux/amd64"
REPAIRABLE = ("reset", "cut", "429", "500", "503", "delay")
ENGINE = {"dev.weightsmith.engine": "llamacpp", "org.opencontainers.image.version": "1.0.0"}


@dataclass
class Scene:
    there: Given
    client: Registry
    folder: Path
    key: Path
    public: Path

    def name(self, rest: str) -> str:
        return f"{self.there.place}/{rest}"

    def image(self, rest: str) -> Image:
        return self.client.pull(Reference.parse(self.name(rest)), platform=AMD64)

    def bake(self, rest: str, base: str = "base/engine:1", **more: Any) -> Any:
        model, push = self.folder / "model", self.name(rest)
        return bake(self.client, model, self.name(base), self.key, push=push, **more)

    def attached(self, rest: str) -> set[str]:
        place = RegistryLocation(self.client, Reference.parse(self.name(rest)))
        return {blob.digest for blob, _ in place.attached(self.image(rest).digest)}

    def check(self, name: str) -> bool:
        return bool(verify_image(name, self.public, self.client, Silent()).checks)


@pytest.fixture
def scene(there: Given, client: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.setenv("WEIGHTSMITH_STORE", str(tmp_path / "store"))
    made = Scene(there, client, tmp_path, *make_key(tmp_path))
    make_model(tmp_path / "model")
    push_base(client, made.name("base/engine:1"), ENGINE, {"app/llama-server": b"1"})
    return made


def test_baked_signed_and_verified(scene: Scene) -> None:
    first = scene.bake("team/app:1")
    assert scene.check(scene.name("team/app:1"))
    assert len(scene.attached("team/app:1")) >= 3
    listed = fallback_tag(first.digest)
    by_tag = scene.client.digest_of(Reference.parse(scene.name(f"team/app:{listed}")))
    assert by_tag is None or scene.there.kind != "cuelabs", "the registry keeps the list itself"
    again = scene.bake("team/app:1")
    assert (again.digest, again.uploaded_bytes) == (first.digest, 0)
    assert scene.image("team/app:1").digest == first.digest
    _, other = make_key(scene.folder, "other")
    with pytest.raises(CheckFailed):
        verify_image(scene.name("team/app:1"), other, scene.client, Silent())


def test_what_was_made_from_an_engine_is_found(scene: Scene) -> None:
    made = scene.bake("found/app:1")
    place, keys = [scene.name("found/app")], {"ours": signing.read_public_key(scene.public)}
    found = find_affected(wanted("engine", "llamacpp<1.1"), place, keys, scene.client, Silent())
    (row,) = found.images
    assert (row.digest, row.reference) == (made.digest, scene.name("found/app:1"))
    assert (row.signed_by, row.chain) == (("ours",), "whole")
    assert (found.unsigned, found.problems) == ((), ())
    assert row.withdrawn is None
    signer = open_signer(str(scene.key))
    withdraw_all(found, "it lies", signer, scene.client, Silent())
    with pytest.raises(CheckFailed, match="it lies"):
        verify_image(row.reference, scene.public, scene.client, Silent())
    assert scene.image("found/app:1").digest == made.digest


def test_a_tag_in_use(scene: Scene) -> None:
    scene.bake("used/app:1")
    with pytest.raises(UsageError, match=":1"):
        scene.bake("used/app:1", name="renamed")
    moved = scene.bake("used/app:1", name="renamed", force=True)
    assert scene.image("used/app:1").digest == moved.digest


def test_rebased_and_still_proven(scene: Scene) -> None:
    scene.bake("old/app:1")
    labels = {**ENGINE, "org.opencontainers.image.version": "1.1.0"}
    push_base(scene.client, scene.name("base/engine:2"), labels, {"app/llama-server": b"2"})
    request = RebaseCommand(
        source=scene.name("old/app:1"),
        onto=scene.name("base/engine:2"),
        to=scene.name("new/app:2"),
        smoke=False,
        force=False,
    )
    done, _ = rebase_image(
        request, memory_tools(scene.folder, registry=scene.client, key=scene.key)
    )
    small = scene.image("new/app:2").config_blob.size
    assert done.uploaded_bytes in ((0, small) if scene.there.pools_blobs else (small,))
    assert scene.check(scene.name("new/app:2"))


@pytest.mark.slow
def test_two_platforms_copied_out_and_back_with_all_that_hangs_on_them(scene: Scene) -> None:
    places = {name: scene.name(f"base/many:{name}") for name in ("amd64", "arm64")}
    for name, where in places.items():
        files = {"app/llama-server": name.encode()}
        push_base(scene.client, where, ENGINE, files, platform=f"linux/{name}")
    images = [
        scene.client.pull(Reference.parse(where), platform=f"linux/{name}")
        for name, where in places.items()
    ]
    many = Reference.parse(scene.name("base/many:1"))
    scene.client.push(Index(images=tuple(images)), many, force=True)
    made = scene.bake("here/app:1", base="base/many:1")
    assert scene.client.digest_of(Reference.parse(scene.name("here/app:1"))) == made.digest
    with fake_registry() as other:
        away = f"{other.host}/away/app:1"
        copy_image(scene.name("here/app:1"), away, scene.client, Silent(), force=False)
        assert scene.check(away)
        copy_image(away, scene.name("back/app:1"), scene.client, Silent(), force=False)
    assert scene.client.digest_of(Reference.parse(scene.name("back/app:1"))) == made.digest
    assert scene.attached("back/app:1") == scene.attached("here/app:1") != set()
    assert scene.check(scene.name("back/app:1"))


@pytest.fixture
def broken(there: Given) -> Iterator[tuple[Given, Faults]]:
    host, slash, path = there.place.partition("/")
    with faulty_proxy(host) as (way, faults):
        yield Given(f"{way}{slash}{path}", there.pair, there.kind), faults


def test_cut_within_a_layer(broken: tuple[Given, Faults], client: Registry, tmp_path: Path) -> None:
    """Half of it comes through: the rest follows where the registry keeps that, else all again."""
    there, faults = broken
    (tmp_path / "w").write_bytes(os.urandom(24 << 20))
    layer = TarLayer(members=(Member.of_file("/w", tmp_path / "w"),), epoch=0)
    image = Image(layers=(layer,), settings={})
    way = Reference.parse(f"{there.place}/cut/app:1")
    faults.plan = [("PATCH PUT", "/uploads/", "cut")]
    client.push(image, way)
    assert faults.plan == []
    if there.keeps_uploads:
        assert faults.received < 1.4 * layer.size
    (back,) = client.pull(way, platform="").layers
    faults.plan = [("GET", "/blobs/", "truncate")]
    assert b"".join(back.open()) == b"".join(layer.open())


@pytest.mark.parametrize("seed", range(3))
def test_a_push_and_a_pull_through_a_storm(
    there: Given, broken: tuple[Given, Faults], client: Registry, tmp_path: Path, seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What networks do, each once: nothing is half-visible, and nothing is lost."""
    way, faults = broken
    if seed % 2:  # send small layers as large ones are sent: a part, and then its end
        monkeypatch.setattr("weightsmith.oci.transfers._SMALL", 0)
    image, source = tiny_image(tmp_path / "model"), random.Random(seed)
    places = [("HEAD", "/blobs/"), ("POST", "/uploads/"), ("PATCH PUT", "/uploads/"), ("GET", "/"),
              ("HEAD", "/manifests/"), ("PUT", "/manifests/")]  # fmt: skip
    faults.plan = [(*source.choice(places), source.choice(REPAIRABLE)) for _ in range(10)]
    directly, place = (Reference.parse(f"{x.place}/storm/{seed}:1") for x in (there, way))
    while client.digest_of(directly) != image.digest:
        try:
            client.push(image, place)
        except WeightsmithError:
            # Patience ended: nothing may be visible, and the next push goes on.
            assert client.digest_of(directly) is None
    back = client.pull(place, platform=AMD64)
    for ours, theirs in zip(image.layers, back.layers, strict=True):
        assert b"".join(ours.open()) == b"".join(theirs.open())
