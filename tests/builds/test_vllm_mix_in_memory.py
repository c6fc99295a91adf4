"""Builds in memory of a mix for vLLM: what is measured again, planned and refused."""

import re
from dataclasses import replace

import pytest
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.jobs import QuantizeJob

from tests.fakes.memory import Memory

TARGET = "vllm-mix"


@pytest.fixture
def vllm(memory: Memory) -> Memory:
    memory.use_vllm(TARGET)
    return memory


def pass_of(memory: Memory) -> QuantizeJob:
    (found,) = (job for job in memory.runner.jobs if isinstance(job, QuantizeJob))
    return found


def test_losses_are_measured_once_for_all_budgets(vllm: Memory) -> None:
    vllm.build("quantize.bits=9")
    first = pass_of(vllm)
    vllm.build("quantize.bits=10")
    second = pass_of(vllm)

    assert (first.builder, first.format) == ("gguf", "mix-compressed")
    assert first.options == {"imatrix": "walk", "bits": 9, "about": first.options["about"]}
    assert first.texts
    assert (first.statistics, first.losses) == (None, None)
    assert second.texts == ()
    assert None not in (second.statistics, second.losses)
    assert vllm.record(TARGET)["recipe"]["quantize"]["bits"] == 10


def test_losses_are_not_those_of_llamacpps_types(vllm: Memory) -> None:
    vllm.build("quantize.bits=9")
    engine = replace(pass_of(vllm)).losses
    vllm.write_recipe(targets=["llamacpp-mix"])
    vllm.build("quantize.bits=9")

    assert engine is None
    assert pass_of(vllm).losses is None
    assert pass_of(vllm).statistics is not None


def test_a_plan_has_the_size_of_the_budget(vllm: Memory) -> None:
    few = vllm.planned("quantize", "quantize.bits=9")
    many = vllm.planned("quantize", "quantize.bits=12")

    assert few["write_bytes"] < many["write_bytes"]
    plan = vllm.forecast("quantize.bits=9")["serving"][TARGET]
    whole = vllm.forecast(targets=["vllm"])["serving"]["vllm"]
    assert plan["weight_bytes"] == pytest.approx(whole["weight_bytes"] * 9 / 16, rel=0.01)


def test_a_mix_fits_the_gpu_beside_the_cache_that_is_wanted(vllm: Memory) -> None:
    gpu = ("quantize.fit=gpu", "serve.gpu_memory=4GiB")
    plan = vllm.forecast(*gpu)["serving"][TARGET]

    assert plan["fits"]
    assert any(note.startswith("quantize.fit: ") for note in plan["notes"])


@pytest.mark.parametrize(
    ("settings", "error", "why"),
    [
        ((), UsageError, "the format mix needs a budget"),
        (("quantize.bits=9", "quantize.size=1MB"), UsageError, "cannot be combined"),
        (("quantize.bits=4",), UsageError, "4 is not between 4.125"),
        (("quantize.bits=9", "quantize.keep=[o_proj]"), UsageError, "keep is not supported by"),
        (("quantize.size=1KB",), InputRefused, "quantize.size: no mix of this model has"),
        (("quantize.bits=4.2",), InputRefused, "quantize.bits: no mix of this model has"),
        (("quantize.fit=gpu",), UsageError, "gpu needs the GPU"),
        (("quantize.fit=gpu", "serve.gpu_memory=1GiB"), UsageError, "and the smallest mix of"),
        (("quantize.mix=none.json",), InputRefused, "cannot read"),
    ],
)
def test_what_makes_no_mix_is_refused_before_any_job(
    vllm: Memory, settings: tuple[str, ...], error: type[Exception], why: str
) -> None:
    before = vllm.seen()
    for ask in (vllm.build, vllm.forecast):
        with pytest.raises(error, match=re.escape(why)):
            ask(*settings)
    assert vllm.jobs() == []
    assert vllm.seen() == before
