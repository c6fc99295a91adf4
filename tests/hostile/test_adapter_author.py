"""The attacker wrote an adapter: its weights, its configuration, and the names in them."""

from __future__ import annotations
