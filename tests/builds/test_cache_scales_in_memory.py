"""Builds in memory with an fp8 KV cache: who gets calibrated scales, and what is said to others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from safetensors.numpy import load
from weightsmith.api.commands.upload import push_to_hub
from weightsmith.core.errors import EnvironmentFailure, InputRefused
from weightsmith.core.jobs import CacheScalesJob
from weightsmith.stages.upload import HubDestination
from weightsmith.steps.tools import JobMemory

from tests.fakes.cache import MemoryCache
from tests.fakes.hub import writable_hub
from tests.fakes.memory import Memory

WANTED = "serve.kv_cache_dtype=fp8"
SCHEME = {
    "num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False,
}  # fmt: skip


@pytest.fixture
def calibrated(memory: Memory) -> Memory:
    """A recipe with calibration text."""
    text = "The lamp blinks twice while it starts and once when it is ready. " * 3
    rows = [json.dumps({"text": f"{number}: {text}"}) for number in range(12)]
    (memory.home / "texts.jsonl").write_text("\n".join(rows))
    memory.write_recipe(calibration={"data": "texts.jsonl"})
    return memory


def files(memory: Memory, target: str) -> Mapping[str, bytes]:
    """The model's files in the image."""
    return memory.engine.held(f"{memory.repository}:1.0.0-{target}").files()


def test_a_16_bit_checkpoint_gets_scales_beside_its_weights(calibrated: Memory) -> None:
    """Formats of one checkpoint share the measurement."""
    calibrated.build(targets=["vllm"])
    before = files(calibrated, "vllm")
    calibrated.build(WANTED, "image.labels.a=b", targets=["vllm", "vllm-fp8"])
    after = files(calibrated, "vllm")

    assert calibrated.jobs().count("cache-scales") == 1
    assert load(after["/models/kv-cache-scales.safetensors"]) == {
        "model.layers.0.self_attn.k_scale": 0.5,
        "model.layers.0.self_attn.v_scale": 0.25,
    }
    config = json.loads(after["/models/config.json"])
    assert config.pop("quantization_config") == {
        "quant_method": "compressed-tensors", "format": "dense", "config_groups": {},
        "quantization_status": "compressed", "ignore": [], "kv_cache_scheme": SCHEME,
    }  # fmt: skip
    assert config == json.loads(before["/models/config.json"])
    weights = {name for name in before if name.endswith(".safetensors")}
    assert len(weights) == 10
    assert all(after[name] == before[name] for name in weights)
    index = json.loads(after["/models/model.safetensors.index.json"])["weight_map"]
    assert index["model.layers.0.self_attn.k_scale"] == "kv-cache-scales.safetensors"


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("vllm-awq", "AWQ changes the scale"),
        ("vllm-gptq-v1", "from the layout of GPTQ's own tools"),
        ("vllm-lora", "adapters are not merged"),
    ],
)
def test_what_vllm_cannot_read_is_said_or_refused(
    calibrated: Memory, target: str, why: str
) -> None:
    assert planned(calibrated, target=target) == {}
    (said,) = [said for said in calibrated.progress.warnings if "fp8 cache has scale 1.0" in said]
    assert said.startswith(f"{target}: ")
    assert why in said
    calibrated.build(WANTED, targets=[target])
    assert "cache-scales" not in calibrated.jobs()
    assert any(why in said for said in calibrated.progress.warnings)

    with pytest.raises(InputRefused, match=why):
        calibrated.build(WANTED, "serve.kv_cache_scales=calibrated", targets=[target])


@pytest.mark.parametrize("dequantized", [False, True])
def test_a_quantized_base_is_measured_only_once_it_is_dequantized(
    calibrated: Memory, dequantized: bool
) -> None:
    config = calibrated.home / "base" / "config.json"
    packed = {"quantization_config": {"quant_method": "compressed-tensors"}}
    config.write_text(json.dumps({**json.loads(config.read_text()), **packed}))
    calibration = {"data": "texts.jsonl"}
    if dequantized:
        calibrated.write_recipe(calibration=calibration)
    else:
        calibrated.write_recipe(calibration=calibration, evaluate=None, adapters=[])
    calibrated.build(WANTED, "merge.quantized_base=dequantize", targets=["vllm"])

    said = any("the base is already quantized" in text for text in calibrated.progress.warnings)
    assert ("cache-scales" in calibrated.jobs()) == dequantized == (not said)


def test_without_calibration_text_or_if_the_recipe_says_so_the_scale_is_one(
    memory: Memory,
) -> None:
    memory.write_recipe(calibration=None)
    memory.build(WANTED, targets=["vllm"])
    assert any("the recipe has no `calibration`" in said for said in memory.progress.warnings)
    assert "cache-scales" not in memory.jobs()

    memory.write_recipe()
    memory.build(WANTED, "serve.kv_cache_scales=none", targets=["vllm"])
    assert "cache-scales" not in memory.jobs()


def test_text_that_cannot_be_measured_stops_only_who_demands_scales(calibrated: Memory) -> None:
    def refuse(job: CacheScalesJob, report: object) -> Mapping[str, Any]:
        raise InputRefused("the calibration text has 200 tokens", hint="add texts")

    calibrated.runner.stages = {**calibrated.runner.stages, "cache-scales": refuse}
    calibrated.build(WANTED, targets=["vllm"])
    assert "/models/kv-cache-scales.safetensors" not in files(calibrated, "vllm")
    said = "the fp8 cache has scale 1.0: the calibration text has 200 tokens"
    assert said in calibrated.progress.warnings

    with pytest.raises(InputRefused, match="has 200 tokens"):
        calibrated.build(WANTED, "serve.kv_cache_scales=calibrated", targets=["vllm"])


def test_weights_in_a_shared_cache_stay_there(calibrated: Memory) -> None:
    calibrated.cache = MemoryCache()
    (first,) = calibrated.build(WANTED, targets=["vllm-fp8"], push=True).values()
    calibrated.store.entries.clear()
    (second,) = calibrated.build(WANTED, targets=["vllm-fp8"], push=True).values()

    assert second.published.digest == first.published.digest
    assert not [one for one in calibrated.store.entries.values() if one.tree.weight_bytes]


@pytest.mark.parametrize("target", ["vllm", "vllm-fp8"])
def test_a_builds_results_are_published_with_their_scales(
    calibrated: Memory, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """From the store: an image that is only in an engine cannot be read."""
    calibrated.build(WANTED, targets=[target])
    with writable_hub(monkeypatch) as hub:
        results = str(calibrated.results(target))
        push_to_hub(results, HubDestination(repository="team/bot"), calibrated.tools)
        found = hub.repositories["team/bot"].files

    built = files(calibrated, target)
    assert "kv-cache-scales.safetensors" in found
    assert found["kv-cache-scales.safetensors"] == built["/models/kv-cache-scales.safetensors"]
    assert found["config.json"] == built["/models/config.json"]


def planned(memory: Memory, *settings: str, target: str) -> dict[str, Any]:
    return memory.planned("cache-scales", WANTED, *settings, targets=[target])


def test_the_plan_has_the_stage_with_its_memory_and_disk(calibrated: Memory) -> None:
    before = planned(calibrated, target="vllm")

    assert (before["target"], before["cached"]) == ("vllm", False)
    assert before["why"] == "merge comes first"
    assert before["peak_memory_bytes"] > 380 << 20
    files = sum(one.stat().st_size for one in (calibrated.home / "base").iterdir())
    assert before["read_bytes"] == files
    weights = (calibrated.home / "base" / "model.safetensors").stat().st_size
    assert before["write_bytes"] == files - weights

    calibrated.build(targets=["vllm"])
    assert planned(calibrated, target="vllm")["why"].startswith("measured on the checkpoint, ")
    calibrated.build(WANTED, targets=["vllm"])
    after = planned(calibrated, target="vllm")
    assert (after["cached"], after["why"]) == (True, "")


def test_a_build_without_the_memory_to_measure_ends_before_any_work(calibrated: Memory) -> None:
    settings = (WANTED, "validate.enabled=false", "evaluate=null")
    needed = planned(calibrated, *settings, target="vllm")["peak_memory_bytes"]
    calibrated.room = JobMemory(budget=needed // 2, limit=needed - 1)

    with pytest.raises(EnvironmentFailure, match="cache-scales vllm needs") as caught:
        calibrated.build(*settings, targets=["vllm"])
    assert "set serve.kv_cache_scales to none" in caught.value.hint
    assert calibrated.jobs() == []
