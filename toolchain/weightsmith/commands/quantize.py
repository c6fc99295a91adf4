"""`invoke quantize`: a checkpoint folder in, a quantized file or folder out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from weightsmith.checkpoints.folder import check_model_folder
from weightsmith.errors import UsageError
from weightsmith.evaluating.limits import judge, limits_for, refusal
from weightsmith.files import folder_beside
from weightsmith.planning.options import check_model, make_wanted, needs_text
from weightsmith.quantizers import of_format
from weightsmith.quantizers.calibration import GENERAL, Bounds, Texts, read_texts
from weightsmith.recipe import Quality
from weightsmith.stages.quality import measured
from weightsmith.stages.quantize import QuantizeOptions, job_of, kept_bytes, model_config
from weightsmith.tools import Tools
from weightsmith.trees import below
from weightsmith.values import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderRequest:
    """One `quantize` command: `wishes` has those of the recipe's `quantize` keys that are given."""

    model: Path
    format_name: str
    out: Path
    wishes: Mapping[str, Json]
    calibration: Path | None = None
    gate: bool = True


def quantize_folder(asked: FolderRequest, tools: Tools) -> Mapping[str, Json]:
    """Quantize a checkpoint; a single file goes to `out` itself where `out` names one.

    Raises UsageError for an unknown format or option, InputRefused for a checkpoint, calibration
    text or importance matrix that is not one, CheckFailed for an output that is not what was
    asked or lost too much; then nothing is left at `out`.
    """
    quantizer = of_format(asked.format_name)
    format_ = next(f for f in quantizer.formats if f.name == asked.format_name)
    check_model_folder(asked.model)
    out = asked.out.absolute()
    if out.exists():
        raise UsageError(f"{out} exists already", hint="name a new file or folder with --out")
    tools.runner.check(quantizer.builder)
    wanted = make_wanted(out.stem or asked.model.name, format_, asked.wishes, {}, tools)
    _refuse_ignored(asked, wanted)
    check_model(wanted, model_config(asked.model))
    texts = _texts(asked, tools)
    if needs_text(wanted):
        wanted = replace(wanted, texts=texts)
    size = sum(path.stat().st_size for path in asked.model.iterdir() if path.is_file())
    kept = kept_bytes(size, format_, model_config(asked.model))
    peak = quantizer.peak_disk(size, kept, format_)
    tools.store.require_room(peak, f"quantizing to {format_.name}")
    with folder_beside(out) as beside:
        details = _quantized(asked, wanted, size, beside, tools)
        quality = _judged(asked, wanted, texts, beside, tools)
        _place(beside, out)
    written = [out] if out.is_file() else [p for p in below(out) if p.is_file()]
    return {
        "out": str(out),
        "format": format_.name,
        "bits_per_weight": details.get("bits_per_weight"),
        "files": [str(path) for path in written],
        "quality": quality,
        "details": details,
    }


_UNASKED = {
    "--group-size": ("group_size", "auto"),
    "--no-zero-point": ("zero_point", True),
    "--keep-module": ("keep", ()),
    "--tensor-type": ("tensor_types", {}),
    "--split-max-size": ("split_max_size", ""),
    "--imatrix": ("imatrix", ""),
}
"""Flag -> the recipe's key, and its value where it was not given."""


def _refuse_ignored(asked: FolderRequest, wanted: QuantizeOptions) -> None:
    """Raise UsageError for an option that the format has no use for."""
    for flag, (key, unasked) in _UNASKED.items():
        wish = asked.wishes.get(key, unasked)
        if wish not in (unasked, "auto", "off") and key not in wanted.options:
            raise UsageError(f"{flag} has no meaning for {asked.format_name}", hint="leave it out")


def _texts(asked: FolderRequest, tools: Tools) -> Texts:
    if asked.calibration is not None:
        texts = read_texts(asked.calibration, Bounds())
        if texts.warning():
            tools.progress.warn(texts.warning())
        return texts
    texts = read_texts(GENERAL, Bounds())
    tools.progress.warn(
        f"no --calibration: {len(texts.calibration) + len(texts.held_out)} general texts are used"
    )
    return texts


def _quantized(
    asked: FolderRequest, wanted: QuantizeOptions, size: int, folder: Path, tools: Tools
) -> Mapping[str, Json]:
    quantizer = of_format(wanted.format.name)
    tools.progress.stage("quantize", wanted.format.name)
    tools.runner.prepare(quantizer.builder, tools.progress)
    details = tools.runner.run(job_of(asked.model.resolve(), size, wanted, folder), tools.progress)
    if quantizer.statistics:
        (folder / quantizer.statistics).unlink(missing_ok=True)
    for text in details.get("warnings", ()):
        tools.progress.warn(text)
    return details


def _judged(
    asked: FolderRequest, wanted: QuantizeOptions, texts: Texts, made: Path, tools: Tools
) -> Mapping[str, Json]:
    """Return what was lost; CheckFailed over the format's limits unless the gate is off."""
    tools.progress.stage("quality", f"{len(texts.held_out)} held-out texts")
    limits = Quality()
    with tools.scratch() as folder:
        found = dict(
            measured(
                folder, asked.model.resolve(), made, wanted.format.name, texts, limits.tokens, tools
            )
        )
    if "skipped" in found:
        tools.progress.warn(f"quality not measured: {found['skipped']}")
        return found
    verdict = judge(found, limits_for(wanted.format, limits, general=bool(texts.general)))
    found |= {"limits": verdict.limits, "exceeded": verdict.exceeded}
    found["calibration"] = texts.described()
    if verdict.exceeded and asked.gate:
        raise refusal(wanted.format, found)
    return found


def _place(beside: Path, out: Path) -> None:
    """Give the result its name: the one file that `out` names, or the folder."""
    files = [path for path in below(beside) if path.is_file()]
    if len(files) == 1 and out.suffix == files[0].suffix:
        files[0].rename(out)
    else:
        beside.chmod(0o755)
        beside.rename(out)
