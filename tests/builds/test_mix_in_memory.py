"""Builds in memory of a mix of types: what is measured again, planned and refused."""

from __future__ import annotations

import json
import re

import pytest
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.jobs import QuantizeJob

from tests.fakes.baking import ENGINE, push_base
from tests.fakes.memory import Memory

TARGET = "llamacpp-mix"
TYPES = {"output.weight": "Q8_0", "blk.0.attn_q.weight": "Q4_K"}


def pass_of(memory: Memory) -> QuantizeJob:
    (found,) = (job for job in memory.runner.jobs if isinstance(job, QuantizeJob))
    return found


def test_losses_are_measured_once_for_all_budgets(memory: Memory) -> None:
    memory.build("quantize.bits=5", targets=[TARGET])
    first = pass_of(memory)
    memory.build("quantize.bits=4.5", targets=[TARGET])
    second = pass_of(memory)

    assert first.options == {"imatrix": "walk", "bits": 5, "about": first.options["about"]}
    assert first.texts
    assert (first.statistics, first.losses) == (None, None)
    assert second.options["bits"] == 4.5
    assert second.texts == ()
    assert None not in (second.statistics, second.losses)
    assert memory.record(TARGET)["recipe"]["quantize"]["bits"] == 4.5


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
    (memory.home / "mix.json").write_text(json.dumps({"tensor_types": {"output.weight": "q4_0"}}))
    memory.build("quantize.mix=mix.json", targets=[TARGET])
    assert pass_of(memory).options["mix"] == {"output.weight": "q4_0"}


def test_a_plan_has_the_size_of_the_budget(memory: Memory) -> None:
    few = memory.planned("quantize", "quantize.bits=4.5", targets=[TARGET])
    many = memory.planned("quantize", "quantize.bits=9", targets=[TARGET])
    sized = memory.planned("quantize", f"quantize.size={few['write_bytes']}B", targets=[TARGET])

    assert many["write_bytes"] == pytest.approx(2 * few["write_bytes"], abs=2)
    assert sized["write_bytes"] == pytest.approx(few["write_bytes"], rel=0.01)


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
    assert fewer["write_bytes"] >= row["write_bytes"] + plan["kv_bytes_per_request"]


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


@pytest.mark.parametrize(
    ("settings", "error", "why"),
    [
        ((), UsageError, "the format mix needs a budget"),
        (("quantize.bits=4", "quantize.size=1MB"), UsageError, "cannot be combined"),
        (("quantize.bits=4",), UsageError, "4 is not between 4.25"),
        (("quantize.bits=5", "quantize.tensor_types={a: q8_0}"), UsageError, "tensor_types is not"),
        (("quantize.size=1KB",), InputRefused, "no mix of this model has"),
        (("quantize.fit=gpu",), UsageError, "gpu needs the GPU"),
        (("quantize.fit=gpu", "serve.gpu=cpu-amx"), UsageError, "gpu needs the GPU"),
        ((*GPU, "serve.max_model_len=auto"), UsageError, "gpu needs the length of a request"),
        ((*GPU, "quantize.bits=5"), UsageError, "quantize.bits and quantize.fit cannot be"),
        ((*GPU, "quantize.size=1MB"), UsageError, "quantize.size and quantize.fit cannot be"),
        (("quantize.fit=gpu", "serve.gpu_memory=600MiB"), UsageError, "and the smallest mix of"),
        (("quantize.mix=none.json",), InputRefused, "cannot read"),
        (("quantize.bits=5", "quantize.imatrix=none.gguf"), InputRefused, "no such importance"),
    ],
)
def test_what_makes_no_mix_is_refused_before_any_job(
    memory: Memory, settings: tuple[str, ...], error: type[Exception], why: str
) -> None:
    for ask in (memory.build, memory.forecast):
        with pytest.raises(error, match=re.escape(why)):
            ask(*settings, targets=[TARGET])
    assert memory.jobs() == []
    assert memory.seen() == []


def test_other_formats_pay_no_heed_to_a_budget(memory: Memory) -> None:
    memory.build(targets=["llamacpp-q4_k_m"])
    memory.build("quantize.bits=5", targets=["llamacpp-q4_k_m"])

    assert memory.jobs() == []
