"""What to do with a quantized base: the choices, and what each of them means; no torch here."""

from __future__ import annotations

from pathlib import Path

from weightsmith.errors import InputRefused, UsageError

CHOICES = ("refuse", "dequantize", "simulate-nf4", "simulate-nf4-double")
"""`-double`: block scales quantized too, as with `bnb_4bit_use_double_quant`."""

_ADVICE = (
    "choose on purpose: (1) merge onto the original 16-bit checkpoint: the better base, but the "
    "adapter learned to correct this one's rounding, and the difference of the two bases was "
    "measured at 1.5 to 46 times the adapter's own size; if the adapter was trained in 4-bit, "
    "--quantized-base simulate-nf4 with that base reproduces the training; (2) --quantized-base "
    "dequantize: decode this base to 16 bits and merge there, which reproduces what was trained "
    "and writes a plain 16-bit checkpoint. Adding and quantizing again on the same grid is not "
    "offered: it kept 0.2 % to 1.6 % of adapters up to a fiftieth of the weights' size"
)


def check_choice(choice: str) -> None:
    """Raise UsageError for what is no choice."""
    if choice not in CHOICES:
        raise UsageError(
            f"unknown choice {choice!r} for a quantized base", hint=f"one of {', '.join(CHOICES)}"
        )


def refuse(base: Path, method: str, *, simulates: bool = False) -> InputRefused:
    """Return the refusal of a quantized base, with both ways on and their price."""
    if simulates:
        return InputRefused(
            f"{base} is quantized ({method}) already, and simulate-nf4 rounds a 16-bit base",
            hint="--quantized-base dequantize merges onto what this base's codes stand for",
        )
    return InputRefused(f"{base} is quantized ({method})", hint=_ADVICE)


def simulates(choice: str) -> bool:
    """Say whether a 16-bit base is to be rounded to 4 bits first."""
    return choice.startswith("simulate-nf4")
