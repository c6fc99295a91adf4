"""Tiny models and adapters with random weights, as transformers and PEFT write them."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from threadpoolctl import threadpool_limits
from weightsmith.merging import engine
from weightsmith.merging.virtual import VirtualCheckpoint
from weightsmith.models.safetensors import open_checkpoint
from weightsmith.models.tensors import has_no_data

from tests.unit.merging.oracle import MakeBase, build, make_base, model_class, save_adapter

MakeModel = Callable[..., Path]
MakeAdapter = Callable[..., Path]


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


@pytest.fixture(scope="session")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Copy a folder that is made once for each key."""
    made: dict[str, Path] = {}

    def copy(to: Path, key: object, make: Callable[[Path], None]) -> Path:
        if str(key) not in made:
            made[str(key)] = tmp_path_factory.mktemp("made") / to.name
            make(made[str(key)])
        return shutil.copytree(made[str(key)], to)

    return copy


@pytest.fixture
def make_model(tmp_path: Path, copied: Callable[..., Path]) -> MakeModel:
    """Write a base model; `dtype` and `shard` besides the config's own options."""

    def make(
        kind: str = "llama",
        name: str = "base",
        dtype: torch.dtype = torch.float32,
        shard: str = "5GB",
        **options: Any,
    ) -> Path:
        def write(folder: Path) -> None:
            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = build(kind, **options)
                for parameter in model.parameters():
                    torch.nn.init.normal_(parameter, std=0.2)
                model.to(dtype).save_pretrained(folder, max_shard_size=shard)

        return copied(tmp_path / name, (kind, name, dtype, shard, options), write)

    return make


@pytest.fixture
def make_adapter(tmp_path: Path, copied: Callable[..., Path]) -> MakeAdapter:
    """Write a LoRA adapter for a base model, with random A and B."""

    def make(
        base: Path, name: str = "adapter", seed: int = 1, copies: bool = False, **options: Any
    ) -> Path:
        from peft import LoraConfig, get_peft_model

        options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | options

        def write(folder: Path) -> None:
            torch.manual_seed(seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = model_class("llama").from_pretrained(base, dtype=torch.float32)
                tuned = get_peft_model(model, LoraConfig(**options))
                for key, parameter in tuned.named_parameters():
                    if "lora_" in key:
                        torch.nn.init.normal_(parameter, std=0.2)
                # By default PEFT adds a copy of a targeted head's base weight.
                save_adapter(tuned, folder, save_embedding_layers=copies)

        files = [path for path in sorted(base.iterdir()) if path.is_file()]
        digests = [sha256(path.read_bytes()).hexdigest() for path in files]
        return copied(tmp_path / name, (digests, name, seed, copies, options), write)

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
    """Read the second part first, and a row that is in both."""
    middle = output.rows // 3
    last = tensor.read(middle, output.rows - middle)
    first = tensor.read(0, min(middle + 1, output.rows))
    assert first[middle:].tobytes() == last[:1].tobytes()
    return bytes(first[:middle].tobytes() + last.tobytes())


def stored(folder: Path, name: str) -> bytes:
    """Return a tensor's bytes in a checkpoint."""
    for shard in open_checkpoint(folder).shards:
        for info in shard.tensors:
            if info.name == name:
                with shard.path.open("rb") as file:
                    file.seek(info.start)
                    return file.read(info.size)
    raise KeyError(name)
