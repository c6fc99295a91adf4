"""Validation findings: one sentence each, with the tensor or file concerned."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

ERROR, WARNING, NOTE = "error", "warning", "note"
_LAYER = re.compile(r"\.(?:layers|h|blocks?|layer)\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A difference that fails the validation (`error`), may matter (`warning`), or is a `note`."""

    severity: str
    check: str
    """The check that found it: `files`, `tokenizer`, `elements`, `outputs`, `layers`, `logits`."""
    message: str
    tensor: str = ""
    """The tensor or file concerned."""
    layer: int | None = None
    """Its decoder layer, counted from 0."""


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
    """Return the findings that fail a validation."""
    return [found for found in findings if found.severity == ERROR]
