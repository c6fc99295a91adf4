"""All that one adapter does: each of its keys understood once, each module that it names there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from toolchain.errors import InputRefused
from toolchain.merging.families.family import SHOWN, AdapterView, Claim, families
from toolchain.merging.names import added_prefix


def claims_of(view: AdapterView) -> list[Claim]:
    """Return what the families understood of an adapter.

    Raises InputRefused for keys that are left over or mean the same twice, and where the
    configuration targets modules that the file has no weights for.
    """
    claims = [
        claim
        for family in families()
        if view.config.kind in family.kinds
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
    plain = next((c for c in claims if c.target.endswith(".weight") and c.terms), None)
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
