"""Rules by the names of a GGUF file's tensors: one that matches none is a slip."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable

from weightsmith.core import time_limits
from weightsmith.core.apart import on_a_main_thread
from weightsmith.core.errors import InputRefused
from weightsmith.models.facts import ModelFacts

_LIKE = "blk.0.attn_v.weight, blk.0.ffn_down.weight, token_embd.weight and output.weight"


def check_patterns(patterns: Iterable[str], model: ModelFacts) -> None:
    """Raise InputRefused for a pattern that matches no tensor of any model with as many layers.

    Which of these the model has, the converter says (`require_matches`). The names are those of the
    package `gguf`, which lacks some of the newest architectures'.
    """
    if not (wanted := [*patterns]) or not model.layers:
        return
    from gguf.constants import TENSOR_NAMES  # a quarter of a second, which few recipes need

    kinds, layers = sorted({*TENSOR_NAMES.values()}), model.layers + model.predicting_layers
    names = [f"{kind.format(bid=n)}.weight" for kind in kinds for n in range(layers)]
    for pattern in wanted:
        if not _matches(pattern, names):
            word = max(re.findall(r"[A-Za-z_]+", pattern), key=len, default="")
            stems = [kind.rpartition(".")[2] for kind in kinds if kind.startswith("blk.")]
            near = difflib.get_close_matches(word, stems, 1, 0.85)
            guess = f"did you mean {near[0]}? " if near and near[0] != word else ""
            raise _no_match(pattern, guess, f", and the model has {layers} layers, from 0")


def require_matches(patterns: Iterable[str], names: Collection[str]) -> None:
    """Raise InputRefused for a pattern that matches none of a file's tensors."""
    for pattern in patterns:
        if not _matches(pattern, names):
            raise _no_match(pattern)


def _matches(pattern: str, names: Collection[str]) -> bool:
    """Return whether a pattern is in a name, whatever its case; raises InputRefused."""
    return on_a_main_thread(_found, (pattern, list(names)))


def _found(given: tuple[str, list[str]]) -> bool:
    pattern, names = given
    search = re.compile(pattern, re.IGNORECASE).search
    try:
        with time_limits.cpu_limit(time_limits.FOREIGN_SECONDS):
            return any(map(search, names))
    except time_limits.TooLong:
        raise InputRefused(
            f"quantize.tensor_types: {pattern[:60]!r} takes more than "
            f"{time_limits.FOREIGN_SECONDS:g} s to match",
            hint="write a simpler pattern, such as attn_v",
        ) from None


def _no_match(pattern: str, guess: str = "", layers: str = "") -> InputRefused:
    return InputRefused(
        f"quantize.tensor_types: no tensor of the GGUF file matches {pattern[:60]!r}{layers}",
        hint=f"{guess}names are like {_LIKE}; correct the pattern, or leave it out",
    )
