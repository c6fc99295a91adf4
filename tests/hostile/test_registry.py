"""The attacker runs a registry, hub, mirror, proxy or package index, or may write to one."""

from __future__ import annotations
