"""The names that transformers gives a checkpoint's tensors when it loads them.

Adapters have these names. Known here are plain renamings (of tensors that transformers stacks, the
part that is renamed), and tensors whose rows it splits into several parameters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

_RENAMED, _SPLIT = "renamed_tensors.json", "split_tensors.json"
_NAMED = {
    "text": "language_model|text_model",
    "vision": "vision|visual|image|vit",
    "audio": "audio|sound|speech",
}
"""Key of a part's configuration, without its end -> what the names of its modules contain."""


def loaded_names(config: Mapping[str, object], names: Iterable[str]) -> dict[str, str]:
    """Return name in the model -> name in the checkpoint, of tensors that are renamed."""
    rules = _rules(config)
    found: dict[str, list[str]] = {}
    for name in names if rules else ():
        found.setdefault(_loaded(name, rules), []).append(name)
    # Several tensors of one name become one parameter, which has no single tensor.
    return {new: old for new, (old, *more) in found.items() if not more and new != old}


@dataclass(frozen=True, slots=True)
class SplitParameter:
    """A parameter that is rows of a tensor of the checkpoint."""

    tensor: str
    """The tensor's name in the checkpoint."""
    names: tuple[str, ...]
    """The model's names of all parameters that the tensor consists of, in the order of its rows."""
    equal: bool
    """True if all have the same number of rows."""


def split_names(config: Mapping[str, object], names: Iterable[str]) -> dict[str, SplitParameter]:
    """Return name in the model -> piece, of parameters that transformers splits a tensor into."""
    splits = _rules(config, _SPLIT)
    renamings = _rules(config) if splits else []
    found: dict[str, SplitParameter] = {}
    for name in names if splits else ():
        new = _loaded(name, renamings)
        for rule in splits:
            pieces = tuple(rule.apply(new, put) for put in rule.targets)
            if pieces[0] != new:
                piece = SplitParameter(name, pieces, rule.equal)
                found |= dict.fromkeys(pieces, piece)
    return found


@dataclass(frozen=True, slots=True)
class _Rule:
    """What replaces a pattern in names, from behind a part's name on."""

    pattern: re.Pattern[str]
    targets: tuple[str, ...]
    """More than one for a tensor that is split."""
    equal: bool
    """True if the pieces have the same number of rows."""
    part: re.Pattern[str] | None
    everywhere: bool
    """Also in names without the part."""

    def apply(self, name: str, target: str) -> str:
        """Rename a tensor as `WeightTransform.rename_source_key` does."""
        part = self.part.match(name) if self.part else None
        start = part.end() if part else 0
        match = self.pattern.search(name[start:])
        if match is None or not (part or self.everywhere):
            return name
        put = target.replace(r"\1", match[1]) if r"\1" in target else target
        return name[:start] + name[start:].replace(match[0], put, 1)


def _loaded(name: str, rules: Iterable[_Rule]) -> str:
    """Rename a tensor by all rules in turn."""
    for rule in rules:
        name = rule.apply(name, rule.targets[0])
    return name


def _rules(config: Mapping[str, object], table: str = _RENAMED) -> list[_Rule]:
    """Return a table's rules of a model's class, else of its type, and those of its parts."""
    listed = config.get("architectures")
    kinds = [str(kind) for kind in listed] if isinstance(listed, list) else []
    kinds.append(str(config.get("model_type", "")))
    own = next((kind for kind in kinds if kind in _table(table)), "")
    rules = list(_of(table, own))
    for key, value in config.items():
        if isinstance(value, dict) and value.get("model_type") != config.get("model_type"):
            rules += _of(table, str(value.get("model_type", "")), key.removesuffix("_config"))
    return rules


def _of(table: str, kind: str, part: str = "") -> Iterator[_Rule]:
    """Yield a class's or type's rules, if it is the model or a part of it."""
    word = _NAMED.get(part, re.escape(part))
    below = re.compile(rf"(?:[^.]+\.)*?[^.]*(?:{word})[^.]*\.") if part else None
    # Some checkpoints have the text model at the top.
    everywhere = part in ("", "text")
    for pattern, targets, equal in _table(table).get(kind, ()):
        yield _Rule(re.compile(pattern), tuple(targets), equal, below, everywhere)


@cache
def _table(name: str) -> dict[str, list[tuple[str, list[str], bool]]]:
    """Return class or model type -> pattern, what it becomes, and whether pieces are equal.

    A test compares the files with transformers' `conversion_mapping.py`.
    """
    rules = json.loads(resources.files(__package__).joinpath(name).read_text("utf-8"))
    if name == _RENAMED:
        return {kind: [(old, [new], True) for old, new in some] for kind, some in rules.items()}
    return {kind: [(old, new, equal) for old, new, equal in some] for kind, some in rules.items()}
