"""Keys of an adapter's file as PEFT loads them; it leaves out what it does not know."""

from __future__ import annotations

from pathlib import Path

from weightsmith.checkpoints.safetensors import read_header
from weightsmith.errors import InputRefused

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch.compile, FSDP and activation checkpointing put into the names of modules."""
KEY_MAPPING = {rf"\b(?:{'|'.join(WRAPPERS)})\.": ""}
"""For PEFT's `key_mapping`: patterns, and what takes their place."""


def check_peft_keys(root: Path) -> None:
    """Raise InputRefused for an adapter of which PEFT would load nothing and say nothing."""
    header = read_header(root / "adapter_model.safetensors")
    strange = [info.name for info in header.tensors if not info.name.startswith("base_model.")]
    if strange:
        raise InputRefused(
            f"PEFT loads no key that does not begin with base_model., such as {strange[0]} of "
            f"{header.path}: there is no unmerged model to compare with",
            hint="export the adapter with PEFT's save_pretrained, from the unwrapped model",
        )
