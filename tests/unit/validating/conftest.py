"""Tiny models with random weights, adapters, and exact merges of them to spoil."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from weightsmith.merging.engine import MergeRequest, merge
from weightsmith.validating.result import Validation
from weightsmith.validating.validate import ValidationRequest, validate

from tests.paths import TINY
from tests.unit.merging.oracle import save_adapter

_SIZES = {"vocab_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 64}
_LLAMA = _SIZES | {"intermediate_size": 96, "num_key_value_heads": 2}
_HEADS = _LLAMA | {"head_dim": 16}
_SPARSE = _HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2}
_GPT2 = {"vocab_size": 512, "n_layer": 3, "n_head": 4}
_LOCAL = {"window_size": 8, "attention_types": [[["global", "local", "local"], 1]]}
_MAMBA = {
    "attn_layer_offset": 1, "attn_layer_period": 2, "num_experts": 1,
    "use_mamba_kernels": False, "mamba_d_state": 8, "mamba_dt_rank": 8,
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("BloomConfig", _GPT2 | {"hidden_size": 64}),
    "doge": ("DogeConfig", _LLAMA),
    "gemma3": ("Gemma3TextConfig", _HEADS),
    "gpt2": ("GPT2Config", _GPT2 | {"n_embd": 64, "n_positions": 128}),
    "gpt_neo": (
        "GPTNeoConfig",
        {"vocab_size": 512, "num_layers": 3, "num_heads": 4, "hidden_size": 64} | _LOCAL,
    ),
    "gpt_oss": ("GptOssConfig", _SPARSE),
    "granite": ("GraniteConfig", _LLAMA),
    "jamba": ("JambaConfig", _LLAMA | _MAMBA),
    "llama": ("LlamaConfig", _LLAMA),
    "mistral": ("MistralConfig", _LLAMA),
    "mixtral": ("MixtralConfig", _SPARSE),
    "mpt": ("MptConfig", {"vocab_size": 512, "n_layers": 3, "n_heads": 4, "d_model": 64}),
    "opt": ("OPTConfig", _SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "qwen2": ("Qwen2Config", _LLAMA),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        _HEADS | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    ),
}


def make_model(
    folder: Path, kind: str = "llama", dtype: torch.dtype = torch.bfloat16, **options: Any
) -> Path:
    """Write a model with the tiny example's tokenizer."""
    import transformers

    torch.manual_seed(0)
    name, sizes = CONFIGS[kind]
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    config = getattr(transformers, name)(**sizes | tokens | options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.1)
            else:
                torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.05)
        model.to(dtype).save_pretrained(folder, max_shard_size="200KB")
    for path in (TINY / "base").iterdir():
        if "token" in path.name or "template" in path.name:
            shutil.copy(path, folder)
    return folder


def make_adapter(folder: Path, base: Path, seed: int = 1, **options: Any) -> Path:
    """Write an adapter with random A and B, about a twentieth of the weights' size."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        tuned = get_peft_model(model, LoraConfig(**options))
        for key, parameter in tuned.named_parameters():
            if "lora_" in key and "magnitude" not in key:
                torch.nn.init.normal_(parameter, std=0.04)
            elif "lora_" not in key and parameter.requires_grad:  # more digits than the base has
                parameter.data += torch.randn_like(parameter) * 0.01
        save_adapter(tuned, folder, save_embedding_layers=False)
    return folder


def make_tuned(folder: Path, base: Path, config: Any) -> Path:
    """Write an adapter of any kind, everything that it trains a little off."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.05
    save_adapter(tuned, folder)
    return folder


def merged(out: Path, base: Path, *adapters: Path, **options: Any) -> Path:
    weights = options.pop("weights", (1.0,) * len(adapters))
    pairs = tuple(zip(adapters, weights, strict=True))
    merge(MergeRequest(base=base, adapters=pairs, out=out, **options))
    return out


def merged_by_peft(out: Path, base: Path, lora: Path) -> Path:
    """Merge in float32 with PEFT and round once: another way, for what it is right about."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    shutil.copytree(base, out, ignore=shutil.ignore_patterns("model*"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        whole = PeftModel.from_pretrained(model, lora).merge_and_unload()
        whole.to(torch.bfloat16).save_pretrained(out, max_shard_size="200KB")
    return out


def held(base: Path, out: Path, *adapters: Path, **options: Any) -> Validation:
    """Validate, every warning of a library left out."""
    weights = options.pop("weights", (1.0,) * len(adapters))
    pairs = tuple(zip(adapters, weights, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return validate(ValidationRequest(base=base, adapters=pairs, merged=out, **options))


def passed(base: Path, out: Path, *adapters: Path, **options: Any) -> Validation:
    """Validate what is right."""
    result = held(base, out, *adapters, **options)
    assert result.passed, tell(result)
    return result


def tell(result: Validation) -> str:
    """Return all findings as text, for a failure's message."""
    return "\n".join(f"{f.severity} {f.check} {f.message}" for f in result.findings)


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a checkpoint; each stays in its file, a new one goes to the last."""
    import json

    files = sorted(folder.glob("model*.safetensors"))
    tensors = {path: load_file(path) for path in files}
    together = {name: value for held in tensors.values() for name, value in held.items()}
    change(together)
    home = {name: path for path, kept in tensors.items() for name in kept}
    for path in files:
        kept = {n: t.contiguous() for n, t in together.items() if home.get(n, files[-1]) == path}
        save_file(kept, path, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        told = json.loads(index.read_text())
        told["weight_map"] = {n: home.get(n, files[-1]).name for n in sorted(together)}
        index.write_text(json.dumps(told))


@pytest.fixture
def plain(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base, an adapter of all its layers, and their exact merge."""
    base = make_model(tmp_path / "base")
    lora = make_adapter(tmp_path / "lora", base)
    return base, lora, merged(tmp_path / "out", base, lora)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
