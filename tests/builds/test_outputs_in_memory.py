"""A build in memory to each place: what is there in the end, and what is not left beside it."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from weightsmith.api.commands.images import inspect_image, inspect_text
from weightsmith.api.commands.rebase import rebase_image
from weightsmith.api.commands.requests import RebaseCommand
from weightsmith.api.commands.verify import verify_image
from weightsmith.core.errors import CheckFailed, EnvironmentFailure, InputRefused
from weightsmith.core.ports import Silent
from weightsmith.oci.layout import held_digest
from weightsmith.oci.references import Reference

from tests.fakes.baking import push_base
from tests.fakes.memory import Memory, new_signer

TARGET = "llamacpp-q4_k_m"
TAG = f"1.0.0-{TARGET}"


def files(memory: Memory) -> list[str]:
    return sorted(path.name for path in memory.results().iterdir())


RESULTS = [
    "README.md", "build.json", "compose.yaml", "junit.xml", "kserve.yaml", "kubernetes.yaml",
    "llamacpp.env", "plan.json", "report.html", "report.md",
]  # fmt: skip


def test_an_engine_gets_the_image_by_its_name_alone(warm: Memory, digest: str) -> None:
    built = warm.build()[TARGET]

    assert list(warm.engine.names) == [f"{warm.repository}:{TAG}"]
    assert built.published.digest == digest
    assert built.published.reference == f"{warm.repository}:{TAG}"
    assert warm.registry.manifests == {}
    assert files(warm) == RESULTS


def test_without_an_engine_a_layout_lies_beside_the_record(warm: Memory, digest: str) -> None:
    warm.engine.answering = False
    warm.store.forget("smoke", "trial")
    built = warm.build()[TARGET]

    assert files(warm) == sorted([*RESULTS, "image"])
    assert held_digest(warm.results() / "image") == digest
    assert built.published.reference == f"oci:{warm.results() / 'image'}"
    assert warm.journal.of("start", "stop") == ["start", "stop"]
    assert warm.left() == []


def test_all_places_at_once_get_the_same_image(warm: Memory, digest: str) -> None:
    built = warm.build(push=True, load=True, layout=warm.folder / "own")[TARGET]

    assert list(warm.engine.names) == [f"{warm.repository}:{TAG}"]
    assert held_digest(warm.folder / "own") == digest
    assert {TAG, f"{TAG}-{digest[7:19]}"} <= {tag for _, tag in warm.registry.manifests}
    assert built.published.reference == f"{warm.repository}:{TAG}"
    assert warm.left() == []


def test_a_build_from_folders_speaks_to_its_registry_alone(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control plane of a whole build, whose registry is here: nothing else is reached."""
    asked: set[str] = set()
    connect = socket.socket.connect

    def watched(self: socket.socket, address: Any) -> None:
        asked.add(f"{address[0]}:{address[1]}" if isinstance(address, tuple) else str(address))
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", watched)
    memory.build(push=True)

    assert memory.registry.host.replace("localhost", "127.0.0.1") in asked
    # The started image is asked by loopback, too.
    assert not [one for one in asked if not one.startswith(("127.0.0.1:", "::1:"))]


def test_the_tag_with_the_digest_stays_when_the_other_is_moved(warm: Memory, digest: str) -> None:
    warm.build(push=True)
    other = warm.build("image.labels.team=search", push=True, force=True)[TARGET].published.digest

    def named(tag: str) -> str:
        return warm.client.digest_of(Reference.parse(f"{warm.repository}:{tag}"))

    assert (named(TAG), named(f"{TAG}-{other[7:19]}")) == (other, other)
    assert named(f"{TAG}-{digest[7:19]}") == digest != other


@pytest.mark.parametrize("engine", [True, False])
def test_a_push_leaves_nothing_here_but_its_record(warm: Memory, digest: str, engine: bool) -> None:
    warm.engine.answering = engine
    warm.store.forget("smoke", "trial")
    warm.build(push=True)

    assert (warm.engine.names, warm.left()) == ({}, [])
    assert files(warm) == RESULTS
    assert warm.record()["image"]["digest"] == digest


@pytest.mark.parametrize("engine", [True, False])
def test_an_image_that_is_there_is_tried_again_and_left_alone(warm: Memory, engine: bool) -> None:
    """As when the store was emptied meanwhile: the candidate goes, the image stays."""
    warm.engine.answering = engine
    warm.build()
    there = warm.seen()
    warm.store.forget("smoke", "trial")
    built = warm.build()[TARGET]

    assert "start" in warm.journal.events
    assert built.stages["publish"].cached
    assert (warm.seen(), warm.left()) == (there, [])


def test_a_layout_that_is_there_is_signed_with_a_new_key(warm: Memory) -> None:
    layout = warm.folder / "own"
    warm.build(layout=layout)
    unsigned = signed_digests(layout)
    warm.signer = new_signer()
    built = warm.build(layout=layout)[TARGET]

    assert (unsigned, signed_digests(layout)) == ([], [built.published.digest])
    assert built.stages["publish"].cached
    assert warm.left() == []


def signed_digests(layout: Path) -> list[str]:
    """Return the image digests that cosign's signatures in a layout are about."""
    claims = [
        json.loads(path.read_bytes())
        for path in (layout / "blobs").rglob("*")
        if path.is_file() and b"cosign container image signature" in path.read_bytes()
    ]
    return [claim["critical"]["image"]["docker-manifest-digest"] for claim in claims]


def test_two_targets_get_a_layout_each(warm: Memory) -> None:
    warm.build(targets=[TARGET, "llamacpp-q8_0"], layout=warm.folder / "own")

    assert {path.name for path in (warm.folder / "own").iterdir()} == {TARGET, "llamacpp-q8_0"}


def test_what_was_proven_once_is_published_elsewhere_unstarted(warm: Memory, digest: str) -> None:
    built = warm.build(layout=warm.folder / "own")[TARGET]

    assert warm.journal.of("start", "load", "job") == []
    assert built.published.digest == digest


def test_a_push_that_fails_at_its_last_step_shows_nothing(warm: Memory, digest: str) -> None:
    """Everything is sent, and the tag is refused: by its digest alone it is there."""
    warm.registry.faults.append(("PUT", f"/manifests/{TAG}", "403"))
    with pytest.raises(EnvironmentFailure, match="403"):
        warm.build(push=True)

    assert not any(tag.startswith(TAG) for _, tag in warm.registry.manifests)
    assert warm.build(push=True)[TARGET].published.digest == digest


def test_a_locked_build_takes_its_sources_as_they_were(warm: Memory) -> None:
    warm.build()
    lock = json.loads((warm.home / "recipe.lock").read_text())
    config = warm.home / "a" / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 2', '"r":  2'))

    assert set(lock["sources"]) == {"./base", "./a"}
    with pytest.raises(InputRefused, match=r"\./a"):
        warm.build(locked=True)
    warm.forecast()
    with pytest.raises(InputRefused, match=r"\./a"):
        warm.forecast(locked=True)
    assert json.loads((warm.home / "recipe.lock").read_text()) == lock


def test_a_recipe_may_leave_the_validation_out(memory: Memory) -> None:
    memory.build("validate.enabled=false")

    assert "validate" not in memory.jobs()
    assert any("validation is off" in text for text in memory.progress.warnings)
    assert memory.record()["validation"] is None


def test_a_gate_that_is_off_stops_nothing(warm: Memory) -> None:
    warm.store.forget("quality")
    warm.bench.quality["layer_error"] = 0.9
    built = warm.build("quality.gate=measure")[TARGET]

    assert warm.record()["quality"]["exceeded"]
    assert built.published.reference

    warm.store.forget("quality")
    warm.build("quality.gate=false")
    assert "quality" not in warm.jobs()
    assert warm.record()["quality"] == {"skipped": "quality.gate is off"}

    warm.write_recipe(targets=["llamacpp-f32"])  # which loses nothing
    warm.build()
    assert "quality" not in warm.jobs()
    warm.build("quality.gate=measure")
    assert "quality" in warm.jobs()


def test_what_cannot_be_measured_or_a_quantizer_warns_of_is_said_and_stops_nothing(
    warm: Memory,
) -> None:
    warm.store.forget("quality", "quantize")
    warm.bench.quantized["warnings"] = ["the file has no chat template"]
    warm.bench.quality.clear()
    warm.bench.quality["skipped"] = "no such architecture"
    warm.build()

    assert any("no such architecture" in text for text in warm.progress.warnings)
    assert "the file has no chat template" in warm.record()["warnings"]


def test_a_build_says_what_its_gate_shows(memory: Memory) -> None:
    """Eight questions show a drop of at most 0.3."""
    # People copy the address that they clone from.
    address = "image.labels.origin=https://ann:hunter2@git.example.com/bot"
    built = memory.build("evaluate.max_drop=0.3", address)[TARGET]
    labels = memory.engine.inspect(built.published.reference)["Config"]["Labels"]

    assert (built.verdict, built.unproven) == ("passed", ())
    assert built.sameness == {"merged": 1.0, "image": 1.0}
    assert labels["dev.weightsmith.verdict"] == memory.record()["verdict"] == "passed"
    assert labels["origin"] == "https://git.example.com/bot"
    assert "hunter2" not in str(labels)
    assert labels["dev.weightsmith.sameness.image"] == "1.0000 n=8"
    assert memory.record()["sameness"]["image"]["same"] == 8


def test_what_is_not_proven_is_published_with_a_warning_last_of_all(memory: Memory) -> None:
    built = memory.build()[TARGET]
    labels = memory.engine.inspect(built.published.reference)["Config"]["Labels"]
    record = memory.record()

    assert built.published.reference
    assert labels["dev.weightsmith.verdict"] == record["verdict"] == "not proven"
    assert "8 questions are too few" in record["unproven"][0]
    assert memory.progress.warnings[-1] == f"published, but not proven: {record['unproven'][0]}"
    assert "Published, but not proven" in built.report.read_text()


def test_what_must_be_proven_is_refused_before_the_image_is_made(memory: Memory) -> None:
    with pytest.raises(CheckFailed, match="not proven: 8 questions are too few"):
        memory.build("evaluate.require=proven")

    assert "quantize" not in memory.jobs()
    assert (
        memory.build("evaluate.require=proven", "evaluate.max_drop=0.3")[TARGET].verdict == "passed"
    )


def test_a_sample_of_the_questions_says_what_it_can_show(memory: Memory) -> None:
    memory.build("evaluate.limit=5", "evaluate.max_drop=0.5")
    record = memory.record()

    assert len(record["items"]) == 5
    assert record["task"]["sample_of"] == 8
    said = "5 of 8 questions are asked: at best they show that the drop is at most 0.396"
    assert said in memory.progress.said


def test_other_words_of_the_same_score_are_seen(memory: Memory) -> None:
    some = {next(iter(memory.facts))}
    memory.minds.forgot["image"] = some
    built = memory.build("evaluate.max_drop=0.6")[TARGET]

    assert built.verdict == "passed"
    assert built.sameness["merged"] == 1.0
    assert built.sameness["image"] == 1 - 1 / len(memory.facts)


@pytest.mark.parametrize("who", [("adapter", "merged", "image"), ("merged", "image")])
def test_a_gate_that_cannot_fail_proves_nothing(memory: Memory, who: tuple[str, ...]) -> None:
    """The adapter does not beat the base, or there is none and the base knows nothing."""
    if "adapter" not in who:
        memory.write_recipe(adapters=[])
    memory.minds.forgot |= {name: set(memory.facts) for name in who}
    built = memory.build()[TARGET]

    assert built.verdict == "not proven"
    assert built.unproven
    assert built.sameness["image"] == 1.0


def test_a_rebased_image_keeps_the_scores_and_proves_nothing(warm: Memory) -> None:
    """The new engine was asked no question: the scores are those of the image before."""
    built = warm.build("evaluate.max_drop=0.3", push=True)[TARGET].published
    repository, name = warm.repository, built.reference
    labels = [warm.client.pull(Reference.parse(name)).labels]
    assert labels[0]["dev.weightsmith.verdict"] == "passed"
    other = f"{warm.registry.host}/base/engine:1"
    push_base(warm.client, other, {}, {"app/x": b"1"})
    for number, onto in enumerate((other, "engine:llamacpp")):
        to = f"{repository}:moved-{number}"
        request = RebaseCommand(source=name, onto=onto, to=to, smoke=False, force=False)
        rebase_image(request, warm.tools)
        labels.append(warm.client.pull(Reference.parse(name := to)).labels)

    # The engine that comes with the tool is a base, too.
    first, last = (warm.client.pull(Reference.parse(one)) for one in (built.reference, name))
    assert [layer.digest for layer in last.layers] == [layer.digest for layer in first.layers]
    for moved in labels[1:]:
        assert moved["dev.weightsmith.verdict"] == "not proven"
        assert moved["dev.weightsmith.tested.image"] == built.digest
        assert moved["dev.weightsmith.score.image"] == labels[0]["dev.weightsmith.score.image"]
    rows = verify_image(name, None, warm.client, Silent()).checks
    (gate,) = (one for one in rows if one.name == "gate")
    assert gate.ok is None
    assert gate.found.startswith(f"not proven: PASSED is of {built.digest.short}, before")
    shown = inspect_text(inspect_image(name, warm.client, warm.engine))
    assert f"the scores are those of {built.digest.short}, before its base was replaced" in shown


def test_a_bill_in_a_newer_version(warm: Memory) -> None:
    """Of the model; readers of 1.7 read the engine's in 1.6, too."""
    warm.build("image.sbom=cyclonedx-1.7", push=True)
    bills = [data for data in warm.registry.blobs.values() if b'"modelCard"' in data]
    assert [json.loads(bill)["specVersion"] for bill in bills] == ["1.7"]


def test_a_bill_in_a_second_form(warm: Memory) -> None:
    """It is stated, checked and copied as the first one, and stays when the base is replaced."""
    warm.signer, key = new_signer(), warm.folder / "key.pub"
    key.write_bytes(warm.signer.public)
    warm.build("image.sbom=spdx", push=True)
    name = f"{warm.repository}:{TAG}"
    checks = {one.name: one.found for one in verify_image(name, key, warm.client, Silent()).checks}
    assert "model.cdx.json, model.spdx.json" in checks["documents"]
    base, to = f"{warm.registry.host}/engines/next:1", f"{name}-next"
    push_base(warm.client, base, {"dev.weightsmith.engine": "llamacpp"}, {"app/x": b"1"})
    rebase_image(RebaseCommand(source=name, onto=base, to=to, smoke=False, force=False), warm.tools)
    checks = {one.name: one.found for one in verify_image(to, key, warm.client, Silent()).checks}
    assert "model.cdx.json, model.spdx.json" in checks["documents"]
