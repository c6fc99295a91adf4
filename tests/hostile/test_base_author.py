"""The attacker wrote a base model: its files, its configuration, its tokenizer and chat template."""

from __future__ import annotations
