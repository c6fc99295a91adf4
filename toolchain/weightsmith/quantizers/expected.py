"""What a quantized checkpoint must quantize, said apart from `matrices.py`, which writers use.

A writer's rule names what is quantized. This one names what stays in 16 bits, and expects all else
in the decoder layers, so that a name which either has wrong is found in the finished checkpoint.
"""

from __future__ import annotations

import re

from weightsmith.models.facts import ModelFacts
from weightsmith.models.tensors import CheckpointTensors

_LAYER = re.compile(r"(?P<above>.*?)\blayers\.(?P<number>\d+)\.(?P<within>.+)")
_TOWERS = ("vision", "visual", "audio", "encoder", "mtp", "projector")
"""Parts of the names of what is not the language model."""
_STAYS = re.compile(
    r"(.*\.)?("
    r"gate|gate\.wg|router|router\.(layer|proj)|shared_expert_gate"  # of experts
    r"|q_a_proj|kv_a_proj_with_mqa|kv_b_proj"  # latent attention; vLLM absorbs the last
    r"|in_proj_(a|b|ba|qkv|qkvz|z)|conv1d|conv\.conv"  # of states
    r"|per_layer_input_gate|per_layer_projection"
    r")\.weight"
)
_ONLY_EXPERTS = frozenset({"GptOssForCausalLM"})


def expected(source: CheckpointTensors, model: ModelFacts) -> frozenset[str]:
    """Return the tensors of a 16-bit checkpoint that a quantizer without `keep` quantizes."""
    return frozenset(name for name in source.names if _is_expected(source, name, model))


def _is_expected(source: CheckpointTensors, name: str, model: ModelFacts) -> bool:
    layer = _LAYER.fullmatch(name)
    if layer is None or any(part in layer["above"] for part in _TOWERS):
        return False
    if model.layers and int(layer["number"]) >= model.layers:
        return False  # predicts further tokens
    within, axes = layer["within"], len(source.info(name).shape)
    if model.architecture in _ONLY_EXPERTS and "experts." not in within:
        return False
    matrix = axes == 2 and within.endswith(".weight")
    stack = axes == 3 and not within.endswith("conv.weight")
    return (matrix or stack) and not _STAYS.fullmatch(within)
