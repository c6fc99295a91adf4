"""LoRA adapters as GGUF files, made by llama.cpp's converter."""

from __future__ import annotations

from pathlib import Path

from weightsmith.checkpoints.safetensors import read_header
from weightsmith.errors import CheckFailed
from weightsmith.quantizers.quantizer import Step

FILE = "adapter.gguf"


def steps(base: Path, adapter: Path, output: Path, tools: Path, python: str) -> tuple[Step, ...]:
    """Return the converter's step; A and B are written in float32, so nothing is rounded."""
    converter = tools / "convert"
    return (
        Step(
            title="converting the adapter to GGUF",
            argv=(
                python,
                str(converter / "convert_lora_to_gguf.py"),
                str(adapter),
                *("--base", str(base), "--outfile", str(output / FILE), "--outtype", "f32"),
            ),
            env={
                "PYTHONPATH": f"{converter}:{converter / 'gguf-py'}",
                "PYTHONDONTWRITEBYTECODE": "1",
                "HF_HUB_OFFLINE": "1",
                "TRANSFORMERS_OFFLINE": "1",
            },
            reads="the adapter",
        ),
    )


def check(adapter: Path, output: Path) -> int:
    """Return the file's tensor count; raise CheckFailed if the adapter's differs."""
    import gguf  # here to keep listing the formats fast

    expected = len(read_header(adapter / "adapter_model.safetensors").tensors)
    found = len(gguf.GGUFReader(output / FILE).tensors)
    if found != expected:
        raise CheckFailed(
            f"the converted adapter has {found} tensors, but the adapter has {expected}",
            hint="the converter dropped some; merge this adapter instead",
        )
    return found
