"""`quantize`: quantize a checkpoint folder to a file or folder."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from weightsmith.api.commands.merge import open_checkpoint
from weightsmith.api.commands.requests import QuantizeCommand
from weightsmith.core.errors import UsageError
from weightsmith.core.files import write_whole
from weightsmith.core.ports import AnySigner
from weightsmith.core.trees import below
from weightsmith.core.values import Artifact, Json
from weightsmith.models.facts import read_facts
from weightsmith.models.gguf_config import projector_name
from weightsmith.models.safetensors import read_header
from weightsmith.models.tensors import unsupported
from weightsmith.provenance.model_signing import SIGNATURE, model_signer, sign_model
from weightsmith.quantizers import of_format
from weightsmith.quantizers.calibration import GENERAL, read_texts
from weightsmith.recipe.schema import Quality, Quantize, TextBounds
from weightsmith.recipe.section import spelling
from weightsmith.stages.quality import quality, quality_fault
from weightsmith.stages.quantize import check_model, format_options, needs_text, quantize
from weightsmith.steps.destinations import in_folder, main_file
from weightsmith.steps.tools import Tools


def quantize_folder(asked: QuantizeCommand, tools: Tools) -> Mapping[str, Json]:
    """Quantize a checkpoint to `out`, a folder or a single file.

    With a signer, a folder gets its signature as a file in it, a file as one beside it.
    Raises UsageError for an unknown format or option, InputRefused for an invalid checkpoint,
    calibration text or importance matrix, CheckFailed for a wrong output or too large a loss.
    After a failure, `out` does not exist.
    """
    quantizer = of_format(asked.format)
    format_ = next(f for f in quantizer.formats if f.name == asked.format)
    out, limits = asked.out.absolute(), Quality(gate=True if asked.gate else "measure")
    _require_new(out)
    signer = model_signer(tools.signer)
    tools.runner.check(quantizer.builder)
    checkpoint = open_checkpoint(asked.model, tools.store)
    for file in checkpoint.tree.files:
        if file.path.endswith(".safetensors"):
            for info in read_header(checkpoint.tree.path(file.path)).tensors:
                if info.dtype == "F64" and len(info.shape) > 1:  # as `merge` does
                    raise unsupported(f"the model's {info.name}", info.dtype)
    name, settings = out.stem or asked.model.name, asked.settings.model_dump()
    model = read_facts(asked.model)
    options = format_options(name, format_, settings, {}, checkpoint.tree, tools)
    _refuse_ignored(asked, {*options.options, "allow_low_bits"})
    check_model(options, model)
    quantizer.check_files(checkpoint.tree.texts, model)
    projector = out.with_name(projector_name(out.name))
    if "projector" in options.options and out.suffix == ".gguf":
        _require_new(projector)
    texts = read_texts(asked.calibration or GENERAL, TextBounds())
    if asked.calibration is None:
        count = len(texts.calibration) + len(texts.held_out)
        tools.progress.warn(f"no --calibration: {count} general texts are used")
    elif texts.warning():
        tools.progress.warn(texts.warning())
    if needs_text(options):
        options = replace(options, texts=texts)
    with in_folder(out, "the quantized model", tools) as to:
        artifact = quantize(checkpoint, options, to, tools).value
        loss = quality(checkpoint, artifact, texts, limits, to, tools).value
        if fault := quality_fault(format_, loss, limits):
            raise fault
        signatures = _signatures(out, artifact, signer)  # a service may refuse
    return {
        "out": str(out),
        "format": format_.name,
        "bits_per_weight": artifact.details.get("bits_per_weight"),
        "files": [str(path) for path in _written(out, artifact, signatures)],
        "quality": loss.to_json() if loss else {},
        "details": dict(artifact.details),
    }


def _signatures(out: Path, artifact: Artifact, signer: AnySigner | None) -> dict[str, bytes]:
    """Return the signatures of what will be at `out`, by name; none without a signer."""
    files = artifact.tree.files
    if signer is None:
        return {}
    if main_file(artifact.tree.root, out) is None:
        return {SIGNATURE: sign_model(out.name, files, signer)}
    return {
        f"{name}.sig": sign_model(name, [replace(file, path=".")], signer)
        for file, name in zip(files, _names(out, artifact), strict=True)
    }


def _names(out: Path, artifact: Artifact) -> list[str]:
    """Return how the files at `out` are named: a single one as the user said."""
    files = artifact.tree.files
    return [file.path for file in files] if files[1:] else [out.name]


def _written(out: Path, artifact: Artifact, signatures: Mapping[str, bytes]) -> list[Path]:
    """Write the signatures into the folder, or beside the file; return all that was written."""
    to = out if out.is_dir() else out.parent
    for name, data in signatures.items():
        write_whole(to / name, data)
    if out.is_dir():
        return [path for path in below(out) if path.is_file()]
    return [to / name for name in (*_names(out, artifact), *signatures)]


def _refuse_ignored(asked: QuantizeCommand, used: Collection[str]) -> None:
    for name, field in Quantize.model_fields.items():
        unasked = (field.get_default(call_default_factory=True), "auto", "off")
        if name not in used and getattr(asked.settings, name) not in unasked:
            flag = spelling(Quantize, name)
            raise UsageError(f"{flag} does not apply to {asked.format}", hint="remove the option")


def _require_new(out: Path) -> None:
    if out.exists():
        raise UsageError(f"{out} exists already", hint="give a new file or folder with --out")
