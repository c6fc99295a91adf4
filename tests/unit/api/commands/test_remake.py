"""`affected --rebuild` and `--rebase`: the images of a recall are made again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from weightsmith.api.commands.affected import error_of, find_affected
from weightsmith.api.commands.remake import chosen, rebase_all, suffix_of, write_fleets
from weightsmith.api.results import Affected
from weightsmith.core.errors import UsageError
from weightsmith.core.ports import Silent
from weightsmith.fleets.cells import builds_of, lock_of
from weightsmith.fleets.file import read_fleet
from weightsmith.oci.registry import Registry
from weightsmith.provenance import signing
from weightsmith.provenance.origins import wanted

from tests.fakes.baking import push_base
from tests.fakes.journal import RecordingProgress
from tests.fakes.memory import memory_tools
from tests.fakes.rebuilding import Scene as Rebuilding
from tests.fakes.registry import fake_registry
from tests.unit.api.commands.conftest import ENGINE, Scene


def found(scene: Scene, where: str = "team") -> Affected:
    keys = {"key": signing.read_public_key(scene.public)}
    place = [f"{scene.fake.host}/{where}"]
    return find_affected(wanted("engine", "llamacpp"), place, keys, scene.client, Silent())


def test_each_image_moves_to_the_new_base(scene: Scene) -> None:
    onto = f"{scene.fake.host}/base/engine:2"
    push_base(scene.client, onto, ENGINE, {"app/llama-server": b"2"})
    tools = memory_tools(scene.folder, registry=scene.client, key=scene.key)

    after = rebase_all(found(scene), onto, tools, force=False)

    (made,) = after.remade
    assert (made.source, made.reference) == (scene.name, f"{scene.name}-on-2")
    assert made.error == ""
    assert scene.image("team/app:1-on-2").digest == made.digest
    assert scene.check(made.reference) == {}
    assert error_of(after) is None
    assert scene.image().digest == found(scene).images[0].digest


def test_what_cannot_be_rebased_is_named_and_ends_with_4(scene: Scene) -> None:
    onto = f"{scene.fake.host}/base/engine:2"
    push_base(scene.client, onto, {"dev.weightsmith.engine": "vllm"}, {"app/x": b"2"})
    tools = memory_tools(scene.folder, registry=scene.client, key=scene.key)

    after = rebase_all(found(scene), onto, tools, force=False)

    assert "vllm" in after.remade[0].error
    failure = error_of(after)
    assert failure is not None
    assert (failure.exit_code, bool(failure.details["remade"])) == (4, True)


@pytest.mark.parametrize(
    ("onto", "suffix"),
    [
        ("engine:llamacpp", "-on-llamacpp"),
        ("docker.io/vllm/vllm-openai:v0.33.1", "-on-v0.33.1"),
        ("x.io/a@sha256:" + "ab" * 32, "-on-abababababab"),
        ("oci:some dir/", "-on-some-dir"),
    ],
)
def test_the_new_tag_says_which_base(onto: str, suffix: str) -> None:
    assert suffix_of(onto) == suffix


@pytest.fixture
def built(tmp_path: Path) -> Iterator[Rebuilding]:
    with fake_registry() as fake, Registry(pause=lambda _: None) as client:
        yield Rebuilding(fake, client, tmp_path)


def test_a_fleet_file_builds_them_again(built: Rebuilding, tmp_path: Path) -> None:
    def alone(recipe: dict[str, object]) -> None:
        recipe["adapters"] = [{"version": "v7", "weight": 0.5}]
        recipe["targets"] = ["llamacpp-q8_0"]
        recipe["calibration"] = {"n": 7, "data": "texts.jsonl"}
        recipe["replay"] = {"keep": "digests", "limit": 3}

    pin = f"hf://acme/base@{'c' * 40}"
    built.publish(pin, "hf://acme/base", alone)
    keys = {"key": signing.read_public_key(built.public)}
    rows = find_affected(
        wanted("adapter", "v7"), [f"{built.fake.host}/team"], keys, built.client, Silent()
    )
    out, told = tmp_path / "again" / "fleet.yaml", RecordingProgress()

    after = write_fleets(
        rows, out, "x.io/engine:2", signing.read_public_key(built.public), built.client, told
    )

    assert [(one.reference, one.error) for one in after.remade] == [(str(out), "")]
    fleet = read_fleet(out)
    lock = lock_of(fleet, out)
    (build,) = builds_of(fleet, out, lock)
    recipe = build.file.recipe
    assert [*lock.sources] == [recipe.base.source]
    assert (recipe.replay.keep, recipe.replay.limit) == ("digests", 3)
    assert recipe.calibration
    assert (recipe.calibration.n, recipe.calibration.seed) == (7, 0)
    assert recipe.calibration.data == str(out.parent / "calibration.jsonl")
    assert told.warnings[-1].endswith(f"not attached: write {recipe.calibration.data}")
    assert (recipe.base.source, recipe.base.revision) == ("hf://acme/base", "c" * 40)
    (adapter,) = recipe.adapters
    assert (adapter.version, adapter.weight) == ("v7", 0.5)
    assert (Path(adapter.source) / "adapter_config.json").read_text() == "0"
    assert Path(recipe.evaluate[0].data).read_text()
    assert recipe.image.base == "x.io/engine:2"
    assert recipe.image.repository == f"{built.fake.host}/team/app"
    assert recipe.serve.served_model_name == "x"
    assert [target.name for target in build.targets] == ["llamacpp-q8_0"]
    with pytest.raises(UsageError, match="exists"):
        write_fleets(rows, out, "", signing.read_public_key(built.public), built.client, Silent())


@pytest.mark.parametrize("onto", ["", "x.io/engine:2"])
def test_of_nothing_no_fleet_file_is_written_and_that_is_said(
    scene: Scene, tmp_path: Path, onto: str
) -> None:
    out, told = tmp_path / "again" / "fleet.yaml", RecordingProgress()
    write_fleets(nothing(scene), out, onto, None, scene.client, told)
    assert told.warnings == ["no image was found that could be made again"]
    assert not out.parent.exists()


def test_of_nothing_nothing_is_rebased_and_that_is_said(scene: Scene) -> None:
    tools = memory_tools(scene.folder, registry=scene.client, key=scene.key)
    assert rebase_all(nothing(scene), "x.io/engine:2", tools, force=False).remade == ()
    assert tools.progress.warnings == ["no image was found that could be made again"]


def nothing(scene: Scene) -> Affected:
    place = [f"{scene.fake.host}/team"]
    return find_affected(wanted("engine", "vllm"), place, {}, scene.client, Silent())


def test_what_has_two_adapters_is_named(built: Rebuilding, tmp_path: Path) -> None:
    built.publish(f"hf://acme/base@{'c' * 40}", "hf://acme/base")
    keys = {"key": signing.read_public_key(built.public)}
    rows = find_affected(
        wanted("adapter", "v7"), [f"{built.fake.host}/team"], keys, built.client, Silent()
    )
    out = tmp_path / "again" / "fleet.yaml"
    after = write_fleets(
        rows, out, "", signing.read_public_key(built.public), built.client, RecordingProgress()
    )
    assert "2 adapters" in after.remade[0].error
    assert not out.exists()


def test_an_index_is_made_as_a_whole(scene: Scene) -> None:
    (row,) = found(scene).images
    index = replace(row, form="index", digest="sha256:" + "0" * 64, members=(row.digest,))
    both = replace(found(scene), images=(row, index, replace(row, form="volume", digest="x")))
    assert chosen(both) == [index]
