"""The layers in which PEFT's change is not one of a weight: uncalled, computing more, or shared.

PEFT adds its change in a layer's forward pass. Mamba multiplies by `dt_proj.weight` itself: an
adapter on it changes nothing while it is trained or served unmerged, so a merge leaves it out.
Tensors that take a weight's place, such as those of `modules_to_save`, are read and have effect.
A test compares the names with transformers' code; validation finds further layers as they run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

_EVERYWHERE = r"(?:.*\.)?(?:tdnn\.\d+\.kernel|rel_embeddings|bbox_attention\.k_(?:proj|linear))"
"""Of whatever model: speaker verification, DeBERTa, and DETR's masks."""
_UNCALLED = {
    r"mamba|falcon_mamba|jamba": r".*\.dt_proj",
    r"bailing_hybrid|bamba|falcon_h1|falcon_mamba|glm5_next.*|granitemoehybrid|inkling.*|jamba"
    r"|kimi_linear|lara_mini.*|mamba2?|nemotron_h|olmo_hybrid|qwen3_5.*|qwen3_next|zamba2?": (
        r".*\.conv1d"
    ),
    r"lfm[23].*": r".*\.conv\.conv",
    r"qwen4_exp.*": r".*\.linear_attn\.conv1d",
    r"neomme": r"unembedding_projection",
    r"longcat_flash": r".*\.router\.classifier",
    r"wavlm": r".*\.attention\.(?:q|k|v|out)_proj",
    r"mobilebert": r"cls\.predictions\.(?:dense|decoder)",
    r"layoutlmv[23]": r"(?:.*\.)?rel_pos_(?:x_|y_)?bias",
    r"siglip2.*|cosmos3_edge.*|glm4v.*|glm_image.*|hunyuan_vl.*|hy_v4_vl.*": (
        r".*\.position_embedding"
    ),
    r"qwen2_audio.*|voxtral.*|audioflamingo3.*|moss_transcribe_diarize.*": r".*\.embed_positions",
    r"prophetnet": r".*\.ngram_embeddings",
    # torch's MultiheadAttention; PEFT has an effect there if it wraps the whole of it.
    r"aria": r".*\.multihead_attn\.out_proj",
    r"bridgetower": r".*\.attn\.out_proj",
    r"siglip.*|idefics2.*|phi4_multimodal.*": r".*\bhead\.attention\.out_proj",
    # Also layers that a model calls from a list of its own, where PEFT does not replace them.
    r"mask2former": r".*\.cross_attn\.out_proj|.*\.mask_embedder\.\d+\.0",
    r"maskformer": (r"(?:.*\.)?mask_embedder\.\d+\.0|.*\.fpn\.(?:stem|layers\.\d+\.block)\.0"),
    r"oneformer": (
        r".*\.multihead_attn\.out_proj"
        r"|.*\.(?:query_transformer|text_encoder)\.(?:.*\.)?self_attn\.out_proj"
        r"|.*\.(?:mask_embed|text_projector|task_mlp)\.layers\.\d+\.0"
    ),
}
"""Model types -> their modules, by the names in the model (transformers 5.24, models/)."""

_COMPUTING = {
    # Finds the positions itself. Whisper's encoder has a plain table.
    r"autoformer|bart|bigbird_pegasus|biogpt|blenderbot|blenderbot[-_]small|fsmt|informer|led|marian"
    r"|mbart|mvp|opt|pegasus|plbart|pp_formulanet|roformer|time_series_transformer|trocr": (
        r"(?:.*\.)?embed_positions"
    ),
    r"whisper": r"(?:.*\.)?decoder\.embed_positions",
    r"inkling.*|muse_.*": r"(?:.*\.)?embed_tokens",  # normalises what it looks up
    r"bit": r".*\.(?:conv\d?|convolution)",  # standardises its weight
    r"dory": r"lm_head",  # scales its output
}
"""Model types -> modules whose class does more than multiply by, or look up in, its weight.

PEFT computes its change beside the whole layer, so no weight can express it. `embed_scale` is none
of these: PEFT applies it too.
"""

_BOXES = r"(?:.*\.)?(?:bbox|class)_embed\..*"
_SHARED = {
    r"(?:mm-)?grounding-dino|deformable_detr|rt_detr_v2|d_fine|deimv2": _BOXES,
    r"dab-detr": r"bbox_predictor\..*|(?:.*\.)?decoder\.bbox_embed\..*",
    r"pp_doclayout_v3": rf"{_BOXES}|(?:.*\.)?enc_(?:score|bbox)_head\..*",
    r"zamba2?": r".*\.shared_transf(?:ormer)?\..*",
    r"diffusion_gemma": r"(?:.*\.)?(?:encoder\.language_model|decoder)\.(?:layers|norm)\..*",
    r"pe_audio_video": r"(?:(?:audio|video)_model\.)?text_model\..*"
    r"|audio_model\.audio_encoder\..*|video_model\.video_encoder\..*"
    r"|audio_video_encoder\.embedder\..*",
    r"granite_speech5.*": r"ctc_head\..*|encoder\.out\..*",
    r"bark|fine_acoustics": r"(?:.*\.)?(?:lm_heads\.\d+|input_embeds_layers\.[1-9]\d*)\..*",
    r"blt": r"(?:model\.)?local_encoder\.embed_tokens\..*|lm_head\..*",
    r"csm": r"(?:.*\.)?embed_audio_tokens\..*|depth_decoder\.model\.embed_tokens\..*",
    r"udop": r"(?:.*\.)?(?:patch_embed|encoder\.embed_patches\.proj)\..*"
    r"|(?:.*\.)?(?:block\.0\.layer\.0\.SelfAttention|biases\.0)\.relative_attention_bias\..*",
}
"""Model types -> parameters of layers that take their weights from another layer, or lend theirs.

PEFT changes one of these layers, and a checkpoint has one weight for both. Tables and heads for
tokens are in `tying`.
"""


def shared(config: Mapping[str, object]) -> Callable[[str], bool]:
    """Return what tells by a parameter's name whether two layers of the model share it."""
    kind, fine = config.get("model_type"), config.get("fine_acoustics_config")
    if kind == "csm":
        tied = config.get("tie_codebooks_embeddings", True)
    elif kind == "bark" and isinstance(fine, Mapping):
        tied = fine.get("tie_word_embeddings", True)
    else:
        tied = config.get("tie_word_embeddings", kind != "blt")
    return _matcher(config, _SHARED if tied or kind == "udop" else {})


def computes_more(config: Mapping[str, object]) -> Callable[[str], bool]:
    """Return what tells by a module's name whether no weight can express PEFT's change of it."""
    return _matcher(config, _COMPUTING)


def uncalled(config: Mapping[str, object]) -> Callable[[str], bool]:
    """Return what tells by a module's name whether the model reads its weight uncalled."""
    return _matcher(config, {r".*": _EVERYWHERE} | _UNCALLED)


def _matcher(config: Mapping[str, object], table: Mapping[str, str]) -> Callable[[str], bool]:
    kinds = set(_model_types(config))
    found = [
        names for types, names in table.items() if any(re.fullmatch(types, kind) for kind in kinds)
    ]
    pattern = re.compile("|".join(found))
    return lambda module: pattern.fullmatch(module) is not None


def _model_types(config: Mapping[str, object]) -> Iterator[str]:
    yield str(config.get("model_type", ""))
    for value in config.values():
        if isinstance(value, Mapping):
            yield str(value.get("model_type", ""))
