"""What an importance matrix is measured on, and by what.

Our walk is the default from 200 MB on; below that its imports take longer than llama-imatrix.
llama-imatrix runs with one CPU variant (x86-64-v3), because another order of sums changes the file:
17 instead of 8 CPU seconds for 3,600 tokens of the support bot.
"""

from __future__ import annotations

from pathlib import Path

from weightsmith.core.cpus import has_avx2
from weightsmith.core.errors import InputRefused
from weightsmith.core.safe_parse import parse_file
from weightsmith.models.facts import ModelFacts
from weightsmith.quantizers.architectures import MEASURED

IMATRIX_WORDS = frozenset({"", "auto", "walk", "off"})
"""Values of the option `imatrix` that are no file's name."""
WITHOUT_WALK = frozenset({"DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"})
"""The converter splits `kv_b_proj` into two matrices, which have other inputs than it."""
WALK_TOKENS = 1 << 16
"""Our walk runs so many through all layers before the next: their states are in memory."""

_WALK_BYTES = 200_000_000
"""Of a checkpoint: below, the walk's imports take longer than llama-imatrix."""
_WINDOW = 512
"""llama-imatrix's default."""
_MIN_TOKENS = 256


def window_of(model: Path, texts: int, tokens: int) -> int:
    """Return how many tokens of the joined texts run together.

    `texts` is their number, for the message. Raises InputRefused for too few tokens.
    """
    if tokens < _MIN_TOKENS:
        raise InputRefused(
            f"the {texts} calibration texts have {tokens} tokens; an importance matrix needs "
            f"at least {_MIN_TOKENS}",
            hint="add calibration text, or set imatrix to off",
        )
    context = int(str(config_of(model).get("max_position_embeddings") or _WINDOW))
    return min(_WINDOW, context, 1 << (tokens.bit_length() - 2))


def check_walk(model: ModelFacts) -> None:
    """Refuse an architecture whose layers our walk cannot run, or whose inputs it does not know."""
    if model.architecture not in MEASURED - WITHOUT_WALK:
        raise InputRefused(
            f"imatrix: walk does not support {model.architecture}",
            hint="set imatrix to auto, which lets llama-imatrix measure",
        )


def measured_by(model: ModelFacts, size: int) -> str:
    """Return who measures importance if nobody was named: `walk`, or `auto` for llama-imatrix.

    `size` is the checkpoint's in bytes. Without AVX2, the bits of a walk are this CPU's own.
    """
    known = model.architecture in MEASURED - WITHOUT_WALK
    return "walk" if known and size >= _WALK_BYTES and has_avx2() else "auto"


def config_of(model: Path) -> dict[str, object]:
    """Return a model's config.json, with that of its language model; {} if it cannot be read."""
    try:
        config = parse_file(model / "config.json")
    except (OSError, ValueError):
        return {}
    return {**config, **(config.get("text_config") or {})}
