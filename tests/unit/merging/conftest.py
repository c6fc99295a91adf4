"""Tiny models and adapters with random weights, as transformers and PEFT write them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from threadpoolctl import threadpool_limits
from weightsmith.merging import engine
from weightsmith.merging.virtual import VirtualCheckpoint
from weightsmith.models.safetensors import open_checkpoint
from weightsmith.models.virtual_weights import has_no_data

from tests.unit.merging.oracle import MakeBase, make_base, save_adapter

SIZES = {"vocab_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2}
MakeModel = Callable[..., Path]
MakeAdapter = Callable[..., Path]


def config_of(kind: str, **options: Any) -> Any:
    import transformers

    match kind:
        case "llama":
            return transformers.LlamaConfig(**SIZES | LLAMA | options)
        case "qwen2":
            return transformers.Qwen2Config(**SIZES | LLAMA | options)
        case "gpt2":
            return transformers.GPT2Config(
                vocab_size=96, n_layer=2, n_head=4, n_embd=32, n_positions=64, **options
            )
    raise ValueError(kind)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> MakeBase:
    """Return the folder of a tiny base model, each made once."""
    made: dict[str, Path] = {}

    def base(kind: str, **options: Any) -> Path:
        key = json.dumps([kind, options], sort_keys=True)
        if key not in made:
            made[key] = make_base(tmp_path_factory.mktemp(f"{kind}-base"), kind, **options)
        return made[key]

    return base


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """Write a base model; `dtype` and `shard` besides the config's own options."""

    def make(
        kind: str = "llama",
        name: str = "base",
        dtype: torch.dtype = torch.float32,
        shard: str = "5GB",
        **options: Any,
    ) -> Path:
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(config_of(kind, **options))
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
            model.to(dtype).save_pretrained(tmp_path / name, max_shard_size=shard)
        return tmp_path / name

    return make


@pytest.fixture
def make_adapter(tmp_path: Path) -> MakeAdapter:
    """Write a LoRA adapter for a base model, with random A and B."""

    def make(
        base: Path, name: str = "adapter", seed: int = 1, copies: bool = False, **options: Any
    ) -> Path:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | options
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            tuned = get_peft_model(model, LoraConfig(**options))
            for key, parameter in tuned.named_parameters():
                if "lora_" in key:
                    torch.nn.init.normal_(parameter, std=0.2)
            # By default PEFT adds a copy of a targeted head's base weight.
            save_adapter(tuned, tmp_path / name, save_embedding_layers=copies)
        return tmp_path / name

    return make


@pytest.fixture
def edit() -> Callable[..., None]:
    """Change keys of a JSON file in place."""

    def change(path: Path, **values: Any) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


@pytest.fixture
def rename() -> Callable[..., None]:
    """Rewrite a safetensors file, each tensor's name passed through a function (None drops it)."""

    def change(path: Path, new: Callable[[str], str | None], **more: torch.Tensor) -> None:
        from safetensors.torch import load_file, save_file

        old = load_file(path)
        tensors = {n: tensor for name, tensor in old.items() if (n := new(name)) is not None}
        save_file(tensors | more, path, {"format": "pt"})

    return change


@pytest.fixture(autouse=True)
def compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read every merged checkpoint virtually, too: each tensor must have the written bytes."""
    check, settings_of, used = engine._check_index, engine._settings, []

    def settings(request: Any) -> Any:
        used[:] = [settings_of(request)]
        return used[0]

    def both(plan: Any, out: Path) -> None:
        check(plan, out)
        if any(map(has_no_data, open_checkpoint(out).shards)):
            return
        virtual = VirtualCheckpoint(plan, used[0])
        with threadpool_limits(1):
            for name, output in virtual.outputs.items():
                assert read_in_parts(virtual.tensor(name), output) == stored(out, name), name
        virtual.close()

    monkeypatch.setattr(engine, "_settings", settings)
    monkeypatch.setattr(engine, "_check_index", both)


def read_in_parts(tensor: Any, output: Any) -> bytes:
    """Read the second part first."""
    middle = output.rows // 3
    last = tensor.read(middle, output.rows - middle).tobytes()
    return bytes(tensor.read(0, middle).tobytes() + last)


def stored(folder: Path, name: str) -> bytes:
    """Return a tensor's bytes in a checkpoint."""
    for shard in open_checkpoint(folder).shards:
        for info in shard.tensors:
            if info.name == name:
                with shard.path.open("rb") as file:
                    file.seek(info.start)
                    return file.read(info.size)
    raise KeyError(name)
