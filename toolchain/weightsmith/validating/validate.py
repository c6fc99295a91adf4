"""Compare a merged checkpoint with base and adapters: files, elements, logits."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weightsmith.core.cpus import all_but_one
from weightsmith.core.errors import EnvironmentFailure, InputRefused
from weightsmith.core.jobs import CombinationRule
from weightsmith.core.safe_parse import read_json
from weightsmith.forward.adapters import IncompatibleAdapters
from weightsmith.forward.greedy import Questions
from weightsmith.forward.greedy import greedy as continuations
from weightsmith.forward.libraries import ModelFails, load_tokenizer, stay_offline
from weightsmith.forward.lockstep import Lockstep
from weightsmith.forward.network import decoder_layers, skeleton
from weightsmith.forward.views import require_finite
from weightsmith.forward.walk import Count, DoesNotRun, Opening, Progress, walk
from weightsmith.forward.weights import Weights
from weightsmith.models.facts import read_facts
from weightsmith.models.task import of_class
from weightsmith.validating import probes
from weightsmith.validating.forwards import (
    BaseAndAdapters,
    ForwardResult,
    MergedModel,
    ProbeBatch,
    ReferenceModel,
    Unmerged,
    merged_forward,
    reference_forward,
)
from weightsmith.validating.probes import Message
from weightsmith.validating.result import (
    ERROR,
    NOTE,
    WARNING,
    Comparison,
    Distance,
    Finding,
    Validation,
    failed,
    finding,
)
from weightsmith.validating.structure import compare_files, end_tokens, is_readable, vocabulary
from weightsmith.validating.verdict import judge_models

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from weightsmith.forward.kinds import Model

_SHOWN = 20
"""Findings of one kind that are listed; more are only counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationRequest:
    """The folders to compare, and how."""

    base: Path
    adapters: tuple[tuple[Path, float], ...]
    """Folder and weight, in order."""
    merged: Path
    items: tuple[Sequence[Message], ...] = ()
    """Chats to probe with; default: built-in ones."""
    scope: str = "all"
    """What is compared: `all` for a weighted sum; `rest`, only tensors that no adapter changes;
    `files`, only files and tokenizer."""
    mixture: CombinationRule | None = None
    """With scope `rest`: how the method combines deltas, if that can be checked."""
    drafts: tuple[tuple[Sequence[int], Sequence[int]], ...] = ()
    """Questions, and what the merged model answers to them, in tokens: drafts, if it is known."""


def validate(request: ValidationRequest, progress: Progress | None = None) -> Validation:
    """Return what comparing files, tokenizer, elements and logits found.

    Weights are read a few rows at a time on both sides, so memory does not grow with the model.
    Raises InputRefused for invalid folders; failed checks are findings of severity `error`.
    """
    began, threads = time.monotonic(), torch.get_num_threads()
    torch.set_num_threads(all_but_one())
    try:
        stay_offline()
        folders = [root for root, _ in request.adapters]
        findings = compare_files(request.base, folders, request.merged)
        expected = probes.expected_tokenizer(request.base, folders)
        readable = is_readable(findings)
        findings += _tokenizers(request, expected) if readable else []
        seen, comparison = None, None
        why = ""
        if request.scope == "files":
            why = "the base was quantized before the merge"
        elif read_json(request.base / "config.json").get("quantization_config"):
            why = "the base is quantized, and its outputs depend on how it is dequantized"
        if why:
            text = f"{why}: only files and tokenizer were checked"
            findings.append(finding(NOTE, "logits", text))
        elif readable:
            progress = progress or (lambda *_: None)
            seen, comparison = _compare(request, expected, findings, progress) or (None, None)
    finally:
        torch.set_num_threads(threads)
    # If logits are not finite, no measure means anything, including the agreement.
    if seen and not math.isfinite(seen.max_abs):
        seen = None
    return Validation(
        max_abs_logit_diff=seen.max_abs if seen else None,
        mean_abs_logit_diff=seen.mean_abs if seen else None,
        kl_mean=seen.kl_mean if seen else None,
        kl_max=seen.kl_max if seen else None,
        top1_agreement=seen.top1 if seen else None,
        comparison=comparison,
        passed=not failed(findings),
        findings=tuple(_first(findings)),
        seconds=round(time.monotonic() - began, 3),
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _tokenizers(request: ValidationRequest, expected: PreTrainedTokenizerBase) -> list[Finding]:
    if expected is None:
        text = "neither base nor adapters have a tokenizer: the probes are random tokens"
        return [finding(NOTE, "tokenizer", text)]
    try:
        merged = load_tokenizer(request.merged)
    except InputRefused as error:
        message = f"of the merged folder: {error.message}"
        return [finding(ERROR, "tokenizer", message, "tokenizer.json")]
    return probes.compare(expected, merged, vocabulary(request.merged), request.base)


class _Uncompared(Exception):
    """One of the two sides cannot run; the finding says why."""

    def __init__(self, severity: str, check: str, message: str, where: str = "") -> None:
        super().__init__(message)
        self.finding = finding(severity, check, message, where)


def _compare(
    request: ValidationRequest,
    expected: PreTrainedTokenizerBase,
    findings: list[Finding],
    progress: Progress,
) -> tuple[Distance, Comparison] | None:
    """Run and compare both sides; None and a finding if one cannot run."""
    try:
        model = _model(request, findings)
        weights = Weights(request.merged, model)
        if lacking := next((name for name in weights.parameters if not weights.has(name)), ""):
            message = f"the merged model cannot run: its files lack {lacking}"
            raise _Uncompared(ERROR, "files", message, lacking)
        ids, most = _probes(request, expected, model)
        texts = _texts(request, ids, min(most, probes.most_new(weights)), findings)
        batch = ProbeBatch.of(probes.longer(ids, texts) if texts else ids, most)
        # So many probes run twice, to measure rounding: half of them, to save time.
        twins, before = -(-len(ids) // 2), len(findings)
        advance = partial(Count(2 * max(1, len(decoder_layers(model))), progress), 1)
        reference, run = _forwards(request, weights, batch, twins, advance, findings)
    except _Uncompared as error:
        findings.append(error.finding)
        return None
    streamed, summed = len(findings) == before, request.scope == "all"
    greedy = list(probes.read(reference.run.logits, run.logits, batch, texts))
    seen, comparison = judge_models(
        reference, run, weights, batch, twins, findings, greedy, summed=summed
    )
    return seen, replace(
        comparison,
        probes=len(ids),
        positions=len(run.logits),
        streamed=streamed,
        greedy=probes.described(greedy, expected),
    )


def _model(request: ValidationRequest, findings: list[Finding]) -> Model:
    """Return the merged model without weights."""
    facts, kind = read_facts(request.base), ""
    merged = read_facts(request.merged)
    if of_class(facts.architecture)[1]:  # transformers would load a part of it
        kind = facts.architecture
    elif (
        merged.task.kind != "generate" and not merged.task.tokens
    ):  # its adapters need not have a causal model's names
        kind = f"{merged.architecture}, which {merged.task.does},"
    elif facts.encoder_decoder:
        kind = f"{facts.architecture or 'the model'}, an encoder with a decoder,"
    if kind:
        text = f"{kind} cannot be run as a causal model: only files were checked"
        raise _Uncompared(WARNING, "logits", text)
    try:
        return skeleton(request.merged)
    except InputRefused as error:
        cause = error.__cause__ or error
        if not isinstance(cause, ValueError) and not failed(findings):
            raise
        why = " ".join(str(cause).split())[:120]
        text = f"transformers cannot load it as a causal model: only files were checked ({why})"
        raise _Uncompared(WARNING, "logits", text) from None


def _probes(
    request: ValidationRequest, expected: PreTrainedTokenizerBase, model: Model
) -> tuple[list[list[int]], int]:
    """Return the probes' tokens, and for how many of each logits fit into memory."""
    head = model.get_output_embeddings()
    if head is None:
        raise InputRefused(
            "the model has no output layer, so it cannot generate text",
            hint="validate a checkpoint that generates text",
        )
    size = int(head.weight.shape[0])
    chats = not read_facts(request.merged).task.tokens
    ids = probes.encode(expected, probes.choose(request.items), size, chats=chats)
    highest = max(max(probe) for probe in ids)
    if highest >= model.get_input_embeddings().weight.shape[0]:
        message = f"the tokenizer produces token {highest}, which the merged model does not embed"
        raise _Uncompared(ERROR, "tokenizer", message, "tokenizer.json")
    return ids, probes.most_logits(len(ids), size)


def _forwards(
    request: ValidationRequest,
    weights: Weights,
    batch: ProbeBatch,
    twins: int,
    advance: Callable[[], None],
    findings: list[Finding],
) -> tuple[ReferenceModel, ForwardResult]:
    """Run both sides in one walk; a finding says if they had to be loaded."""
    openings: dict[str, Opening] = {
        "reference": BaseAndAdapters(checkpoint=request.base, adapters=request.adapters),
        "merged": MergedModel(checkpoint=request.merged),
    }

    def reference(unmerged: Unmerged, lockstep: Lockstep) -> ReferenceModel:
        mixture = request.mixture
        return reference_forward(
            unmerged, lockstep, weights, batch, twins, advance=advance, mixture=mixture
        )

    def merged(model: Model, _: Lockstep) -> ForwardResult:
        return merged_forward(model, batch, twins, advance)

    def tell(error: ModelFails) -> None:
        text = f"this architecture cannot be streamed and was loaded whole ({error})"
        findings.append(finding(NOTE, "logits", text))

    try:
        ask: dict[str, Any] = {"reference": reference, "merged": merged}
        found = walk(openings, ask, tell, alike=True)
        return found["reference"], found["merged"]
    except IncompatibleAdapters as error:
        text = f"PEFT cannot load these adapters together: only files were checked ({error})"
        raise _Uncompared(WARNING, "logits", text) from None
    except DoesNotRun as error:
        if not failed(findings):
            raise
        # The findings already say why: the merged files do not fit the base.
        text = f"logits were not compared: the model does not run ({error.__cause__ or error})"
        raise _Uncompared(NOTE, "logits", text) from None


def _texts(
    request: ValidationRequest, ids: list[list[int]], most: int, findings: list[Finding]
) -> list[list[int]]:
    """Return the merged model's greedy tokens after each probe; [] if it cannot generate."""
    ends = sorted(end_tokens(request.merged))
    known = probes.known(ids, request.drafts, ends, most)
    prompts = [probe for number, probe in enumerate(ids) if number not in known]
    if not prompts:
        return list(known.values())
    drafts = probes.drafts(prompts, request.drafts)
    filler = min(ends, default=0)
    asked = Questions(prompts=prompts, ends=ends, most=most, filler=filler, drafts=drafts)

    def generate(model: Model, _: Lockstep) -> list[list[int]]:
        model.get_output_embeddings().register_forward_hook(require_finite)
        return continuations(model, asked, lambda _: None).tokens

    try:
        made = iter(walk({"": MergedModel(checkpoint=request.merged)}, {"": generate})[""])
        return [known[n] if n in known else next(made) for n in range(len(ids))]
    except (DoesNotRun, EnvironmentFailure) as error:
        why = error.__cause__ or error
        text = f"only the first token of each answer is compared: generation failed ({why})"
        findings.append(finding(NOTE, "logits", text))
        return []


def _first(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings, errors first, with at most _SHOWN of each kind."""
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
