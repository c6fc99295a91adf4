"""Each variant's test must notice when its arithmetic is wrong: break it on purpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from weightsmith.core.errors import WeightsmithError
from weightsmith.merging import blocks, plan
from weightsmith.merging.claim import AdapterView
from weightsmith.merging.families import experts, lora, tokens

from tests.unit.merging import test_layouts, test_variants

Mutate = Callable[[pytest.MonkeyPatch], None]


def wrapped(owner: Any, name: str, change: Callable[..., Any]) -> Mutate:
    """Put what calls the original, its first argument, into its place."""
    own = getattr(owner, name)
    return lambda patch: patch.setattr(owner, name, lambda *a, **k: change(own, *a, **k))


def each_term(change: Callable[[Any], Any]) -> Mutate:
    def changed(own: Any, view: Any) -> list[Any]:
        return [replace(c, terms=tuple(change(term) for term in c.terms)) for c in own(view)]

    return wrapped(plan, "claims_of", changed)


def without_lengths(own: Any, dora: Any, output: Any, files: Any) -> Any:
    own(dora, output, files)
    add = lora.adder(dora.term, files)
    return lambda first, count: lora._sum(output, files, add, first, count)


def kasa_that_keeps_the_base(patch: pytest.MonkeyPatch) -> None:
    from numpy import linalg

    def none(own: Any, *args: Any, **options: Any) -> Any:
        u, s, v = own(*args, **options)
        return u, s * 0, v

    wrapped(linalg, "svd", none)(patch)


def head_for_embedding(own: Any, view: Any) -> list[Any]:
    tie = view.tie
    return [
        replace(claim, target=tie.embedding) if claim.target == tie.head else claim
        for claim in own(view)
    ]


def slowest_in_b(own: Any, view: Any, name: str, stack: Any, pair: Any) -> Any:
    rank = pair.a.shape[0] // experts._count(view, stack)

    def contiguous(term: Any, place: int) -> Any:
        columns = slice(place * rank, (place + 1) * rank)
        return replace(term, left=replace(term.left, columns=columns))

    return {
        target: tuple(contiguous(term, place) for place, term in enumerate(terms))
        for target, terms in own(view, name, stack, pair).items()
    }


def gate_and_up_exchanged(patch: pytest.MonkeyPatch) -> None:
    pieces = {"gate_up_proj": (("up_proj", "gate_proj"),), "down_proj": (("down_proj",),)}
    patch.setattr(experts, "_PIECES", pieces)


other_axis = wrapped(lora, "Dora", lambda own, **w: own(**w | {"by_column": not w["by_column"]}))
tensors_kept = wrapped(
    plan,
    "_single",
    lambda own, plain, some: replace(own(plain, some), source=plain.source, shape=plain.shape),
)
MUTATIONS: list[tuple[str, Mutate]] = [
    ("rslora", wrapped(AdapterView, "term", lambda own, v, b, a, s, *f: own(v, b, a, s / 2, *f))),
    ("patterns", each_term(lambda term: replace(term, factor=-term.factor))),
    ("dora", wrapped(lora.Dora, "begin", without_lengths)),
    ("dora", other_axis),
    ("dora-embedding", other_axis),
    ("lora-bias", wrapped(lora, "_bias", lambda own, view, group, _: own(view, group, 1.0))),
    ("bias-all", tensors_kept),
    ("modules-to-save", tensors_kept),
    ("tokens", wrapped(tokens, "_places", lambda own, view, module: own(view, module)[::-1])),
    ("tokens", wrapped(blocks, "patched", lambda own, patches, files, weight, first: weight)),
    ("kasa", kasa_that_keeps_the_base),
    ("bdlora-b", wrapped(lora, "_blocks", lambda own, view, group: (1, 1))),
    ("replication", wrapped(plan, "replicate", lambda own, b, c, rows: own(b, c, rows[::-1]))),
    (
        "tied-embedding",
        wrapped(plan, "claims_of", lambda own, view: [replace(c, both=True) for c in own(view)]),
    ),
    ("tied-head", wrapped(plan, "claims_of", head_for_embedding)),
]


@pytest.mark.grid(6)
@pytest.mark.parametrize(
    ("name", "mutate"), MUTATIONS, ids=[f"{n}-{name}" for n, (name, _) in enumerate(MUTATIONS)]
)
def test_a_broken_variant_fails_its_test(
    name: str, mutate: Mutate, bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)

    with pytest.raises((AssertionError, WeightsmithError)):
        test_variants.test_llama(name, bases, tmp_path)


STACKS: list[tuple[Callable[..., None], Mutate]] = [
    (test_layouts.test_stacked_experts, wrapped(experts, "_terms", slowest_in_b)),
    (
        lambda folder: test_layouts.test_stacked_factors_on_single_experts(
            test_layouts.EXPERTS, ("gate_proj", "up_proj", "down_proj"), folder
        ),
        gate_and_up_exchanged,
    ),
    (
        test_layouts.test_single_experts_factors_on_a_stack,
        each_term(lambda term: replace(term, first=0)),
    ),
    (
        test_layouts.test_transposed_experts,
        each_term(lambda term: replace(term, left=term.right.transpose, right=term.left.transpose)),
    ),
]


@pytest.mark.parametrize(("test", "mutate"), STACKS, ids=range(len(STACKS)))
def test_broken_experts_fail_their_test(
    test: Callable[..., None], mutate: Mutate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)

    with pytest.raises((AssertionError, WeightsmithError)):
        test(tmp_path)
