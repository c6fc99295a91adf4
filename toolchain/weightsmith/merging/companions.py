"""The files besides the weights: configuration, tokenizer, chat template, end tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from weightsmith.core.safe_parse import TOKENIZER, json_object, read_json
from weightsmith.core.values import JsonValue
from weightsmith.merging.claim import AdapterView
from weightsmith.merging.plan import MergePlan
from weightsmith.models.task import MODULES, is_of_sentences
from weightsmith.models.templates import TEMPLATE_FILES, TOKENIZER_FILES, is_named_template

_GENERATION, _CONFIG = "generation_config.json", "tokenizer_config.json"
_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def companion_files(plan: MergePlan) -> tuple[dict[str, bytes], list[str]]:
    """Return the files besides the weights by relative path, and findings.

    The last adapter with a tokenizer replaces all tokenizer files, because files of two tokenizers
    must not be mixed; a chat template or a generation_config.json is replaced on its own.
    """
    files = {
        name: (plan.base.root / name).read_bytes()
        for name in plan.base_files
        if not name.endswith((".safetensors", ".safetensors.index.json")) or is_of_sentences(name)
    }
    before = _object(files, _GENERATION)
    if "architectures" in plan.settings:  # sentence-transformers' files are not of the new head
        files = {name: data for name, data in files.items() if not is_of_sentences(name)}
    findings = overlay(files, plan.adapters)
    if plan.dtype != "auto":
        config = _object(files, "config.json")
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            for key in ("dtype", "torch_dtype"):
                if key in part or (part is config and key == "torch_dtype" and "dtype" not in part):
                    part[key] = _NAMES[plan.dtype]
        files["config.json"] = _json(config)
    if plan.settings:
        _apply(files, plan.settings)
    findings += _join_ends(files, plan.adapters, before)
    return files, findings


def index_json(weight_map: Mapping[str, str], total_size: int, parameters: int) -> bytes:
    """Return the content of `model.safetensors.index.json`."""
    metadata = {"total_parameters": parameters, "total_size": total_size}
    return _json({"metadata": metadata, "weight_map": dict(weight_map)})


def write_file(root: Path, name: str, data: bytes) -> dict[str, JsonValue]:
    """Write a small file under the folder, mode 0644, and return path, size and sha256."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(data)
    temporary.chmod(0o644)
    temporary.rename(path)
    return {"path": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def overlay(files: dict[str, bytes], adapters: Sequence[AdapterView]) -> list[str]:
    """Replace tokenizer, template, generation settings and the like by each adapter's.

    Returns findings.
    """
    findings = []
    for adapter in adapters:
        if new := _overlay_text(files, adapter.path, adapter.files):
            findings.append(f"{', '.join(sorted(new))} taken from the adapter {adapter.path.name}")
        if _GENERATION in adapter.files:
            files[_GENERATION] = (adapter.path / _GENERATION).read_bytes()
            findings.append(f"{_GENERATION} taken from the adapter {adapter.path.name}")
        if MODULES in adapter.files:  # sentence-transformers writes them beside an adapter
            for name in [name for name in files if is_of_sentences(name)]:
                del files[name]
            names = [name for name in adapter.files if is_of_sentences(name)]
            files.update({name: (adapter.path / name).read_bytes() for name in names})
            findings.append(f"{', '.join(names)} taken from the adapter {adapter.path.name}")
    return findings


def _overlay_text(files: dict[str, bytes], root: Path, names: tuple[str, ...]) -> Collection[str]:
    """Replace tokenizer and chat template by an adapter's; return the names of its files."""
    own = [name for name in names if name in TOKENIZER_FILES]
    before = _template_in(files)
    template = [name for name in names if name in TEMPLATE_FILES or is_named_template(name)]
    complete = any(name in own for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    if complete:
        for name in TOKENIZER_FILES:
            files.pop(name, None)
    new = {name: (root / name).read_bytes() for name in (own if complete else []) + template}
    if not complete and not template and _CONFIG in own:
        # Without a tokenizer, only the template counts.
        alone = read_json(root / _CONFIG).get("chat_template")
        if alone and _CONFIG in files:
            new = {_CONFIG: _json(_object(files, _CONFIG) | {"chat_template": alone})}
    if template or _template_in(new):
        for name in [name for name in files if name in TEMPLATE_FILES or is_named_template(name)]:
            del files[name]
    files.update(new)
    if before and not _template_in(files) and not any(name in files for name in TEMPLATE_FILES):
        # The adapter's tokenizer has no template and replaced the file with the base's.
        if isinstance(before, str):
            files["chat_template.jinja"] = before.encode()
        else:
            files[_CONFIG] = _json(_object(files, _CONFIG) | {"chat_template": before})
    return new


def _template_in(files: Mapping[str, bytes]) -> JsonValue:
    """Return the chat template in tokenizer_config.json: a text, named ones as a list, or ""."""
    template = _object(files, _CONFIG).get("chat_template")
    return template if isinstance(template, str | list) else ""


def _apply(files: dict[str, bytes], settings: Mapping[str, JsonValue]) -> None:
    """Apply settings to config.json (in `text_config` if it has the key); None removes a key."""
    config = _object(files, "config.json")
    inner = config.get("text_config")
    text = inner if isinstance(inner, dict) else {}
    for name, value in settings.items():
        if value is None:
            config.pop(name, None)
            continue
        nested = name in text
        if nested:
            text[name] = value
        if name in config or not nested:
            config[name] = value
    files["config.json"] = _json(config)


def _join_ends(
    files: dict[str, bytes], adapters: Sequence[AdapterView], base: Mapping[str, JsonValue]
) -> list[str]:
    """Add every end-of-sequence token of any input to generation_config.json.

    A fine-tuned model may end its turns with another token than its base, and never stops if only
    one of the two is listed. The file is unchanged if it lists them all.
    """
    generation, config = _object(files, _GENERATION), _object(files, "config.json")
    before = _ids(generation)
    theirs = (read_json(a.path / _GENERATION) for a in adapters if _GENERATION in a.files)
    found = [n for source in (generation, base, config, *theirs) for n in _ids(source)]
    tokens = list(dict.fromkeys((*found, *_tokenizer_end(files))))
    if not tokens or set(tokens) == set(before):
        return []
    generation["eos_token_id"] = tokens[0] if len(tokens) == 1 else tokens
    if _GENERATION not in files:
        if len(tokens) == 1:
            # config.json has the same token.
            return []
        keys = [n for n in ("bos_token_id", "pad_token_id") if config.get(n) is not None]
        special = {key: config[key] for key in keys}
        generation = {"_from_model_config": True, **special, **generation}
    files[_GENERATION] = _json(generation)
    return [f"generation_config.json: end tokens changed from {before or 'none'} to {tokens}"]


def _ids(config: Mapping[str, JsonValue]) -> list[int]:
    value = config.get("eos_token_id")
    return [n for n in (value if isinstance(value, list) else [value]) if type(n) is int]


def _tokenizer_end(files: Mapping[str, bytes]) -> list[int]:
    config = _object(files, _CONFIG)
    end = config.get("eos_token")
    text = end.get("content") if isinstance(end, dict) else end
    if not isinstance(text, str):
        return []
    added = _mapping(config.get("added_tokens_decoder"))
    found = [n for n, token in added.items() if _mapping(token).get("content") == text]
    if found or "tokenizer.json" not in files:
        return [int(number) for number in found if number.isdecimal()]
    tokenizer = _object(files, "tokenizer.json")
    listed = tokenizer.get("added_tokens")
    tokens = [_mapping(token) for token in (listed if isinstance(listed, list) else [])]
    numbers = [token.get("id") for token in tokens if token.get("content") == text]
    vocabulary = _mapping(_mapping(tokenizer.get("model")).get("vocab"))
    numbers = numbers or [vocabulary.get(text)]
    return [number for number in numbers if type(number) is int]


def _mapping(value: JsonValue) -> Mapping[str, JsonValue]:
    """Return the value if it is an object, else {}: a tokenizer's files may hold anything."""
    return value if isinstance(value, dict) else {}


def _object(files: Mapping[str, bytes], name: str) -> dict[str, JsonValue]:
    return json_object(files.get(name, b"{}"), name, largest=TOKENIZER)


def _json(value: Mapping[str, JsonValue]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
