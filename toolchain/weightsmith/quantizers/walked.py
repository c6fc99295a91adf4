"""AWQ and GPTQ by our own walk, with one decoder layer in memory at a time.

Only inputs are in the key: these results are multiplied in float32 by the machine's own libraries,
in an order that threads and CPUs decide, so another machine's may differ. An image's digest covers
the actual bytes.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from weightsmith.core.safe_parse import read_json
from weightsmith.core.values import AWQ, GPTQ, Format, JsonValue
from weightsmith.models.facts import ModelFacts
from weightsmith.quantizers.architectures import GROUPED, check_kept
from weightsmith.quantizers.checkpoints import (
    check_group,
    check_grouped,
    group_option,
    in_groups,
    keep_option,
    output_bytes,
    zero_point_option,
)
from weightsmith.quantizers.packed import PackedLayout, view_of
from weightsmith.quantizers.packed_check import checked
from weightsmith.quantizers.quantizer import BuilderCommand, Quantizer, QuantizeRequest
from weightsmith.quantizers.running import python_step, read_settings, refusals

FACTS = ".calibrated.json"
"""What the walk found out, for the check to report."""


def options(format_: Format, requested: Mapping[str, JsonValue]) -> Mapping[str, JsonValue]:
    """Return the recipe's options that affect these formats' output."""
    if format_ == AWQ:
        zero_point_option(format_, requested)
    return {"group_size": group_option(requested), "keep": keep_option(requested)}


def check_options(model: ModelFacts, chosen: Mapping[str, JsonValue]) -> None:
    """Refuse a group size that does not divide every row, and to keep a part of the experts."""
    check_group(model, chosen)
    check_kept(model, chosen)


def steps(request: QuantizeRequest) -> tuple[BuilderCommand, ...]:
    """Return the step, which runs this module."""
    return (
        python_step(
            __name__,
            request,
            f"calibrating {request.format.name}, layer by layer",
            method=request.format.kind,
            group_size=_layout(request).group_size,
            keep=request.keep,
        ),
    )


def check(request: QuantizeRequest) -> Mapping[str, JsonValue]:
    """Check the finished checkpoint against the original; raises CheckFailed."""
    found = checked(request, _layout(request), "walked")
    told = request.output / FACTS
    more = read_json(told) if told.is_file() else {}
    told.unlink(missing_ok=True)
    return {**found, **more}


def _layout(request: QuantizeRequest) -> PackedLayout:
    return in_groups(request.model, request.format.kind, request.options.get("group_size"))


def main() -> None:
    """Run in the builder: quantize as set in the settings file of the command line."""
    settings = read_settings()
    libraries: Any = importlib.import_module("weightsmith.forward.libraries")
    libraries.import_for_good()
    walk: Any = importlib.import_module("weightsmith.quantizers.layerwise.quantizing")
    with refusals():
        walk.quantize(settings)


QUANTIZER = Quantizer(
    name="walked",
    builder="merge",
    formats=(AWQ, GPTQ),
    recipe_number=1,
    check_input=lambda _format, model: check_grouped(model, GROUPED),
    steps=steps,
    check=check,
    # The finished layers, and the folder made of them.
    peak_disk=lambda size, kept, format_, _options: 2 * output_bytes(size, kept, format_),
    options=options,
    check_options=check_options,
    calibrated=lambda _format, _options: True,
    view=view_of,
    by_layer=True,
)

if __name__ == "__main__":
    main()
