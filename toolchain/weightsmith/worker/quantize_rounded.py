"""Program that rounds a checkpoint, or base and adapters seen as one, without calibration.

python -m weightsmith.worker.quantize_rounded SETTINGS
"""

from __future__ import annotations

from weightsmith.quantizers.rounded import quantize
from weightsmith.quantizers.running import read_settings, refusals
from weightsmith.quantizers.schemes import SCHEMES
from weightsmith.worker.virtual import computed_for_program


def main() -> None:
    """Quantize as set in the settings file."""
    settings = read_settings()
    scheme = SCHEMES[settings.method]
    with refusals(), computed_for_program() as recorded:
        quantize(scheme, settings.model, settings.out, settings.keep, recorded=recorded)


if __name__ == "__main__":
    main()
