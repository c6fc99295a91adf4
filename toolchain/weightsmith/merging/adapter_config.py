"""Read `adapter_config.json` strictly: settings that cannot be merged correctly are refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightsmith.core.errors import InputRefused
from weightsmith.core.safe_parse import read_json
from weightsmith.core.values import JsonValue
from weightsmith.merging.tying import is_embedding, is_head

_PROMPT = "it adds tokens or keys and values to the input and changes no weight"
_ROUTED = "its weights depend on the input"
_LAYERS = "it adds layers to the model"

REFUSED = {
    "PROMPT_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "PREFIX_TUNING": _PROMPT,
    "CPT": _PROMPT,
    "CARTRIDGE": _PROMPT,
    "ADAPTION_PROMPT": _LAYERS,
    "XLORA": _ROUTED,
    "POLY": _ROUTED,
    "LILY": "its factors are shared between layers and chosen by a router",
    "SHADOW": _LAYERS,
    "ADAMSS": "the rows that a factor changes are not saved: PEFT clusters the base's weights on "
    "each load, with scikit-learn and a random SVD whose last bits depend on the machine",
}
"""`peft_type` -> why it cannot be merged."""

SETTINGS = {
    "use_qalora": "QALoRA's factors act on groups of inputs of a GPTQ base",
    "alora_invocation_tokens": "activated LoRA (aLoRA) is active only after its invocation tokens",
    "arrow_config": "Arrow chooses adapters for each token",
    "megatron_config": "Megatron's parallel layers split the weights in their own way",
}
"""Setting of a LoRA configuration -> why it cannot be merged."""

UNMERGED = "serve it unmerged with PEFT"
_MUTATING = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Initialisations that also change the base weights, so that B·A alone is not the adapter."""

_TIED = ("embed_tokens", "lm_head")
"""PEFT's `EMBEDDING_LAYER_NAMES`."""
_PLAIN = (
    "alora_invocation_tokens alpha_pattern arrow_config auto_mapping base_model_name_or_path bias "
    "corda_config ensure_weight_tying "
    "eva_config exclude_modules fan_in_fan_out inference_mode init_lora_weights layers_pattern "
    "layers_to_transform loftq_config lora_alpha lora_dropout lora_ga_config megatron_core "
    "monteclora_config peft_type peft_version qalora_group_size r rank_pattern revision "
    "runtime_config target_modules task_type use_rslora velora_config use_dora lora_bias "
    "modules_to_save target_parameters trainable_token_indices layer_replication kasa_config "
    "use_bdlora use_qalora megatron_config token_indices init_weights peft_type"
)
"""Fields that are read here or do not affect a merge."""
_NEVER_NULL = ("alpha_pattern", "bias", "lora_dropout", "rank_pattern")
"""Fields of LoRA without which a merge could do, but not its validation, for which PEFT runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """The fields of an adapter's configuration that matter for a merge."""

    kind: str
    """PEFT's `peft_type`."""
    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    fan_in_fan_out: bool
    target_modules: str | tuple[str, ...] | None
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    ensure_weight_tying: bool = False
    base_model: str = ""
    raw: Mapping[str, Any] = field(default_factory=dict)
    """The parsed file, for fields that only one family reads."""
    unknown: tuple[str, ...] = field(default=())
    """Unknown fields that are set; they get a warning, as in PEFT."""

    def rank(self, module: str) -> int:
        """Return the configured rank of a module."""
        return int(_by_pattern(self.rank_pattern, module, self.r))

    def scaling(self, module: str) -> float:
        """Return the factor on B·A: alpha/r, or alpha/√r for rank-stabilised LoRA.

        In float64, as in PEFT's `LoraLayer.update_layer`.
        """
        alpha, rank = _by_pattern(self.alpha_pattern, module, self.lora_alpha), self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def pattern_name(self, module: str) -> str:
        """Return the name that `rank_pattern` and `alpha_pattern` are matched against.

        The parameter's if `target_parameters` lists it, else the module's.
        """
        parameter = f"{module}.weight"
        named = names_match(tuple(self.raw.get("target_parameters") or ()), parameter)
        return parameter if named else module

    def ties(self, module: str) -> bool:
        """Return whether PEFT applies what it trains for an embedding to the tied head too.

        `ensure_weight_tying` only works for the names in _TIED.
        """
        names = [module, *(self.raw.get("modules_to_save") or ())]
        if isinstance(self.target_modules, tuple):
            names += self.target_modules
        return self.ensure_weight_tying and any(n.rpartition(".")[2] in _TIED for n in names)

    def targets(self, module: str) -> bool:
        """Return whether PEFT targets the module (`check_target_module_exists`)."""
        if self.target_modules is None or self._excludes(module):
            return False
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, module) is not None
        if module in self.target_modules:
            return True
        if not names_match(self.target_modules, module):
            return False
        layer = -1
        for pattern in self.layers_pattern or (r"[^.]*",):
            prefix = r"(?:^|.*?\.)" if self.layers_pattern else r".*?\."
            if match := re.match(rf"{prefix}{pattern}\.(?P<layer>\d+)\.", module):
                layer = int(match["layer"])
                break
        return not self.layers_to_transform or layer in self.layers_to_transform

    def wraps(self, module: str) -> bool:
        """Return whether PEFT may wrap the module: if it or one of its parameters is targeted.

        Unknown targets, which PEFT chooses by the model, leave out only excluded modules.
        """
        for parameter in self.raw.get("target_parameters") or ():
            name = f".{module}.{parameter.rpartition('.')[2]}"
            if name.endswith(f".{parameter}"):
                return True
        if self.target_modules is None:
            linear = str(self.raw.get("target_modules")).lower() == "all-linear"
            ends = linear and (is_head(module) or is_embedding(module))
            return not ends and not self._excludes(module)
        return self.targets(module)

    def _excludes(self, module: str) -> bool:
        """Return whether PEFT never targets a module: it is excluded, or part of a saved one."""
        saved = self.raw.get("modules_to_save") or ()
        whole = any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in saved)
        return whole or names_match(self.exclude_modules, module)


def read_adapter_config(root: Path) -> AdapterConfig:
    """Return the adapter's configuration; raise InputRefused if it cannot be merged correctly."""
    path = root / "adapter_config.json"
    raw = read_json(path)
    init, lora = raw.get("init_lora_weights", True), raw.get("peft_type") == "LORA"
    for name, reason in SETTINGS.items():
        if lora and raw.get(name):
            raise InputRefused(f"{path} sets {name}: {reason}", hint=UNMERGED)
    if lora and isinstance(init, str) and init.lower().startswith(_MUTATING):
        raise InputRefused(
            f"{path}: init_lora_weights is {init!r}, which also changes the base weights: on the "
            "original base, B·A alone is not the adapter",
            hint="convert it to plain LoRA: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=<the adapter as initialised>); or use the "
            "residual base that the training saved, and set init_lora_weights to true in "
            "adapter_config.json",
        )
    return parse_adapter_config(path, raw)


def parse_adapter_config(path: Path, raw: Mapping[str, Any]) -> AdapterConfig:
    """Return a configuration, also of a kind that is not merged; raise InputRefused if invalid."""
    # Other methods define rank and alpha differently; PEFT reads them itself.
    lora = raw if raw.get("peft_type") == "LORA" else {}
    targets = raw.get("target_modules")
    ranks, alphas = lora.get("rank_pattern") or {}, lora.get("alpha_pattern") or {}
    try:
        patterns = _texts(raw.get("layers_pattern") or ())
        unknown = str(targets).lower() in ("none", "all-linear")
        config = AdapterConfig(
            kind=str(raw.get("peft_type")),
            raw=raw,
            r=_rank(lora.get("r", 8)),
            lora_alpha=_number(lora.get("lora_alpha", 8)),
            use_rslora=_flag(lora, "use_rslora"),
            rank_pattern={key: _rank(rank) for key, rank in dict(ranks).items()},
            alpha_pattern={key: _number(alpha) for key, alpha in dict(alphas).items()},
            fan_in_fan_out=_flag(raw, "fan_in_fan_out"),
            # PEFT expands `all-linear` before saving; if it is still there, they are unknown.
            target_modules=None if unknown else _texts(targets),
            exclude_modules=_texts(raw.get("exclude_modules") or ()),
            layers_to_transform=_numbers(raw.get("layers_to_transform")),
            layers_pattern=(patterns,) if isinstance(patterns, str) else patterns,
            ensure_weight_tying=_flag(raw, "ensure_weight_tying"),
            base_model=str(raw.get("base_model_name_or_path") or ""),
            unknown=tuple(sorted(k for k, v in lora.items() if v and k not in _PLAIN.split())),
        )
        keys = (*config.rank_pattern, *config.alpha_pattern)
        given = (config.target_modules, config.exclude_modules, *config.layers_pattern)
        for pattern in (*(rf"(.*\.)?({key})$" for key in keys), *given):
            if isinstance(pattern, str):
                re.compile(pattern)
        _check_values(raw)
    except (TypeError, ValueError, OverflowError, RecursionError, re.error) as error:
        raise InputRefused(
            f"{path} is not a valid LoRA configuration: {error}",
            hint="export the adapter again with PEFT's save_pretrained",
        ) from error
    return config


def _check_values(raw: Mapping[str, JsonValue]) -> None:
    """Raise TypeError or ValueError for values of which PEFT says nothing that helps."""
    for name in ("modules_to_save", "target_parameters"):
        given = raw.get(name) or ()
        if not isinstance(given, list | tuple) or not all(isinstance(one, str) for one in given):
            raise TypeError(f"{name} must be a list of names, not {str(given)[:80]!r}")
    lora = raw.get("peft_type") == "LORA"
    if nulls := [name for name in _NEVER_NULL if lora and raw.get(name, "") is None]:
        raise ValueError(f"{nulls[0]} is null, which PEFT cannot load")
    # Each other method has a name of its own for this: `vera_only`, `oft_only`.
    only = "lora_only" if lora else "_only"
    bias = raw.get("bias") or "none"
    if bias not in ("none", "all") and not (isinstance(bias, str) and bias.endswith(only)):
        raise ValueError(f"bias must be none, all or lora_only, not {str(bias)[:80]!r}")


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """Return the value of the first matching pattern, as PEFT's `get_pattern_key` does."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def names_match(targets: str | Sequence[str], module: str) -> bool:
    """Return whether PEFT's `target_modules` or a similar setting matches a module.

    A string is a regular expression; the strings of a list are suffixes of names.
    """
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in targets)


def _rank(value: object) -> int:
    if type(value) is not int or not 0 < value <= 1 << 20:
        raise ValueError(f"rank must be a positive integer, not {value!r}")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"alpha must be a finite number, not {value!r}")
    return float(value)


def _flag(raw: Mapping[str, JsonValue], name: str) -> bool:
    value = raw.get(name) or False
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, not {value!r}")
    return value


def _texts(value: object) -> str | tuple[str, ...]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise TypeError(f"expected a string or a list of strings, not {value!r}")
    return tuple(value)


def _numbers(value: object) -> tuple[int, ...]:
    numbers = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(number) is int for number in numbers):
        raise TypeError(f"layers_to_transform must be integers, not {value!r}")
    return tuple(numbers)
