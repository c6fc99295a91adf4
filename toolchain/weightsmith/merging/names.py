"""Match an adapter's module names to base tensors with other prefixes or spellings.

Adapters have the names that transformers gives a checkpoint's tensors when it loads them. Known
here are plain renamings (of tensors that transformers stacks, the part that is renamed), and
tensors whose rows it splits into several parameters.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources

from weightsmith.models.peft_patterns import WRAPPERS

_WRAPPER = "base_model.model."
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
_CONV1D_MODULES = ("c_attn", "q_attn", "c_proj", "c_fc")
_LEADING = 3
"""Prefixes such as `model.` or `model.language_model.` have at most this many parts."""


_SPELLINGS: tuple[tuple[tuple[str, str], ...], ...] = (
    ((r"\.mlp\.(experts|gate)\b", r".block_sparse_moe.\1"),),
    ((r"\.block_sparse_moe\.", ".mlp."),),
    ((r"^model\.language_model\.", "language_model.model."),),
    ((r"^language_model\.model\.", "model.language_model."),),
    ((r"\bencoder\.text_model\.", "encoder."),),
    ((r"^vlm\.language_model\.", "vlm.model.language_model.model."),),
    ((r"\bvision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),),
    ((r"\bvision_tower\.vision_model\.", "vision_tower."),),
    ((r"^lm_head\.", "embed_out."),),
    ((r"^embed_out\.", "lm_head."),),
    (
        (r"\blayers\.(\d+)\.", r"encoder.layer.\1."),
        (r"\battention\.q_proj\b", "attention.attention.query"),
        (r"\battention\.k_proj\b", "attention.attention.key"),
        (r"\battention\.v_proj\b", "attention.attention.value"),
        (r"\battention\.o_proj\b", "attention.output.dense"),
        (r"\bmlp\.fc1\b", "intermediate.dense"),
        (r"\bmlp\.fc2\b", "output.dense"),
    ),
)
"""Renames between transformers 4 and 5 (its conversion_mapping.py), in both directions if needed:
checkpoints keep the older names, adapters have those of the version that trained them."""
_RENAMED, _SPLIT = "renamed_tensors.json", "split_tensors.json"
_NAMED = {
    "text": "language_model|text_model",
    "vision": "vision|visual|image|vit",
    "audio": "audio|sound|speech",
    "backbone": r"backbone|pixel_level_module\.encoder",
}
"""Key of a part's configuration, without its end -> what the names of its modules contain."""
_BELOW = {"backbone": r"(?:conv_encoder\.)?(?:model\.)?"}
"""Key of a part's configuration, without its end -> modules that some models put around it."""


class BaseNames:
    """The base's tensors by name: an exact match first, else the tensor with the same ending.

    `loaded` has the tensors that transformers renames: name in the model -> name in the base.
    `pieces` has the parameters that it makes of a tensor's rows. `further` are tensors that it does
    not load, which match by their whole names alone.
    """

    def __init__(
        self,
        tensors: Mapping[str, object],
        loaded: Mapping[str, str] | None = None,
        pieces: Mapping[str, SplitParameter] | None = None,
        further: Collection[str] = (),
    ) -> None:
        self._tensors = tensors
        self._pieces = pieces or {}
        self._loaded = loaded or {}
        self._stored = {stored: name for name, stored in self._loaded.items()}
        self._renamed = BaseNames(self._loaded) if self._loaded else None
        self._endings: dict[str, list[str]] = defaultdict(list)
        for name in tensors:
            if name in further:
                continue
            parts = name.split(".")
            for cut in range(1, min(_LEADING, len(parts) - 2) + 1):
                self._endings[".".join(parts[cut:])].append(name)

    def find(self, tensor: str) -> tuple[str, ...]:
        """Return the base tensors that match a name: none, one, or several if ambiguous.

        `tensor` is the model's name (`model.layers.0.mlp.up_proj.weight`); the base may have fewer
        or more leading parts, or the names of another transformers version.
        """
        if tensor in self._loaded:
            return (self._loaded[tensor],)
        found = next((found for name in spellings(tensor) if (found := self._find(name))), ())
        if found or self._renamed is None:
            return found
        return tuple(self._loaded[name] for name in self._renamed.find(tensor))

    def piece(self, tensor: str) -> SplitParameter | None:
        """Return the rows of the base that a parameter of the model is made of."""
        return self._pieces.get(tensor)

    def loaded(self, stored: str) -> str:
        """Return the name that transformers gives one of the base's tensors."""
        return self._stored.get(stored, stored)

    def _find(self, tensor: str) -> tuple[str, ...]:
        if tensor in self._tensors:
            return (tensor,)
        longer = self._endings.get(tensor, [])
        parts = tensor.split(".")
        cuts = range(1, min(_LEADING, len(parts) - 2) + 1)
        shorter = [n for cut in cuts if (n := ".".join(parts[cut:])) in self._tensors]
        return tuple(longer + shorter)


def spellings(name: str) -> Iterator[str]:
    """Yield a tensor's name, then its names in other versions of transformers."""
    yield name
    for rules in _SPELLINGS:
        other = name
        for pattern, put in rules:
            other = re.sub(pattern, put, other)
        if other != name:
            yield other


def module_key(key: str) -> str:
    """Return an adapter's key without PEFT's prefix and the names of other wrappers."""
    return plain_key(key).removeprefix(_WRAPPER)


@lru_cache(maxsize=1 << 16)
def plain_key(key: str) -> str:
    """Return a key without the prefixes that compiling, sharding or checkpointing adds."""
    plain = ".".join(part for part in key.split(".") if part not in WRAPPERS)
    return plain.removeprefix("module.") if plain.startswith(f"module.{_WRAPPER}") else plain


def added_prefix(module: str, base: str) -> tuple[str, str]:
    """Return the prefixes to remove from and to add to a base name to get the model's name.

    `("", "model.")` means that the base was saved without `model.`.
    """
    if base.endswith(module):
        return base[: len(base) - len(module)], ""
    return "", module[: len(module) - len(base)]


def is_conv1d(model_type: str, module: str) -> bool:
    """Return whether a module is transformers' Conv1D, which stores its weight as (in, out)."""
    return model_type in CONV1D_MODELS and module.rpartition(".")[2] in _CONV1D_MODULES


def plain_module(raw: str) -> str:
    """Return a module's name without PEFT's wrappers."""
    return ".".join(part for part in raw.split(".") if part != "base_layer")


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
        # As `WeightTransform.rename_source_key` does.
        part = self.part.match(name) if self.part else None
        start = part.end() if part else 0
        match = self.pattern.search(name[start:])
        if match is None or not (part or self.everywhere):
            return name
        put = target.replace(r"\1", match[1]) if r"\1" in target else target
        return name[:start] + name[start:].replace(match[0], put, 1)


def _loaded(name: str, rules: Iterable[_Rule]) -> str:
    for rule in rules:
        name = rule.apply(name, rule.targets[0])
    return name


def _rules(config: Mapping[str, object], table: str = _RENAMED) -> list[_Rule]:
    """Return a table's rules of a model's class, else of its type, and those of its parts."""
    listed = config.get("architectures")
    kinds = [str(kind) for kind in listed] if isinstance(listed, list) else []
    kinds.append(str(config.get("model_type", "")))
    own = next((kind for kind in kinds if kind in _table(table)), "")
    parts = [(own, "")] + [
        (str(value.get("model_type", "")), key.removesuffix("_config"))
        for key, value in config.items()
        if isinstance(value, dict) and value.get("model_type") != config.get("model_type")
    ]
    rules = []
    for kind, part in parts:
        word, more = _NAMED.get(part, re.escape(part)), _BELOW.get(part, "")
        below = re.compile(rf"(?:[^.]+\.)*?[^.]*(?:{word})[^.]*\.{more}") if part else None
        # A BERT as the decoder has an encoder, too.
        if part in ("encoder", "decoder") and kinds[-1].endswith("encoder-decoder"):
            below = re.compile(rf"{part}\.")
        # Some checkpoints have the text model at the top.
        everywhere = part in ("", "text")
        known = _table(table)
        for pattern, targets, equal in known.get(f"{kind} {part}", known.get(kind, ())):
            rules.append(_Rule(re.compile(pattern), tuple(targets), equal, below, everywhere))
    return rules


@cache
def _table(name: str) -> dict[str, list[tuple[str, list[str], bool]]]:
    """Return class or model type -> pattern, what it becomes, and whether pieces are equal.

    A type that is another class as the backbone of a model is there as `TYPE backbone`, too.
    A test compares the files with transformers' `conversion_mapping.py`.
    """
    rules = json.loads(resources.files(__package__).joinpath(name).read_text("utf-8"))
    if name == _RENAMED:
        return {kind: [(old, [new], True) for old, new in some] for kind, some in rules.items()}
    return {kind: [(old, new, equal) for old, new, equal in some] for kind, some in rules.items()}
