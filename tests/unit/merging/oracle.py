"""Tiny models of real architectures, and the judge of merges: PEFT's unmerged model, in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from weightsmith.merging.engine import MergeRequest, merge

SIZES = {"vocab_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
NARROW = {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2}
PLAIN = {"hidden_size": 32, "intermediate_size": 48}
EXPERTS = {"num_experts_per_tok": 2}
STAGES = {"depths": [1, 2]}
SEGFORMER = STAGES | {
    "num_encoder_blocks": 2,
    "hidden_sizes": [16, 32],
    "sr_ratios": [2, 1],
    "num_attention_heads": [2, 4],
    "decoder_hidden_size": 16,
}
VISION = ("vit", "cnn", "swin", "segformer", "regions", "queries", "depth")
BACKBONE = {"out_features": ["stage1", "stage2", "stage3", "stage4"], "image_size": 16}
GPT = {"vocab_size": 96, "n_layer": 2, "n_head": 4, "n_embd": 32}


def model_class(kind: str) -> Any:
    """Return the class that loads a model of a kind."""
    import transformers

    words = ("bert", "distilbert", "albert", "electra", "deberta", "modernbert")
    task = dict.fromkeys(("t5", "bart"), "Seq2SeqLM") | dict.fromkeys(words, "MaskedLM")
    task |= dict.fromkeys(VISION, "ImageClassification") | {"regions": "SemanticSegmentation"}
    task |= {"queries": "UniversalSegmentation", "depth": "DepthEstimation"}
    return getattr(transformers, f"AutoModelFor{task.get(kind, 'CausalLM')}")


def build(kind: str, **options: Any) -> Any:
    """Return a model with random weights."""
    return model_class(kind).from_config(config_of(kind, **options))


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SIZES | NARROW),
    "qwen2": ("Qwen2Config", SIZES | NARROW),
    "qwen3": ("Qwen3Config", SIZES | NARROW | {"head_dim": 8}),
    "gemma2": ("Gemma2Config", SIZES | NARROW | {"head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", SIZES | NARROW | {"head_dim": 8}),
    "phi3": ("Phi3Config", SIZES | NARROW | {"pad_token_id": 0}),
    "gpt2": ("GPT2Config", GPT),
    "falcon": ("FalconConfig", SIZES | {"hidden_size": 32}),
    "t5": (
        "T5Config",
        {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    ),
    "bert": ("BertConfig", SIZES | PLAIN),
    "distilbert": (
        "DistilBertConfig",
        {"vocab_size": 96, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    ),
    "albert": ("AlbertConfig", SIZES | PLAIN | {"embedding_size": 16}),
    "electra": ("ElectraConfig", SIZES | PLAIN | {"embedding_size": 16}),
    "deberta": ("DebertaV2Config", SIZES | PLAIN),
    "modernbert": (
        "ModernBertConfig",
        SIZES
        | PLAIN
        | dict.fromkeys(("pad_token_id", "bos_token_id", "cls_token_id"), 0)
        | dict.fromkeys(("eos_token_id", "sep_token_id"), 1),
    ),
    "bert_generation": ("BertGenerationConfig", SIZES | PLAIN | {"is_decoder": True}),
    "biogpt": ("BioGptConfig", SIZES | PLAIN),
    "openai": ("OpenAIGPTConfig", GPT),
    "ctrl": ("CTRLConfig", GPT | {"n_positions": 32, "dff": 48}),
    "mamba": ("MambaConfig", {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2}),
    "mamba2": (
        "Mamba2Config",
        {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
        | {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    ),
    "zamba2": (
        "Zamba2Config",
        SIZES
        | PLAIN
        | {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2}
        | {"num_key_value_heads": 4, "num_mem_blocks": 1, "adapter_rank": 4, "chunk_size": 8}
        | {"mamba_d_state": 8, "mamba_headdim": 16, "n_mamba_heads": 4, "mamba_ngroups": 1},
    ),
    "bart": (
        "BartConfig",
        {"vocab_size": 96, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
        | {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
    ),
    "vit": (
        "ViTConfig",
        PLAIN
        | {"num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 4},
    ),
    "cnn": (
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    ),
    "swin": (
        "SwinConfig",
        STAGES | {"embed_dim": 16, "num_heads": [2, 4], "window_size": 2, "image_size": 16},
    ),
    "segformer": ("SegformerConfig", SEGFORMER),
    "regions": ("SegformerConfig", SEGFORMER),
    "queries": (
        "Mask2FormerConfig",
        {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "num_queries": 4}
        | {"num_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 2}
        | {"dim_feedforward": 48, "encoder_feedforward_dim": 48}
        | {
            "backbone_config": BACKBONE
            | {"model_type": "swin", "depths": [1] * 4, "num_heads": [2] * 4}
            | {"embed_dim": 16, "window_size": 2}
        },
    ),
    "depth": (
        "ZoeDepthConfig",
        {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "bottleneck_features": 8}
        | {"num_relative_features": 8, "bin_embedding_dim": 8, "num_attractors": [2, 2, 1, 1]}
        | {
            "backbone_config": BACKBONE
            | {"model_type": "beit", "num_hidden_layers": 4, "num_attention_heads": 2}
            | PLAIN
            | {"patch_size": 8, "reshape_hidden_states": False, "use_mask_token": False}
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        SIZES | NARROW | EXPERTS | {"moe_intermediate_size": 24, "num_experts": 4, "head_dim": 8},
    ),
    "mixtral": ("MixtralConfig", SIZES | NARROW | {"num_local_experts": 4}),
    "aria": (
        "AriaTextConfig",
        SIZES | NARROW | {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    ),
    "granitemoe": ("GraniteMoeConfig", SIZES | NARROW | EXPERTS | {"num_local_experts": 4}),
    "jetmoe": (
        "JetMoeConfig",
        {"vocab_size": 96, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 24}
        | {"num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4},
    ),
    "hy_v3": (
        "HYV3Config",
        SIZES | NARROW | EXPERTS | {"moe_intermediate_size": 24, "num_experts": 4, "head_dim": 8},
    ),
    "nemotron_h": (
        "NemotronHConfig",
        SIZES
        | NARROW
        | EXPERTS
        | {"layers_block_type": ["mamba", "moe", "attention", "mlp"], "head_dim": 8}
        | {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1}
        | {"n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 24}
        | {"moe_shared_expert_intermediate_size": 24},
    ),
    "hrm_text": (
        "HrmTextConfig",
        SIZES
        | PLAIN
        | {"num_key_value_heads": 4, "head_dim": 8}
        | {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    ),
    "sarvam_moe": (
        "SarvamMoEConfig",
        SIZES
        | NARROW
        | EXPERTS
        | {"head_dim": 8, "moe_intermediate_size": 24, "n_routed_experts": 4},
    ),
    "gpt_oss": ("GptOssConfig", SIZES | NARROW | EXPERTS | {"num_local_experts": 4, "head_dim": 8}),
}


def config_of(kind: str, **options: Any) -> Any:
    """Return a kind's configuration, as small as it goes."""
    import transformers

    name, sizes = CONFIGS[kind]
    return getattr(transformers, name)(**sizes | options)


MakeBase = Callable[..., Path]
Case = tuple[str, dict[str, Any], dict[str, Any]]
"""An architecture, options of its configuration, and those of an adapter's."""


def case(kind: str, *targets: str, base: dict[str, Any] | None = None, **lora: Any) -> Case:
    """Return a case whose adapter has these `target_modules`, if `lora` has none."""
    return kind, base or {}, {"target_modules": list(targets)} | lora


def make_base(folder: Path, kind: str, **options: Any) -> Path:
    """Save a tiny model with random weights."""
    torch.manual_seed(0)
    model = build(kind, **options)
    for name, parameter in model.named_parameters():
        scale, shift = (0.1, 1.0) if "norm" in name and "weight" in name else (0.2, 0.0)
        torch.nn.init.normal_(parameter, mean=shift, std=scale)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def train(base: Path, kind: str, folder: Path, config: Any, resize: int = 0) -> Path:
    """Save an adapter whose trained tensors are all random."""
    from peft import get_peft_model

    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_class(kind).from_pretrained(base, dtype=torch.float32)
        if resize:
            model.resize_token_embeddings(resize)
        tuned = get_peft_model(model, config)
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad:
                shift = 1.0 if "magnitude" in name or "norm" in name else 0.0
                torch.nn.init.normal_(parameter, mean=shift, std=0.2)
        save_adapter(tuned, folder)
    return folder


def save_adapter(tuned: Any, folder: Path, **options: Any) -> None:
    """Save an adapter without its model card, which takes a third of the time."""
    setattr(tuned, "create_or_update_model_card", lambda _: None)  # noqa: B010 - as mypy wants it
    tuned.save_pretrained(folder, **options)


def answers(model: Any, kind: str) -> torch.Tensor:
    """What a model makes of fixed inputs, in float64."""
    model = model.double().eval()
    if hasattr(model, "set_experts_implementation"):
        # The fast ones have no float64.
        model.set_experts_implementation("eager")
    with torch.no_grad():
        if kind in VISION:
            pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
            found = model(pixel_values=pixels.double()).values()
            return torch.cat([t.flatten() for t in found if isinstance(t, torch.Tensor)])
        ids = torch.arange(40).view(2, 20) % 90
        more = {"decoder_input_ids": ids} if kind in ("t5", "bart") else {}
        return model(input_ids=ids, **more).logits


def unmerged(
    base: Path, kind: str, adapters: Path | Sequence[tuple[Path, float]], resize: int = 0
) -> torch.Tensor:
    """The oracle: PEFT's forward pass with the adapters beside the weights."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    pairs = [(adapters, 1.0)] if isinstance(adapters, Path) else adapters
    names = [f"adapter_{number}" for number in range(len(pairs))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_class(kind).from_pretrained(base, dtype=torch.float32)
        if resize:
            model.resize_token_embeddings(resize)
        network = PeftModel.from_pretrained(model, pairs[0][0], names[0])
        for name, (root, _) in zip(names[1:], pairs[1:], strict=True):
            network.load_adapter(root, name)
    if len(names) > 1:
        network.base_model.set_adapter(names)
    for layer in network.modules():
        if isinstance(layer, LoraLayer):
            for name, (_, weight) in zip(names, pairs, strict=True):
                if name in layer.scaling:
                    layer.scaling[name] *= weight
    return answers(network, kind)


def merged(folder: Path, kind: str) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, told = model_class(kind).from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert not told["mismatched_keys"]
    return answers(model, kind)


def run(
    base: Path, adapters: Path | Sequence[tuple[Path, float]], out: Path, **options: Any
) -> dict[str, Any]:
    """Merge one adapter, or several with their weights."""
    pairs = ((adapters, 1.0),) if isinstance(adapters, Path) else tuple(adapters)
    return merge(MergeRequest(base=base, adapters=pairs, out=out, **options))


def check(
    base: Path,
    kind: str,
    tmp_path: Path,
    lora: dict[str, Any],
    resize: int = 0,
    room: float = 2e-6,
) -> dict[str, Any]:
    """Train, merge, and compare; return the merge's result."""
    from peft import LoraConfig

    options = {"r": 4, "lora_alpha": 6} | lora
    adapter = train(base, kind, tmp_path / "adapter", LoraConfig(**options), resize)
    out = tmp_path / "out"
    result = run(base, adapter, out, workers=2)

    wanted, got = unmerged(base, kind, adapter, resize), merged(out, kind)
    scale = float(wanted.abs().max())
    if not resize:
        assert (merged(base, kind) - wanted).abs().max() > 1e-3 * scale
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=room * max(1.0, scale))
    return result
