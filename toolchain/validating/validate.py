"""A merged checkpoint against its base with the adapters on it: files, elements, logits."""

from __future__ import annotations

import math
import os
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from toolchain.checkpoints.safetensors import read_json
from toolchain.errors import InputRefused
from toolchain.validating import probes as asked
from toolchain.validating.elements import Tally, compare_bytes, compare_rows
from toolchain.validating.findings import ERROR, NOTE, WARNING, Finding, failed, finding
from toolchain.validating.forwards import Batch, Reference, Run, merged_forward, reference_forward
from toolchain.validating.logits import (
    Distance,
    Limits,
    distance,
    judge,
    judge_choices,
    limits,
)
from toolchain.validating.network import decoder_layers, skeleton
from toolchain.validating.probes import Message
from toolchain.validating.structure import compare_files, vocabulary
from toolchain.validating.suspicion import explain
from toolchain.validating.weights import Weights

Progress = Callable[[int, int], None]
_NOT_SUMMED = (
    "this method is no plain sum, which the reference is: how far the two are apart is told and "
    "not judged; the evaluation judges it"
)
_SHOWN = 20
"""Findings of one kind that are told one by one."""
_SWALLOWED = 0.5
"""Part of the adapter's effect that rounding may take before it is worth a warning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to hold against what."""

    base: Path
    adapters: tuple[tuple[Path, float], ...]
    """Folder and weight, in order."""
    merged: Path
    items: tuple[Sequence[Message], ...] = ()
    """Chats to probe with; built-in ones where there are none."""
    scope: str = "all"
    """What base and adapters can judge: `all` of a weighted sum; `rest`, what no adapter changes;
    `files` and tokenizer."""


def validate(request: Request, progress: Progress | None = None) -> dict[str, Any]:
    """Return `{max_abs_logit_diff, kl_mean, kl_max, top1_agreement, findings, …}`.

    Weights are read a few rows at a time on both sides, so that memory does not grow with the
    model. Raises InputRefused for folders that are not what they should be; what fails is told by
    findings of severity `error`.
    """
    # One CPU is left to others, as in the reference answers: waiting threads spin.
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))
    try:
        return _validate(request, progress or (lambda *_: None))
    finally:
        torch.set_num_threads(threads)


def _validate(request: Request, progress: Progress) -> dict[str, Any]:
    began = time.monotonic()
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    folders = [root for root, _ in request.adapters]
    findings = compare_files(request.base, folders, request.merged)
    expected = asked.expected_tokenizer(request.base, folders)
    findings += _tokenizers(request, expected)
    result: dict[str, Any] = dict.fromkeys(
        ("max_abs_logit_diff", "mean_abs_logit_diff", "kl_mean", "kl_max", "top1_agreement")
    )
    if why := _no_reference(request):
        findings.append(finding(NOTE, "logits", f"{why}: files and tokenizer were judged alone"))
    else:
        result |= _compare(request, expected, findings, progress)
    return {
        **_finite(result),
        "passed": not failed(findings),
        "findings": _first(findings),
        "seconds": round(time.monotonic() - began, 3),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _no_reference(request: Request) -> str:
    """Say why base with adapters is no reference for this merge; nothing where it is one."""
    if request.scope == "files":
        return "the base was rounded before it was merged onto"
    if read_json(request.base / "config.json").get("quantization_config"):
        return "the base is quantized, and what it computes depends on how it is unpacked"
    return ""


def _finite(value: Any) -> Any:
    """Return a result that JSON can hold: a number that is none becomes null."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tokenizers(request: Request, expected: Any) -> list[Finding]:
    if expected is None:
        text = "neither base nor adapters have a tokenizer: the probes are tokens drawn at random"
        return [finding(NOTE, "tokenizer", text)]
    try:
        merged = asked.load_tokenizer(request.merged)
    except (OSError, ValueError, TypeError) as error:
        message = f"the merged folder's tokenizer cannot be loaded: {str(error)[:200]}"
        return [finding(ERROR, "tokenizer", message, "tokenizer.json")]
    return asked.compare(expected, merged, vocabulary(request.merged))


def _compare(
    request: Request, expected: Any, findings: list[Finding], progress: Progress
) -> dict[str, Any]:
    """Run both sides and judge them; what cannot run is a finding."""
    model = skeleton(request.merged)
    weights = Weights(request.merged, model)
    lacking = [name for name in weights.parameters if not weights.has(name)]
    if lacking:
        message = f"the merged model cannot run: nothing in its files is {lacking[0]}"
        findings.append(finding(ERROR, "files", message, lacking[0]))
        return {}
    ids = asked.encode(expected, asked.choose(request.items), _vocabulary(model))
    batch = Batch.of(ids)
    highest = int(batch.ids.max())
    if highest >= model.get_input_embeddings().weight.shape[0]:
        message = f"the tokenizer gives token {highest}, which the merged model does not embed"
        findings.append(finding(ERROR, "tokenizer", message, "tokenizer.json"))
        return {}
    sides = Sides(request=request, model=model, weights=weights, batch=batch)
    try:
        reference, run = sides.forwards(progress, streamed=True)
    except _NOT_STREAMABLE as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        text = f"this architecture was not streamed but loaded whole ({why})"
        findings.append(finding(NOTE, "logits", text))
        model = skeleton(request.merged)
        sides = Sides(
            request=request, model=model, weights=Weights(request.merged, model), batch=batch
        )
        reference, run = sides.forwards(progress, streamed=False)
    streamed = not any("loaded whole" in found.message for found in findings)
    told = _judge(reference, run, sides, findings)
    return told | {"probes": len(ids), "positions": len(run.logits), "streamed": streamed}


_NOT_STREAMABLE = (RuntimeError, AttributeError, KeyError, TypeError, NotImplementedError)
"""What an architecture raises that reaches for weights otherwise than by calling their module."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides:
    """Both sides of a comparison, ready to run."""

    request: Request
    model: Any
    weights: Weights
    """Of the merged checkpoint."""
    batch: Batch

    @property
    def summed(self) -> bool:
        """Say whether the merge is the sum that the reference computes."""
        return self.request.scope == "all"

    @property
    def twins(self) -> int:
        """Probes that are run twice, to see what rounding does: half of them, for time."""
        return -(-len(self.batch.ids) // 2)

    def forwards(self, progress: Progress, *, streamed: bool) -> tuple[Reference, Run]:
        """Run both; RuntimeError where the numbers are none."""
        steps = 2 * max(1, len(decoder_layers(self.model)))
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            progress(min(done, steps), steps)

        request = self.request
        reference = reference_forward(
            request.base,
            request.adapters,
            self.weights,
            self.batch,
            self.twins,
            streamed=streamed,
            advance=advance,
        )
        if not bool(torch.isfinite(reference.run.logits).all()):
            raise RuntimeError("the reference's logits are not finite")
        run = merged_forward(
            self.model, self.weights, self.batch, self.twins, streamed=streamed, advance=advance
        )
        return reference, run


def _judge(reference: Reference, run: Run, sides: Sides, findings: list[Finding]) -> dict[str, Any]:
    examined, elements = _elements(reference, sides.weights, summed=sides.summed)
    findings += reference.examiner.findings
    findings += examined
    mine = sum(sides.batch.lengths[: sides.twins])
    exact, there = reference.twins.logits, run.logits[:mine]
    rounding = distance(reference.run.logits[:mine], exact)
    seen, off = distance(reference.run.logits, run.logits), distance(exact, there)
    complete = not reference.examiner.unjudged
    allowed = limits(rounding, reference.run.logits, complete=complete)
    told = judge(off, allowed) + judge_choices(exact, there, allowed)
    if not bool(torch.isfinite(run.logits).all()):
        told = [finding(ERROR, "logits", "the merged model's logits are not finite")]
    if not sides.summed:
        told = [finding(NOTE, "logits", _NOT_SUMMED)]
    layers = _layers(reference, run)
    parted = next((row["layer"] for row in layers if row["parted"]), None)
    if failed(told) and parted is not None:
        findings.append(_where(parted, examined))
    findings += told
    lost, swallowed = _swallowed(reference)
    # Of a wrong merge the rest says nothing about rounding.
    findings += lost if sides.summed and not elements["wrong"] else []
    measured = {
        "max_abs_logit_diff": seen.max_abs,
        "mean_abs_logit_diff": seen.mean_abs,
        "kl_mean": seen.kl_mean,
        "kl_max": seen.kl_max,
        "top1_agreement": seen.top1,
    }
    return {
        # Of logits that are no numbers nothing was measured, the agreement included.
        **(measured if math.isfinite(seen.max_abs) else dict.fromkeys(measured)),
        "limits": _told(allowed),
        "rounding": _told(rounding),
        "from_exact": _told(off),
        "first_difference": parted,
        "layers": layers,
        "elements": elements,
        "lost_to_rounding": swallowed,
    }


def _elements(
    reference: Reference, weights: Weights, *, summed: bool
) -> tuple[list[Finding], dict[str, int]]:
    """Judge every tensor of the merged checkpoint; where it is no sum, those not adapted."""
    examiner = reference.examiner
    tallies = dict(examiner.tallies)
    places = {name: site for site in reference.sites for name in site.parameters.values()}
    for name, value in reference.replaced.items():
        if weights.has(name) and name not in tallies:
            tally = tallies[name] = Tally(tensor=weights.tensor_of(name) or name)
            there = weights.read(tally.tensor) if weights.tensor_of(name) else weights.whole(name)
            flat = value.reshape(len(value), -1).float()
            compare_rows(tally, 0, flat, torch.zeros_like(flat), there.reshape(len(there), -1))
    touched = set(tallies)
    tallies |= _untouched(reference, weights, touched)
    if not summed:
        tallies = {name: tally for name, tally in tallies.items() if name not in touched}
    shared = _shared(reference, weights, touched)
    wrong = {name: tally for name, tally in tallies.items() if tally.wrong}
    found = [
        explain(tally, name, places.get(name), reference.sites, examiner)
        for name, tally in wrong.items()
    ]
    return found + shared, {
        "tensors": len(tallies),
        "elements": sum(tally.total for tally in tallies.values()),
        "wrong": sum(tally.wrong for tally in wrong.values()),
    }


def _untouched(reference: Reference, weights: Weights, touched: set[str]) -> dict[str, Tally]:
    """Compare what no adapter changes, tensor by tensor; a tied head counts as the embedding."""
    base = reference.base
    pairs: dict[tuple[str, str], None] = {}
    for name in base.parameters:
        if name in touched or not weights.has(name):
            continue
        if base.tensor_of(name) and weights.tensor_of(name):
            pairs[base.tensor_of(name), weights.tensor_of(name)] = None
        else:
            pairs.update(((t, t), None) for t in base.tensors_of(name) if t in weights.infos)
    pairs.update(((t, t), None) for t in base.unused if t in weights.infos)
    done = {t.tensor for n, t in reference.examiner.tallies.items()}
    found = {}
    for mine, theirs in pairs:
        if theirs in done or base.infos[mine].shape != weights.infos[theirs].shape:
            continue
        tally = found[theirs] = Tally(tensor=theirs)
        for first, rows in base.blocks(mine):
            there = (
                weights.slice(theirs, first, first + len(rows))
                if rows.dim()
                else weights.read(theirs)
            )
            compare_bytes(tally, first, rows, there)
    return found


def _shared(reference: Reference, weights: Weights, touched: set[str]) -> list[Finding]:
    """Return a finding where one tensor is two parameters, of which an adapter changes one."""
    base = reference.base
    changed = {t.tensor: n for n, t in reference.examiner.tallies.items() if t.changed}
    return [
        finding(
            ERROR,
            "elements",
            f"{name} and {changed[weights.tensor_of(name)]} are one tensor in the merged "
            "checkpoint, and the adapters change only the second: they must be untied",
            name,
        )
        for name in base.parameters
        if name not in touched and weights.tensor_of(name) in changed
    ]


def _layers(reference: Reference, run: Run) -> list[dict[str, Any]]:
    """Return how far the hidden states after each layer are from the reference's.

    All as parts of their size: `difference` of the merged model, `rounding` of the exact merge, and
    `off`, between those two, which is arithmetic alone where the merge is right.
    """
    rows: list[dict[str, Any]] = []
    states = zip(reference.run.hidden, reference.twins.hidden, run.hidden, strict=False)
    for number, (mine, exact, there) in enumerate(states):
        size = float(mine.norm()) or 1.0
        rounding, off = float((exact - mine).norm()) / size, float((there - exact).norm()) / size
        rows.append(
            {
                "layer": number,
                "difference": _bounded(float((there - mine).norm()) / size),
                "rounding": _bounded(rounding),
                "off": _bounded(off),
                "parted": not off <= rounding + 2.0**-14,
            }
        )
    return rows


def _bounded(value: float) -> float:
    """Return a number that can be drawn: what is none is as far off as can be."""
    return value if math.isfinite(value) else 1e9


def _where(parted: int, examined: Sequence[Finding]) -> Finding:
    suspects = sorted({f.tensor for f in examined if f.layer == parted and f.tensor})
    what = f"; suspect {', '.join(suspects[:3])}" if suspects else ""
    message = f"the two part in decoder layer {parted}{what}"
    return Finding(
        severity=ERROR,
        check="layers",
        message=message,
        tensor=suspects[0] if suspects else "",
        layer=parted,
    )


def _swallowed(reference: Reference) -> tuple[list[Finding], float | None]:
    """Return a warning where rounding took most of the adapter, and the part that it took."""
    signal = reference.examiner.signal.values()
    added = sum(size**2 for size, _ in signal) ** 0.5
    lost = sum(size**2 for _, size in signal) ** 0.5
    if not added:
        return [], None
    part = lost / added
    if part < _SWALLOWED:
        return [], part
    return [
        finding(
            WARNING,
            "outputs",
            f"rounding changes the adapted layers' outputs by {part:.0%} of what the adapters add: "
            "they are small against the checkpoint's type; merge with dtype float32 to keep them",
        )
    ], part


def _first(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings, errors first, each kind in the model's order and not too many."""
    order = {ERROR: 0, WARNING: 1, NOTE: 2}
    ranked = sorted(findings, key=lambda found: order[found.severity])
    kept: list[Finding] = []
    for found in ranked:
        same = [f for f in kept if f.check == found.check and f.severity == found.severity]
        if len(same) < _SHOWN:
            kept.append(found)
    left = len(ranked) - len(kept)
    if left:
        kept.append(finding(NOTE, "elements", f"{left} more findings are not shown"))
    return kept


def _vocabulary(model: Any) -> int:
    head = model.get_output_embeddings()
    if head is None:
        raise InputRefused("the model has no output layer, so it answers nothing")
    return int(head.weight.shape[0])


def _told(value: Distance | Limits) -> dict[str, float]:
    return {name: getattr(value, name) for name in value.__slots__}
