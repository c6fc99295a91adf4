"""What is planned for well-known models on well-known GPUs, one readable page per model.

UPDATE_GOLDEN=1 writes the pages anew; then read the difference. The invariants are checked on every
row, so that a page cannot be updated into nonsense.
"""

import json
import os
from pathlib import Path

import pytest

from toolchain.errors import InputRefused, UsageError
from toolchain.planning import all_targets, estimated_bytes
from toolchain.serving.engine import Wishes
from toolchain.serving.gpus import GPUS
from toolchain.serving.memory import human

GOLDEN = Path(__file__).parents[2] / "golden"
MODELS = sorted(path.stem for path in (GOLDEN / "models").glob("*.json"))
MACHINES = {
    "L4": ("nvidia-l4", 1),
    "A10G": ("nvidia-a10g", 1),
    "A100 80GB": ("nvidia-a100-80gb", 1),
    "2 x H100": ("nvidia-h100-80gb", 2),
    "8 x H100": ("nvidia-h100-80gb", 8),
    "H200": ("nvidia-h200-141gb", 1),
}
PACKED = {"gpt-oss-20b": ("vllm", "sglang", "trtllm"), "deepseek-v3": ("vllm-fp8", "sglang-fp8")}
TARGETS = ("vllm", "vllm-awq", "vllm-fp8", "tgi", "sglang", "trtllm", "llamacpp-q4_k_m")
LENGTH = 8192


def model(name):
    return json.loads((GOLDEN / "models" / f"{name}.json").read_text("utf-8"))


def planned(name, target, machine, **wishes):
    """Return (plan, error): one of them is None."""
    facts, (gpu, count) = model(name), MACHINES[machine]
    target = all_targets()[target]
    size = facts["weight_bytes"]
    if name not in PACKED:
        size = estimated_bytes(size, target.format, facts["config"])
    asked = Wishes(gpu=gpu, gpu_count=count, format=target.format, **wishes)
    try:
        return target.engine.plan(facts["config"], size, asked), None
    except (UsageError, InputRefused) as error:
        return None, error


def cells(name, target, machine):
    plan, error = planned(name, target, machine)
    if error is not None:
        told = error.details.get("plan")
        ways = [way["text"] for way in told.nearest] if told else [error.message]
        return f"| {target} | {machine} | | | | | no: {'; '.join(ways) or 'no way found'} |"
    fixed, _ = planned(name, target, machine, max_model_len=LENGTH)
    at_once = fixed.max_num_seqs if fixed else "none"
    split = (
        f"{plan.tensor_parallel_size} x {plan.pipeline_parallel_size}, " if plan.gpus > 1 else ""
    )
    layers = "" if plan.fits else f", {plan.gpu_layers} layers on the GPU"
    return (
        f"| {target} | {machine} | {human(plan.weights_bytes_per_gpu)} |"
        f" {human(plan.kv_cache_bytes)} | {plan.max_model_len} x {plan.max_num_seqs} | {at_once} |"
        f" {split}{human(plan.kv_bytes_per_request)} a request{layers} |"
    )


def page(name):
    head = (
        f"# {name}\n\n`auto` is the longest request that fits, and how many of it; {LENGTH}: how"
        " many of that length. Sizes are per GPU.\n\n"
        f"| target | on | weights | for the cache | auto | at {LENGTH} | |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    rows = [
        cells(name, target, machine) for target in PACKED.get(name, TARGETS) for machine in MACHINES
    ]
    return head + "\n".join(rows) + "\n"


@pytest.mark.parametrize("name", MODELS)
def test_plans_are_as_before(name):
    path = GOLDEN / "plans" / f"{name}.md"
    text = page(name)
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path.write_text(text, "utf-8")

    assert path.read_text("utf-8") == text


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_planned_fits_and_grows_with_what_is_given(name, machine):
    for target in PACKED.get(name, TARGETS):
        plan, error = planned(name, target, machine)
        if plan is None:
            assert error.exit_code in {2, 3}
            continue
        if not plan.fits:
            assert plan.gpu_layers < model(name)["config"].get("num_hidden_layers", 62)
            continue
        gpus, whole = plan.gpus, GPUS[plan.device].usable_bytes
        each = plan.weights_bytes_per_gpu + plan.kv_cache_bytes + plan.overhead_bytes // gpus
        assert each + plan.margin_bytes <= whole + gpus
        assert plan.kv_bytes_total <= plan.kv_cache_bytes * gpus + gpus
        assert plan.max_num_seqs <= plan.max_concurrency
        half, _ = planned(name, target, machine, max_model_len=max(256, plan.max_model_len // 2))
        assert half is not None
        assert half.max_num_seqs >= plan.max_num_seqs
        one, _ = planned(name, target, machine, max_num_seqs=1)
        two, _ = planned(name, target, machine, max_num_seqs=2)
        assert two is None or one.max_model_len >= two.max_model_len
