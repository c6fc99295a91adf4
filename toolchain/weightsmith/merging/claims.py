"""All that one adapter does: each of its keys understood once, each module that it names there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from weightsmith.errors import InputRefused
from weightsmith.merging.claim import SHOWN, AdapterView, Claim
from weightsmith.merging.families import families
from weightsmith.merging.names import added_prefix
from weightsmith.merging.tasks import TASKS
from weightsmith.merging.tying import is_head

_BUFFERS = ("e_score_correction_bias", "final_logits_bias")
"""Biases that are no parameters, so that nothing trains or saves them."""


def claims_of(view: AdapterView) -> list[Claim]:
    """Return what the families understood of an adapter.

    Raises InputRefused for keys that are left over or mean the same twice, and where the
    configuration targets modules that the file has no weights for.
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
            hint="nothing of an adapter is left out in silence: export it again with PEFT's "
            "save_pretrained, or serve it unmerged",
        )
    twice = sorted(key for key, count in used.items() if count > 1)
    if twice:
        raise InputRefused(
            f"{view.path}: {', '.join(twice[:SHOWN])} may mean several things",
            hint="export the adapter again with PEFT's save_pretrained",
        )
    _check_complete(view, claims)
    _check_promises(view, claims)
    return claims


def _kind(key: str) -> str:
    """Say in a few words what an unsupported key is."""
    kinds = {
        "lora_embedding_": "LoRA on an embedding",
        "lora_magnitude_vector": "DoRA",
        "lora_B.bias": "a LoRA bias",
        "trainable_tokens": "trained tokens",
        "modules_to_save": "a fully trained module",
        "base_layer": "a trained base weight",
        "lora_diag": "KaSA",
        "lora_": "an unknown LoRA tensor",
    }
    return next((text for part, text in kinds.items() if part in key), "a full weight")


def _check_complete(view: AdapterView, claims: Sequence[Claim]) -> None:
    """Refuse where the configuration targets modules of the base that the file has no keys for."""
    if not claims or view.config.target_modules is None:
        return
    # The base's names are translated as the first module's was: they may lack `model.`.
    plain = next((c for c in claims if _same_end(f"{c.module}.weight", c.target)), None)
    if plain is None:
        return
    cut, put = added_prefix(f"{plain.module}.weight", plain.target)
    have = {claim.target for claim in claims}
    missing = []
    for name, source in view.sources.items():
        module = put + name.removeprefix(cut).removesuffix(".weight")
        matrix = name.endswith(".weight") and len(source.shape) == 2
        if matrix and name not in have and view.config.targets(module):
            missing.append(module)
    if missing:
        raise InputRefused(
            f"{view.path} targets {len(missing)} modules that it has no weights for, such as "
            + ", ".join(missing[:SHOWN]),
            hint="the adapter file is incomplete or its keys were renamed; export it again",
        )


def _check_promises(view: AdapterView, claims: Sequence[Claim]) -> None:
    """Refuse where the configuration names more that was trained than the file holds."""
    raw, keys = view.config.raw, list(view.keys)
    # For classifiers PEFT lists all the names that a head may have.
    heads = ("classifier", "score") if raw.get("task_type") in TASKS else ()
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
    ]
    if raw.get("trainable_token_indices") and not any(claim.patch for claim in claims):
        missing.append("trainable_token_indices")
    if view.tie and view.config.targets(head := view.tie.head.removesuffix(".weight")):
        done = any(is_head(claim.module) or claim.both for claim in claims)
        missing += [] if done else [f"target_modules {head}"]
    missing += [f"the bias {name}" for name in _missing_biases(view, claims)]
    if missing:
        raise InputRefused(
            f"{view.path}: adapter_config.json says that these were trained, and the file has no "
            f"weights for them: {', '.join(missing[:SHOWN])}",
            hint="the adapter file is incomplete or its keys were renamed; export it again",
        )


def _missing_biases(view: AdapterView, claims: Sequence[Claim]) -> list[str]:
    """Return the base's biases that `bias` says were trained, without a claim."""
    bias = str(view.config.raw.get("bias", "none"))
    have = {claim.target for claim in claims if claim.replacement}
    if bias == "all":
        trained = [name for name in view.sources if name.endswith("bias")]
        return [n for n in trained if n not in have and n.rpartition(".")[2] not in _BUFFERS]
    if not bias.endswith("_only"):
        return []
    modules = [claim.module for claim in claims if claim.terms or claim.change]
    found = [view.find(module, "bias") for module in modules]
    return sorted({name for name in found if name and name not in have})


def _same_end(module: str, target: str) -> bool:
    return bool(target) and (module.endswith(target) or target.endswith(module))
