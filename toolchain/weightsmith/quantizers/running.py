"""How a quantizer of Python runs in its builder: a file of settings, our module, its own folder."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from weightsmith.errors import InputRefused
from weightsmith.foreign import parse
from weightsmith.quantizers.quantizer import QuantizeRequest, Step
from weightsmith.values import Json

BLOCK = 512
"""Tokens of one calibration sample, at most."""
_FEWEST = 256
RAW = ".engine"
"""Folder in the output that the engine itself writes to."""


def python_step(module: str, request: QuantizeRequest, title: str, **settings: Json) -> Step:
    """Return the step that runs `module` with settings, offline and in UTF-8."""
    file = request.output / ".settings.json"
    contents = {
        "model": str(request.model),
        "raw": str(request.output / RAW),
        "out": str(request.output),
        "calibration": str(request.calibration) if request.calibration else "",
        **settings,
    }
    return Step(
        title=title,
        argv=(request.python, "-m", module, str(file)),
        env={
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONDONTWRITEBYTECODE": "1",
            # Threads that spin while they wait take the CPU from the one that they wait for.
            "OMP_WAIT_POLICY": "PASSIVE",
        },
        writes={file: json.dumps(contents, sort_keys=True)},
        removes=(file,),
    )


def read_settings() -> Mapping[str, Json]:
    """Return the settings of the file that the command line names; leave the output folder."""
    settings: Mapping[str, Json] = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    # Libraries leave logs where they are started.
    os.chdir(tempfile.gettempdir())
    return settings


def texts(calibration: str) -> list[str]:
    """Return the calibration texts, their chat template applied."""
    lines = Path(calibration).read_text("utf-8").splitlines() if calibration else []
    found = [str(parse(line)["text"]) for line in lines if line.strip()]
    if not found:
        raise InputRefused(
            "this format measures activations, and there is no calibration text",
            hint="name a JSON Lines file with --calibration or calibration.data",
        )
    return found


def samples(lines: list[str], encode: Callable[[str], list[int]]) -> list[list[int]]:
    """Return every text by itself, in pieces of BLOCK tokens where it is longer.

    A model is asked so: from position 0, where it keeps its largest activations, and without the
    text before. Raises InputRefused for too few tokens to measure on.
    """
    read = [encode(line) for line in lines]
    if (count := sum(map(len, read))) < _FEWEST:
        raise InputRefused(
            f"the calibration text has {count} tokens, {_FEWEST} are the fewest to measure on",
            hint="add texts like those the model will see",
        )
    return [ids[start : start + BLOCK] for ids in read for start in range(0, len(ids), BLOCK)]


def even(pieces: Iterable[list[int]]) -> list[list[int]]:
    """Return the pieces one after another, in samples of one length of at most BLOCK tokens.

    For an engine that joins texts and drops what does not fill its last sample. The last one is
    filled with the first tokens once more.
    """
    ids = [token for piece in pieces for token in piece]
    count = -(-len(ids) // BLOCK)
    size = -(-len(ids) // count)
    ids += ids[: count * size - len(ids)]
    return [ids[start : start + size] for start in range(0, len(ids), size)]


def encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """Return how a text becomes tokens; the chat template has the special ones in it already."""

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    return encode
