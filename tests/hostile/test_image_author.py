"""The attacker made an image that is verified, started, rebased, or built from again."""

from __future__ import annotations
