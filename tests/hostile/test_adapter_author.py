"""The attacker wrote an adapter: weights, `adapter_config.json`, tokenizer files, and the names in them."""

from __future__ import annotations
