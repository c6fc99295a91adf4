"""Which engine loads which quantized format on which hardware, before anything is made."""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.errors import InputRefused
from toolchain.serving.gpus import GPUS
from toolchain.values import Format


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """What an engine needs for one format."""

    capability: tuple[int, int]
    """The least compute capability of an NVIDIA GPU."""
    cpu: bool
    source: str


# vLLM 0.33 (model_executor/layers/quantization/) and its CPU build 0.32; SGLang 0.5.23
# (srt/layers/quantization/); TGI 3.3 (server/text_generation_server/layers/).
TABLE: dict[tuple[str, str], Support] = {
    ("vllm", "awq"): Support(
        capability=(7, 5), cpu=True, source="awq.py get_min_capability; CPUWNA16LinearKernel"
    ),
    ("vllm", "gptq"): Support(
        capability=(7, 5), cpu=True, source="gptq_marlin.py; CPUWNA16LinearKernel"
    ),
    ("vllm", "fp8"): Support(
        capability=(8, 9),
        cpu=True,
        source="compressed_tensors_w8a8_fp8.py get_min_capability; ChannelWiseTorchFP8 kernel",
    ),
    ("vllm", "fp8-static"): Support(
        capability=(8, 9), cpu=False, source="its CPU build lacks _C::static_scaled_fp8_quant"
    ),
    ("vllm", "w8a8"): Support(
        capability=(7, 5), cpu=True, source="compressed_tensors_w8a8_int8.py; CPUInt8 kernel"
    ),
    ("sglang", "awq"): Support(capability=(7, 5), cpu=False, source="awq.py get_min_capability"),
    ("sglang", "gptq"): Support(capability=(7, 5), cpu=False, source="gptq.py"),
    ("sglang", "fp8"): Support(capability=(8, 9), cpu=False, source="compressed_tensors_w8a8_fp8"),
    ("tgi", "awq"): Support(capability=(7, 5), cpu=False, source="layers/awq/quantize"),
    ("tgi", "gptq"): Support(capability=(7, 5), cpu=False, source="layers/gptq"),
    ("trtllm", "fp8"): Support(capability=(8, 9), cpu=False, source="the release's support matrix"),
}


def check_support(engine: str, format_: Format, device: str) -> None:
    """Refuse a format that the engine cannot load on a device: `cpu` or a GPU's name.

    What the table does not name is left to the engine's own plan. Raises InputRefused.
    """
    row = TABLE.get((engine, format_.name)) or TABLE.get((engine, format_.kind))
    if row is None:
        return
    if device == "cpu":
        if not row.cpu:
            raise InputRefused(
                f"{engine} has no kernel for {format_.name} on a CPU ({row.source})",
                hint="choose a GPU with serve.gpu, or awq, gptq, fp8 or w8a8 of vllm",
            )
        return
    card = GPUS.get(device)
    if card and any(card.compute_capability) and card.compute_capability < row.capability:
        major, minor = row.capability
        raise InputRefused(
            f"{format_.name} on {engine} needs compute capability {major}.{minor}, {device} has "
            f"{card.compute_capability[0]}.{card.compute_capability[1]} ({row.source})",
            hint="choose awq or gptq, or a newer GPU",
        )
