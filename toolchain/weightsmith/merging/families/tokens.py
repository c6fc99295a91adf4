"""Trained tokens: rows of an embedding or head in an adapter."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from weightsmith.core.errors import InputRefused
from weightsmith.merging.adapter_config import UNMERGED
from weightsmith.merging.claim import AdapterView, Claim, Family
from weightsmith.merging.names import module_key, plain_module
from weightsmith.merging.outputs import Patch
from weightsmith.merging.tying import is_embedding, is_head
from weightsmith.merging.uncalled import computes_more

_KEY = re.compile(r"(?P<module>.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.[^.]+)?")

_ALONE = ("SEQ_CLS", "TOKEN_CLS")
_LOOSE = re.compile(r"For(?:Sequence|Token)Classification$|^(?!.*T5).*ForQuestionAnswering$")
"""Classes without `_tied_weights_keys` of their own."""


def _claim(view: AdapterView) -> Iterator[Claim]:
    found = {
        plain_module(match["module"]): key
        for key in view.keys
        if (match := _KEY.fullmatch(module_key(key)))
    }
    for module, key in found.items():
        claim = _one(view, module, key, found)
        yield claim
        # PEFT goes by config.json here: its layer for tokens follows into a head of other weights.
        if view.apart and is_embedding(module) and not any(map(is_head, found)):
            yield replace(claim, keys=(), target=view.apart.head)


FAMILY = Family(
    name="tokens",
    kinds=frozenset({"LORA", "TRAINABLE_TOKENS"}),
    claim=_claim,
    variants={
        "`trainable_token_indices`, trainable tokens": "the adapter's rows replace the base's, "
        "also in a tied head",
    },
)


def _one(view: AdapterView, module: str, key: str, found: dict[str, str]) -> Claim:
    tie = view.tie or view.apart
    follows = bool(tie and tie.follows) and is_embedding(module)
    owner = tie.head.removesuffix(".weight") if tie and follows else module
    if is_head(owner) and view.find(owner, "bias"):
        raise InputRefused(
            f"{view.path} trains tokens of {owner}, whose bias PEFT ignores for such adapters: a "
            "merged model would differ from the trained one",
            hint="serve it unmerged with PEFT, or train the rows with modules_to_save",
        )
    _check_follows(view, module)
    if computes_more(view.base_config)(module):
        raise InputRefused(
            f"{view.path} trains tokens of {module}, whose class computes more than a lookup",
            hint=UNMERGED,
        )
    places = _places(view, module)
    info = view.keys[key]
    head = bool(view.tie) and view.is_head(module)
    target = view.need(module)
    view.require_plain(module)
    shape = view.shape(target)
    if info.shape != (len(places), *shape[1:]):
        raise InputRefused(
            f"{view.path}: {key} has shape {list(info.shape)}, but {len(places)} tokens of "
            f"{target} {list(shape)} need {[len(places), *shape[1:]]}",
            hint="configuration and weights are from different trainings; export both together",
        )
    # In PEFT a tied head follows its embedding, but not the other way round.
    both = bool(view.tie and view.tie.follows) and is_embedding(module)
    others = [m for m in found if (is_embedding(m) if head else view.is_head(m))]
    if others and (head or both):
        same = view.stored(key).same_bytes(view.stored(found[others[0]]))
        both = places == _places(view, others[0]) and same
        if both and head:
            return Claim(keys=(key,), module=module)
    patch = Patch(adapter=view.index, places=places, stored=view.stored(key))
    return Claim(keys=(key,), module=module, target=target, patch=patch, both=both)


def _check_follows(view: AdapterView, module: str) -> None:
    """Refuse tokens of a table that encoder and decoder read by other names.

    PEFT lets them follow if the whole class lists them as tied, which classifiers do not.
    """
    if module.rpartition(".")[2] != "shared":
        return
    listed = view.base_config.get("architectures")
    kinds = [str(kind) for kind in listed] if isinstance(listed, list) else []
    task = str(view.config.raw.get("task_type"))
    if (view.tie and not view.tie.follows) or task in _ALONE or any(map(_LOOSE.search, kinds)):
        raise InputRefused(
            f"{view.path} trains tokens of {module}, but encoder and decoder use that table by "
            "other names, so the tokens had no effect in training",
            hint="train it again without trainable_token_indices, or serve it unmerged",
        )


def _places(view: AdapterView, module: str) -> tuple[int, ...]:
    """Return the token ids that the configuration lists for a module, in the tensor's row order."""
    raw: Any = view.config.raw.get("trainable_token_indices")
    if view.config.kind == "TRAINABLE_TOKENS":
        raw = view.config.raw.get("token_indices")
    if isinstance(raw, dict):
        named = [rows for name, rows in raw.items() if f".{module}".endswith(f".{name}")]
        if (view.tie or view.apart) and view.is_head(module):
            # It follows its embedding.
            named += raw.values()
        raw = named[0] if named else None
    if not isinstance(raw, list) or not all(type(row) is int and row >= 0 for row in raw):
        raise InputRefused(
            f"{view.path}: adapter_config.json does not say which tokens {module} trains",
            hint="export the adapter again with PEFT's save_pretrained",
        )
    return tuple(raw)
