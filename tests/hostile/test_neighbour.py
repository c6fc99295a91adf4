"""The attacker is another user or process on the same machine, or on a volume that both mount."""

from __future__ import annotations
