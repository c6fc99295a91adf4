"""How the libraries that run models are imported: offline, and once for all."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from weightsmith.errors import InputRefused, WeightsmithError, ran_out_of_memory

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def stay_offline() -> None:
    """Keep libraries off the network, regardless of the environment."""
    os.environ.update(OFFLINE)


def import_for_good(*names: str) -> None:
    """Import libraries in a process that ends with its job; they are never searched for garbage.

    Such searches took 2 of the 29 CPU seconds of the example's reference answers.
    """
    stay_offline()
    gc.disable()
    try:
        for name in ("torch", "transformers.generation", "transformers.models.auto", *names):
            importlib.import_module(name)
        gc.freeze()
    finally:
        gc.enable()


def load_tokenizer(root: Path, **options: Any) -> Any:
    """Return a folder's tokenizer, from local files only; raises InputRefused if that fails."""
    stay_offline()
    from transformers import AutoTokenizer

    with reading_tokenizer(root):
        return AutoTokenizer.from_pretrained(
            root, local_files_only=True, trust_remote_code=False, **options
        )


def reading_tokenizer(root: Path) -> AbstractContextManager[None]:
    """Raise InputRefused if a library cannot read the folder's tokenizer in the block."""
    hint = "check that its files are complete and belong to the same model"
    return reading(f"the tokenizer of {root}", hint)


@contextmanager
def reading(what: str, hint: str) -> Iterator[None]:
    """Raise InputRefused if a library cannot load an input in the block, whatever it raises.

    Libraries raise errors of many types for a damaged file. Only their calls belong in the block.
    """
    try:
        yield
    except Exception as error:  # the tokenizers library raises plain ones
        if isinstance(error, WeightsmithError) or ran_out_of_memory(error):
            raise
        raise unreadable(what, error, hint) from error


def unreadable(what: str, error: Exception, hint: str) -> InputRefused:
    """Return the refusal of an input that a library cannot load."""
    why = " ".join(str(error).split())[:200] or type(error).__name__
    return InputRefused(f"{what} cannot be loaded: {why}", hint=hint)
