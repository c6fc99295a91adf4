"""A build in memory of a model that sees, for llama.cpp: one more file, wherever the weights go."""

from __future__ import annotations

import json
from typing import Any

import pytest
from weightsmith.building.explain import plan_of
from weightsmith.core.errors import CheckFailed, InputRefused, UsageError
from weightsmith.models.facts import read_facts
from weightsmith.oci.references import Reference
from weightsmith.quantizers import formats
from weightsmith.steps.sizes import estimated_bytes, projector_bytes

from tests.fakes.memory import Memory

TARGET = "llamacpp-q4_k_m"
MODEL, PROJECTOR = "tiny.gguf", "mmproj-tiny.gguf"
TOWER = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96,
         "image_size": 56, "patch_size": 14, "architectures": ["InternVisionModel"]}  # fmt: skip


@pytest.fixture
def seeing(warm: Memory) -> Memory:
    """A build whose base sees, and says how pictures are prepared."""
    give_eyes(warm, TOWER)
    (warm.home / "base" / "preprocessor_config.json").write_text("{}")
    return warm


def give_eyes(memory: Memory, tower: dict[str, Any]) -> None:
    config = memory.home / "base" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vision_config": tower}))


def planned(memory: Memory) -> dict[str, Any]:
    return dict(memory.forecast()["serving"][TARGET])


def test_the_projector_is_served_recorded_and_in_every_form(seeing: Memory) -> None:
    kinds = ("volume", "modelpack", "modelpack-tar", "ollama")
    seeing.build(f"outputs=[image, {', '.join(kinds)}]", push=True)

    record = seeing.record(TARGET)
    assert [file["path"] for file in record["artifact"]["files"]] == [PROJECTOR, MODEL]
    assert record["image"]["takes_pictures"]
    assert "picture" in [check["name"] for check in record["checks"]]
    tag = f"{seeing.repository}:1.0.0-{TARGET}"
    image = seeing.client.pull(Reference.parse(tag))
    assert f"LLAMA_ARG_MODEL=/models/{MODEL}" in image.config["Env"]
    assert f"LLAMA_ARG_MMPROJ=/models/{PROJECTOR}" in image.config["Env"]
    forms = {kind: seeing.client.pull(Reference.parse(f"{tag}-{kind}")) for kind in kinds}
    for one in (image, *forms.values()):
        (layer,) = [layer for layer in one.layers if layer.file.endswith(PROJECTOR)]
        assert layer.size < 10_000  # alone in it
    types = [layer.media_type.rpartition(".")[2] for layer in forms["ollama"].layers]
    assert types[:2] == ["model", "projector"]
    assert forms["ollama"].settings["model_families"][1:] == ["clip"]
    assert forms["modelpack"].settings["config"]["capabilities"]["inputTypes"] == ["text", "image"]
    manifest = (seeing.results() / "volume" / "kubernetes.yaml").read_text()
    assert f"/models/{PROJECTOR}" in manifest


TEXT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
PARTS = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("status", [200, 400, 500])
def test_an_image_that_takes_no_pictures_is_published_with_a_warning(
    seeing: Memory, status: int
) -> None:
    """A chat template for text alone ends in any error, by the server."""
    (seeing.home / "base" / "chat_template.jinja").write_text(TEXT)
    seeing.launcher.pictures = status

    for _ in range(2):  # the second time, the image is not started
        seeing.build()

        said = [text for text in seeing.progress.warnings if "reads pictures" in text]
        assert len(said) == (status != 200)
        assert all(f"HTTP {status}: the chat template is for text alone" in text for text in said)


def test_a_server_that_fails_with_a_template_for_pictures_is_refused(seeing: Memory) -> None:
    (seeing.home / "base" / "chat_template.jinja").write_text(PARTS)
    seeing.launcher.pictures = 500

    with pytest.raises(CheckFailed, match="'picture' failed"):
        seeing.build()


def test_ollamas_modelfile_names_both_files_of_a_layout(seeing: Memory) -> None:
    seeing.build("outputs=[image, ollama]")

    lines = (seeing.results() / "Modelfile").read_text().splitlines()
    places = [line.removeprefix("FROM ./") for line in lines if line.startswith("FROM ")]
    assert len(places) == 2
    sizes = [(seeing.results() / place).stat().st_size for place in places]
    assert sizes[0] > sizes[1] > 0


def test_the_plan_counts_it_and_says_so(seeing: Memory) -> None:
    before = planned(seeing)
    expected = projector_bytes(read_facts(seeing.home / "base"))
    seeing.build()
    after = planned(seeing)

    assert expected > 2 * 2 * (4 * 64 * 64 + 2 * 64 * 96)
    (said,) = [note for note in before["notes"] if "reads pictures" in note]
    assert "projector" in said
    assert after["weight_bytes"] == seeing.record(TARGET)["artifact"]["size"]
    assert before["overhead_bytes"] == after["overhead_bytes"]


def test_it_is_no_part_of_the_file_that_must_fit_a_layer(seeing: Memory) -> None:
    model = read_facts(seeing.home / "base")
    weights = (seeing.home / "base" / "model.safetensors").stat().st_size
    both = estimated_bytes(weights, formats()["q4_k_m"], model)
    limit = f"image.max_layer_size={both - projector_bytes(model) // 2}"

    plan_of(seeing.request(limit), seeing.tools)
    limit = f"image.max_layer_size={both - projector_bytes(model) - 100}"
    with pytest.raises(UsageError, match="one layer"):
        plan_of(seeing.request(limit), seeing.tools)


@pytest.mark.parametrize("lacks", ["preprocessor_config.json", "a known architecture"])
def test_without_one_it_is_refused_unless_text_is_enough(seeing: Memory, lacks: str) -> None:
    """Before any work, and in the plan; a model that sees is not published blind unasked."""
    if lacks == "preprocessor_config.json":
        (seeing.home / "base" / lacks).unlink()
    else:
        give_eyes(seeing, {**TOWER, "architectures": ["StrangeVisionModel"]})

    for ask in (seeing.build, lambda: planned(seeing)):
        with pytest.raises(InputRefused, match="would read text only") as caught:
            ask()
        assert "quantize.allow_text_only" in caught.value.hint
    assert seeing.jobs() == []

    seeing.write_recipe(quantize={"allow_text_only": True})
    seeing.build()

    plan, record = planned(seeing), seeing.record(TARGET)
    assert [file["path"] for file in record["artifact"]["files"]] == [MODEL]
    assert "takes_pictures" not in record["image"]
    assert "picture" not in [check["name"] for check in record["checks"]]
    assert "projector" not in record["inputs"]["quantize"]["options"]
    (said,) = [note for note in plan["notes"] if "reads text only" in note]
    assert "preprocessor_config.json" in said
