"""Weights that PEFT leaves out when it loads an adapter: of modules that it does not target.

llama.cpp's converter and vLLM load them: they read no such setting but rank and scaling.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from weightsmith.core.errors import InputRefused
from weightsmith.core.safe_parse import read_json
from weightsmith.merging.adapter_config import parse_adapter_config
from weightsmith.merging.claim import SHOWN, AdapterView
from weightsmith.merging.families import lora
from weightsmith.merging.loading import loaded_names, split_names
from weightsmith.merging.names import BaseNames, module_key, plain_module
from weightsmith.merging.tying import is_embedding, is_head
from weightsmith.models.peft_patterns import check_peft_patterns, limit_matching
from weightsmith.models.safetensors import open_checkpoint, read_header

_WHOLE = ("modules_to_save", "original_module", "token_adapter", "trainable_tokens_delta")
"""Parts of keys that `target_modules` says nothing about."""
_LENGTH = 80
"""Characters of a setting that are shown."""


def without_left_out(view: AdapterView) -> tuple[AdapterView, tuple[str, ...]]:
    """Return the adapter without what PEFT leaves out, and a finding that names it.

    Raises InputRefused if nothing remains.
    """
    wrapped = _wrapped(view)
    left = sorted(raw for raw in wrapped if not _is_targeted(view, raw))
    if not left:
        return view, ()
    dropped = {key for raw in left for key in wrapped[raw]}
    text = (
        f"{len(dropped)} tensors are left out, as PEFT leaves them out: adapter_config.json does "
        f"not target their modules ({', '.join(_settings(view))}), such as "
        + ", ".join(map(plain_module, left[:SHOWN]))
    )
    kept = {key: info for key, info in view.keys.items() if key not in dropped}
    if not kept:
        raise InputRefused(
            f"{view.path} changes nothing: {text}",
            hint="correct adapter_config.json if they were trained; export the adapter again",
        )
    return replace(view, keys=kept), (f"{view.path.name}: {text}",)


def require_all_targeted(base: Path, adapter: Path) -> None:
    """Refuse a LoRA adapter with weights that PEFT leaves out, for engines that would load them.

    Reads headers and configurations. Raises InputRefused.
    """
    view = _view(adapter)
    wrapped = _wrapped(view)
    check_peft_patterns(adapter, sorted(wrapped))
    with limit_matching(adapter, len(view.keys)):
        # The file's own names are enough for nearly all adapters, and need no base.
        left = sorted(raw for raw in wrapped if not view.config.wraps(raw))
        if left:
            named = replace(view, names=_base_names(base))
            left = [raw for raw in left if not _is_targeted(named, raw)]
    if left:
        raise InputRefused(
            f"{adapter} has weights of modules that adapter_config.json does not target "
            f"({', '.join(_settings(view))}), such as {', '.join(map(plain_module, left[:SHOWN]))}:"
            " PEFT leaves them out, and this engine would use them",
            hint="merge it; or remove them: load it with PEFT and save it with save_pretrained",
        )


def _view(adapter: Path) -> AdapterView:
    """Return an adapter without its base."""
    path = adapter / "adapter_config.json"
    header = read_header(adapter / "adapter_model.safetensors")
    return AdapterView(
        index=0,
        path=adapter,
        file=header.path,
        weight=1.0,
        keys={info.name: info for info in header.tensors},
        config=parse_adapter_config(path, read_json(path)),
        names=BaseNames({}),
        sources={},
        base_config={},
    )


def _base_names(base: Path) -> BaseNames:
    config, tensors = read_json(base / "config.json"), open_checkpoint(base).tensors
    return BaseNames(tensors, loaded_names(config, tensors), split_names(config, tensors))


def _wrapped(view: AdapterView) -> dict[str, list[str]]:
    """Return the keys by the name of the module that PEFT would wrap for them."""
    found: dict[str, list[str]] = {}
    for key in view.keys:
        if raw := _wrapped_module(view, key):
            found.setdefault(raw.partition(".base_layer")[0], []).append(key)
    return found


def _wrapped_module(view: AdapterView, key: str) -> str:
    """Return a key's module with the wrappers in its name, or "" for a key without a wrapper."""
    name = module_key(key)
    parts = name.split(".")
    if any(part in parts for part in _WHOLE):
        return ""
    if "base_layer" in parts:
        return name
    if view.config.kind == "LORA":
        return lora.module_of(name)
    names = (".".join(parts[:cut]) for cut in range(len(parts) - 1, 0, -1))
    module = next((module for module in names if view.find(module)), "")
    return "" if name in (f"{module}.weight", f"{module}.bias") else module


def _is_targeted(view: AdapterView, module: str) -> bool:
    """Return whether PEFT wraps a module, by its name in the file or in the loaded model."""
    config = view.config
    if config.ties(module) and (is_embedding(module) or is_head(module)):
        return True
    return any(config.wraps(name) for name in _names(view, module))


def _names(view: AdapterView, module: str) -> Iterator[str]:
    yield module
    if target := view.find(module):
        yield view.names.loaded(target).removesuffix(".weight")


def _settings(view: AdapterView) -> Iterator[str]:
    """Return the settings that choose modules, as adapter_config.json has them."""
    for name in ("target_modules", "exclude_modules", "layers_to_transform", "modules_to_save"):
        value = view.config.raw.get(name)
        # Layer 0 is a choice; so are targets of which there are none.
        if value not in (None, [], "") or (name == "target_modules" and value is not None):
            shown = str(value)
            yield f"{name} {shown if len(shown) <= _LENGTH else shown[:_LENGTH] + '…'}"
