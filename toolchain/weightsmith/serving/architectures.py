"""Which models are served: those whose task an engine has, and whose cache is known or certain."""

from __future__ import annotations

import re
from collections.abc import Mapping

from weightsmith.core.errors import InputRefused
from weightsmith.models.facts import ModelFacts
from weightsmith.models.task import BY_TOKENS

_KNOWN = (
    "Afmoe|Apertus|Arcee|Aria|AXK1|Bamba|Blip2|Bloom|Cohere|Cohere2|Cohere2Moe|Cohere2Vision"
    "|CohereCompass|Cosmos3Edge|Cwm|DeepseekV2|DeepseekV3|Emu3|Ernie4_5|Ernie4_5_Moe"
    "|Ernie4_5_VLMoe|Exaone|Exaone4|Exaone4_5_|ExaoneMoe|Falcon|FalconH1|FlexOlmo|Gemma|Gemma2"
    "|Gemma3|Gemma3n|Gemma4|Gemma4Unified|Glm|Glm4|Glm4Moe|Glm4MoeLite|Glm4v|Glm4vMoe|GlmAsr"
    "|GlmOcr|GPT2|GPTBigCode|GPTJ|GPTNeoX|GptOss|Granite|Granite4Vision|GraniteMoe"
    "|GraniteMoeHybrid|GraniteMoeShared|GraniteMoeSWA|GraniteSpeech|GraniteSpeechPlus|GraniteSWA"
    "|HrmText|HunYuanDenseV1|HunYuanMoEV1|HunYuanVL|HyperCLOVAX|HYV3|Idefics3|InternLM2|InternLM3"
    "|InternVL|Jais2|Jamba|Laguna|Lfm2|Lfm2Moe|Lfm2Vl|Llama|Llama4|Llava|LlavaNext|LlavaNextVideo"
    "|LlavaOnevision|Mellum|MiniCPM|MiniCPM3|MiniCPMV4_6|MiniCPMV4_7|MiniMaxM2|Ministral3|Mistral"
    "|Mistral3|Mixtral|Molmo2|MossTranscribeDiarize|MuseGlimmer|Nemotron|NemotronH|Olmo|Olmo2"
    "|Olmo3|Olmoe|OlmoHybrid|OPT|PaddleOCRVL|PaliGemma|Phi|Phi3|PhiMoE|QianfanOCR|Qwen2|Qwen2_5_VL"
    "|Qwen2Audio|Qwen2Moe|Qwen2VL|Qwen3|Qwen3_5|Qwen3_5Moe|Qwen3ASR|Qwen3Moe|Qwen3Next|Qwen3VL"
    "|Qwen3VLMoe|SeedOss|SmolLM3|SmolVLM|StableLm|Starcoder2|VaultGemma|VibeVoiceAsr|Voxtral"
)
_KNOWN_GGUF = (
    "apertus|arcee|bloom|cohere2|command-r|ernie4_5|ernie4_5-moe|exaone|exaone4|falcon|gemma|gemma2"
    "|gemma3|glm4|glm4moe|gpt-oss|gpt2|gptneox|granite|granitemoe|hunyuan-dense|hunyuan-moe"
    "|internlm2|llama|minicpm|mistral3|nemotron|olmo|olmo2|olmoe|phi2|phi3|phimoe|qwen2|qwen2moe"
    "|qwen2vl|qwen3|qwen3moe|qwen3vl|qwen3vlmoe|seed_oss|smollm3|stablelm|starcoder2"
)
"""The same by what a GGUF file calls them."""
_KNOWN_NAME = re.compile(
    rf"(?:{_KNOWN})(?:ForCausalLM|LMHeadModel|ForConditionalGeneration)|{_KNOWN_GGUF}"
)

_SPARSE = "keeps an index of its tokens beside the cache"
_STATES = "keeps states alone, and no keys and values"
_OWN_WAY = "keeps keys and values in a way of its own"
NOT_PLANNED: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "DeepseekV32ForCausalLM", "DeepseekV4ForCausalLM", "Dots3NoteForCausalLM",
            "Glm5NextForConditionalGeneration", "GlmMoeDsaForCausalLM", "HYV4ForCausalLM",
            "MiniMaxM3SparseForConditionalGeneration", "Qwen4ExpForCausalLM",
            "Qwen4ExpForConditionalGeneration",
        ),
        _SPARSE,
    ),
    **dict.fromkeys(
        ("FalconMambaForCausalLM", "Mamba2ForCausalLM", "MambaForCausalLM"),
        _STATES,
    ),
    **dict.fromkeys(
        (
            "DiffusionGemmaForBlockDiffusion", "InklingForCausalLM",
            "InklingForConditionalGeneration", "KimiLinearForCausalLM", "LongcatFlashForCausalLM",
            "MiMoV2FlashForCausalLM", "Step3p7ForConditionalGeneration", "Zamba2ForCausalLM",
        ),
        _OWN_WAY,
    ),
    **dict.fromkeys(
        (
            "DbrxForCausalLM", "NemotronH_Omni_Reasoning_V3", "Qwen2_5OmniForConditionalGeneration",
            "Qwen3OmniMoeForConditionalGeneration",
        ),
        "has a config.json with names of its own",
    ),
}  # fmt: skip
"""Models that generate text, and whose memory is not planned here -> what is special of them."""

_HEAD = re.compile(r"For(?:SequenceClassification|TokenClassification)$|Model$")
"""What a decoder's class ends with where it has another head, or none."""
_PART = re.compile(r"Classification|Answering|Encoder(?:Model)?$")
"""In names of classes that do not use a decoder, or not as one."""

DONE_HERE = (
    "here, `merge` and `validate` take it, `push DIR --to hf://OWNER/NAME` publishes the result,"
    " and `bake --kind volume` makes an image of its files alone"
)
_UNPLANNED = (
    "; for what vLLM or llama.cpp know, `bake --kind image` makes one with the engine's own"
    " settings, neither planned nor tested"
)

_WITH_HEAD = (
    "save it as its class ForSequenceClassification with one label, of which the head is the true"
    " token's row of `lm_head` less the false one's: target vllm serves that, and clients put the"
    " prompt around query and document"
)


def check_served(model: ModelFacts) -> None:
    """Refuse a model that no target serves, by its configuration alone.

    Raises InputRefused, which says what the model is and what can be done with it here.
    """
    name = model.architecture or model.model_type or "the model"
    if (model.encoder_decoder or name == "t5") and not _PART.search(name):
        raise InputRefused(
            f"{name} is an encoder with a decoder, and no target serves one: an image here is"
            " planned, started and tested as the server of a decoder",
            hint=DONE_HERE,
        )
    if model.task.kind == "other":
        raise InputRefused(
            f"{name} {model.task.does}, and no target serves such a model: an image here is"
            " planned, started and tested as a server that continues text, or gives vectors, scores"
            " of pairs or labels",
            hint=_WITH_HEAD if model.task.does == BY_TOKENS else DONE_HERE + _UNPLANNED,
        )
    if why := NOT_PLANNED.get(name) or (_STATES if model.states_alone else ""):
        raise InputRefused(
            f"{name} {why}: its memory is not planned here, and no target serves a model without a"
            " plan",
            hint=DONE_HERE + _UNPLANNED,
        )


def is_known_decoder(architecture: str) -> bool:
    """Say whether a class is that of a decoder whose cache is known, whatever its head."""
    decoder = _HEAD.sub("ForCausalLM", architecture)
    return bool(_KNOWN_NAME.fullmatch(architecture) or _KNOWN_NAME.fullmatch(decoder))


def check_architecture(model: ModelFacts) -> str:
    """Return what is assumed of an architecture that is not known; "" for one that is.

    Raises InputRefused where its cache would be a guess, and for what is not served at all.
    """
    check_served(model)
    shape, strange = model.shape, model.stateful_keys
    if is_known_decoder(shape.architecture):
        return ""
    if strange:
        raise InputRefused(
            f"the architecture {shape.architecture} is not known, and {', '.join(strange[:3])} in"
            " its config.json implies a cache of an unknown kind: its memory would be a guess",
            hint=DONE_HERE + _UNPLANNED,
        )
    kinds = " and ".join(sorted({part.kind for part in shape.cache}))
    return (
        f"the architecture {shape.architecture} is not known: planned as {shape.layers} layers of"
        f" {kinds} attention with {shape.kv_heads} key-value heads of {shape.head_dim}"
    )
