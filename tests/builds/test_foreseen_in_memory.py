"""A plan for a folder with only config.json has the sizes that it has with the weights there."""

from __future__ import annotations

import json

import pytest
from weightsmith.api.commands.plan import table
from weightsmith.building.explain import forecast
from weightsmith.core.errors import InputRefused

from tests.fakes.memory import Memory

TARGETS = ("llamacpp-q4_k_m", "vllm-awq", "vllm", "llamacpp-lora")
SIZES = ("read_bytes", "write_bytes", "peak_memory_bytes", "disk_bytes")


def planned(memory: Memory, *targets: str, adapters: bool = True, **more) -> dict:
    changes = {} if adapters else {"adapters": [], "evaluate": None}
    changes = {} if adapters else {"adapters": None}
    memory.write_recipe(targets=list(targets), **changes)
    request = memory.request()
    return dict(forecast(request.file, request.targets, memory.dist, memory.tools, **more))


def without_weights(memory: Memory) -> None:
    (memory.home / "base/model.safetensors").unlink()


@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_its_sizes_are_those_of_the_weights(memory: Memory, target: str, adapters: bool) -> None:
    if target.endswith("lora") and not adapters:
        pytest.skip("adapters are what it serves")
    here = planned(memory, target, adapters=adapters)
    without_weights(memory)
    away = planned(memory, target, adapters=adapters)

    stages = [(row["stage"], row["target"]) for row in here["stages"]]
    assert [(row["stage"], row["target"]) for row in away["stages"]] == stages
    for known, expected in zip(here["stages"], away["stages"], strict=True):
        for size in SIZES:
            # Headers and norms are left out, which count in a model of two megabytes.
            assert expected[size] == pytest.approx(known[size], rel=0.05, abs=20_000)
    assert away["serving"][target]["weight_bytes"] == pytest.approx(
        here["serving"][target]["weight_bytes"], rel=0.05
    )
    assert not any(row["cached"] for row in away["stages"])


def test_it_says_that_its_sizes_are_worked_out(memory: Memory) -> None:
    without_weights(memory)
    found = planned(memory, "llamacpp-q4_k_m")

    assert "worked out from config.json" in found["stages"][0]["why"]
    text = table(found)
    assert "by the files' size" not in text
    assert "note: no weights there: their size is worked out from config.json" in text


def test_it_is_measured(memory: Memory) -> None:
    without_weights(memory)
    found = planned(memory, "llamacpp-q4_k_m", measure=True)

    assert memory.jobs() == ["layer_time"]
    assert {row["stage"] for row in found["stages"] if row["seconds"]} >= {"validate", "quality"}


def test_an_index_says_it_exactly(memory: Memory) -> None:
    without_weights(memory)
    index = {"metadata": {"total_size": 7_000_000_000}, "weight_map": {}}
    (memory.home / "base/model.safetensors.index.json").write_text(json.dumps(index))
    found = planned(memory, "vllm")

    assert found["serving"]["vllm"]["weight_bytes"] == 3_500_000_000  # float32, served in 16 bits
    assert "model.safetensors.index.json's" in found["stages"][0]["why"]


def test_an_adapter_of_another_width_is_refused(memory: Memory) -> None:
    config = memory.home / "base/config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps({**told, "hidden_size": 512}))
    without_weights(memory)

    with pytest.raises(InputRefused, match=r"q_proj.* takes 256 inputs.* hidden size is 512"):
        planned(memory, "llamacpp-q4_k_m")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "fills gaps in texts"),
        ({"architectures": ["BartModel"], "is_encoder_decoder": True}, "an encoder with a decoder"),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "encoder"),
        ({"architectures": ["MambaForCausalLM"], "state_size": 16}, "keeps states alone"),
    ],
)
def test_what_no_target_serves_is_refused_by_what_it_is(
    memory: Memory, config: dict, says: str
) -> None:
    (memory.home / "base/config.json").write_text(json.dumps(config))
    without_weights(memory)

    with pytest.raises(InputRefused, match=says):
        planned(memory, "llamacpp-q4_k_m", adapters=False)


def test_weights_as_pickles_are_refused_as_in_a_build(memory: Memory) -> None:
    without_weights(memory)
    (memory.home / "base/pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputRefused, match=r"pytorch_model\.bin"):
        planned(memory, "llamacpp-q4_k_m")
