"""A serving plan for people: where the memory goes, as a table and a bar."""

from __future__ import annotations

from weightsmith.core.escape import joined
from weightsmith.serving.memory import human
from weightsmith.serving.parameters import NO_WEIGHTS
from weightsmith.serving.plan import ServingPlan

_WIDTH = 60


def summary(name: str, plan: ServingPlan) -> str:
    """Return a plan as lines: what it serves, a bar of one device's memory, and its numbers.

    Sizes are per GPU, or of the machine without one.
    """
    gpus = plan.gpus
    where = f"{gpus} x {plan.device}" if gpus > 1 else plan.device
    parts = _parts(plan, max(1, gpus))
    whole = sum(size for _, _, size, _ in parts)
    requests = plan.max_num_seqs
    lines = [
        (
            f"{name} on {where}: {requests} request{'s' * (requests > 1)} of"
            f" {plan.max_model_len} tokens at once, {plan.max_num_batched_tokens} tokens a"
            " step"
        ),
        f"  [{_bar(parts, whole)}] {human(whole)}{' per GPU' if gpus > 1 else ''}",
    ]
    lines += [
        f"   {sign} {what:<14} {human(size):>10}  {said}"
        for sign, what, size, said in parts
        if size
    ]
    lines += [f"  note: {note}" for note in plan.notes]
    if not plan.fits:
        lines.append("  it would fit as a whole with:")
        lines += [f"   - {way['text']}" for way in plan.nearest or ()]
    if plan.choices:
        pairs = [(row["max_num_seqs"], row["max_model_len"]) for row in plan.choices]
        others = [f"{most} of {n}" for most, n in pairs if n != plan.max_model_len]
        lines.append(f"  requests at once, of other lengths: {', '.join(others)} tokens")
    return joined(lines)


def _parts(plan: ServingPlan, devices: int) -> list[tuple[str, str, int, str]]:
    """Return (sign, name, bytes, explanation) of all that takes memory, per device."""
    cache = plan.kv_bytes_total // devices
    estimated = any(note.startswith(NO_WEIGHTS) for note in plan.notes)
    whole = plan.max_concurrency
    spare = max(0, plan.kv_cache_bytes - cache)
    return [
        (
            "w",
            "weights",
            plan.weights_bytes_per_gpu,
            "an estimate" if estimated else "by the files' size",
        ),
        (
            "k",
            "cache",
            cache,
            (
                f"exact: {human(plan.kv_bytes_per_request)} per request,"
                f" {human(plan.kv_bytes_per_token)} per further token"
            ),
        ),
        ("o", "other", plan.overhead_bytes // devices, "an estimate"),
        (
            "+",
            "cache to spare",
            spare,
            f"{whole:g} request{'s' * (whole != 1)} of full length would fit",
        ),
        (".", "held back", plan.margin_bytes, "because the rest is estimated"),
    ]


def _bar(parts: list[tuple[str, str, int, str]], whole: int) -> str:
    """Return one character per sixtieth; the ends are rounded so that the length is always 60."""
    bar, reached = "", 0
    for sign, _, size, _ in parts:
        reached += size
        bar += sign * (round(reached * _WIDTH / (whole or 1)) - len(bar))
    return bar.ljust(_WIDTH)
