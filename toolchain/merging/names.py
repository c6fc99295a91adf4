"""Which base tensor an adapter's module means, whatever prefix either side was saved with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

_WRAPPER = "base_model.model."
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
_CONV1D_MODULES = ("c_attn", "q_attn", "c_proj", "c_fc")
_LEADING = 3
"""Prefixes such as `model.` or `model.language_model.` have at most this many parts."""


class BaseNames:
    """The base's tensors by module name: exact first, then the one tensor with the same ending."""

    def __init__(self, tensors: Mapping[str, object]) -> None:
        self._tensors = tensors
        self._endings: dict[str, list[str]] = defaultdict(list)
        for name in tensors:
            parts = name.split(".")
            for cut in range(1, min(_LEADING, len(parts) - 2) + 1):
                self._endings[".".join(parts[cut:])].append(name)

    def find(self, tensor: str) -> tuple[str, ...]:
        """Return the base tensors that a name may mean: one if it is clear, none, or several.

        The name counts as the model's own (`model.layers.0.mlp.up_proj.weight`); the base may lack
        its leading parts, or have more of them.
        """
        if tensor in self._tensors:
            return (tensor,)
        longer = self._endings.get(tensor, [])
        parts = tensor.split(".")
        cuts = range(1, min(_LEADING, len(parts) - 2) + 1)
        shorter = [n for cut in cuts if (n := ".".join(parts[cut:])) in self._tensors]
        return tuple(longer + shorter)


def module_key(key: str) -> str:
    """Return an adapter's key without PEFT's wrapper prefix."""
    return key.removeprefix(_WRAPPER)


def added_prefix(module: str, base: str) -> tuple[str, str]:
    """Return what to cut from, and to put before, a base name to get the model's own name.

    `("", "model.")` means that the base was saved without `model.`.
    """
    if base.endswith(module):
        return base[: len(base) - len(module)], ""
    return "", module[: len(module) - len(base)]


def is_conv1d(model_type: str, module: str) -> bool:
    """Say whether a module is transformers' Conv1D, which stores its weight as (in, out)."""
    return model_type in _CONV1D_MODELS and module.rpartition(".")[2] in _CONV1D_MODULES
