"""A build in memory that publishes its weights in several forms: one merge, one gate."""

from __future__ import annotations

import json
from typing import Any

import pytest
from weightsmith.commands.verify import verify_image
from weightsmith.errors import UsageError
from weightsmith.oci.layout import read_layout
from weightsmith.oci.references import Reference
from weightsmith.ports import Silent

from tests.fakes.images import entry, foreign_image, tar_of
from tests.fakes.memory import Memory

TARGET = "llamacpp-q4_k_m"
TAG = f"1.0.0-{TARGET}"
ALL = "outputs=[image, volume, modelpack]"


def pulled(memory: Memory, tag: str) -> Any:
    return memory.client.pull(Reference.parse(f"{memory.repository}:{tag}"))


def test_all_forms_hold_the_weights_that_the_image_was_asked_with(warm: Memory) -> None:
    warm.store.forget("smoke", "trial")
    built = warm.build(ALL, push=True)[TARGET]

    assert warm.journal.of("start", "stop") == ["start", "stop"]
    assert sorted(built.forms) == ["modelpack", "volume"]
    image, volume, pack = (pulled(warm, TAG + end) for end in ("", "-volume", "-modelpack"))
    assert [volume.digest, pack.digest] == [
        built.forms["volume"].digest, built.forms["modelpack"].digest,
    ]  # fmt: skip
    assert {layer.digest for layer in volume.layers} < {layer.digest for layer in image.layers}
    weights = [layer for layer in image.layers if layer.file.endswith(".gguf")]
    (file,) = (layer for layer in pack.layers if layer.file.endswith(".gguf"))
    assert b"".join(file.open()) in b"".join(weights[0].open())
    for form in (volume, pack):
        assert form.labels["dev.weightsmith.tested.image"] == built.published.digest
        assert form.labels["dev.weightsmith.verdict"] == built.verdict
        assert "dev.weightsmith.plan" not in form.labels


def test_an_image_is_recorded_though_another_form_fails(warm: Memory) -> None:
    built = warm.build(push=True)[TARGET]
    (warm.results() / "build.json").unlink()
    other = foreign_image(tar_of(entry("a")), docker=False)
    warm.client.push(other, Reference.parse(f"{warm.repository}:{TAG}-volume"))

    with pytest.raises(UsageError, match="volume"):
        warm.build("outputs=[image, volume]", push=True)

    assert warm.record()["image"]["digest"] == built.published.digest


def test_each_form_can_be_verified(warm: Memory) -> None:
    built = warm.build(ALL, push=True)[TARGET]

    for form in built.forms.values():
        checks = verify_image(form.reference, None, warm.client, Silent())
        assert all(check["ok"] is not False for check in checks["checks"]), checks


def test_the_record_names_them_and_a_second_build_sends_nothing(warm: Memory) -> None:
    first = warm.build(ALL, push=True)[TARGET]
    forms = warm.record()["forms"]
    again = warm.build(ALL, push=True)[TARGET]

    assert {kind: row["digest"] for kind, row in forms.items()} == {
        kind: form.digest for kind, form in first.forms.items()
    }
    assert {kind: form.digest for kind, form in again.forms.items()} == {
        kind: form.digest for kind, form in first.forms.items()
    }
    assert sum(form.uploaded_bytes for form in again.forms.values()) == 0
    report = (warm.results() / "report.html").read_text("utf-8")
    assert all(form.digest in report for form in first.forms.values())


def test_an_engine_loads_what_it_can_and_the_rest_is_a_layout(warm: Memory) -> None:
    built = warm.build(ALL)[TARGET]

    assert sorted(warm.engine.names) == [
        f"{warm.repository}:{TAG}",
        f"{warm.repository}:{TAG}-volume",
    ]
    layout = warm.results() / "image-modelpack"
    assert read_layout(layout).digest == built.forms["modelpack"].digest
    assert warm.left() == []


def test_a_layout_is_beside_the_images(warm: Memory) -> None:
    built = warm.build(ALL, layout=warm.folder / "own")[TARGET]

    for kind, form in built.forms.items():
        assert read_layout(warm.folder / f"own-{kind}").digest == form.digest
        assert form.reference == f"oci:{warm.folder / f'own-{kind}'}"
    marker = json.loads((warm.folder / "own" / "index.json").read_bytes())
    assert len([row for row in marker["manifests"] if "artifactType" not in row]) == 1


def test_a_form_that_nobody_knows_is_refused(warm: Memory) -> None:
    with pytest.raises(UsageError, match="outputs"):
        warm.build("outputs=[image, floppy]")
