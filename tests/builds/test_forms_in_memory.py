"""A build in memory that publishes its weights in several forms: one merge, one gate."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from weightsmith.api.commands.images import copy_image
from weightsmith.api.commands.verify import verify_image
from weightsmith.core.errors import EnvironmentFailure, UsageError
from weightsmith.core.ports import Silent
from weightsmith.oci.layout import read_layout
from weightsmith.oci.references import Reference

from tests.fakes.images import entry, foreign_image, tar_of
from tests.fakes.memory import Memory, new_signer

TARGET = "llamacpp-q4_k_m"
TAG = f"1.0.0-{TARGET}"
ALL = "outputs=[image, volume, modelpack, modelpack-tar, ollama]"
KINDS = ["modelpack", "modelpack-tar", "ollama", "volume"]


def pulled(memory: Memory, tag: str) -> Any:
    return memory.client.pull(Reference.parse(f"{memory.repository}:{tag}"))


def test_all_forms_hold_the_weights_that_the_image_was_asked_with(warm: Memory) -> None:
    warm.store.forget("smoke", "trial")
    built = warm.build(ALL, push=True)[TARGET]

    assert warm.journal.of("start", "stop") == ["start", "stop"]
    assert sorted(built.forms) == KINDS
    image = pulled(warm, TAG)
    pack, tars, ollama, volume = (pulled(warm, f"{TAG}-{kind}") for kind in KINDS)
    found = [pack.digest, tars.digest, ollama.digest, volume.digest]
    assert found == [built.forms[kind].digest for kind in KINDS]
    assert {layer.digest for layer in volume.layers} < {layer.digest for layer in image.layers}
    weights = [layer for layer in image.layers if layer.file.endswith(".gguf")]
    (file,) = (layer for layer in pack.layers if layer.file.endswith(".gguf"))
    assert b"".join(file.open()) in b"".join(weights[0].open())
    assert [layer.digest for layer in tars.layers] == [layer.digest for layer in volume.layers]
    assert built.forms["modelpack-tar"].uploaded_bytes < 10_000
    assert ollama.layers[0].digest == file.digest
    assert ollama.media_type == "application/vnd.docker.distribution.manifest.v2+json"
    for form in (volume, pack, tars, ollama):
        assert form.labels["dev.weightsmith.score.image"] == "1.0000 contains n=8"
        assert form.labels["dev.weightsmith.tested.image"] == built.published.digest
        assert form.labels["dev.weightsmith.verdict"] == built.verdict
        assert "dev.weightsmith.plan" not in form.labels


@pytest.mark.parametrize("taken", ["", "-volume"])
def test_nothing_is_published_if_a_tag_names_something_else(warm: Memory, taken: str) -> None:
    other = foreign_image(tar_of(entry("a")), docker=False)
    warm.client.push(other, Reference.parse(f"{warm.repository}:{TAG}{taken}"))
    before = warm.seen()
    warm.store.forget("quantize")

    with pytest.raises(UsageError, match=f"{TAG}{taken}") as caught:
        warm.build("outputs=[image, volume]", push=True)
    assert "--force" in caught.value.hint
    assert warm.seen() == before
    assert warm.jobs() == []
    warm.build("outputs=[image, volume]", push=True, force=True)


def test_a_form_of_the_same_sources_with_another_digest(warm: Memory) -> None:
    """Labels cannot tell; nothing is published, since the digests are compared before."""
    warm.build("outputs=[image, volume]", push=True)
    (warm.results() / "build.json").unlink()
    del warm.registry.manifests[("team/tiny", TAG)]

    with pytest.raises(UsageError, match=f"{TAG}-volume"):
        warm.build("outputs=[image, volume]", "image.labels.team=search", push=True)
    assert ("team/tiny", TAG) not in warm.registry.manifests


def test_an_image_is_recorded_though_another_form_fails(warm: Memory) -> None:
    built = warm.build(push=True)[TARGET]
    (warm.results() / "build.json").unlink()
    warm.registry.faults.append(("PUT", "-volume", "403"))

    with pytest.raises(EnvironmentFailure):
        warm.build("outputs=[image, volume]", push=True)

    assert warm.record()["image"]["digest"] == built.published.digest


@pytest.mark.slow
def test_each_form_is_signed_and_its_signature_goes_with_it(warm: Memory) -> None:
    warm.signer = new_signer()
    key = warm.folder / "key.pub"
    key.write_bytes(warm.signer.public)
    built = warm.build(ALL, push=True)[TARGET]

    for kind, form in built.forms.items():
        copy = f"{warm.registry.host}/prod/{kind}:1"
        copy_image(form.reference, copy, warm.client, Silent(), force=False)
        verify_image(copy, key, warm.client, Silent())


def test_the_record_names_them_and_a_second_build_sends_nothing(warm: Memory) -> None:
    first = warm.build(ALL, push=True)[TARGET]
    digests = {kind: form.digest for kind, form in first.forms.items()}
    assert {kind: row["digest"] for kind, row in warm.record()["forms"].items()} == digests
    again = warm.build(ALL, push=True)[TARGET]

    assert {kind: form.digest for kind, form in again.forms.items()} == digests
    assert sum(form.uploaded_bytes for form in again.forms.values()) == 0
    for form in first.forms.values():
        verify_image(form.reference, None, warm.client, Silent())
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


def test_a_model_pack_says_the_licence_and_what_it_is(warm: Memory) -> None:
    warm.build("outputs=[image, modelpack]", "card.license=MIT", push=True)
    config = json.loads(pulled(warm, f"{TAG}-modelpack").config_bytes)

    assert config["descriptor"]["licenses"] == ["MIT"]
    assert config["descriptor"]["family"] == "llama"
    assert config["config"]["quantization"] == "q4_k_m"


def test_what_ollama_reads(warm: Memory) -> None:
    """Held to ollama's manifest/manifest.go, types/model/config.go and server/images.go."""
    warm.build("outputs=[image, ollama]", push=True)
    found = pulled(warm, f"{TAG}-ollama")
    manifest, config = json.loads(found.manifest_bytes), json.loads(found.config_bytes)

    assert manifest["schemaVersion"] == 2
    assert manifest["config"]["mediaType"] == "application/vnd.docker.container.image.v1+json"
    kinds = [row["mediaType"] for row in manifest["layers"]]
    assert kinds == [f"application/vnd.ollama.image.{kind}" for kind in ("model", "params")]
    assert json.loads(b"".join(found.layers[1].open())) == {"num_ctx": 512}
    assert {key: config[key] for key in ("model_format", "model_family", "file_type")} == {
        "model_format": "gguf", "model_family": "llama", "file_type": "Q4_K_M",
    }  # fmt: skip
    assert config["rootfs"]["diff_ids"] == [row["digest"] for row in manifest["layers"]]


def test_a_modelfile_names_the_gguf_file_itself(warm: Memory) -> None:
    warm.build("outputs=[image, ollama]")
    lines = (warm.results() / "Modelfile").read_text().splitlines()
    (source,) = (line.removeprefix("FROM ") for line in lines if line.startswith("FROM "))

    found = (warm.results() / source).read_bytes()
    (file,) = warm.record()["artifact"]["files"]
    assert f"sha256:{hashlib.sha256(found).hexdigest()}" == file["digest"]
    assert "PARAMETER num_ctx 512" in lines

    warm.build("outputs=[image, ollama]", push=True)
    text = (warm.results() / "Modelfile").read_text()
    assert f"FROM {warm.repository}:{TAG}-ollama\n" in text


@pytest.mark.parametrize(
    ("settings", "target", "message"),
    [
        (("outputs=[image, ollama]",), "vllm", "GGUF"),
        (("outputs=[image, ollama]",), "llamacpp-lora", "GGUF"),
        (("outputs=[image, ollama]", "quantize.split_max_size=1GB"), TARGET, "split"),
        (("outputs=[image, floppy]",), TARGET, "outputs"),
    ],
)
def test_a_form_that_cannot_be_made_is_refused_before_any_work(
    memory: Memory, settings: tuple[str, ...], target: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        memory.build(*settings, targets=(target,))
    assert memory.jobs() == []


@pytest.mark.parametrize(
    ("repository", "why"),
    [
        ("localhost:5017/a/b/c", "3 parts"),
        ("localhost:5017/bot", "1 part"),
        ("registry.example.com/my.team/bot", "dot"),
        (f"registry.example.com/team/{'b' * 81}", "80"),
        ("[::1]:5000/team/bot", "IPv6"),
    ],
)
def test_a_name_that_ollama_cannot_read_is_refused_in_the_plan(
    memory: Memory, repository: str, why: str
) -> None:
    """Its rule is types/model/name.go's: HOST/NAMESPACE/MODEL:TAG."""
    name = f"image.repository='{repository}'"
    with pytest.raises(UsageError, match="HOST/NAMESPACE/MODEL") as caught:
        memory.forecast("outputs=[image, ollama]", name)
    assert why in caught.value.message
    assert memory.forecast("outputs=[image, modelpack]", name)


@pytest.mark.parametrize(
    ("kinds", "costs"),
    [("[image, ollama]", {TARGET}), ("[image, modelpack]", {TARGET, "vllm"}), ("[image]", set())],
)
def test_the_plan_says_which_target_is_uploaded_twice(
    memory: Memory, kinds: str, costs: set[str]
) -> None:
    rows = memory.forecast(f"outputs={kinds}", targets=(TARGET, "vllm"))["stages"]

    assert {row["target"] for row in rows if "a second time" in row["why"]} == costs


def test_the_plan_counts_what_goes_to_a_hub(memory: Memory) -> None:
    sent = memory.planned("publish")["write_bytes"]

    assert memory.planned("publish", "outputs.hub=hf://team/bot")["write_bytes"] == 2 * sent


def test_a_volume_has_manifests_that_pin_it(warm: Memory) -> None:
    built = warm.build("outputs=[image, volume]", push=True)[TARGET]
    folder = warm.results() / "volume"

    assert sorted(path.name for path in folder.iterdir()) == [
        "inferenceservice.yaml", "kubernetes.yaml",
    ]  # fmt: skip
    pinned = f"{warm.repository}:{TAG}-volume@{built.forms['volume'].digest}"
    for path in folder.iterdir():
        assert pinned in path.read_text()
    assert "ghcr.io/ggml-org/llama.cpp:server-" in (folder / "kubernetes.yaml").read_text()


def test_an_engine_without_an_image_of_its_own_has_no_manifests(memory: Memory) -> None:
    memory.build("outputs=[image, volume]", targets=("vllm",), layout=memory.folder / "own")
    assert not (memory.results("vllm") / "volume").exists()
    assert any("no manifests for the volume" in str(line) for line in memory.progress.lines)
