"""Arguments that several commands share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolchain.building.planning import wishes_of
from toolchain.errors import UsageError
from toolchain.recipe import Serve
from toolchain.recipe_file import check_recipe, with_settings
from toolchain.serving.engine import Wishes


def required(**values: object) -> None:
    """Raise UsageError naming the flags that are not given."""
    missing = [f"--{name.replace('_', '-')}" for name, value in values.items() if not value]
    if missing:
        raise UsageError(
            f"missing: {', '.join(missing)}", hint="`invoke --help COMMAND` lists every flag"
        )


def number(text: str, flag: str) -> float:
    """Return a share from 0 to 1; UsageError naming the flag for anything else."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise UsageError(f"{flag} {text}: a number from 0 to 1 is expected", hint="such as 0.5")
    return value


def counts(text: str, flag: str) -> tuple[int, ...]:
    """Return `1,4,16` as positive numbers; UsageError naming the flag for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(
            f"{flag} {text}: positive numbers separated by commas are expected",
            hint=f"as in {flag} 1,4,16",
        )
    return tuple(int(part) for part in parts)


def parse_weights(text: str, count: int) -> tuple[float, ...]:
    """Return `0.7,0.3` as numbers, one per adapter; all 1 where none is given."""
    if not text:
        return (1.0,) * count
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"--weights {text}: numbers separated by commas are expected",
            hint="as in --weights 0.7,0.3",
        ) from None
    if len(weights) != count:
        raise UsageError(
            f"--weights has {len(weights)} numbers for {count} adapter(s)",
            hint="give one for each --adapter, in their order",
        )
    return weights


def serve_wishes(flags: Mapping[str, Any], settings: Sequence[str]) -> Wishes:
    """Return serving wishes from flags and `--set serve.KEY=VALUE`; raises UsageError."""
    given = {key: _number(value) for key, value in flags.items() if value not in ("", None)}
    data = with_settings({"serve": given}, settings)
    extra = sorted(set(data) - {"serve"})
    if extra:
        raise UsageError(
            f"--set {extra[0]}: only serve.KEY can be set here",
            hint="other recipe keys are for `build` and `plan`",
        )
    skeleton = {"name": "x", "base": {"source": "x"}, "serve": data["serve"]}
    serve: Serve = check_recipe(skeleton, "the command line").serve
    return wishes_of(serve)


def quantize_wishes(flags: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return those of the recipe's `quantize` keys that flags give; raises UsageError."""
    given = {key: value for key, value in flags.items() if value or value is False}
    given = {
        key: value for key, value in given.items() if (key, value) != ("allow_low_bits", False)
    }
    skeleton = {"name": "x", "base": {"source": "x"}, "quantize": given}
    found = check_recipe(skeleton, "the command line").quantize.model_dump()
    return {key: found[key] for key in given}


def new_folder(path: Path, what: str) -> Path:
    """Return the path, absolute, of a folder that is to be made; UsageError where it is in use."""
    path = path.absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path} exists already", hint=f"name a new folder for {what}")
    return path


def _number(value: object) -> object:
    return int(value) if isinstance(value, str) and value.lstrip("-").isdigit() else value
