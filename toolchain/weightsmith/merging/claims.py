"""Collect an adapter's claims, and check that every key and every target is covered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from weightsmith.core.errors import InputRefused
from weightsmith.merging.claim import SHOWN, AdapterView, Claim
from weightsmith.merging.families import families
from weightsmith.merging.families.experts import is_one_of_stack
from weightsmith.merging.names import added_prefix
from weightsmith.merging.tasks import TASKS
from weightsmith.merging.tying import is_head


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
        raise InputRefused(
            f"{view.path} has {len(left)} tensors that cannot be merged: "
            + "; ".join(f"{key} ({_kind(key)})" for key in left[:SHOWN]),
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


def _kind(key: str) -> str:
    """Describe an unsupported key."""
    kinds = {
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
    return next((text for part, text in kinds.items() if part in key), "a full weight")


def _check_complete(view: AdapterView, claims: Sequence[Claim]) -> None:
    """Refuse an adapter whose file lacks keys for targeted modules of the base."""
    if not claims or view.config.target_modules is None:
        return
    # Translate the base's names like the first module's: they may lack `model.`.
    named = ((c, name) for name in (str, view.names.loaded) for c in claims)
    plain, as_model = next(
        ((c, name) for c, name in named if _same_end(f"{c.module}.weight", name(c.target))),
        (None, str),
    )
    if plain is None:
        return
    cut, put = added_prefix(f"{plain.module}.weight", as_model(plain.target))
    have = {claim.target for claim in claims}
    # Experts are no modules in transformers 5, so PEFT finds no targets among them.
    stacked = not any(is_one_of_stack(claim.module) for claim in claims)
    missing = []
    for name, source in view.sources.items():
        module = put + as_model(name).removeprefix(cut).removesuffix(".weight")
        matrix = name.endswith(".weight") and len(source.shape) == 2
        matrix = matrix and not (stacked and is_one_of_stack(module))
        if matrix and name not in have and view.config.targets(module):
            missing.append(module)
    if missing:
        raise InputRefused(
            f"{view.path} has no weights for {len(missing)} of its target modules, such as "
            + ", ".join(missing[:SHOWN]),
            hint="the adapter file is incomplete or its keys were renamed; export it again",
        )


def _check_trained(view: AdapterView, claims: Sequence[Claim]) -> None:
    """Refuse an adapter whose file lacks weights that the configuration says were trained."""
    raw, keys = view.config.raw, list(view.keys)
    # For classifiers PEFT lists all possible names of a head.
    heads = ("classifier", "score") if str(raw.get("task_type")) in TASKS else ()
    missing = [
        f"modules_to_save {name}"
        for name in raw.get("modules_to_save") or ()
        if not any(f"{name}." in key for key in keys) and name not in heads
    ]
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
    missing += [f"the bias {name}" for name in _missing_biases(view, claims)]
    if missing:
        raise InputRefused(
            f"{view.path} has no weights for parts that adapter_config.json says were trained: "
            f"{', '.join(missing[:SHOWN])}",
            hint="the adapter file is incomplete or its keys were renamed; export it again",
        )


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


def _missing_biases(view: AdapterView, claims: Sequence[Claim]) -> list[str]:
    """Return the base's biases that `bias` says were trained but that have no claim."""
    bias = str(view.config.raw.get("bias", "none"))
    have = {claim.target for claim in claims if claim.replacement}
    if bias == "all":
        # Not `dt_bias` or `experts.down_proj_bias`: PEFT trains parameters called `bias`.
        return [name for name in view.sources if name.endswith(".bias") and name not in have]
    if not bias.endswith("_only"):
        return []
    modules = [claim.module for claim in claims if claim.terms or claim.change]
    found = [view.find(module, "bias") for module in modules]
    return sorted({name for name in found if name and name not in have})


def _same_end(module: str, target: str) -> bool:
    return bool(target) and (module.endswith(target) or target.endswith(module))
