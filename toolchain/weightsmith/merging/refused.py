"""PEFT methods that cannot be merged, and why."""

from __future__ import annotations

_PROMPT = "it adds tokens or keys and values to the input and changes no weight"
_ROUTED = "its weights depend on the input"
_LAYERS = "it adds layers to the model"

REFUSED = {
    "PROMPT_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "PREFIX_TUNING": _PROMPT,
    "CPT": _PROMPT,
    "CARTRIDGE": _PROMPT,
    "ADAPTION_PROMPT": _LAYERS,
    "XLORA": _ROUTED,
    "POLY": _ROUTED,
    "LILY": "its factors are shared between layers and chosen by a router",
    "SHADOW": _LAYERS,
    "ADAMSS": "the rows that a factor changes are not saved: PEFT clusters the base's weights on "
    "each load, with scikit-learn and a random SVD whose last bits depend on the machine",
}
"""`peft_type` -> why it cannot be merged."""

SETTINGS = {
    "use_qalora": "QALoRA's factors act on groups of inputs of a GPTQ base",
    "alora_invocation_tokens": "activated LoRA (aLoRA) is active only after its invocation tokens",
    "arrow_config": "Arrow chooses adapters for each token",
    "megatron_config": "Megatron's parallel layers split the weights in their own way",
}
"""Setting of a LoRA configuration -> why it cannot be merged."""

UNMERGED = "serve it unmerged with PEFT"
