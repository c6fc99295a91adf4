"""LoRA adapters as GGUF files, made by llama.cpp's converter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from weightsmith.core.errors import CheckFailed
from weightsmith.models.safetensors import read_header
from weightsmith.quantizers.quantizer import BuilderCommand

FILE = "adapter.gguf"
_PROGRAM = "weightsmith.worker.convert_adapters"


def steps(
    base: Path, files: Mapping[Path, Path], output: Path, tools: Path, python: str
) -> tuple[BuilderCommand, ...]:
    """Return the step that converts adapters, each to its file; none without adapters."""
    if not files:
        return ()
    converter = tools / "convert" / "convert_lora_to_gguf.py"
    listed = output / ".adapters.json"
    pairs = [[str(adapter), str(file)] for adapter, file in files.items()]
    return (
        BuilderCommand(
            title=f"converting {len(files)} adapter(s) to GGUF",
            argv=(python, "-m", _PROGRAM, str(converter), str(base), str(listed)),
            writes={listed: json.dumps(pairs)},
            removes=(listed,),
            env={
                "PYTHONDONTWRITEBYTECODE": "1",
                "HF_HUB_OFFLINE": "1",
                "TRANSFORMERS_OFFLINE": "1",
            },
        ),
    )


def check(adapter: Path, file: Path) -> int:
    """Return a file's tensor count; raise CheckFailed if its adapter's differs."""
    import gguf  # here to keep listing the formats fast

    expected = len(read_header(adapter / "adapter_model.safetensors").tensors)
    found = len(gguf.GGUFReader(file).tensors)
    if found != expected:
        raise CheckFailed(
            f"the converted adapter has {found} tensors, but {adapter} has {expected}",
            hint="the converter dropped some; merge this adapter instead",
        )
    return found
