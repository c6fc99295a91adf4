"""`invoke quantize`: a checkpoint folder in, a quantized file or folder out."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from toolchain.checkpoints.folder import check_model_folder
from toolchain.errors import UsageError
from toolchain.ports import Tools
from toolchain.quantizers import of_format
from toolchain.values import Job, Json


def quantize_folder(model: Path, format_name: str, out: Path, tools: Tools) -> Mapping[str, Json]:
    """Quantize a checkpoint; a single file goes to `out` itself where `out` names one.

    Raises UsageError for an unknown format, InputRefused for a checkpoint that is not one,
    CheckFailed for an output that is not what was asked.
    """
    quantizer = of_format(format_name)
    format_ = next(f for f in quantizer.formats if f.name == format_name)
    check_model_folder(model)
    out = out.absolute()
    if out.exists():
        raise UsageError(f"{out} exists already", hint="name a new file or folder with --out")
    size = sum(path.stat().st_size for path in model.iterdir() if path.is_file())
    tools.store.require_room(quantizer.peak_disk(size, format_), f"quantizing to {format_name}")
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        tools.progress.stage("quantize", format_name)
        tools.runner.prepare(quantizer.builder, tools.progress)
        details = tools.runner.run(
            Job(
                stage="quantize",
                builder=quantizer.builder,
                inputs={"model": model.resolve()},
                parameters={
                    "quantizer": quantizer.name,
                    "format": format_name,
                    "name": out.stem or model.name,
                    "options": {},
                },
                output=beside,
                memory_bytes=(4 << 30) + 2 * size,
            ),
            tools.progress,
        )
        files = sorted(path for path in beside.rglob("*") if path.is_file())
        if len(files) == 1 and out.suffix == files[0].suffix:
            files[0].rename(out)
        else:
            beside.chmod(0o755)
            beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    written = [out] if out.is_file() else sorted(p for p in out.rglob("*") if p.is_file())
    return {
        "out": str(out),
        "format": format_name,
        "bits_per_weight": details.get("bits_per_weight"),
        "files": [str(path) for path in written],
        "quality": {},
        "details": details,
    }
