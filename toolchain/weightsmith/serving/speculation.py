"""Speculative decoding: something cheap drafts tokens, and the model confirms several in one step.

A greedy answer stays the same, whatever drafts: a token counts only if the model would have chosen
it. What changes is the time, and the memory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.values import JsonValue
from weightsmith.models.facts import ModelFacts
from weightsmith.models.shape import CacheLayers, ModelShape
from weightsmith.serving.options import plain_name

_OPTIONS = ("spec-", "speculative-", "draft", "model-draft", "speculate")
"""Beginnings of engines' own options of it."""
_WHAT = {
    "draft": "a smaller model drafts",
    "eagle3": "an EAGLE-3 head drafts",
    "mtp": "the model's own layers for further tokens draft",
    "ngram": "what stands in the prompt and the answer already drafts",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """What drafts, and how many tokens at a time."""

    method: str
    """Of the recipe's `serve.speculative`."""
    tokens: int
    draft: ModelFacts | None = None
    """The model that drafts, of methods that have one."""
    weight_bytes: int = 0
    """Its weights."""
    path: str = ""
    """Absolute, in the image: its file or folder."""

    @property
    def note(self) -> str:
        """What a plan says of it."""
        return (
            f"speculative decoding: {_WHAT[self.method]} up to {self.tokens} tokens, and the model"
            " confirms each: greedy answers stay the same"
        )


def check_speculation(
    model: ModelFacts,
    speculation: Speculation,
    engine: str,
    known: Collection[str],
    extra: Mapping[str, JsonValue],
    most_apart: int = 0,
    unplanned: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Refuse what the engine, of whose methods `known` are, cannot do with this model.

    `most_apart` is by how many rows it lets the embeddings of model and draft differ, `unplanned`
    are methods that its program has, and what they lack here.
    Raises InputRefused, and UsageError where `serve.extra` has options of it, too.
    """
    if speculation.method not in known:
        has = f"{', '.join(sorted(known))} are" if known else "nor is another"
        lacking = f": {why}" if (why := unplanned.get(speculation.method)) else ""
        raise InputRefused(
            f"serve.speculative: method {speculation.method} is not planned for {engine} here;"
            f" {has}{lacking}",
            hint="choose another method, or build this target by a recipe of its own",
        )
    if model.task.kind != "generate":
        raise InputRefused(
            f"serve.speculative: {model.architecture} {model.task.does}, and writes no tokens",
            hint="leave serve.speculative out",
        )
    own = [key for key in extra if plain_name(key).removeprefix("llama-arg-").startswith(_OPTIONS)]
    if own:
        raise UsageError(
            f"serve.extra.{own[0]} and serve.speculative say the same thing",
            hint="set one of them",
        )
    if speculation.draft:
        _check_draft(model.shape, speculation.draft.shape, speculation.method, most_apart)
    layers = model.predicting_layers
    if speculation.method == "mtp":
        if not layers:
            raise InputRefused(
                f"serve.speculative: {model.architecture}'s config.json states no layers for"
                " further tokens (MTP)",
                hint="choose ngram, or a base that has them",
            )
        if speculation.tokens > layers and speculation.tokens % layers:
            # vLLM 0.33, config/speculative.py: "must be divisible by n_predict".
            raise InputRefused(
                f"serve.speculative.tokens {speculation.tokens} is no multiple of the model's"
                f" {layers} layers for further tokens",
                hint=f"set it to {speculation.tokens // layers * layers}",
            )


def _check_draft(model: ModelShape, draft: ModelShape, method: str, most_apart: int) -> None:
    apart = abs(model.vocab - draft.vocab)
    if apart > most_apart and method == "draft":
        raise InputRefused(
            f"serve.speculative: config.json of the draft has vocab_size {draft.vocab}, and the"
            f" model's {model.vocab}: the engine takes a difference of up to {most_apart}",
            hint="choose another draft; rows behind the last token count too",
        )
    odd = model.latent_cache or draft.latent_cache
    if odd or any(part.kind == "state" for part in (*model.cache, *draft.cache)):
        raise InputRefused(
            "serve.speculative: the memory of a draft is planned where model and draft attend to"
            " all tokens or a window, with heads of their own",
            hint="choose method mtp or ngram",
        )


def with_drafter(shape: ModelShape, model: ModelFacts, drafts: Speculation | None) -> ModelShape:
    """Return a decoder's shape with the caches of what drafts beside its own.

    A layer for further tokens keeps every token, as the decoder's own layers of full attention.
    """
    if drafts and drafts.draft:
        own = drafts.draft.shape
        part = CacheLayers(
            kind="full", layers=own.layers, kv_heads=own.kv_heads, head_dim=own.head_dim
        )
        return replace(shape, cache=(*shape.cache, part))
    if drafts is None or drafts.method != "mtp":
        return shape
    layers, found = model.predicting_layers, list(shape.cache)
    for place, part in enumerate(found):
        if part.kind == "full":
            found[place] = replace(part, layers=part.layers + layers)
            return replace(shape, cache=tuple(found))
    return replace(shape, cache=(CacheLayers(kind="full", layers=layers), *found))
