"""LoRA adapters as GGUF files, made by llama.cpp's own converter."""

from __future__ import annotations

from pathlib import Path

from weightsmith.checkpoints.safetensors import read_header
from weightsmith.errors import CheckFailed
from weightsmith.quantizers.quantizer import Step

FILE = "adapter.gguf"


def steps(base: Path, adapter: Path, output: Path, tools: Path, python: str) -> tuple[Step, ...]:
    """Return the converter's command; A and B stay float32, so nothing is rounded again."""
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
    """Return how many tensors the file holds; raises CheckFailed where the adapter has others."""
    import gguf  # here, so that listing the formats stays light

    wanted = len(read_header(adapter / "adapter_model.safetensors").tensors)
    found = len(gguf.GGUFReader(output / FILE).tensors)
    if found != wanted:
        raise CheckFailed(
            f"the converted adapter holds {found} tensors, the adapter {wanted}",
            hint="the converter left some out; merge this adapter instead",
        )
    return found
