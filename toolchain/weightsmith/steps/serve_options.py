"""The recipe's `serve` section as a planner takes it."""

from __future__ import annotations

from weightsmith.core.errors import UsageError
from weightsmith.recipe.schema import Serve
from weightsmith.serving.engine import ServeOptions
from weightsmith.serving.memory import parse_size
from weightsmith.serving.speculation import Speculation

_LEAST_MEMORY = 1 << 20
"""Bytes; less is a number without its unit."""


def serve_options(serve: Serve) -> ServeOptions:
    """Return the recipe's `serve` section in the planner's units; both have the same defaults."""
    left = {"kv_cache_scales", "speculative"}
    given = serve.model_dump(exclude_defaults=True, exclude=left)
    for key, option in (("gpu_memory", "gpu_memory_bytes"), ("memory", "host_memory_bytes")):
        if key in given:
            text = given.pop(key)
            given[option] = size = parse_size(text)
            if size < _LEAST_MEMORY:
                raise UsageError(
                    f"serve.{key} {text} is {size} bytes",
                    hint="write it with its unit, such as 24GiB",
                )
    if wanted := serve.speculative:
        given["speculation"] = Speculation(method=wanted.method, tokens=wanted.tokens)
    return ServeOptions(**given)
