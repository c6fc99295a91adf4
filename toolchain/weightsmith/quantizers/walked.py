"""AWQ and GPTQ by our own walk, with one decoder layer in memory at a time.

Only inputs are in the key: these results are multiplied in float32 by the machine's own libraries,
in an order that threads and CPUs decide, so another machine's may differ. An image's digest covers
the actual bytes.
"""

from __future__ import annotations

import importlib
from typing import Any

from weightsmith.core.safe_parse import read_json
from weightsmith.core.values import AWQ, GPTQ, Format
from weightsmith.models.facts import ModelFacts
from weightsmith.quantizers.architectures import GROUPED
from weightsmith.quantizers.checkpoints import (
    check_group,
    check_grouped,
    check_kept,
    group_option,
    in_groups,
    keep_option,
    output_bytes,
    zero_point_option,
)
from weightsmith.quantizers.packed import view_of
from weightsmith.quantizers.packed_check import checked
from weightsmith.quantizers.quantizer import BuilderCommand, Options, Quantizer, QuantizeRequest
from weightsmith.quantizers.running import python_step, read_settings, refusals

FACTS = ".calibrated.json"
"""What the walk found out, for the check to report."""


def _options(format_: Format, requested: Options) -> Options:
    if format_ == AWQ:
        zero_point_option(format_, requested)
    return {"group_size": group_option(requested), "keep": keep_option(requested)}


def _check_options(model: ModelFacts, chosen: Options) -> None:
    check_group(model, chosen)
    check_kept(model, chosen)


def _steps(request: QuantizeRequest) -> tuple[BuilderCommand, ...]:
    return python_step(
        __name__,
        request,
        f"calibrating {request.format.name}, layer by layer",
        method=request.format.kind,
        group_size=in_groups(request).group_size,
        keep=request.keep,
    )


def _check(request: QuantizeRequest) -> Options:
    found = checked(request, in_groups(request), "walked")
    told = request.output / FACTS
    more = read_json(told) if told.is_file() else {}
    told.unlink(missing_ok=True)
    return {**found, **more}


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
    steps=_steps,
    check=_check,
    # The finished layers, and the folder made of them.
    peak_disk=lambda size, kept, format_, _options: 2 * output_bytes(size, kept, format_),
    options=_options,
    check_options=_check_options,
    calibrated=lambda _format, _options: True,
    view=view_of,
    by_layer=True,
)

if __name__ == "__main__":
    main()
