"""Images have the program that asks their replay set, and their manifests call it at the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from weightsmith.core.errors import EnvironmentFailure
from weightsmith.oci.image import Image
from weightsmith.oci.layers import Layer
from weightsmith.oci.references import Reference

from tests.fakes.memory import Memory
from tests.fakes.thin import THIN, round_really, use_bfloat16

TARGET = "llamacpp-q4_k_m"
PROGRAM = "opt/weightsmith/healthcheck"


def program_of(image: Image) -> list[Layer]:
    return [layer for layer in image.layers if layer.file == PROGRAM]


def pulled(memory: Memory, tag: str) -> Image:
    return memory.client.pull(Reference.parse(f"{memory.repository}:{tag}"))


def startup_probe(memory: Memory, target: str = TARGET, folder: str = "") -> Any:
    place = Path(memory.dist) / "tiny/1.0.0" / target / folder / "kubernetes.yaml"
    files = yaml.safe_load_all(place.read_text())
    (deployment,) = (one for one in files if one["kind"] == "Deployment")
    return deployment["spec"]["template"]["spec"]["containers"][0]["startupProbe"]


def test_the_program_is_a_layer_of_its_own_that_all_images_share(warm: Memory) -> None:
    warm.build(push=True)
    first = pulled(warm, f"1.0.0-{TARGET}")
    warm.build("serve.max_model_len=256", "version=1.1.0", push=True)
    (layer,), (same,) = program_of(first), program_of(pulled(warm, f"1.1.0-{TARGET}"))

    assert layer.digest == same.digest
    assert b"a program for linux/amd64" in b"".join(layer.open())
    probe = startup_probe(warm)
    assert probe["exec"]["command"][:3] == [f"/{PROGRAM}", "--port", "8080"]
    assert "--replay" in probe["exec"]["command"]


@pytest.mark.parametrize(
    "change",
    ["replay={probe: false}", "replay=none", "replay=digests", "evaluate=[]"],
)
def test_without_questions_that_may_be_asked_nothing_is_added(warm: Memory, change: str) -> None:
    warm.build(change, push=True)

    assert program_of(pulled(warm, f"1.0.0-{TARGET}")) == []
    assert startup_probe(warm)["httpGet"] == {"path": "/health", "port": 8080}


def test_a_set_remains_where_only_the_probe_is_off(warm: Memory) -> None:
    warm.build("replay={probe: false}", push=True)
    files = [layer.file for layer in pulled(warm, f"1.0.0-{TARGET}").layers]
    assert "etc/weightsmith/replay.json" in files


def test_a_thin_image_has_it_too_and_a_volume_not(memory: Memory) -> None:
    use_bfloat16(memory)
    round_really(memory)
    memory.use_vllm("vllm", serve={"gpu": "nvidia-h100", "max_model_len": 512})
    memory.build(THIN.replace("thin]", "thin, volume]"), push=True)
    fat, thin, volume = (pulled(memory, f"1.0.0-vllm{end}") for end in ("", "-thin", "-volume"))

    (one,), (other,) = program_of(fat), program_of(thin)
    assert one.digest == other.digest
    assert program_of(volume) == []
    for folder in ("", "thin"):
        assert "--replay" in startup_probe(memory, "vllm", folder)["exec"]["command"]
    assert "exec" not in startup_probe(memory, "vllm", "volume")


def test_a_site_without_the_compiler_is_told_how_to_do_without(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = memory._make_engine_files

    def refused(engine: str, *rest: Any) -> None:
        if engine == "healthcheck":
            raise EnvironmentFailure("no index answers", hint="name a mirror")
        make(engine, *rest)

    monkeypatch.setattr(memory, "_make_engine_files", refused)
    with pytest.raises(EnvironmentFailure, match="no index answers") as error:
        memory.build()
    assert "replay: {probe: false}" in error.value.hint
