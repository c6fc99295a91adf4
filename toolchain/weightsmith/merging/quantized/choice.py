"""The choices for a quantized base; no torch here.

The default is a refusal with the numbers: adapters do not record whether they were trained on 4-bit
weights, and both 16-bit bases are in use. Quantizing a merge again on the same grid is not offered,
because it erases small adapters.
"""

from __future__ import annotations

from pathlib import Path

from weightsmith.core.errors import InputRefused

_ADVICE = (
    "choose one: (1) merge onto the original 16-bit checkpoint: a better base, but the adapter "
    "was trained with this one's rounding errors, which measured 1.5 to 46 times the adapter's "
    "own size; if the adapter was trained in 4-bit, --quantized-base simulate-nf4 with that base "
    "reproduces the training; (2) --quantized-base dequantize: dequantize this base to 16 bits "
    "and merge there, which reproduces the training and writes a plain 16-bit checkpoint. "
    "Requantizing the sum on the same grid is not offered: it kept only 0.2 % to 1.6 % of "
    "adapters up to a fiftieth of the weights' size"
)


def refuse(base: Path, method: str, *, simulates: bool = False) -> InputRefused:
    """Return the error for a quantized base, with the choices and their drawbacks."""
    if simulates:
        return InputRefused(
            f"{base} is already quantized ({method}), but simulate-nf4 needs a 16-bit base",
            hint="use --quantized-base dequantize to merge onto this base's dequantized weights",
        )
    return InputRefused(f"{base} is quantized ({method})", hint=_ADVICE)


def simulates(choice: str) -> bool:
    """Return whether the choice rounds a 16-bit base to 4 bits first."""
    return choice.startswith("simulate-nf4")
