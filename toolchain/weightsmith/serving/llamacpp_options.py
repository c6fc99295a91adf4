"""The options of llama-server, by the names of the pinned version."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from weightsmith.core.errors import UsageError
from weightsmith.core.values import JsonValue
from weightsmith.serving.options import NO_TLS, require_fitting, require_harmless

_LIST = json.loads(Path(__file__).with_name("llamacpp_options.json").read_text("utf-8"))
ENVIRONMENT: Mapping[str, str] = MappingProxyType(_LIST["environment"])
"""Option -> environment variable, for the options that have one."""
COMMAND_LINE: Mapping[str, bool] = MappingProxyType(_LIST["command_line"])
"""Options that only the command line knows -> whether they take a value."""
# Options with one variable are spellings of each other; plans use these, else the list's first.
_OWN = ("n-gpu-layers", "log-verbosity", "temperature", "n-predict", "ui", "embedding")
_CANONICAL = {ENVIRONMENT[option]: option for option in reversed((*_OWN, *ENVIRONMENT))}

# What a plan decides, or what a baked image must not do; option -> what to do instead.
_NOT_HERE: Mapping[str, str] = {
    "model": "the image's own model is served",
    "alias": "set the recipe's name",
    "ctx-size": "set serve.max_model_len, the length of one request",
    "parallel": "set serve.max_num_seqs",
    "kv-unified": "a plan gives every request its own share of the cache",
    "kv-unified-per-slot": "set serve.max_model_len",
    "n-gpu-layers": "set serve.gpu or serve.gpu_memory; the plan works out the layers",
    "fit": "the plan is explicit, so that the same image starts the same way everywhere",
    "host": "publish the port where you want it",
    "port": "publish port 8080 as the port you want",
    "offline": "an image holds all it needs",
    "api-key": "a key does not belong in an image: set LLAMA_API_KEY where it runs",
    "ssl-key-file": NO_TLS,
    "ssl-cert-file": NO_TLS,
    "api-prefix": "health checks ask /health: let a proxy change paths",
    "hf-token": "a token does not belong in an image",
    "tools": "it lets whoever reaches the port run programs",
    "agent": "it lets whoever reaches the port run programs",
    "ui-mcp-proxy": "it lets whoever reaches the port reach other hosts",
    "mcp-servers-config": "it starts programs inside the server",
    "mcp-servers-json": "it starts programs inside the server",
    "model-url": "an image downloads nothing",
    "hf-repo": "an image downloads nothing",
    "docker-repo": "an image downloads nothing",
    "models-dir": "one image serves one model",
    "models-preset": "one image serves one model",
}


def extra_options(extra: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return `serve.extra` with every key as llama-server's long option, without dashes.

    Keys may be long options or LLAMA_ARG_ variables. Raises UsageError for an unknown option
    (with near misses), one given twice, one that is not for an image, what none may hold, a word
    that the server does not know and a number that is none.
    """
    require_harmless(extra)
    found: dict[str, JsonValue] = {}
    for key, value in extra.items():
        option = _option(key)
        if option in _NOT_HERE:
            raise UsageError(
                f"serve.extra.{key} cannot be set: {option} is not for an image to choose",
                hint=_NOT_HERE[option],
            )
        if option in found:
            raise UsageError(f"serve.extra sets {option} twice", hint=f"remove {key}")
        words, number = _LIST["words"].get(option, ()), option in _LIST["numbers"]
        require_fitting(option, value, words, number=number)
        if isinstance(value, Mapping | list | tuple):
            value = json.dumps(value, sort_keys=True)
        found[option] = value
    return found


def as_environment(settings: Mapping[str, JsonValue]) -> dict[str, str]:
    """Return the settings that have a variable, under it; booleans as 1 and 0.

    llama-server reads true/1/on/enabled and false/0/off/disabled; a variable of a plain switch
    takes effect only when it is true (common/arg.cpp).
    """
    found = ((ENVIRONMENT.get(option), _text(value)) for option, value in settings.items())
    return {name: value for name, value in found if name}


def as_arguments(settings: Mapping[str, JsonValue]) -> tuple[str, ...]:
    """Return the settings that only the command line knows, as arguments."""
    argv: list[str] = []
    for option, value in settings.items():
        takes_value = COMMAND_LINE.get(option)
        if takes_value is None:
            continue
        if takes_value:
            argv += [f"--{option}", _text(value)]
        elif value:
            argv.append(f"--{option}")
        elif f"no-{option}" in COMMAND_LINE:
            argv.append(f"--no-{option}")
    return tuple(argv)


def _text(value: JsonValue) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def _option(key: str) -> str:
    wanted = key.upper() if key.upper().startswith("LLAMA_") else key.replace("_", "-").lower()
    if wanted in _CANONICAL:
        return _CANONICAL[wanted]
    option = wanted.lstrip("-")
    if option in ENVIRONMENT:
        return _CANONICAL[ENVIRONMENT[option]]
    if option in COMMAND_LINE:
        return option
    known = _CANONICAL if wanted.startswith("LLAMA_") else (*ENVIRONMENT, *COMMAND_LINE)
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.6)
    guess = f"did you mean {', '.join(near)}? " if near else ""
    raise UsageError(
        f"serve.extra.{key}: llama-server has no such option",
        hint=f"{guess}`llama-server --help` in the image lists them all",
    )
