"""The attacker wrote a base: its files, configuration, tokenizer and chat template."""

from __future__ import annotations
