"""What a validation found: one sentence each, with the place that it points at."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

ERROR, WARNING, NOTE = "error", "warning", "note"
_LAYER = re.compile(r"\.(?:layers|h|blocks?|layer)\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One difference that matters (`error`), may matter (`warning`), or is worth knowing."""

    severity: str
    check: str
    """Which detector saw it: `files`, `tokenizer`, `elements`, `outputs`, `layers`, `logits`."""
    message: str
    tensor: str = ""
    """The tensor or file to suspect."""
    layer: int | None = None
    """The decoder layer it belongs to, counted from 0."""


def finding(severity: str, check: str, message: str, tensor: str = "") -> Finding:
    """Return a finding; the layer is read from the tensor's name."""
    return Finding(
        severity=severity, check=check, message=message, tensor=tensor, layer=layer_of(tensor)
    )


def layer_of(tensor: str) -> int | None:
    """Return the number of the decoder layer in a tensor's name, or None."""
    match = _LAYER.search(f".{tensor}.")
    return int(match[1]) if match else None


def failed(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings that make a validation fail."""
    return [found for found in findings if found.severity == ERROR]
