"""Run Python quantizers in their builder: settings file, calibration samples.

AutoAWQ joins texts, and GPTQModel uses only the last sample if lengths differ, so these tools get
joined samples of equal length. OpenMP's threads sleep while they wait: spinning, they take CPU time
from the other threads, and fp8-static of the tiny model took 38.9 CPU seconds instead of 12.0.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from weightsmith.core.errors import InputRefused, WeightsmithError
from weightsmith.core.safe_parse import parse
from weightsmith.forward.libraries import OFFLINE
from weightsmith.quantizers.quantizer import BuilderCommand, QuantizeRequest

if TYPE_CHECKING:
    from weightsmith.forward.kinds import Tokenizer

BLOCK = 512
"""Maximum tokens of a calibration sample."""
_MIN_TOKENS = 256
REFUSED = "refused: "
"""Begins the last line of a program of ours that refuses its input."""
PROGRESS = re.compile(r"weightsmith: (\d+) of (\d+) (\w+)")
"""A line by which a program of ours says how far it is."""
RAW = ".engine"
"""Subfolder of the output for the engine's own output."""
FACTS = ".calibrated.json"
"""What our own walk found out, for the check to report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramSettings:
    """What a program that quantizes in a builder is told."""

    model: Path
    out: Path
    calibration: str = ""
    """JSON Lines of rendered texts; empty: none."""
    method: str = ""
    """The format's name or kind, for a program that makes several."""
    bits: int = 4
    group_size: int = 0
    symmetric: bool = True
    packed: bool = False
    """Whether integers are packed as compressed-tensors does, not as the method's own tool."""
    scaled: bool = True
    """Whether AWQ may move scales between matrices and norms."""
    keep: Sequence[str] = ()
    """Ends of the names of matrices that stay in 16 bits."""

    @property
    def raw(self) -> Path:
        """Where the engine's own output belongs."""
        return self.out / RAW

    def text(self) -> str:
        """Return it as `read_settings` reads it."""
        return json.dumps(asdict(self), default=str, sort_keys=True)


def python_step(
    module: str,
    request: QuantizeRequest,
    title: str,
    *,
    method: str = "",
    bits: int = 4,
    group_size: int = 0,
    symmetric: bool = True,
    packed: bool = False,
    scaled: bool = True,
) -> tuple[BuilderCommand]:
    """Return the step that runs `module` offline with settings."""
    file = request.output / ".settings.json"
    settings = ProgramSettings(
        model=request.model,
        out=request.output,
        calibration=str(request.calibration) if request.calibration else "",
        method=method,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        packed=packed,
        scaled=scaled,
        keep=request.keep,
    )
    return (
        BuilderCommand(
            title=title,
            argv=(request.python, "-m", module, str(file)),
            env={
                **OFFLINE,
                "HF_DATASETS_OFFLINE": "1",
                "PYTHONDONTWRITEBYTECODE": "1",
                # Spinning threads take CPU time from the thread that they wait for.
                "OMP_WAIT_POLICY": "PASSIVE",
            },
            writes={file: settings.text()},
            removes=(file,),
        ),
    )


def read_settings() -> ProgramSettings:
    """Return the settings in the file of the command line, and change to a temporary folder."""
    told = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    # Libraries write logs to the current folder.
    os.chdir(tempfile.gettempdir())
    return ProgramSettings(**{**told, "model": Path(told["model"]), "out": Path(told["out"])})


def refusal(error: WeightsmithError) -> str:
    """Return the last line of a program of ours that refuses its input."""
    return REFUSED + json.dumps([error.message, error.hint])


@contextmanager
def refusals() -> Iterator[None]:
    """End the program with its refusal as the last line, if the block raises an error of ours."""
    try:
        yield
    except WeightsmithError as error:
        print(refusal(error), file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)


def progress_line(done: int, total: int, unit: str) -> str:
    """Return the line by which a program of ours says how far it is."""
    return f"weightsmith: {done} of {total} {unit}"


def texts(calibration: str) -> list[str]:
    """Return the calibration texts, rendered by the chat template."""
    lines = Path(calibration).read_text("utf-8").splitlines() if calibration else []
    found = [str(parse(line)["text"]) for line in lines if line.strip()]
    if not found:
        raise InputRefused(
            "this format needs calibration text",
            hint="give a JSON Lines file with --calibration or calibration.data",
        )
    return found


def samples(lines: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Return each text's tokens, split into pieces of at most BLOCK tokens.

    Texts are not concatenated, because in use a model also starts at position 0, where activations
    are largest. Raises InputRefused for too few tokens.
    """
    # The chat template already adds special tokens.
    read: list[list[int]] = [tokenizer(one, add_special_tokens=False)["input_ids"] for one in lines]
    if (count := sum(map(len, read))) < _MIN_TOKENS:
        raise InputRefused(
            f"the calibration text has {count} tokens, but at least {_MIN_TOKENS} are needed",
            hint="add texts like those the model will see",
        )
    return [ids[start : start + BLOCK] for ids in read for start in range(0, len(ids), BLOCK)]


def equal_length(pieces: Iterable[list[int]]) -> list[list[int]]:
    """Concatenate the pieces and split them into samples of equal length, at most BLOCK tokens.

    For engines that concatenate texts and drop an incomplete last sample. The last sample is
    padded with the first tokens.
    """
    ids = [token for piece in pieces for token in piece]
    count = -(-len(ids) // BLOCK)
    size = -(-len(ids) // count)
    ids += ids[: count * size - len(ids)]
    return [ids[start : start + size] for start in range(0, len(ids), size)]
