"""Collect an adapter's claims, and check that every key and every target is covered.

Weights of modules that adapter_config.json does not target are left out, as PEFT leaves them out
when it loads an adapter. llama.cpp's converter and vLLM load them: they read no such setting but
rank and scaling.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from weightsmith.core.errors import InputRefused
from weightsmith.core.safe_parse import read_json
from weightsmith.core.values import JsonValue
from weightsmith.merging.adapter_config import UNMERGED, parse_adapter_config
from weightsmith.merging.claim import SHOWN, TASKS, AdapterView, Claim, read_adapter
from weightsmith.merging.families import families, lora
from weightsmith.merging.families.experts import is_one_of_stack
from weightsmith.merging.names import (
    BaseNames,
    added_prefix,
    loaded_names,
    module_key,
    plain_module,
    split_names,
)
from weightsmith.merging.tying import is_embedding, is_head
from weightsmith.merging.uncalled import computes_more, shared, uncalled
from weightsmith.models.peft_patterns import check_peft_patterns, limit_matching
from weightsmith.models.predicting import predicting
from weightsmith.models.safetensors import open_checkpoint
from weightsmith.models.task import outputs_of

_KINDS = {
    "lora_embedding_": "LoRA on an embedding",
    "lora_magnitude_vector": "DoRA",
    "lora_B.bias": "a LoRA bias",
    "trainable_tokens": "trained tokens",
    "modules_to_save": "a fully trained module",
    "base_layer": "a trained base weight",
    "lora_diag": "KaSA",
    "beft_bias": "BEFT on a layer without a bias",
    "lora_": "an unknown LoRA tensor",
}
"""Part of an unsupported key -> what it is."""
_WHOLE = ("modules_to_save", "original_module", "token_adapter", "trainable_tokens_delta")
"""Parts of keys that `target_modules` says nothing about."""
_HEAD = re.compile(r"(?:LMHeadModel|For[A-Z]\w*|Model)$")
_FILLS_GAPS = re.compile(r"For(?:MaskedLM|PreTraining)$")
_IN_LAYER = re.compile(r"\.\d+\.")
_PARAMETER = re.compile(r"\.(?:lora_.*|weight|bias)$")
_LENGTH = 80
"""Characters of a setting that are shown."""


def claims_of(view: AdapterView) -> list[Claim]:
    """Return the claims of all families for an adapter.

    Raises InputRefused for keys without a claim or with several, and if the configuration targets
    modules for which the file has no weights.
    """
    claims = [
        claim
        for family in families()
        if family.every or view.config.kind in family.kinds
        for claim in family.claim(view)
    ]
    used = Counter(key for claim in claims for key in claim.keys)
    left = sorted(view.keys.keys() - used.keys())
    if left:
        kinds = (
            next((kind for part, kind in _KINDS.items() if part in key), "a full weight")
            for key in left
        )
        raise InputRefused(
            f"{view.path} has {len(left)} tensors that cannot be merged: "
            + "; ".join(f"{key} ({kind})" for key, kind in zip(left[:SHOWN], kinds, strict=False)),
            hint="export the adapter again with PEFT's save_pretrained, or serve it unmerged",
        )
    twice = sorted(key for key, count in used.items() if count > 1)
    if twice:
        raise InputRefused(
            f"{view.path}: ambiguous keys: {', '.join(twice[:SHOWN])}",
            hint="export the adapter again with PEFT's save_pretrained",
        )
    _check_complete(view, claims)
    _check_trained(view, claims)
    return claims


def _check_complete(view: AdapterView, claims: Sequence[Claim]) -> None:
    """Refuse an adapter whose file lacks keys for targeted modules of the base."""
    if not claims or view.config.target_modules is None:
        return
    # Translate the base's names like the first module's: they may lack `model.`. One that is
    # renamed tells which version's names the adapter has.
    loaded = view.names.loaded
    ordered = sorted(claims, key=lambda claim: loaded(claim.target) == claim.target)
    named = ((c, name) for c in ordered for name in (str, loaded))
    plain, as_model = next(
        (
            (c, name)
            for c, name in named
            if c.target
            and (
                f".{c.module}.weight".endswith(f".{name(c.target)}")
                or f".{name(c.target)}".endswith(f".{c.module}.weight")
            )
        ),
        (None, str),
    )
    if plain is None:
        return
    cut, put = added_prefix(f"{plain.module}.weight", as_model(plain.target))
    have = {claim.target for claim in claims}
    # Experts are no modules in transformers 5, so PEFT finds no targets among them.
    stacked = not any(is_one_of_stack(claim.module) for claim in claims)
    # A class with a head of its own may lack the base's: BERT's for tokens has no pooler.
    headed = view.config.raw.get("task_type") in TASKS
    left_out, idle = _left_out(view, have), uncalled(view.base_config)
    missing = []
    for name, source in view.sources.items():
        module = put + as_model(name).removeprefix(cut).removesuffix(".weight")
        matrix = name.endswith(".weight") and len(source.shape) == 2
        matrix = matrix and not (stacked and is_one_of_stack(module))
        matrix = matrix and not (headed and not _IN_LAYER.search(module)) and not idle(module)
        if matrix and name not in have and view.config.targets(module) and not left_out(name):
            missing.append(module)
    if missing:
        raise InputRefused(
            f"{view.path} has no weights for {len(missing)} of its target modules, such as "
            + ", ".join(missing[:SHOWN]),
            hint="the adapter file is incomplete or its keys were renamed; export it again",
        )


def _left_out(view: AdapterView, have: Collection[str]) -> Callable[[str], bool]:
    """Return what tells whether the adapter was trained without a tensor of the base.

    Layers that predict further tokens are not loaded for training, whatever is targeted. An adapter
    that has weights for one of them was trained with them.
    """
    belongs = predicting(view.base_config)
    return (lambda _: False) if any(map(belongs, have)) else belongs


def _check_trained(view: AdapterView, claims: Sequence[Claim]) -> None:
    """Refuse an adapter whose file lacks weights that the configuration says were trained."""
    raw, absent = view.config.raw, unmatched_modules(view)
    missing = [f"modules_to_save {name}" for name in _unsaved(view) if name not in absent]
    missing += [
        f"target_parameters {name}"
        for name in raw.get("target_parameters") or ()
        if not any(f".{claim.module}.weight".endswith(f".{name}") for claim in claims)
        and not any(f".{claim.module}".endswith(f".{name}") for claim in claims)
        and name not in unmatched_parameters(view)
    ]
    if raw.get("trainable_token_indices") and not any(claim.patch for claim in claims):
        missing.append("trainable_token_indices")
    if view.tie and view.config.targets(head := view.tie.head.removesuffix(".weight")):
        done = any(is_head(claim.module) or claim.both for claim in claims)
        missing += [] if done else [f"target_modules {head}"]
    bias, have = str(raw.get("bias", "none")), {c.target for c in claims if c.replacement}
    left_out = _left_out(view, {c.target for c in claims})
    biases: list[str] = []
    if bias == "all":
        # Not `dt_bias` or `experts.down_proj_bias`: PEFT trains parameters called `bias`.
        biases = [name for name in view.sources if name.endswith(".bias") and not left_out(name)]
    elif bias.endswith("_only"):
        modules = [claim.module for claim in claims if claim.terms or claim.change]
        biases = sorted({view.find(module, "bias") for module in modules} - {""})
    missing += [f"the bias {name}" for name in biases if name not in have]
    if missing:
        raise InputRefused(
            f"{view.path} has no weights for parts that adapter_config.json says were trained: "
            f"{', '.join(missing[:SHOWN])}",
            hint="the adapter file is incomplete or its keys were renamed; export it again",
        )


def _unsaved(view: AdapterView) -> list[str]:
    """Return the `modules_to_save` that the adapter has no weights for."""
    raw = view.config.raw
    # For classifiers PEFT lists all possible names of a head.
    heads = ("classifier", "score") if str(raw.get("task_type")) in TASKS else ()
    return [
        name
        for name in raw.get("modules_to_save") or ()
        if not any(f"{name}." in key for key in view.keys) and name not in heads
    ]


def unmatched_modules(view: AdapterView) -> list[str]:
    """Return the `modules_to_save` that neither adapter nor base has; PEFT says nothing of them."""
    names = [name for stored in view.sources for name in (stored, view.names.loaded(stored))]
    names += [view.tie.head] if view.tie else []
    return [n for n in _unsaved(view) if not any(f"{n}." in stored for stored in names)]


def unmatched_parameters(view: AdapterView) -> list[str]:
    """Return the `target_parameters` that the base does not have; PEFT only warns about them.

    It adds those of an architecture to `all-linear`, whatever the model has of them.
    """
    listed = view.config.raw.get("target_parameters") or ()
    names = {f".{name}" for stored in view.sources for name in (stored, view.names.loaded(stored))}
    # Experts that transformers stacks have other names in the file.
    stacked = any(is_one_of_stack(name.rpartition(".")[0][1:]) for name in names)
    return [
        name
        for name in listed
        if not any(known.endswith(f".{name}") for known in names)
        and not (stacked and not name.endswith((".weight", ".bias")))
    ]


def without_left_out(view: AdapterView) -> tuple[AdapterView, tuple[str, ...]]:
    """Return the adapter without what PEFT leaves out, and a finding that names it.

    Raises InputRefused if nothing remains.
    """
    wrapped = _wrapped(view)
    left = sorted(raw for raw in wrapped if not _is_targeted(view, raw))
    idle = uncalled(view.base_config)
    without_effect = sorted(raw for raw in wrapped.keys() - left if idle(plain_module(raw)))
    _check_expressible(view, sorted(wrapped.keys() - left - {*without_effect}))
    dropped = {key for raw in left for key in wrapped[raw]}
    texts = list[str]()
    if left:
        texts.append(
            f"{len(dropped)} tensors are left out, as PEFT leaves them out: adapter_config.json"
            f" does not target their modules ({', '.join(_settings(view))}), such as "
            + ", ".join(map(plain_module, left[:SHOWN]))
        )
    # A tensor that takes the weight's place is read.
    read = {key for raw in without_effect for key in wrapped[raw] if not _is_replacement(key)}
    if read:
        texts.append(
            f"{len(read)} tensors are left out, because PEFT's forward pass does not use them: the"
            " model's code reads these layers' weights without calling the layers, such as "
            + ", ".join(map(plain_module, without_effect[:SHOWN]))
        )
    kept = {key: info for key, info in view.keys.items() if key not in dropped | read}
    _check_not_shared(view, kept)
    if not kept:
        correct = "correct adapter_config.json if they were trained; export the adapter again"
        raise InputRefused(
            f"{view.path} changes nothing: {'; '.join(texts)}",
            hint=correct if left else "train the adapter again, on layers that the model calls",
        )
    return replace(view, keys=kept), tuple(f"{view.path.name}: {text}" for text in texts)


def _check_expressible(view: AdapterView, wrapped: Iterable[str]) -> None:
    """Refuse an adapter of layers that compute more than their weight can express."""
    computing = computes_more(view.base_config)
    if found := [name for raw in wrapped if computing(name := plain_module(raw))]:
        raise InputRefused(
            f"{view.path} changes {', '.join(found[:SHOWN])}, whose class computes more than a "
            "product with its weight: PEFT adds its change afterwards, which no weight expresses",
            hint=f"{UNMERGED}, or train it without these layers in target_modules",
        )


def _check_not_shared(view: AdapterView, keys: Iterable[str]) -> None:
    """Refuse an adapter of layers that take their weights from another layer."""
    matches = shared(view.base_config)
    names = (plain_module(module_key(key)) for key in keys)
    if found := sorted({_PARAMETER.sub("", name) for name in names if matches(name)}):
        raise InputRefused(
            f"{view.path} changes {', '.join(found[:SHOWN])}: transformers has one weight for this "
            "layer and another one, and PEFT changes only one of the two",
            hint=f"{UNMERGED}, or train it without these layers (exclude_modules)",
        )


def require_all_targeted(base: Path, adapter: Path) -> None:
    """Refuse a LoRA adapter with weights that PEFT leaves out, for engines that would load them.

    Reads headers and configurations. Raises InputRefused.
    """
    path = adapter / "adapter_config.json"
    view = read_adapter(adapter, parse_adapter_config(path, read_json(path)))
    wrapped = _wrapped(view)
    check_peft_patterns(adapter, sorted(wrapped))
    with limit_matching(adapter, len(view.keys)):
        # The file's own names are enough for nearly all adapters, and need no base.
        left = sorted(raw for raw in wrapped if not view.config.wraps(raw))
        if left:
            config, tensors = read_json(base / "config.json"), open_checkpoint(base).tensors
            names = BaseNames(tensors, loaded_names(config, tensors), split_names(config, tensors))
            named = replace(view, names=names)
            left = [raw for raw in left if not _is_targeted(named, raw)]
    if left:
        raise InputRefused(
            f"{adapter} has weights of modules that adapter_config.json does not target "
            f"({', '.join(_settings(view))}), such as {', '.join(map(plain_module, left[:SHOWN]))}:"
            " PEFT leaves them out, and this engine would use them",
            hint="merge it; or remove them: load it with PEFT and save it with save_pretrained",
        )


def _wrapped(view: AdapterView) -> dict[str, list[str]]:
    """Return the keys by the name of the module that PEFT would wrap for them."""
    found: dict[str, list[str]] = {}
    for key in view.keys:
        name = module_key(key)
        parts = name.split(".")
        if any(part in parts for part in _WHOLE):
            continue
        if "base_layer" in parts:
            raw = name.partition(".base_layer")[0]
        elif view.config.kind == "LORA":
            raw = lora.module_of(name).partition(".base_layer")[0]
        else:
            names = (".".join(parts[:cut]) for cut in range(len(parts) - 1, 0, -1))
            raw = next((module for module in names if view.find(module)), "")
            raw = "" if name in (f"{raw}.weight", f"{raw}.bias") else raw
        if raw:
            found.setdefault(raw, []).append(key)
    return found


def _is_replacement(key: str) -> bool:
    return ".base_layer." in key and key.endswith((".base_layer.weight", ".base_layer.bias"))


def _is_targeted(view: AdapterView, module: str) -> bool:
    """Return whether PEFT wraps a module, by its name in the file or in the loaded model."""
    config, target = view.config, view.find(module)
    if config.ties(module) and (is_embedding(module) or is_head(module)):
        return True
    loaded = view.names.loaded(target).removesuffix(".weight")
    return config.wraps(module) or bool(target and config.wraps(loaded))


def _settings(view: AdapterView) -> Iterator[str]:
    """Return the settings that choose modules, as adapter_config.json has them."""
    for name in ("target_modules", "exclude_modules", "layers_to_transform", "modules_to_save"):
        value = view.config.raw.get(name)
        # Layer 0 is a choice; so are targets of which there are none.
        if value not in (None, [], "") or (name == "target_modules" and value is not None):
            shown = str(value)
            yield f"{name} {shown if len(shown) <= _LENGTH else shown[:_LENGTH] + '…'}"


def class_with_head(own: str, task_type: str) -> str:
    """Return the class of a model that gets the head of a PEFT task."""
    return _HEAD.sub("", own) + TASKS[task_type]


def prefix_below_head(claims: Sequence[Claim]) -> str:
    """Return what the names of a base's tensors begin with in a model that gets a new head.

    A checkpoint of an encoder alone has `encoder.layer.0`, and a classifier `bert.encoder.layer.0`,
    as the adapter's keys name it. transformers reads both, engines only the second. "" if nothing
    is to be added.
    """
    if not any(claim.new for claim in claims):
        return ""
    pairs = ((c.module, c.target.rpartition(".")[0]) for c in claims if c.target and not c.new)
    added = {
        module.removesuffix(stored) if module.endswith(f".{stored}") else ""
        for module, stored in pairs
    }
    return added.pop() if len(added) == 1 else ""


def old_head(
    config: Mapping[str, JsonValue], claims: Sequence[Claim], names: Iterable[str]
) -> frozenset[str]:
    """Return the base's tensors of a head for gaps in texts, of which a new head takes the place.

    transformers leaves them out; vLLM does not load a checkpoint with them. ModernBERT's `head` is
    a part of its classifiers, too.
    """
    listed = config.get("architectures")
    own = str(listed[0]) if isinstance(listed, list) and listed else ""
    changed = [claim for claim in claims if claim.target and not claim.new]
    encoders = {claim.target.partition(".")[0] for claim in changed} - {"head"}
    known = all(claim.target.startswith(f"{claim.module}.") for claim in changed)
    if not (_FILLS_GAPS.search(own) and any(claim.new for claim in claims)):
        return frozenset()
    if not known or len(encoders) != 1:
        return frozenset()
    kept = (f"{encoders.pop()}.", "head.")
    return frozenset(name for name in names if not name.startswith(kept))


def task_settings(
    config: Mapping[str, JsonValue], views: Sequence[AdapterView], claims: Sequence[Sequence[Claim]]
) -> dict[str, JsonValue]:
    """Return architecture and labels of a model with a new head, {} without one.

    Raises InputRefused if the architecture is ambiguous.
    """
    heads = [
        (view, claim)
        for view, some in zip(views, claims, strict=True)
        for claim in some
        if claim.new
    ]
    if not heads:
        return {}
    view, first = heads[0]
    listed = config.get("architectures")
    own = str(listed[0]) if isinstance(listed, list) and listed else ""
    if any(other is not view for other, _ in heads) or view.weight != 1.0 or not own:
        raise InputRefused(
            f"{view.path} has {first.target}, a head that the base does not have",
            hint="merge it alone, at weight 1, and onto a base whose config.json has "
            "`architectures`",
        )
    task_type = str(view.config.raw["task_type"])
    suffix = TASKS[task_type]
    settings: dict[str, JsonValue] = {"architectures": [class_with_head(own, task_type)]}
    count = outputs_of((c.target, c.replacement.shape) for _, c in heads if c.replacement)
    known = config.get("id2label")
    if suffix != "ForQuestionAnswering" and count:
        if isinstance(known, Mapping) and len(known) == count:  # named for this head
            return settings
        settings["id2label"] = {str(number): f"LABEL_{number}" for number in range(count)}
        settings["label2id"] = {f"LABEL_{number}": number for number in range(count)}
    return settings
