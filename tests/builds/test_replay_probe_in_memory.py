"""Images have the program that asks their replay set, and their manifests call it at the start."""

from __future__ import annotations

import io
import json
import tarfile
from hashlib import sha256
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
WEIGHTS = "etc/weightsmith/weights.json"


def program_of(image: Image) -> list[Layer]:
    return [layer for layer in image.layers if layer.file == PROGRAM]


def files_of(image: Image) -> dict[str, bytes]:
    found = dict[str, bytes]()
    for layer in image.layers:
        with tarfile.open(fileobj=io.BytesIO(b"".join(layer.open()))) as whole:
            files = [(one.name, whole.extractfile(one)) for one in whole if one.isfile()]
            found |= {name: file.read() for name, file in files if file}
    return found


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
    assert b"healthcheck, a program for linux/amd64" in b"".join(layer.open())
    assert WEIGHTS not in files_of(first)
    probe = startup_probe(warm)
    assert probe["exec"]["command"][:3] == [f"/{PROGRAM}", "--port", "8080"]
    assert "--replay" in probe["exec"]["command"]


def test_a_recipe_lets_the_program_read_all_weights(warm: Memory) -> None:
    warm.build()
    seconds = limit_of(startup_probe(warm))
    warm.build("replay={read_weights: true}", push=True)
    files = files_of(pulled(warm, f"1.0.0-{TARGET}"))
    (name, data), *others = [one for one in files.items() if one[0].endswith(".gguf")]

    assert others == []
    assert files[PROGRAM] == b"healthcheck-weights, a program for linux/amd64"
    (row,) = json.loads(files[WEIGHTS])["files"]
    assert (row["path"], row["sha256"]) == (f"/{name}", sha256(data).hexdigest())
    assert limit_of(startup_probe(warm)) > seconds


def limit_of(probe: Any) -> int:
    return int(probe["failureThreshold"])


NOT_ASKED = ("replay={probe: false}", "replay=none", "replay=digests", "evaluate=null")


@pytest.mark.parametrize("change", NOT_ASKED)
def test_without_questions_that_may_be_asked_it_asks_for_health_alone(
    warm: Memory, change: str
) -> None:
    warm.build(change, push=True)
    image = pulled(warm, f"1.0.0-{TARGET}")

    assert len(program_of(image)) == 1
    said = (f"/{PROGRAM}", "--port", "8080", "--port-variable", "LLAMA_ARG_PORT")
    assert image.config["Healthcheck"]["Test"] == ["CMD", *said, "--health", "/health"]
    assert startup_probe(warm)["httpGet"] == {"path": "/health", "port": 8080}


@pytest.mark.parametrize("change", NOT_ASKED[:2])
def test_an_image_for_a_gpu_keeps_the_health_check_of_its_base(memory: Memory, change: str) -> None:
    memory.use_vllm("vllm", serve={"gpu": "nvidia-h100", "max_model_len": 512})
    memory.build(change, push=True)

    assert program_of(pulled(memory, "1.0.0-vllm")) == []
    assert "httpGet" in startup_probe(memory, "vllm")


def test_a_plan_says_that_it_is_compiled_once_for_each_platform(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = "image.platforms=[linux/amd64, linux/arm64]"

    def rows() -> list[Any]:
        told = memory.forecast(both)["stages"]
        return [row for row in told if row["stage"] == "health check"]

    first, second = rows()
    assert first["why"] == "healthcheck for linux/amd64 is made once: a minute"
    assert second["why"] == "healthcheck for linux/arm64 is made once: a minute"
    assert first["disk_bytes"] == 500_000_000

    def refused(engine: str, platform: str) -> None:
        raise EnvironmentFailure(f"{engine} for {platform}: no compiler", hint="a wheel")

    monkeypatch.setattr(memory, "_check_engine_files", refused)
    with pytest.raises(
        EnvironmentFailure,
        match=r"healthcheck for linux/amd64: no compiler|llamacpp for linux/arm64: no",
    ):
        rows()
    monkeypatch.undo()
    memory.build(both)
    assert [row["cached"] for row in rows()] == [True, True]


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
    files = files_of(fat)
    assert files[PROGRAM] == b"healthcheck-weights, a program for linux/amd64"
    assert json.loads(files[WEIGHTS])["files"] == [
        {"path": f"/{name}", "size": len(data), "begins": sha256(data[: 1 << 20]).hexdigest()}
        for name, data in sorted(files.items())
        if name.endswith(".safetensors")
    ]
    assert WEIGHTS not in files_of(thin)  # it compares whole files where it merges them
    assert program_of(volume) == []
    for folder in ("", "thin"):
        assert "--replay" in startup_probe(memory, "vllm", folder)["exec"]["command"]
    assert "exec" not in startup_probe(memory, "vllm", "volume")


def test_a_volume_for_a_platform_that_has_no_image_has_no_program(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightsmith.stages.bake.DEFAULT_PLATFORM", "linux/s390x")
    memory.build("outputs.kinds=[image, volume]", push=True)

    volume = pulled(memory, f"1.0.0-{TARGET}-volume")
    assert (program_of(volume), volume.platform) == ([], "linux/s390x")


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
    assert error.value.hint == "name a mirror"
    memory.use_vllm("vllm", serve={"gpu": "nvidia-h100", "max_model_len": 512})
    with pytest.raises(EnvironmentFailure, match="no index answers") as error:
        memory.build()
    assert "replay: {probe: false}" in error.value.hint
    assert "job merge" not in memory.journal.events  # it is asked for before any long step
