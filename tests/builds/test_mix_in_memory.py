"""Builds in memory of a mix, for both engines: what is measured again, planned and refused."""

from __future__ import annotations

import json
import re

import pytest
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.jobs import QuantizeJob

from tests.fakes.baking import ENGINE, push_base
from tests.fakes.memory import Memory

TARGET = "llamacpp-mix"
VLLM = "vllm-mix"
TYPES = {"output.weight": "Q8_0", "blk.0.attn_q.weight": "Q4_K"}


@pytest.fixture(params=[TARGET, VLLM])
def target(request: pytest.FixtureRequest, memory: Memory) -> str:
    if request.param == VLLM:
        memory.use_vllm(VLLM)
    else:
        memory.write_recipe(targets=[TARGET])
    return str(request.param)


def pass_of(memory: Memory) -> QuantizeJob:
    (found,) = (job for job in memory.runner.jobs if isinstance(job, QuantizeJob))
    return found


def test_losses_are_measured_once_for_all_budgets(memory: Memory, target: str) -> None:
    memory.build("quantize.bits=9")
    first = pass_of(memory)
    memory.build("quantize.bits=9.5")
    second = pass_of(memory)

    assert (first.builder, first.format) == ("gguf", "mix" + "-compressed" * (target == VLLM))
    assert first.options == {"imatrix": "walk", "bits": 9, "about": first.options["about"]}
    assert first.texts
    assert (first.statistics, first.losses) == (None, None)
    assert second.options["bits"] == 9.5
    # Integers are calibrated for each mix.
    assert bool(second.texts) == (target == VLLM)
    assert None not in (second.statistics, second.losses)
    assert memory.record(target)["recipe"]["quantize"]["bits"] == 9.5


def test_losses_are_not_those_of_the_other_engines_types(memory: Memory) -> None:
    memory.use_vllm(VLLM)
    memory.build("quantize.bits=9")
    memory.write_recipe(targets=[TARGET])
    memory.build("quantize.bits=9")

    assert pass_of(memory).losses is None
    assert pass_of(memory).statistics is not None


def test_importance_is_shared_with_other_types(memory: Memory) -> None:
    memory.build("quantize.imatrix=walk", targets=["llamacpp-q4_k_m"])
    memory.build("quantize.size=1MB", targets=[TARGET])

    assert pass_of(memory).options["size"] == 10**6
    assert pass_of(memory).statistics is not None
    assert pass_of(memory).losses is None
    assert pass_of(memory).texts


@pytest.mark.parametrize("changed", ["quantize.imatrix='off'", "quantize.allow_low_bits=true"])
def test_losses_are_of_an_importance_and_of_some_types(memory: Memory, changed: str) -> None:
    memory.build("quantize.bits=5", targets=[TARGET])
    memory.build("quantize.bits=5", changed, targets=[TARGET])

    assert pass_of(memory).losses is None


def test_the_mix_of_another_build_needs_no_text_but_for_importance(memory: Memory) -> None:
    memory.bench.quantized = {"tensor_types": TYPES}
    memory.build("quantize.bits=5", targets=[TARGET])
    earlier = memory.results(TARGET) / "build.json"
    (memory.home / "mix.json").write_text(earlier.read_text())
    memory.build("quantize.mix=mix.json", targets=[TARGET])

    assert pass_of(memory).options["mix"] == {k: kind.lower() for k, kind in sorted(TYPES.items())}
    assert pass_of(memory).losses is None
    assert pass_of(memory).texts == ()
    other = {**pass_of(memory).options["mix"], "output.weight": "q4_0"}
    (memory.home / "mix.json").write_text(json.dumps({"tensor_types": other}))
    memory.build("quantize.mix=mix.json", targets=[TARGET])
    assert pass_of(memory).options["mix"] == other


def planned_bytes(memory: Memory, *settings: str, **wanted: list[str]) -> int:
    (plan,) = memory.forecast(*settings, **wanted)["serving"].values()
    return int(plan["weight_bytes"])


def test_a_plan_has_the_size_of_the_budget(memory: Memory, target: str) -> None:
    whole = planned_bytes(memory, targets=["vllm" if target == VLLM else "llamacpp-f16"])
    found = planned_bytes(memory, "quantize.bits=8.4")

    assert found == pytest.approx(whole * 8.4 / 16, rel=0.01)
    if target != VLLM:  # Q8_0 is the largest of its types
        for most in ("quantize.bits=16", "quantize.size=99999TB"):
            assert planned_bytes(memory, most) == pytest.approx(whole * 8.5 / 16, rel=0.01)
    assert planned_bytes(memory, f"quantize.size={found}B") == pytest.approx(found, rel=0.01)


def test_a_plan_has_about_the_size_of_a_given_mix(memory: Memory, target: str) -> None:
    name = "model.layers.0.mlp.down_proj" if target == VLLM else "blk.0.ffn_down.weight"
    sizes = []
    for kind in ("int4-32", "fp8") if target == VLLM else ("q4_0", "q8_0"):
        (memory.home / "mix.json").write_text(json.dumps({"tensor_types": {name: kind}}))
        sizes.append(memory.planned("quantize", "quantize.mix=mix.json")["write_bytes"])

    assert sizes[0] < 0.9 * sizes[1]


GPU = ("quantize.fit=gpu", "serve.gpu_memory=2GiB")


def gpu_with(memory: Memory, room: int) -> tuple[str, str]:
    """Settings with a GPU that has so many bytes beside cache and overhead of the recipe."""
    plan = memory.forecast(*GPU, targets=[TARGET])["serving"][TARGET]
    taken = plan["overhead_bytes"] + plan["kv_bytes_total"]
    return GPU[0], f"serve.gpu_memory={-(-(taken + room) * 20 // 19)}B"  # a twentieth is held back


def test_a_mix_fits_the_gpu_beside_the_cache_that_is_wanted(memory: Memory) -> None:
    wanted = gpu_with(memory, 400_000)
    plan = memory.forecast(*wanted, targets=[TARGET])["serving"][TARGET]
    row = memory.planned("quantize", *wanted, targets=[TARGET])
    fewer = memory.planned("quantize", *wanted, "serve.max_num_seqs=1", targets=[TARGET])

    assert plan["fits"]
    assert any(note.startswith("quantize.fit: 390.") for note in plan["notes"])
    assert 399_990 < plan["weight_bytes"] <= 400_001
    # With the cache of another request, there is room for the largest of its types.
    most = memory.planned("quantize", "quantize.bits=16", targets=[TARGET])
    assert row["write_bytes"] < fewer["write_bytes"] == most["write_bytes"]
    assert most["write_bytes"] < row["write_bytes"] + plan["kv_bytes_per_request"]


def test_a_mix_that_fits_is_made_again_only_for_another_room(memory: Memory) -> None:
    engine = f"image.base={memory.registry.host}/engines/llama.cpp:1"
    push_base(memory.client, engine.partition("=")[2], ENGINE, {"app/llama-server": b"1"})
    wanted = gpu_with(memory, 400_000)
    memory.build(*wanted, engine, targets=[TARGET])
    size = pass_of(memory).options["size"]
    assert memory.record(TARGET)["recipe"]["quantize"]["fit"] == "gpu"
    memory.build(*wanted, engine, "serve.served_model_name=x", targets=[TARGET])
    assert memory.jobs() == []
    memory.build(*wanted, engine, "serve.max_num_seqs=1", targets=[TARGET])
    assert pass_of(memory).options["size"] > size


def test_a_mix_for_vllm_fits_the_gpu_too(memory: Memory) -> None:
    memory.use_vllm(VLLM)
    whole = memory.forecast("serve.gpu_memory=4GiB", targets=["vllm"])["serving"]["vllm"]
    taken = whole["overhead_bytes"] + whole["kv_bytes_total"]
    wanted = (taken + 600_000) * 4 * 2**30 // whole["usable_bytes"]
    plan = memory.forecast(GPU[0], f"serve.gpu_memory={wanted}B")["serving"][VLLM]

    assert plan["fits"]
    assert 590_000 < plan["weight_bytes"] <= 600_001
    assert any(note.startswith("quantize.fit: ") for note in plan["notes"])


OF_BOTH = (
    ((), UsageError, "the format mix needs a budget"),
    (("quantize.bits=9", "quantize.size=1MB"), UsageError, "cannot be combined"),
    (("quantize.size=1KB",), InputRefused, "quantize.size: no mix of this model has"),
    (("quantize.size=0MB",), UsageError, "quantize.size: no weights have 0MB"),
    (("quantize.bits=9", "quantize.tensor_types={a: q8_0}"), UsageError, "tensor_types is not"),
    (("quantize.fit=gpu",), UsageError, "gpu needs the GPU"),
    (("quantize.fit=gpu", "serve.gpu=cpu-amx"), UsageError, "gpu needs the GPU"),
    ((*GPU, "serve.max_model_len=auto"), UsageError, "gpu needs the length of a request"),
    ((*GPU, "quantize.bits=9"), UsageError, "quantize.bits and quantize.fit cannot be"),
    (("quantize.fit=gpu", "serve.gpu_memory=600MiB"), UsageError, "and the smallest mix of"),
    (("quantize.mix=none.json",), InputRefused, "cannot read"),
    (("quantize.mix=deeper.json",), InputRefused, "a type for layer 1, and this one has 1 layers"),
    (("quantize.mix=head.json",), InputRefused, "no type for layer 0, and this one has 1 layers"),
    (("quantize.bits=9", "quantize.imatrix=none.gguf"), InputRefused, "no such importance"),
)
OF_ONE = {
    TARGET: ((("quantize.bits=4",), UsageError, "4 is not between 4.25"),),
    VLLM: (
        (("quantize.bits=4",), UsageError, "4 is not between 4.125"),
        (("quantize.bits=9", "quantize.keep=[o_proj]"), UsageError, "keep is not supported by"),
        (("quantize.bits=4.2",), InputRefused, "quantize.bits: no mix of this model has"),
        (("quantize.size=1GB",), InputRefused, "room for all weights in 16 bits"),
        ((GPU[0], "serve.gpu_memory=80GiB"), InputRefused, "room for all weights in 16 bits"),
    ),
}


def test_what_makes_no_mix_is_refused_before_any_job(memory: Memory, target: str) -> None:
    layer = {TARGET: "blk.{}.attn_q.weight", VLLM: "model.layers.{}.self_attn.o_proj"}[target]
    kind = "q8_0" if target == TARGET else "fp8"
    for name, matrices in (("deeper", [*map(layer.format, (0, 1))]), ("head", ["output.weight"])):
        types = {"tensor_types": dict.fromkeys(matrices, kind)}
        (memory.home / f"{name}.json").write_text(json.dumps(types))
    before = memory.seen()
    for settings, error, why in (*OF_BOTH, *OF_ONE[target]):
        for ask in (memory.build, memory.forecast):
            with pytest.raises(error, match=re.escape(why)):
                ask(*settings)
    assert memory.jobs() == []
    assert memory.seen() == before


def test_other_formats_pay_no_heed_to_a_budget(memory: Memory) -> None:
    memory.build(targets=["llamacpp-q4_k_m"])
    memory.build("quantize.bits=5", targets=["llamacpp-q4_k_m"])

    assert memory.jobs() == []
