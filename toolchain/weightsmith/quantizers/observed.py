"""NVFP4 with scales of inputs: rounded like the others, after a walk that finds the largest.

Q, K and V, and gate and up, get one scale because engines read one. So do all experts of a layer:
what calibration does not send to one may reach it in use.
"""

from __future__ import annotations

from weightsmith.core.values import Format
from weightsmith.forward.libraries import import_for_good
from weightsmith.models.facts import ModelFacts
from weightsmith.models.tensors import CheckpointTensors
from weightsmith.quantizers.architectures import WALKED
from weightsmith.quantizers.checkpoints import check_config, check_kept, check_rounded, output_bytes
from weightsmith.quantizers.matrices import matrices
from weightsmith.quantizers.packed import PackedLayout, view_of
from weightsmith.quantizers.packed_check import checked
from weightsmith.quantizers.quantizer import Quantizer
from weightsmith.quantizers.rounded import options, quantize
from weightsmith.quantizers.running import python_step, read_settings, refusals, texts
from weightsmith.quantizers.schemes import NVFP4


def _check_input(_format: Format, model: ModelFacts) -> None:
    check_config(model, WALKED)
    check_rounded(NVFP4, model)


def main() -> None:
    """Run in the builder: quantize as set in the settings file of the command line."""
    settings = read_settings()
    import_for_good()
    from weightsmith.quantizers.layerwise.maxima import input_maxima

    with refusals():
        found = matrices(CheckpointTensors(settings.model), settings.model)
        inputs = input_maxima(settings.model, texts(settings.calibration), found)
        quantize(NVFP4, settings.model, settings.out, settings.keep, inputs)


QUANTIZER = Quantizer(
    name="observed",
    builder="merge",
    formats=(NVFP4.format,),
    recipe_number=1,
    check_input=_check_input,
    steps=lambda request: python_step(
        __name__, request, "rounding to nvfp4, with scales of inputs"
    ),
    check=lambda request: checked(request, PackedLayout.of_scheme(NVFP4), "observed"),
    peak_disk=lambda size, kept, format_, _options: output_bytes(size, kept, format_),
    options=options,
    check_options=check_kept,
    calibrated=lambda _format, _options: True,
    view=view_of,
    by_layer=True,
)

if __name__ == "__main__":
    main()
