"""Program that runs llama.cpp's converter, which writes the file itself.

python -m weightsmith.worker.convert_gguf CONVERTER MODEL ARGUMENTS
"""

from __future__ import annotations

import sys
from pathlib import Path

from weightsmith.errors import InputRefused
from weightsmith.quantizers.convert import run
from weightsmith.quantizers.running import refusal
from weightsmith.worker.virtual import computed_for_program


def main() -> None:
    """Run the converter with the model's folder and the remaining arguments."""
    try:
        with computed_for_program():
            run(Path(sys.argv[1]), Path(sys.argv[2]), (sys.argv[3:], None))
    except InputRefused as error:
        print(refusal(error), file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
