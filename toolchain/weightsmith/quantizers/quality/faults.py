"""How far a type of weights may be from the checkpoint's: a tensor beyond it is damaged.

Perplexity and divergence hardly move if one of hundreds of tensors is wrong. But what rounding to a
type does to weights is known: per type, the relative error (root of the sum of squares) of normally
distributed weights was measured, 256 rows of 2048, by llama.cpp's own code or this package's
(docs/explanation/what-a-verdict-shows.md has the table). Other distributions, row and column scales
and importance matrices raised it at most by half, in proportion to the largest weight of a block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

_MARGIN = 2.0
_HIGHEST = 0.95
"""A tensor of zeros has an error of 1."""
_COPIED = 0.01
"""For weights in 16 or 32 bits."""
_TINY = 2.0**-14
"""Root mean square of an error that is no damage. Scales in float16 have steps of 2**-24, which are
multiplied by up to 1000. So weights below 0.0001, such as those of tokens that no text has, may
become zero; errors of up to 0.000035 were measured."""
_TINY_COPIED = 2.0**-24
"""The same for float16 itself."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """A type's relative error on normally distributed weights."""

    error: float
    block: int = 32
    """Weights that share a scale, whose largest decides the error; 0: none does; -1: a row."""
    tiny: float = _TINY
    """Root mean square of an error that is no damage, however small the weights are."""

    @property
    def usual(self) -> float:
        """The largest error of normally distributed weights that is no damage."""
        return min(_HIGHEST, _MARGIN * self.error)

    def limit(self, rows: torch.Tensor) -> float:
        """Return the largest error of these rows, [n, columns], that is no damage."""
        return min(_HIGHEST, _MARGIN * self.error * self._excess(rows))

    def _excess(self, rows: torch.Tensor) -> float:
        """Return how much larger the blocks' largest weights are than those of normal ones."""
        if not self.block:
            return 1.0
        width = rows.shape[-1] if self.block < 0 else self.block
        flat = rows.reshape(-1, rows.shape[-1])
        if flat.shape[-1] % width:
            flat = torch.nn.functional.pad(flat, (0, width - flat.shape[-1] % width))
        largest = flat.reshape(len(flat), -1, width).abs().amax(-1)
        mean = float(rows.square().mean()) or math.inf
        return max(1.0, math.sqrt(float(largest.square().mean()) / mean) / _largest(width))


def _largest(count: int) -> float:
    """Return about the root of the mean square of the largest of so many normal numbers.

    Measured: 2.14 for 16, 2.40 for 32, 2.87 for 128, 3.65 for 2048.
    """
    return 1.28 + 0.31 * math.log(count)


ROUNDING: Mapping[str, Rounding] = {
    "q8_0": Rounding(0.0054),
    "q6_k": Rounding(0.0189),
    "q5_k": Rounding(0.0374),
    "q5_1": Rounding(0.0379),
    "q5_0": Rounding(0.0427),
    "q4_k": Rounding(0.0765),
    "q4_1": Rounding(0.0782),
    "iq4_nl": Rounding(0.0795),
    "iq4_xs": Rounding(0.0799),
    "q4_0": Rounding(0.0861),
    "nvfp4": Rounding(0.1032),
    "mxfp4": Rounding(0.1145),
    "q3_k": Rounding(0.1565),
    "iq3_s": Rounding(0.1663),
    "iq3_xxs": Rounding(0.2165),
    "iq2_s": Rounding(0.2749),
    "q2_k": Rounding(0.2970),
    "iq2_xs": Rounding(0.3403),
    "iq2_xxs": Rounding(0.3820),
    "int-quantized": Rounding(0.0083, block=-1),
    "float-quantized": Rounding(0.0263, block=0),
    "nvfp4-pack-quantized": Rounding(0.1032, block=16),
    "mxfp4-pack-quantized": Rounding(0.1145),
    # With groups of 128; rounding errors are moved to other weights on purpose.
    "gptq": Rounding(0.2, block=128),
    "f32": Rounding(_COPIED / _MARGIN, block=0, tiny=_TINY_COPIED),
    "f16": Rounding(_COPIED / _MARGIN, block=0, tiny=_TINY_COPIED),
    "bf16": Rounding(_COPIED / _MARGIN, block=0, tiny=_TINY_COPIED),
}
"""Below two bits, and where scales are moved between tensors (AWQ), no limit would say anything."""
