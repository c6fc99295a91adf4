"""Whole tensors that an adapter brings: trained modules, biases, resized or copied embeddings."""

from __future__ import annotations

import re
from collections.abc import Iterator

from weightsmith.errors import InputRefused
from weightsmith.merging.claim import AdapterView, Claim, Family, Variant
from weightsmith.merging.duplicates import same_bytes
from weightsmith.merging.names import module_key, plain_module
from weightsmith.merging.outputs import Stored
from weightsmith.merging.tasks import TASKS
from weightsmith.merging.tying import is_embedding, is_head

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
        if _is_spare(view, key, module, parameter):
            yield Claim(keys=(key,), module=module)
        elif _legal(view, key, module):
            yield _one(view, key, owner, module, parameter)


FAMILY = Family(
    name="replaced",
    kinds=frozenset({"LORA", "TRAINABLE_TOKENS"}),
    every=True,
    claim=_claim,
    variants=(
        Variant(name="`modules_to_save`", how="the adapter's tensor takes the base's place"),
        Variant(name="`bias` all or lora_only", how="the adapter's bias takes the base's place"),
        Variant(
            name="heads of another task (`task_type` SEQ_CLS, TOKEN_CLS, QUESTION_ANS)",
            how="the head is added; `architectures` and labels in config.json follow",
        ),
        Variant(
            name="resized vocabularies",
            how="the adapter's embeddings take the base's place; `vocab_size` follows",
        ),
    ),
)


def _legal(view: AdapterView, key: str, module: str) -> bool:
    """Say whether the configuration, or PEFT's saving of embeddings, explains a whole tensor."""
    if _is_saved(view, module):
        return True
    owner, _, parameter = key.rpartition(".")
    if parameter == "bias":
        wrapped = owner.endswith(".base_layer")
        bias = str(view.config.raw.get("bias", "none"))
        if bias == "all" or (bias.endswith("_only") and wrapped):
            return True
        # Of a resized head, which PEFT saves whole.
        return is_head(module) and f"{key.rpartition('.')[0]}.weight" in view.keys
    return parameter == "weight" and (is_embedding(module) or is_head(module))


def _is_spare(view: AdapterView, key: str, module: str, parameter: str) -> bool:
    """Say whether a tensor adds nothing: the untrained original, or what another key holds too.

    PEFT writes all parts of an embedding's wrapper where the vocabulary was resized, and BERT's
    head has two names for its bias.
    """
    prefix, name = key.removesuffix(module_key(key)), f"{module}.{parameter}"
    twin = f"{prefix}{view.second_name(name) or name}"
    if twin == key or twin not in view.keys:
        return False
    original = ".original_module." in key
    return original or same_bytes(view.file, view.keys[key], view.keys[twin])


def _is_saved(view: AdapterView, module: str) -> bool:
    """Say whether the module, or one that it is part of, is among `modules_to_save`.

    PEFT compares the ends of names, not of their parts: `norm` means `input_layernorm` too.
    """
    saved = tuple(view.config.raw.get("modules_to_save") or ())
    parts = module.split(".")
    return any(".".join(parts[:end]).endswith(saved) for end in range(1, len(parts) + 1))


def _one(view: AdapterView, key: str, owner: str, module: str, parameter: str) -> Claim:
    info = view.keys[key]
    target = view.find(module, parameter)
    # Counters of a batch norm are whole numbers on both sides.
    counted = target in view.sources and info.dtype == view.sources[target].dtype
    if info.dtype not in ("F32", "F16", "BF16") and not counted:
        raise InputRefused(
            f"{view.path}: {key} is of type {info.dtype}",
            hint="save the adapter in float32, float16 or bfloat16",
        )
    if parameter == "weight" and _is_unread(view, module):
        return _unread(view, key, module)
    if view.tie and parameter == "weight" and (is_embedding(module) or is_head(module)):
        return _tied(view, key, owner, module)
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
            f"{view.path} brings {module}.{parameter}, which the base does not have",
            hint="a new head needs an architecture: set task_type in adapter_config.json to "
            + ", ".join(TASKS),
        )
    _check_shape(view, key, module, target)
    return Claim(keys=(key,), module=module, target=target, replacement=view.stored(key))


def _is_unread(view: AdapterView, module: str) -> bool:
    """Say whether it is the table of an encoder-decoder, trained under the name that none calls."""
    both = bool(view.base_config.get("is_encoder_decoder"))
    return both and module.rpartition(".")[2] == "shared" and _is_saved(view, module)


def _unread(view: AdapterView, key: str, module: str) -> Claim:
    """Return a claim without effect; PEFT's copy of the table is not what the stacks read."""
    source, info = view.sources[view.need(module)], view.keys[key]
    if isinstance(source, Stored) and same_bytes(view.file, info, source.info, source.path):
        return Claim(keys=(key,), module=module)
    raise InputRefused(
        f"{view.path} brings {module} (modules_to_save), which encoder and decoder read under "
        "names of their own: unmerged, it has no effect",
        hint="take it out of modules_to_save and out of the file if it was not meant; new words "
        "can be trained with trainable_token_indices",
    )


def _tied(view: AdapterView, key: str, owner: str, module: str) -> Claim:
    """Return what a tensor of an embedding or a head does whose weight they share.

    A tensor saved for both stays tied; one of two that differ, and a module that was trained by
    itself (`modules_to_save`), is its module's own.
    """
    tie = view.tie
    assert tie is not None  # noqa: S101 - the caller looked
    twin = _twin(view, key, is_embedding(module))
    _check_shape(view, key, module, tie.embedding)
    if twin and same_bytes(view.file, view.keys[key], view.keys[twin]):
        if is_head(module):
            return Claim(keys=(key,), module=module)
        alone = False
    else:
        wrapped = owner.endswith("base_layer")
        tying = view.config.ties(module)
        alone = bool(twin) or (_is_saved(view, module) and not wrapped and not tying)
    own = tie.head if is_head(module) else tie.embedding
    return Claim(
        keys=(key,),
        module=module,
        target=own if alone else tie.embedding,
        replacement=view.stored(key),
        both=not alone,
    )


def _twin(view: AdapterView, key: str, embedding: bool) -> str:
    """Return the key of the other one of embedding and head, saved in the same way."""
    for other in view.keys:
        name = module_key(other)
        owner, _, parameter = name.rpartition(".")
        module = plain_module(owner.removesuffix(".token_adapter.base_layer"))
        right = is_head(module) if embedding else is_embedding(module)
        if other != key and right and parameter == "weight" and not _OTHERS.fullmatch(name):
            return other
    return ""


def _check_shape(view: AdapterView, key: str, module: str, target: str) -> None:
    shape, wanted = view.keys[key].shape, view.shape(target)
    resizable = is_embedding(module) or is_head(module)
    if shape == wanted or (resizable and shape[1:] == wanted[1:] and len(shape) == len(wanted)):
        return
    raise InputRefused(
        f"{view.path}: {key} has the shape {list(shape)}, the base's {target} {list(wanted)}",
        hint="the adapter was trained on another model: its configuration names "
        f"{view.config.base_model or '(none)'!r}",
    )
