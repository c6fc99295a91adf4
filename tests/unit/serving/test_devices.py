"""A CPU with AMX is planned and rendered as any CPU; only its name differs."""

from dataclasses import replace

import pytest
from weightsmith.core.errors import UsageError
from weightsmith.serving import engines
from weightsmith.serving.devices import AMX, CPU, CPUS, GPUS, gpu, is_cpu, named_gpu
from weightsmith.serving.engine import ServeOptions
from weightsmith.serving.memory import GIB
from weightsmith.steps.bases import base_reference

from tests.fakes import rendering
from tests.fakes.configs import LLAMA_8B, LLAMA_8B_BYTES, facts

ON_CPUS = ["vllm", "llamacpp-q4_k_m"]
WISHES = {"max_model_len": 4096, "max_num_seqs": 2, "host_memory_bytes": 64 * GIB}


def test_cpus_and_gpus_are_told_apart() -> None:
    assert all(is_cpu(name) and named_gpu(name) is None for name in CPUS)
    assert not any(is_cpu(name) for name in ("", "gpu", *GPUS))
    assert named_gpu("") is None
    assert named_gpu("l4") == GPUS["nvidia-l4"]


# MiB that `nvidia-smi --query-gpu=memory.total` prints with drivers 570 to 610, and of AMD's cards
# what PyTorch's errors say ("total capacity of 287.98 GiB"), in published logs.
REPORTED = {
    "nvidia-t4": 15_360, "nvidia-l4": 23_034, "nvidia-l40s": 46_068, "nvidia-a100-80gb": 81_920,
    "nvidia-a100-40gb": 40_960, "nvidia-h100-80gb": 81_559, "nvidia-h200-141gb": 143_771,
    "nvidia-b200": 183_359, "nvidia-gb200": 189_471, "nvidia-b300": 275_040,
    "nvidia-gb300": 284_208, "nvidia-rtx-4090": 24_564, "nvidia-rtx-pro-5000": 48_935,
    "nvidia-rtx-pro-6000": 97_887, "amd-mi325x": 262_124, "amd-mi355x": 294_892,
}  # fmt: skip


@pytest.mark.parametrize("name", REPORTED)
def test_a_process_sees_a_little_less_than_drivers_report(name: str) -> None:
    seen = GPUS[name].usable_bytes >> 20

    assert 0.975 * REPORTED[name] < seen <= REPORTED[name]


@pytest.mark.parametrize(
    ("name", "near"),
    [("cpu_amx", "cpu-amx"), ("CPU-AMX", "cpu-amx"), ("nvidia-l44", "nvidia-l4")],
)
def test_an_unknown_gpu_gets_near_misses_and_a_way_out(name: str, near: str) -> None:
    with pytest.raises(UsageError, match="unknown GPU") as refused:
        gpu(name)
    assert f"did you mean {near}" in refused.value.hint
    assert "--gpu-memory" in refused.value.hint


@pytest.mark.parametrize("target", ON_CPUS)
def test_a_plan_differs_by_the_device_s_name_alone(target: str) -> None:
    plain = rendering.rendered(target, **WISHES)
    named = rendering.rendered(target, gpu=CPU, **WISHES)
    amx = rendering.rendered(target, gpu=AMX, **WISHES)

    assert named == plain
    assert amx.plan == replace(plain.plan, device=AMX)
    assert amx.plan.portable() == {**plain.plan.portable(), "device": AMX}
    assert (amx.env, amx.command, amx.healthcheck) == (plain.env, plain.command, plain.healthcheck)
    assert amx.files.keys() == plain.files.keys()
    for name, text in plain.files.items():
        # Where the device is named, and nowhere else.
        assert amx.files[name].replace(AMX, CPU) == text.replace(AMX, CPU), name


@pytest.mark.parametrize("engine", sorted(engines()))
def test_each_engine_takes_it_as_it_takes_any_cpu(engine: str) -> None:
    found, said = engines()[engine], []
    for name in (CPU, AMX):
        try:
            options = ServeOptions(gpu=name, **WISHES)
            planned = found.plan(facts(LLAMA_8B), LLAMA_8B_BYTES, options)
            said.append(str(replace(planned, device=CPU)))
        except UsageError as refused:
            said.append(f"{refused.message}; {refused.hint}")
    assert said[0] == said[1]
    if found.base.cpu:
        assert base_reference(found, AMX, "") == base_reference(found, CPU, "")
    else:
        with pytest.raises(UsageError, match="no base image for a cpu-amx"):
            base_reference(found, AMX, "")


def test_options_that_the_build_for_cpus_lacks_are_refused() -> None:
    for name in CPUS:
        with pytest.raises(UsageError, match="monokernel"):
            rendering.rendered("vllm", gpu=name, extra={"monokernel": True}, **WISHES)
    rendering.rendered("vllm", gpu="nvidia-l40s", extra={"monokernel": True}, **WISHES)


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("nvidia-l4", "nvidia-l4"),
        ("L4", "nvidia-l4"),
        ("h100", "nvidia-h100-80gb"),
        ("nvidia-h100", "nvidia-h100-80gb"),
        ("h200", "nvidia-h200-141gb"),
        ("RTX 4090", "nvidia-rtx-4090"),
        ("mi300x", "amd-mi300x"),
    ],
)
def test_finds_by_name_and_alias(name, full):
    assert gpu(name).name == full


def test_less_is_usable_than_the_board_has():
    nvidia = [card for card in GPUS.values() if card.name.startswith("nvidia")]

    assert all(0.88 * card.total_bytes < card.usable_bytes for card in nvidia)
    assert all(card.usable_bytes < 1.02 * card.total_bytes for card in GPUS.values())


def test_number_formats_follow_the_compute_capability():
    assert (gpu("t4").bf16, gpu("t4").fp8) == (False, False)
    assert (gpu("a100-80gb").bf16, gpu("a100-80gb").fp8) == (True, False)
    assert (gpu("l4").bf16, gpu("l4").fp8) == (True, True)
    generations = {"t4": "Turing", "h200": "Hopper", "GB300": "Blackwell Ultra", "mi355x": "CDNA 4"}
    assert {name: gpu(name).generation for name in generations} == generations
    assert all(card.generation for card in GPUS.values())
