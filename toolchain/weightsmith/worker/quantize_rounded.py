"""Program that rounds a checkpoint, or base and adapters seen as one, without calibration.

python -m weightsmith.worker.quantize_rounded SETTINGS
"""

from __future__ import annotations

import sys
from pathlib import Path

from weightsmith.errors import InputRefused
from weightsmith.quantizers.rounded import quantize
from weightsmith.quantizers.running import read_settings, refusal
from weightsmith.quantizers.schemes import SCHEMES
from weightsmith.worker.virtual import computed_for_program


def main() -> None:
    """Quantize as set in the settings file."""
    settings = read_settings()
    scheme = SCHEMES[settings["method"]]
    try:
        with computed_for_program():
            quantize(scheme, Path(settings["model"]), Path(settings["out"]), settings["keep"])
    except InputRefused as error:
        print(refusal(error), file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
