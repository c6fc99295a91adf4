"""What vLLM does with the pictures of an architecture, on GPUs and on CPUs (0.32)."""

from __future__ import annotations

from collections.abc import Mapping

from weightsmith.core.errors import UsageError
from weightsmith.core.values import Json

_BOTH_WAYS = frozenset({"Gemma3ForConditionalGeneration", "PaliGemmaForConditionalGeneration"})
"""Whose tokens of a picture see each other (MM_PREFIX_LM_MODELS in transformers_utils)."""
_LACKING = {"SmolVLMForConditionalGeneration": "num2words"}
"""Architecture -> the package that its processor needs, and the engine for CPUs lacks."""

_UNPLANNED = (
    "the server reads pictures; what preparing and encoding one takes is not in this plan, so leave"
    " memory for it"
)


def check_pictures(architecture: str, extra: Mapping[str, Json], *, on_cpu: bool) -> list[str]:
    """Return notes on the pictures that a model with a vision tower is served with.

    Raises UsageError for a model whose server would not start on a CPU, unless `extra` turns
    pictures off.
    """
    limit = extra.get("limit-mm-per-prompt")
    if isinstance(limit, Mapping) and limit.get("image") == 0:
        return []
    lacking = _LACKING.get(architecture, "") if on_cpu else ""
    if lacking:
        raise UsageError(
            f"vLLM's engine for CPUs cannot start {architecture}: its pictures need the package"
            f" {lacking}, which the engine does not have",
            hint="choose a llamacpp target, a GPU, or text alone: serve.extra.limit-mm-per-prompt"
            ' as {"image": 0, "video": 0}',
        )
    notes = [_UNPLANNED]
    if on_cpu and architecture in _BOTH_WAYS:
        # v1/attention/backends/cpu_attn.py has no ranges of tokens that see each other.
        notes.append(
            f"on a CPU, vLLM reads the pictures of {architecture} in one direction, not in both as"
            " it was trained, so answers about them can be worse than on a GPU"
        )
    return notes
