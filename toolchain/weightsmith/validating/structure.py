"""Checks of files and headers: tensors, dtypes, configuration, end tokens, tied heads."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from weightsmith.core.errors import InputRefused
from weightsmith.core.safe_parse import read_json
from weightsmith.core.values import JsonValue, canonical
from weightsmith.models.folder import check_model_folder
from weightsmith.models.safetensors import (
    CheckpointIndex,
    TensorInfo,
    open_checkpoint,
    read_header,
)
from weightsmith.models.tensors import data_of
from weightsmith.validating.result import ERROR, NOTE, Finding, finding

_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight", "decoder.weight")
_OFTEN_OTHERS = ("output.weight", "decoder.weight")
"""Names that layers of other shapes have, too."""
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_FREE = {
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "tie_word_embeddings",
    "eos_token_id", "bos_token_id", "pad_token_id", "vocab_size", "quantization_config",
    "num_hidden_layers", "layer_types", "use_cache", "architectures",
}  # fmt: skip
"""Keys of config.json that a merge may change; those that matter have checks of their own."""
_TASKS = frozenset({"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"})
"""Of adapters that may bring a head."""
_FILLS_GAPS = re.compile(r"For(MaskedLM|PreTraining)$")
_OLD_HEAD = re.compile(
    r"(cls|decoder|predictions|sop_classifier|vocab_\w+|\w+_predictions|(\w+_)?lm_head)\."
)
"""Tensors of heads that fill gaps, which no classifier has."""
_LABELLED = re.compile(r"(^|\.)(score|classifier)\.(out_proj\.)?weight$")
"""Matrices with a row for each label; not what comes before, such as DistilBERT's."""
_LABELS = frozenset({"id2label", "label2id"})
UNREADABLE = "model.safetensors"
"""The file named by a finding if shards, headers and index are inconsistent."""


def compare_files(base: Path, adapters: Sequence[Path], merged: Path) -> list[Finding]:
    """Return findings from files and headers only.

    Raises InputRefused for a folder that is not a checkpoint.
    """
    check_model_folder(merged)
    before = open_checkpoint(base)
    try:
        after = open_checkpoint(merged)
    except InputRefused as error:
        return [finding(ERROR, "files", error.message, UNREADABLE)]
    config, new = read_json(base / "config.json"), read_json(merged / "config.json")
    old = _as_in(after, before, adapters)
    heads = _new_heads(old, after, adapters)
    # A quantized base has other tensors than the merged model.
    comparable = not config.get("quantization_config")
    return [
        *_configs(config, new, _LABELS if heads else frozenset()),
        *(_tensors(old, after, config, new, heads) if comparable else ()),
        *_brought(merged, after, heads, new),
        *(_types(old, after) if comparable else ()),
        *_ends(base, adapters, merged, new),
        *_tied(after, new, headless=_is_tied(config) is False and not _heads(before)),
    ]


def is_readable(findings: Sequence[Finding]) -> bool:
    """Return whether the merged folder's tensors can be read."""
    return not any(found.tensor == UNREADABLE for found in findings)


def vocabulary(merged: Path) -> int:
    """Return the number of rows of the model's embedding, 0 if it is not found."""
    for name, info in open_checkpoint(merged).tensors.items():
        if name.endswith(_EMBEDDINGS):
            return info.shape[0]
    return 0


def end_tokens(root: Path) -> set[int]:
    """Return the end tokens in generation_config.json and config.json."""
    return _ids(_read(root / "generation_config.json")) | _ids(_read(root / "config.json"))


def _as_in(
    after: CheckpointIndex, before: CheckpointIndex, adapters: Sequence[Path]
) -> Mapping[str, TensorInfo]:
    """Return the base's tensors by the names that the merged model must have for them.

    Below a new head they may all begin with the encoder's name, as transformers writes them.
    """
    old = before.tensors
    if not any(map(_may_bring_head, adapters)) or not old.keys() - after.tensors.keys():
        return old
    first = next(iter(old))
    for name in after.tensors:
        prefix = name.removesuffix(first)
        found = sum(prefix + one in after.tensors for one in old) if prefix != name else 0
        if 2 * found > len(old):
            return {prefix + one: info for one, info in old.items()}
    return old


def _class(config: Mapping[str, JsonValue]) -> str:
    listed = config.get("architectures")
    return str(listed[0]) if isinstance(listed, list) and listed else ""


def _may_bring_head(adapter: Path) -> bool:
    return read_json(adapter / "adapter_config.json").get("task_type") in _TASKS


def _tensors(
    old: Mapping[str, TensorInfo],
    after: CheckpointIndex,
    config: Mapping[str, JsonValue],
    new: Mapping[str, JsonValue],
    heads: Collection[str],
) -> Iterator[Finding]:
    there = after.tensors
    gone = old.keys() - there.keys()
    if heads and _FILLS_GAPS.search(_class(config)) and not _FILLS_GAPS.search(_class(new)):
        gone = {name for name in gone if not _OLD_HEAD.match(name)}
    for name in sorted(gone):
        yield finding(ERROR, "files", f"tensor {name} is missing", name)
    # An untied head and replicated layers are new tensors.
    untied = _is_tied(config) and not _is_tied(new)
    grown = _setting(new, "num_hidden_layers") != _setting(config, "num_hidden_layers")
    for name in sorted(there.keys() - old.keys()):
        if not untied and not grown and name not in heads:
            yield finding(ERROR, "files", f"tensor {name} is not in the base", name)
    for name in sorted(old.keys() & there.keys()):
        base_shape, merged_shape = old[name].shape, there[name].shape
        resized = (
            len(base_shape) == 2
            and base_shape[1:] == merged_shape[1:]
            and name.endswith((*_EMBEDDINGS, *_HEADS))
        )
        if base_shape != merged_shape and not resized:
            message = f"{name} has shape {list(merged_shape)}, but {list(base_shape)} in the base"
            yield finding(ERROR, "files", message, name)


def _new_heads(
    old: Mapping[str, TensorInfo], after: CheckpointIndex, adapters: Sequence[Path]
) -> Mapping[str, tuple[Path, str]]:
    """Return the merged tensors that an adapter has for a head of another task, and their keys."""
    found: dict[str, tuple[Path, str]] = {}
    for folder in adapters:
        if not _may_bring_head(folder):
            continue
        file = folder / "adapter_model.safetensors"
        for info in read_header(file).tensors:
            name = info.name.removeprefix("base_model.model.")
            if name in after.tensors and name not in old:
                found[name] = file, info.name
    return found


def _brought(
    merged: Path,
    after: CheckpointIndex,
    heads: Mapping[str, tuple[Path, str]],
    config: Mapping[str, JsonValue],
) -> Iterator[Finding]:
    """Compare a new head with the adapter's, rounded to its type, and with the labels."""
    import numpy as np
    import torch
    from safetensors import safe_open

    from weightsmith.models.tensors import CheckpointTensors

    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for name, (file, key) in heads.items():
        with safe_open(file, framework="pt") as stored:
            wanted = stored.get_tensor(key).to(kinds.get(after.tensors[name].dtype)).float().numpy()
        found = CheckpointTensors(merged).tensor(name)
        if found.shape != wanted.shape or not np.array_equal(found, wanted):
            yield finding(ERROR, "files", f"{name} is not the adapter's", name)
    named = [name for name in sorted(heads) if _LABELLED.search(name)]
    rows = [after.tensors[name].shape[0] for name in named]
    labels = config.get("id2label")
    if rows and isinstance(labels, Mapping) and len(labels) != rows[-1]:
        message = f"config.json names {len(labels)} labels, and the head has {rows[-1]}"
        yield finding(ERROR, "files", message, "config.json")


def _types(old: Mapping[str, TensorInfo], after: CheckpointIndex) -> Iterator[Finding]:
    """Report dtype changes: a note if all tensors were cast, an error if only some were."""
    changes: dict[tuple[str, str], list[str]] = {}
    for name, info in after.tensors.items():
        if name in old and old[name].dtype != info.dtype:
            changes.setdefault((old[name].dtype, info.dtype), []).append(name)
    for (was, now), names in changes.items():
        same = [n for n, i in after.tensors.items() if n in old and i.dtype == old[n].dtype == was]
        if same:
            message = f"{len(names)} tensors were cast to {now}, {len(same)} others are still {was}"
            yield finding(ERROR, "files", message, names[0])
        else:
            yield finding(NOTE, "files", f"all {was} tensors were cast to {now}")


def _configs(
    old: Mapping[str, JsonValue], new: Mapping[str, JsonValue], free: Collection[str] = ()
) -> Iterator[Finding]:
    keys = (old.keys() | new.keys()) - _FREE - set(free)
    for key in sorted(keys, key=lambda key: (key != "model_type", key)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _configs(before, after)
        # NaN does not equal itself, and 10000 is written as 10000.0, too.
        elif before != after and canonical(before) != canonical(after):
            message = f"config.json: {key} is {after!r}, but {before!r} in the base"
            yield finding(ERROR, "files", message[:300], "config.json")


def _ends(
    base: Path, adapters: Sequence[Path], merged: Path, config: Mapping[str, JsonValue]
) -> Iterator[Finding]:
    """Report end tokens of the inputs that the merged model's configuration lacks."""
    expected = _ids(read_json(base / "config.json"))
    for folder in (base, *adapters):
        expected |= _ids(_read(folder / "generation_config.json"))
    kept = _ids(_read(merged / "generation_config.json")) or _ids(config)
    lost = sorted((expected - kept) | (_ids(read_json(base / "config.json")) - _ids(config)))
    if lost:
        message = f"end-of-sequence token {', '.join(map(str, lost))} is missing"
        yield finding(ERROR, "files", message, "generation_config.json")


def _heads(index: CheckpointIndex) -> list[str]:
    tables = {info.shape for name, info in index.tensors.items() if name.endswith(_EMBEDDINGS)}
    return [
        name
        for name, info in index.tensors.items()
        if name.endswith(_HEADS) and (not name.endswith(_OFTEN_OTHERS) or info.shape in tables)
    ]


def _tied(
    after: CheckpointIndex, config: Mapping[str, JsonValue], *, headless: bool
) -> Iterator[Finding]:
    """Compare the flag `tie_word_embeddings` with the file's head and embedding.

    `headless`: the base has no head either, such as a classifier.
    """
    heads = _heads(after)
    embeddings = [n for n in after.tensors if n.endswith(_EMBEDDINGS)]
    tied = _is_tied(config)
    if not tied and not heads and embeddings and tied is not None and not headless:
        message = "config.json says that the head is not tied, but the checkpoint has no head"
        yield finding(ERROR, "files", message, "lm_head.weight")
    if tied and heads and embeddings and _digest(after, heads[0]) != _digest(after, embeddings[0]):
        message = (
            f"config.json ties the head to {embeddings[0]}, but {heads[0]} differs from it: engines"
            " that follow the flag and engines that read the tensor will disagree"
        )
        yield finding(ERROR, "files", message, heads[0])


def _is_tied(config: Mapping[str, JsonValue]) -> bool | None:
    value = _setting(config, "tie_word_embeddings")
    return None if value is None else bool(value)


def _setting(config: Mapping[str, JsonValue], key: str) -> JsonValue:
    text = config.get("text_config")
    return config.get(key, text.get(key) if isinstance(text, dict) else None)


def _digest(index: CheckpointIndex, name: str) -> str:
    both = ((shard, info) for shard in index.shards for info in shard.tensors)
    shard, info = next((shard, info) for shard, info in both if info.name == name)
    digest, left = hashlib.sha256(), info.size
    if data := data_of(shard):
        for start in range(info.start, info.end, 1 << 20):
            digest.update(data.read(start, min(1 << 20, info.end - start)).tobytes())
        return digest.hexdigest()
    with shard.path.open("rb") as file:
        file.seek(info.start)
        while left and (piece := file.read(min(left, 1 << 20))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def _ids(config: Mapping[str, JsonValue]) -> set[int]:
    value = config.get("eos_token_id")
    return {n for n in (value if isinstance(value, list) else [value]) if type(n) is int}


def _read(path: Path) -> Mapping[str, JsonValue]:
    if not path.is_file():
        return {}
    try:
        return read_json(path)
    except InputRefused:
        return {}
