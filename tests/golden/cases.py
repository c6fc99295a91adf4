"""What the golden files are of: well-known models by their config.json, on well-known GPUs.

`make golden` writes plans/ and renders/ anew; then read the difference.
"""

import json
import os
from pathlib import Path

from weightsmith.building.targets import all_targets
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.values import Digest
from weightsmith.serving.engine import ServedAdapter, ServeOptions
from weightsmith.stages.render import render
from weightsmith.steps.sizes import estimated_bytes

from tests.fakes.configs import facts

GOLDEN = Path(__file__).parent
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
"""Models whose checkpoint is packed already -> the targets that serve it as it is."""
TARGETS = (
    "vllm",
    "vllm-awq",
    "vllm-fp8",
    "tgi",
    "sglang",
    "trtllm",
    "trtllm-fp8",
    "llamacpp-q4_k_m",
)

GIB = 1 << 30
IMAGE = f"registry.example.com/ml/support@{Digest.of(b'image')}"
TWO = (
    ServedAdapter(name="billing-v2", folder="adapters/billing-v2", rank=16),
    ServedAdapter(name="returns-v1", folder="adapters/returns-v1", rank=24),
)
RENDERS = {
    "vllm-8xh100": ("llama-3.1-70b", "vllm", {"gpu": "nvidia-h100-80gb", "gpu_count": 8}),
    "vllm-h200": ("gpt-oss-20b", "vllm", {"gpu": "nvidia-h200-141gb", "max_num_seqs": 16}),
    "vllm-awq-l4": ("llama-3-8b", "vllm-awq", {"gpu": "nvidia-l4"}),
    "vllm-cpu": (
        "smollm2-135m",
        "vllm",
        {"host_memory_bytes": 8 * GIB, "max_model_len": 2048, "max_num_seqs": 4},
    ),
    "vllm-lora-l40s": ("qwen3-8b", "vllm-lora", {"gpu": "nvidia-l40s", "adapters": TWO}),
    "llamacpp-cpu": (
        "smollm2-135m",
        "llamacpp-q8_0",
        {"host_memory_bytes": 8 * GIB, "max_model_len": 2048, "max_num_seqs": 4},
    ),
    "llamacpp-l4": ("llama-3-8b", "llamacpp-q4_k_m", {"gpu": "nvidia-l4", "max_num_seqs": 8}),
    "tgi-a10g": ("llama-3-8b", "tgi-awq", {"gpu": "nvidia-a10g"}),
    "sglang-2xh100": ("mixtral-8x7b", "sglang", {"gpu": "nvidia-h100-80gb", "gpu_count": 2}),
    "trtllm-h200": ("qwen3-8b", "trtllm", {"gpu": "nvidia-h200-141gb"}),
}
"""Folder of renders/ -> (model, target, wishes)."""


def updating():
    """Whether the files are to be written, not compared."""
    return os.environ.get("UPDATE_GOLDEN") == "1"


def model(name):
    """`config` and `weight_bytes`, which is what the published checkpoint's index says."""
    return json.loads((GOLDEN / "models" / f"{name}.json").read_text("utf-8"))


def weight_bytes(name, target):
    """The model's weights in the target's format."""
    known = model(name)
    if name in PACKED:
        return known["weight_bytes"]
    return estimated_bytes(
        known["weight_bytes"], all_targets()[target].format, facts(known["config"])
    )


def planned(name, target, machine, **wishes):
    """Return (plan, error): one of them is None."""
    (gpu, count), chosen = MACHINES[machine], all_targets()[target]
    asked = ServeOptions(gpu=gpu, gpu_count=count, format=chosen.format, **wishes)
    try:
        plan = chosen.engine.plan(facts(model(name)["config"]), weight_bytes(name, target), asked)
    except (UsageError, InputRefused) as error:
        return None, error
    return plan, None


def rendered(name, target, wishes, *, config=None):
    """Return the ServingConfig of a model, as `render` and `build` make it.

    `config` is for a model that is none of the golden ones: its weights are then 10 GB.
    """
    return render(
        target=all_targets()[target],
        name=f"support-{name}",
        version="1.2.0",
        model=facts(config or model(name)["config"]),
        model_file="support.gguf" if target.startswith("llamacpp") else "",
        weight_bytes=10_000_000_000 if config else weight_bytes(name, target),
        options=ServeOptions(**wishes),
        image=IMAGE,
        made_from=(Digest.of(b"artifact"),),
        replays=True,
    )
