"""PEFT's methods that no merged weight can stand for, and what to do with them instead."""

from __future__ import annotations

_PROMPT = "it adds tokens or keys and values to the input and changes no weight"
_ROUTED = "its weights depend on the input"
_LAYERS = "it adds layers of its own to the model"

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
    "ADAMSS": "which rows a factor acts on is in no file: PEFT clusters the base's weights anew at "
    "each loading, by scikit-learn and a random SVD whose last bits depend on the machine",
}
"""`peft_type` -> why there is no merge."""

SETTINGS = {
    "use_qalora": "QALoRA's factors act on groups of inputs of a GPTQ base and have no merged form",
    "alora_invocation_tokens": "activated LoRA (aLoRA) acts only after its invocation tokens",
    "arrow_config": "Arrow routes every token to other adapters",
    "megatron_config": "Megatron's parallel layers split the weights in a way of their own",
}
"""Setting of a LoRA configuration -> why there is no merge."""

UNMERGED = "serve it unmerged, with PEFT's own forward pass"
