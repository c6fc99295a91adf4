"""Program that runs llama.cpp's converter on several LoRA adapters of one base.

python -m weightsmith.worker.convert_adapters CONVERTER BASE LIST

LIST is a JSON file with the folder and the output file of each adapter.
"""

from __future__ import annotations

import logging
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import TextIO

from weightsmith.core.errors import InputRefused, ran_out_of_memory
from weightsmith.core.safe_parse import TOKENIZER, parse_file
from weightsmith.forward.libraries import import_lightly
from weightsmith.quantizers.running import progress_line, refusal

_TYPE = "f32"
"""Of A and B, so that nothing is rounded."""


class _Log(logging.StreamHandler[TextIO]):
    """Writes what the converter warns of to the job's log, and keeps its errors."""

    errors = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message, and keep an error."""
        super().emit(record)
        if record.levelno >= logging.ERROR:
            self.errors += f" {record.getMessage()}"


def main() -> None:
    """Convert each adapter; each output is there as soon as it is whole."""
    converter, base, listed = sys.argv[1:]
    pairs = [tuple(map(Path, pair)) for pair in parse_file(Path(listed), largest=TOKENIZER)]
    # Before the builder's own gguf package, which may be of another version.
    sys.path[:0] = [str(Path(converter).parent), str(Path(converter).parent / "gguf-py")]
    import_lightly("torch", "transformers.activations")
    log = _Log()
    logging.getLogger().addHandler(log)
    for number, (adapter, output) in enumerate(pairs):
        log.errors = ""
        output.parent.mkdir(exist_ok=True)
        part = output.with_suffix(".part")
        words = ["--base", base, "--outfile", str(part), "--outtype", _TYPE]
        sys.argv = [converter, str(adapter), *words]
        try:
            runpy.run_path(converter, run_name="__main__")
        except (Exception, SystemExit) as error:
            if isinstance(error, OSError) or ran_out_of_memory(error):
                raise
            traceback.print_exc()
            said = log.errors.strip() if isinstance(error, SystemExit) else ""
            why = said or f"{type(error).__name__}: {error}"
            refused = InputRefused(
                f"llama.cpp's converter cannot read the adapter in {adapter.readlink()}: "
                f"{why[:300]}",
                hint="the job's log has more; merge this adapter, or try another engine, such as "
                "target vllm-lora",
            )
            print(refusal(refused), file=sys.stderr)  # noqa: T201
            sys.exit(refused.exit_code)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.rename(output)
        print(progress_line(number + 1, len(pairs), "adapters"), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
