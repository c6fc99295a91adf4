"""Converts LoRA adapters to GGUF."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightsmith.core.errors import CheckFailed
from weightsmith.core.jobs import ConvertAdaptersJob
from weightsmith.core.trees import discard
from weightsmith.core.values import Json
from weightsmith.worker.steps import forget_steps, run_steps
from weightsmith.worker.wire import Report


def tools_folder() -> Path:
    """Return the folder of the builder's own programs."""
    return Path(os.environ.get("WEIGHTSMITH_TOOLS_LLAMACPP", "/opt/llamacpp"))


def convert_adapters(job: ConvertAdaptersJob, report: Report) -> Mapping[str, Json]:
    """Convert adapters in one process, and read them back; return `tensors` by folder.

    What an interrupted run has converted is not converted again. Raises InputRefused or CheckFailed
    with the adapter's path.
    """
    gguf_lora: Any = importlib.import_module("weightsmith.quantizers.gguf_lora")
    adapters = dict(zip(job.folders, (given.path for given in job.adapters), strict=True))
    links = job.output / ".links"
    left: dict[Path, Path] = {}
    for folder, adapter in adapters.items():
        file = job.output / folder / gguf_lora.FILE
        if not file.is_file():
            left[_link(links / folder, adapter)] = file
    forget_steps(job.output)  # those of another run had other adapters left
    made = gguf_lora.steps(job.base.path, left, job.output, tools_folder(), sys.executable)
    run_steps(made, job.output, report)
    discard(links)
    forget_steps(job.output)
    found = {}
    for folder, adapter in adapters.items():
        try:
            found[folder] = gguf_lora.check(adapter, job.output / folder / gguf_lora.FILE)
        except CheckFailed:
            discard(job.output / folder)
            raise
    return {"tensors": found}


def _link(folder: Path, adapter: Path) -> Path:
    """Return a link to an adapter that has the same name for each.

    The converter writes the name into the file, so the bytes would depend on the adapter's place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "adapter"
    link.unlink(missing_ok=True)
    link.symlink_to(adapter)
    return link
