"""Architectures whose cache is known; of others only what is certain is planned."""

from __future__ import annotations

import re

from weightsmith.checkpoints.facts import ModelFacts
from weightsmith.errors import InputRefused

_KNOWN = (
    "Arcee|Bamba|Cohere|Cohere2|DeepseekV2|DeepseekV3|Ernie4_5|Ernie4_5_Moe|Exaone|Exaone4|Falcon"
    "|Gemma|Gemma2|Gemma3|Gemma3n|Glm|Glm4|Glm4Moe|GPT2|GPTBigCode|GPTJ|GPTNeoX|GptOss|Granite"
    "|GraniteMoe|GraniteMoeHybrid|InternLM2|InternLM3|Jamba|Llama|Llama4|Mamba|Mamba2|MiniCPM"
    "|MiniCPM3|Mistral|Mistral3|Mixtral|Nemotron|NemotronH|Olmo|Olmo2|Olmo3|Olmoe|OPT|Phi|Phi3"
    "|PhiMoE|Qwen2|Qwen2Moe|Qwen3|Qwen3Moe|Qwen3Next|SeedOss|SmolLM3|StableLm|Starcoder2"
)
_KNOWN_NAME = re.compile(rf"(?:{_KNOWN})(?:ForCausalLM|LMHeadModel|ForConditionalGeneration)")


def check_architecture(model: ModelFacts) -> str:
    """Return what is assumed of an architecture that is not known; "" for one that is.

    Raises InputRefused where its cache would be a guess, and for encoders.
    """
    shape, strange = model.shape, model.stateful_keys
    if model.encoder_decoder:
        raise InputRefused(
            f"{shape.architecture} is an encoder with a decoder; only decoders are served here",
            hint="choose a decoder-only model",
        )
    if _KNOWN_NAME.fullmatch(shape.architecture):
        return ""
    if strange:
        raise InputRefused(
            f"the architecture {shape.architecture} is not known, and {', '.join(strange[:3])} in"
            " its config.json implies a cache of an unknown kind",
            hint="its memory would be a guess; choose a known architecture, or serve it unplanned",
        )
    kinds = " and ".join(sorted({part.kind for part in shape.cache}))
    return (
        f"the architecture {shape.architecture} is not known: planned as {shape.layers} layers of"
        f" {kinds} attention with {shape.kv_heads} key-value heads of {shape.head_dim}"
    )
