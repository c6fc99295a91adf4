"""Whole tensors in an adapter: trained modules, biases, resized or copied embeddings."""

from __future__ import annotations

import re
from collections.abc import Iterator

from weightsmith.core.errors import InputRefused
from weightsmith.merging.claim import TASKS, AdapterView, Claim, Family
from weightsmith.merging.names import module_key, plain_module
from weightsmith.merging.outputs import StoredTensor
from weightsmith.merging.tying import Tie, is_embedding, is_head

_WRAPPED = re.compile(r"\.(?:modules_to_save(?:\.[^.]+)?|original_module)$")
_OTHERS = re.compile(r".*(?:lora_|trainable_tokens_delta|ln_tuning_layers).*")


def _claim(view: AdapterView) -> Iterator[Claim]:
    for key in view.keys:
        name = module_key(key)
        if _OTHERS.fullmatch(name):
            continue
        owner, _, parameter = name.rpartition(".")
        module = plain_module(owner.removesuffix(".token_adapter.base_layer"))
        module = _WRAPPED.sub("", module)
        if _is_redundant(view, key, module, parameter) or _is_unchanged(view, key, module):
            yield Claim(keys=(key,), module=module)
        elif _is_expected(view, key, module):
            yield _one(view, key, owner, module, parameter)


FAMILY = Family(
    name="replaced",
    kinds=frozenset({"LORA", "TRAINABLE_TOKENS"}),
    every=True,
    claim=_claim,
    variants={
        "`modules_to_save`": "the adapter's tensor replaces the base's",
        "`bias` all or lora_only": "the adapter's bias replaces the base's",
        "heads of another task (`task_type` SEQ_CLS, TOKEN_CLS, QUESTION_ANS)": "the head "
        "is added; names of tensors, `architectures` and labels are those of the class with it; a "
        "head that filled gaps in texts is left out",
        "resized vocabularies": "the adapter's embeddings replace the base's; `vocab_size` is "
        "updated",
    },
)


def _is_expected(view: AdapterView, key: str, module: str) -> bool:
    """Return whether a whole tensor is expected: by the configuration, or as a saved embedding."""
    if _is_saved(view, module):
        return True
    owner, _, parameter = key.rpartition(".")
    bias = str(view.config.raw.get("bias", "none"))
    # Older versions of PEFT train all parameters with `bias` in their names.
    if bias == "all" and "bias" in module_key(key):
        return True
    if parameter == "bias":
        if bias.endswith("_only") and owner.endswith(".base_layer"):
            return True
        # The bias of a resized head, which PEFT saves whole.
        return is_head(module) and f"{key.rpartition('.')[0]}.weight" in view.keys
    if parameter == "weight" and (is_embedding(module) or is_head(module)):
        return True
    target = view.find(module, parameter) if owner.endswith(".base_layer") else ""
    # An embedding or head by another name, which PEFT saves whole.
    return bool(target) and view.shape(target)[:1] == (view.base_config.get("vocab_size"),)


def _is_redundant(view: AdapterView, key: str, module: str, parameter: str) -> bool:
    """Return whether a tensor is redundant: the untrained original, or a copy of another key's.

    PEFT writes all parts of an embedding's wrapper if the vocabulary was resized, and BERT's head
    has two names for its bias.
    """
    prefix, name = key.removesuffix(module_key(key)), f"{module}.{parameter}"
    other = f"{prefix}{view.alias_target(name) or name}"
    if other == key or other not in view.keys:
        return False
    original = ".original_module." in key
    return original or view.stored(key).same_bytes(view.stored(other))


def _is_unchanged(view: AdapterView, key: str, module: str) -> bool:
    """Return whether it is the base's own weight, which PEFT saves with an embedding's factors."""
    target = view.find(module) if key.endswith(".base_layer.weight") else ""
    source = view.source(target) if target else None
    return isinstance(source, StoredTensor) and view.stored(key).same_bytes(source)


def _is_saved(view: AdapterView, module: str) -> bool:
    """Return whether the module or one of its parents is in `modules_to_save`.

    PEFT matches suffixes of names, not whole parts: `norm` also matches `input_layernorm`.
    """
    saved = tuple(view.config.raw.get("modules_to_save") or ())
    parts = module.split(".")
    return any(".".join(parts[:end]).endswith(saved) for end in range(1, len(parts) + 1))


def _one(view: AdapterView, key: str, owner: str, module: str, parameter: str) -> Claim:
    info = view.keys[key]
    target = view.find(module, parameter)
    # A batch norm's counters are integers in both.
    counted = target in view.sources and info.dtype == view.sources[target].dtype
    if not counted:
        view.require_float(key)
    stacks = parameter == "weight" and view.base_config.get("is_encoder_decoder")
    if stacks and module.rpartition(".")[2] == "shared" and _is_saved(view, module):
        source = view.sources[view.need(module)]
        if isinstance(source, StoredTensor) and view.stored(key).same_bytes(source):
            return Claim(keys=(key,), module=module)
        raise InputRefused(
            f"{view.path} has {module} (modules_to_save), but encoder and decoder use it by other "
            "names: it had no effect in training",
            hint="remove it from modules_to_save and from the file if it was not intended; train "
            "new words with trainable_token_indices",
        )
    if view.tie and parameter == "weight" and (is_embedding(module) or view.is_head(module)):
        return _tied(view, view.tie, key, owner, module)
    if not target and str(view.config.raw.get("task_type")) in TASKS and _is_saved(view, module):
        return Claim(
            keys=(key,),
            module=module,
            target=f"{module}.{parameter}",
            replacement=view.stored(key),
            new=True,
        )
    if not target:
        raise InputRefused(
            f"{view.path} has {module}.{parameter}, which the base does not have",
            hint="a new head needs an architecture: set task_type in adapter_config.json to "
            + ", ".join(TASKS),
        )
    _check_shape(view, key, module, target)
    return Claim(keys=(key,), module=module, target=target, replacement=view.stored(key))


def _tied(view: AdapterView, tie: Tie, key: str, owner: str, module: str) -> Claim:
    """Return the claim of a tensor for a tied embedding or head.

    Equal tensors for both keep them tied; different ones, or one trained alone
    (`modules_to_save`), untie them.
    """
    # The head's key for an embedding, the embedding's for a head.
    judge = view.is_head if is_embedding(module) else is_embedding
    other = next((k for k, m in _weights(view) if k != key and judge(m)), "")
    _check_shape(view, key, module, tie.embedding)
    if other and view.stored(key).same_bytes(view.stored(other)):
        if view.is_head(module):
            return Claim(keys=(key,), module=module)
        alone = False
    else:
        wrapped = owner.endswith("base_layer")
        tying = view.config.ties(module)
        alone = bool(other) or (_is_saved(view, module) and not wrapped and not tying)
    own = tie.head if view.is_head(module) else tie.embedding
    return Claim(
        keys=(key,),
        module=module,
        target=own if alone else tie.embedding,
        replacement=view.stored(key),
        both=not alone,
    )


def _weights(view: AdapterView) -> Iterator[tuple[str, str]]:
    for key in view.keys:
        owner, _, parameter = module_key(key).rpartition(".")
        if parameter == "weight" and not _OTHERS.fullmatch(module_key(key)):
            yield key, plain_module(owner.removesuffix(".token_adapter.base_layer"))


def _check_shape(view: AdapterView, key: str, module: str, target: str) -> None:
    shape, expected = view.keys[key].shape, view.shape(target)
    resizable = is_embedding(module) or is_head(module)
    if shape == expected or (
        resizable and shape[1:] == expected[1:] and len(shape) == len(expected)
    ):
        return
    raise InputRefused(
        f"{view.path}: {key} has shape {list(shape)}, but the base's {target} has {list(expected)}",
        hint="the adapter was trained on another model: its adapter_config.json names "
        f"{view.config.base_model or '(none)'!r}",
    )
