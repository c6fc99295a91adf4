"""Adapter keys as PEFT loads them; PEFT silently ignores unknown keys."""

from __future__ import annotations

from pathlib import Path

from weightsmith.core.errors import InputRefused
from weightsmith.models.safetensors import read_header

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Name parts added by torch.compile, FSDP and activation checkpointing."""
KEY_MAPPING = {rf"\b(?:{'|'.join(WRAPPERS)})\.": ""}
"""PEFT's `key_mapping`: pattern -> replacement."""


def check_peft_keys(root: Path) -> None:
    """Raise InputRefused for an adapter with keys that PEFT would silently ignore."""
    header = read_header(root / "adapter_model.safetensors")
    ignored = [info.name for info in header.tensors if not info.name.startswith("base_model.")]
    if ignored:
        raise InputRefused(
            f"PEFT ignores keys without the prefix base_model., such as {ignored[0]} in "
            f"{header.path}, so there is no unmerged model to compare with",
            hint="export the adapter with PEFT's save_pretrained, from the unwrapped model",
        )
