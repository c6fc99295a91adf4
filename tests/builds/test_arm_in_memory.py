"""A build in memory for two platforms: one merge, one gate, an index that shares the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from weightsmith.api.commands.images import inspect_image, inspect_text
from weightsmith.api.commands.plan import table
from weightsmith.api.commands.verify import verify_image
from weightsmith.core import platforms
from weightsmith.core.errors import UsageError
from weightsmith.core.ports import Silent
from weightsmith.oci.image import Image
from weightsmith.oci.references import Reference
from weightsmith.outside import checkup
from weightsmith.outside.docker import DockerEngine

from tests.fakes.memory import Memory

TARGET = "llamacpp-q4_k_m"
BOTH = "image.platforms=[linux/amd64, linux/arm64]"


@pytest.fixture(autouse=True)
def on_amd64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platforms.platform, "machine", lambda: "x86_64")


def pulled(memory: Memory, machine: str, end: str = "") -> Image:
    name = Reference.parse(f"{memory.repository}:1.0.0-{TARGET}{end}")
    return memory.client.pull(name, platform=f"linux/{machine}")


def test_both_platforms_come_from_one_build_and_share_the_weights(warm: Memory) -> None:
    """One platform is what a recipe without any gives."""
    first = warm.build()[TARGET].published.digest
    assert warm.build("image.platforms=[linux/amd64]")[TARGET].published.digest == first
    warm.store.forget("base", "smoke", "trial")
    built = warm.build(BOTH, push=True)[TARGET]

    assert warm.jobs() == ["export-engine"]
    assert warm.journal.of("make", "start") == [
        "make llamacpp for linux/arm64",
        "make healthcheck for linux/amd64",
        "make healthcheck for linux/arm64",
        "start",
    ]
    amd, arm = pulled(warm, "amd64"), pulled(warm, "arm64")
    assert built.published.platforms == {"linux/amd64": amd.digest, "linux/arm64": arm.digest}
    assert arm.settings["architecture"] == "arm64"
    pairs = list(zip(amd.layers, arm.layers, strict=True))
    assert len(pairs) > 3
    assert [place for place, (one, other) in enumerate(pairs) if one.digest != other.digest] == [
        0,  # the engine
        next(n for n, one in enumerate(amd.layers) if one.file == "opt/weightsmith/healthcheck"),
    ]
    assert b"a program for linux/arm64" in b"".join(arm.layers[0].open())


def test_the_image_that_was_not_started_says_so(warm: Memory) -> None:
    built = warm.build(BOTH, "evaluate.max_drop=0.3", push=True)[TARGET]
    amd, arm = pulled(warm, "amd64"), pulled(warm, "arm64")

    assert built.started == "linux/amd64"
    assert built.verdict == "passed"
    assert amd.labels["dev.weightsmith.verdict"] == "passed"
    assert "dev.weightsmith.tested.platform" not in amd.labels
    assert arm.labels["dev.weightsmith.verdict"] == "not proven"
    assert arm.labels["dev.weightsmith.tested.platform"] == "linux/amd64"

    name = f"{warm.repository}:1.0.0-{TARGET}"
    checks = verify_image(name, None, warm.client, Silent()).checks
    gates = {one.name: one.found for one in checks if one.name.endswith("gate")}
    assert gates["linux/amd64 gate"].startswith("PASSED")
    assert gates["linux/arm64 gate"].startswith("WARNED: not proven: it was not started")
    shown = inspect_text(inspect_image(name, warm.client, DockerEngine(), "linux/arm64"))
    assert "not started itself: the scores are those of the image for linux/amd64" in shown

    image = warm.record()["image"]
    assert image["started"] == "linux/amd64"
    assert image["platforms"] == {"linux/amd64": amd.digest, "linux/arm64": arm.digest}
    for page in ("report.html", "report.md"):
        report = (warm.results() / page).read_text("utf-8")
        assert "the image for linux/arm64 was not" in report.replace("\\", "")
        assert arm.digest in report


def test_doctor_says_whether_the_other_engine_is_compiled(tmp_path: Path) -> None:
    lacking = checkup._platforms(tmp_path).found
    checkup.toolset_folder(tmp_path, "llamacpp", "aarch64").mkdir(parents=True)
    ready = checkup._platforms(tmp_path).found

    assert "images for linux/arm64 are made here, but not started" in ready
    assert "the engine for linux/arm64 is compiled by the first build" in lacking
    assert "is compiled" not in ready


def test_only_another_platform_is_published_without_a_proof(warm: Memory) -> None:
    built = warm.build("image.platforms=[linux/arm64]", push=True)[TARGET]

    assert warm.journal.of("start") == []
    assert (built.started, built.verdict) == ("", "not proven")
    assert "the image is for linux/arm64: it was not started" in warm.progress.warnings
    assert pulled(warm, "arm64").labels["dev.weightsmith.verdict"] == "not proven"
    assert warm.record()["image"]["started"] == ""
    assert "linux/arm64: not started" in (warm.results() / "report.html").read_text("utf-8")


def test_a_volume_and_a_modelcar_are_for_both_and_a_modelpack_for_any(warm: Memory) -> None:
    built = warm.build(BOTH, "outputs=[image, volume, modelpack, modelcar]", push=True)[TARGET]

    assert warm.journal.of("make")[-2:] == [
        "make modelcar for linux/amd64", "make modelcar for linux/arm64",
    ]  # fmt: skip
    amd, arm = (pulled(warm, machine, "-modelcar") for machine in ("amd64", "arm64"))
    assert {one.digest for one in amd.layers} & {one.digest for one in arm.layers}
    amd, arm = (pulled(warm, machine, "-volume") for machine in ("amd64", "arm64"))
    assert [amd.platform, arm.platform] == ["linux/amd64", "linux/arm64"]
    assert [one.digest for one in amd.layers] == [one.digest for one in arm.layers]
    assert built.forms["modelpack"].digest == pulled(warm, "arm64", "-modelpack").digest


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        ("vllm", "linux/arm64"),
        (TARGET, "linux/s390x"),
        (TARGET, "arm64"),
        (TARGET, "linux/arm/v7"),
    ],
)
def test_what_cannot_be_made_is_refused_before_any_work(
    memory: Memory, target: str, wanted: str
) -> None:
    with pytest.raises(UsageError, match=f"not for {wanted}") as caught:
        memory.build(f"image.platforms=[{wanted}]", targets=[target])
    assert "llamacpp-* target, which is made for linux/amd64 and linux/arm64" in caught.value.hint
    assert memory.jobs() == []

    with pytest.raises(UsageError, match=f"not for {wanted}"):
        memory.forecast(f"image.platforms=[{wanted}]", targets=[target])


def test_the_plan_says_what_is_made_and_what_is_started(warm: Memory) -> None:
    before = warm.forecast(BOTH)
    assert before["platforms"] == {
        TARGET: {
            "linux/amd64": "started and tested on this machine",
            "linux/arm64": "made, not started on this machine",
        }
    }
    assert warm.planned("base", BOTH)["why"].startswith("llamacpp for linux/arm64 is made once")
    assert "the image for linux/arm64 is made, not started on this machine" in table(before)

    warm.build(BOTH)
    row = warm.planned("base", BOTH)
    assert (row["cached"], row["why"]) == (True, "")
