"""Adapters as PEFT reads them: keys that it would ignore, patterns that would take too long.

PEFT matches these untrusted patterns against every module with Python's `re`, which can take
forever. Another engine is no alternative: some lack lookaheads or match differently.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from weightsmith.core import time_limits
from weightsmith.core.apart import on_a_main_thread
from weightsmith.core.errors import InputRefused
from weightsmith.core.safe_parse import read_json
from weightsmith.core.time_limits import TooLong, cpu_limit, doing
from weightsmith.core.values import JsonValue
from weightsmith.models.safetensors import read_header

_PLAIN = re.compile(r"[\w.]*")
"""Plain names, as most entries are: they cannot backtrack and need no check."""
_SHOWN = 60
_SECONDS_EACH = 0.001
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Name parts added by torch.compile, FSDP and activation checkpointing."""
KEY_MAPPING = {rf"\b(?:{'|'.join(WRAPPERS)})\.": ""}
"""PEFT's `key_mapping`: pattern -> replacement."""


def check_peft_patterns(root: Path, modules: Iterable[str]) -> None:
    """Match each pattern of an adapter against all modules as PEFT does, with a time limit.

    Raises InputRefused for slow and invalid patterns.
    """
    if any(_patterns(read_json(root / "adapter_config.json"))):
        on_a_main_thread(_matched, (str(root), list(modules)))


def _matched(given: tuple[str, list[str]]) -> None:
    root, names = given
    path, at = Path(root) / "adapter_config.json", ""
    patterns = list(_patterns(read_json(path)))
    try:
        with doing(f"matching the patterns of {path}"), cpu_limit(time_limits.FOREIGN_SECONDS):
            for field, text, whole in patterns:
                at = f"{field} {_excerpt(text)}"
                fits = re.compile(whole).match
                for name in names:
                    fits(name)
    except TooLong:
        raise _too_slow(path, at) from None
    except (re.error, RecursionError, OverflowError) as error:
        raise InputRefused(
            f"{path}: {at} is not a valid regular expression: {error}",
            hint="export the adapter again with PEFT's save_pretrained",
        ) from None


@contextmanager
def limit_matching(root: Path, keys: int) -> Iterator[None]:
    """Limit the CPU time of a block that matches the names of an adapter's `keys` tensors.

    Raises InputRefused if the time is exceeded.
    """
    path = root / "adapter_config.json"
    seconds = time_limits.FOREIGN_SECONDS + keys * _SECONDS_EACH
    try:
        with cpu_limit(seconds):
            yield
    except TooLong:
        patterns = [f"{field} {_excerpt(text)}" for field, text, _ in _patterns(read_json(path))]
        if patterns:
            raise _too_slow(path, ", ".join(dict.fromkeys(patterns))) from None
        raise InputRefused(
            f"{root}: matching the names of its {keys} tensors exceeded {seconds:g} s of CPU time",
            hint="export the adapter again with PEFT's save_pretrained",
        ) from None


def _too_slow(path: Path, named: str) -> InputRefused:
    return InputRefused(
        f"{path}: matching {named} against the base's module names exceeded "
        f"{time_limits.FOREIGN_SECONDS:g} s of CPU time",
        hint="list the modules one by one, or avoid nested repetitions in the pattern",
    )


def _patterns(raw: Mapping[str, JsonValue]) -> Iterator[tuple[str, str, str]]:
    """Yield field, text, and PEFT's regular expression for it (`tuners_utils`, `utils.other`).

    Only for strings: other types are refused when the configuration is read.
    """
    for field, value in raw.items():
        if field.endswith("layers_pattern"):
            forms = (r"(?:^|.*?\.){}\.(?P<idx>\d+)\.", r".*?\.{}\.(?P<layer>\d+)\.")
            yield from _forms(field, [value] if isinstance(value, str) else value, forms)
        elif field == "modules_to_save":
            yield from _forms(field, value, (r"(^|.*\.){}($|\..*)",))
        elif field.endswith("_modules") and isinstance(value, str):
            yield from _forms(field, [value], (r"(?:{})\Z",))
        elif field.endswith("_pattern") and isinstance(value, Mapping):
            yield from _forms(field, list(value), (r"(.*\.)?({})$", r".*\.{}$"))


def _forms(field: str, texts: JsonValue, forms: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
    for text in texts if isinstance(texts, list) else ():
        if isinstance(text, str) and not _PLAIN.fullmatch(text):
            for form in forms:
                yield field, text, form.replace("{}", text)


def _excerpt(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"


def check_peft_keys(root: Path) -> None:
    """Raise InputRefused for an adapter with keys that PEFT would silently ignore."""
    header = read_header(root / "adapter_model.safetensors")
    ignored = [info.name for info in header.tensors if not info.name.startswith("base_model.")]
    if ignored:
        raise InputRefused(
            f"PEFT ignores keys without the prefix base_model., such as {ignored[0]} in "
            f"{header.path}, so there is no unmerged model to compare with",
            hint="export the adapter with PEFT's save_pretrained, from the unwrapped model",
        )
