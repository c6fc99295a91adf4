"""The names that transformers gives a checkpoint's tensors when it loads them.

Adapters have these names. Only plain renamings are known here: of tensors that transformers stacks
or splits, the part that is renamed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources

_TABLE = "renamed_tensors.json"


def loaded_names(config: Mapping[str, object], names: Iterable[str]) -> dict[str, str]:
    """Return name in the model -> name in the checkpoint, of tensors that are renamed."""
    rules = _rules(config)
    found: dict[str, list[str]] = {}
    for name in names if rules else ():
        found.setdefault(_loaded(name, rules), []).append(name)
    # Several tensors of one name become one parameter, which has no single tensor.
    return {new: old for new, (old, *more) in found.items() if not more and new != old}


def _loaded(name: str, rules: Iterable[tuple[re.Pattern[str], str]]) -> str:
    """Rename a tensor as `WeightTransform.rename_source_key` does, by all rules in turn."""
    for pattern, target in rules:
        if match := pattern.search(name):
            put = target.replace(r"\1", match[1]) if r"\1" in target else target
            name = name.replace(match[0], put, 1)
    return name


def _rules(config: Mapping[str, object]) -> list[tuple[re.Pattern[str], str]]:
    """Return the rules of a model's class, else of its type, and those of its text model."""
    listed, text = config.get("architectures"), config.get("text_config")
    kinds = [str(kind) for kind in listed] if isinstance(listed, list) else []
    kinds.append(str(config.get("model_type", "")))
    own = next((kind for kind in kinds if kind in _table()), "")
    inner = str(text.get("model_type", "")) if isinstance(text, dict) else ""
    both = dict.fromkeys(kind for kind in (own, inner) if kind)
    return [(re.compile(rule), put) for kind in both for rule, put in _table().get(kind, ())]


@cache
def _table() -> dict[str, list[tuple[str, str]]]:
    """Return class or model type -> patterns and what they become, in order.

    A test compares the file with transformers' `conversion_mapping.py`.
    """
    text = resources.files(__package__).joinpath(_TABLE).read_text("utf-8")
    return {kind: [(old, new) for old, new in rules] for kind, rules in json.loads(text).items()}
