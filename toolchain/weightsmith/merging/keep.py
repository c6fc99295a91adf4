"""Write the combined adapter in PEFT's format instead of merging it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.values import JsonValue
from weightsmith.merging.combining.changes import Combined, Mixture, pair
from weightsmith.merging.combining.combination import KEEPABLE, Combination
from weightsmith.merging.combining.measure import terms_of
from weightsmith.merging.combining.methods import concatenate, to_float32
from weightsmith.merging.companions import overlay, write_file
from weightsmith.merging.names import module_key
from weightsmith.merging.outputs import Band, MergedTensor, bands
from weightsmith.merging.plan import MergePlan
from weightsmith.merging.rounding import F32
from weightsmith.merging.stream import OpenFiles, Writer, as_bytes
from weightsmith.models.safetensors import build_header

_SIDES = re.compile(r"(?P<module>.+)\.lora_(?:embedding_)?[AB](?:\.weight)?")
_FIELDS = ("base_model_name_or_path", "revision", "task_type", "fan_in_fan_out", "peft_version")
_HINT = "merge into the base instead, without --keep-adapter"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Module:
    a: str
    """Key of A in the file."""
    b: str
    output: MergedTensor
    band: Band
    rank: int

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        rows, columns = self.band.end - self.band.first, self.output.columns
        if self.band.terms[0].left.transposed:
            rows, columns = columns, rows
        return (self.rank, columns), (rows, self.rank)

    @property
    def name(self) -> str:
        match = _SIDES.fullmatch(module_key(self.a))
        return match["module"] if match else ""


def keep_adapter(
    plan: MergePlan, combination: Combination, out: Path
) -> tuple[dict[str, JsonValue], list[str]]:
    """Write the combined adapter to `out` in float32 with scaling 1; return files and findings.

    One module is in memory at a time. Raises UsageError for methods whose result is not an adapter,
    InputRefused for adapters with more than pairs of factors.
    """
    if combination.space == "delta" and combination.method not in KEEPABLE:
        raise UsageError(
            f"the result of method {combination.method} is not an adapter: it has full rank",
            hint=f"one of {', '.join(KEEPABLE)}, or --space factors",
        )
    modules = [module for output in plan.outputs.values() for module in _modules(output)]
    files, writer = OpenFiles(), Writer(out / "adapter_model.safetensors")
    try:
        tensors = [
            (key, "F32", shape)
            for module in modules
            for key, shape in zip((module.a, module.b), module.shapes, strict=True)
        ]
        writer.write(build_header(tensors, {"format": "pt"}))
        for module in modules:
            output, band = module.output, module.band
            if isinstance(output.change, Combined):
                left, right = output.change.factors(output, band, files)
            else:
                pairs = [pair(term, band, files) for term in band.terms]
                left, right = to_float32(concatenate(pairs), output.name)
            turned = band.terms[0].left.transposed
            for side in (left.T, right.T) if turned else (right, left):
                writer.write(as_bytes(np.ascontiguousarray(side, F32)))
        weights = writer.finish()
    except BaseException:
        writer.abandon()
        raise
    finally:
        files.close()
    others: dict[str, bytes] = {}
    findings = overlay(others, plan.adapters)
    others["adapter_config.json"] = _config(plan, modules)
    small = [write_file(out, name, data) for name, data in sorted(others.items())]
    made: dict[str, JsonValue] = {
        "out": str(out),
        "tensors": {"merged": 2 * len(modules), "copied": 0, "replaced": 0},
        "tensor_bytes": {"merged": weights["size"], "copied": 0, "replaced": 0},
        "shards": [weights],
        "files": [
            *small,
            {"path": weights["file"], "size": weights["size"], "sha256": weights["sha256"]},
        ],
        "ranks": sorted({module.rank for module in modules}),
    }
    return made, findings


def _modules(output: MergedTensor) -> Iterator[_Module]:
    if output.kind == "copied":
        return
    change, terms = output.change, terms_of(output)
    if isinstance(change, Combined | Mixture):
        pure = all(share.claim.terms for share in change.shares)
    else:
        pure = change is None and not output.patches and output.kind == "merged"
    plain_terms = all(
        part is not None and part.whole and part.blocks == 1
        for term in terms
        for part in (term.left, term.right)
    )
    if not pure or not plain_terms:
        raise InputRefused(
            f"the adapters change {output.name} by more than pairs of factors (DoRA, biases, "
            "experts or whole tensors), which a combined LoRA adapter cannot represent",
            hint=_HINT,
        )
    plain = replace(output, terms=terms, change=None)
    for band in change.bands(output) if isinstance(change, Combined) else bands(plain):
        if not band.terms:
            continue
        if any(term.shape[0] != band.end - band.first for term in band.terms):
            raise InputRefused(
                f"this method changes {output.name} as a whole, but the adapters change several "
                "layers in it, so the result is not a LoRA adapter",
                hint=_HINT,
            )
        keys = set()
        for term in band.terms:
            sides = [term.left.stored.info.name, term.right.stored.info.name if term.right else ""]
            keys.add(tuple(sides if term.left.transposed else sides[::-1]))
        if len(keys) > 1:
            raise InputRefused(
                f"the adapters name the module of {output.name} differently: "
                + ", ".join(sorted(a for a, _ in keys)),
                hint=_HINT,
            )
        a, b = keys.pop()
        rank = sum(term.rank for term in band.terms)
        if isinstance(change, Combined):
            rank = change.rank(output, band)
        yield _Module(a=a, b=b, output=output, band=band, rank=rank)


def _config(plan: MergePlan, modules: list[_Module]) -> bytes:
    """Return adapter_config.json; alpha equals the rank, so scaling is 1."""
    first = plan.adapters[0].config.raw
    rank = max(module.rank for module in modules)
    others = {re.escape(module.name): module.rank for module in modules if module.rank != rank}
    config = {name: first[name] for name in _FIELDS if name in first} | {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted({module.name for module in modules}),
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
