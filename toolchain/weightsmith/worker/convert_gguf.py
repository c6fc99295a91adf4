"""Program that runs llama.cpp's converter, which writes the file itself.

python -m weightsmith.worker.convert_gguf CONVERTER MODEL ARGUMENTS
    [-- [--allow-text-only] PROJECTOR...]
"""

from __future__ import annotations

import sys
from pathlib import Path

from weightsmith.quantizers.convert import run
from weightsmith.quantizers.gguf_check import ALLOW_TEXT_ONLY
from weightsmith.quantizers.running import refusals
from weightsmith.worker.virtual import computed_for_program


def main() -> None:
    """Run the converter with the model's folder and the remaining arguments.

    Before that, it writes a projector for pictures to all places that are named.
    """
    converter, model, *rest = sys.argv[1:]
    end = rest.index("--") if "--" in rest else len(rest)
    words = rest[end + 1 :]
    places = [Path(word) for word in words if word != ALLOW_TEXT_ONLY]
    text_only = ALLOW_TEXT_ONLY in words
    with refusals(), computed_for_program():
        run(
            Path(converter),
            Path(model),
            (rest[:end], None),
            projectors=places,
            allow_text_only=text_only,
        )


if __name__ == "__main__":
    main()
