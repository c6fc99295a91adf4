"""Each variant's test must notice when its arithmetic is wrong: break it on purpose."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from weightsmith.core.errors import WeightsmithError
from weightsmith.merging import base as base_module
from weightsmith.merging import blocks, claims, compose, plan
from weightsmith.merging.claim import AdapterView
from weightsmith.merging.families import experts, lora, tokens

from tests.unit.merging import test_layouts, test_variants

Patch = pytest.MonkeyPatch


def each_term(change: Callable[[Any], Any]) -> Callable[[Patch], None]:
    """Change every low-rank term of a plan."""

    def mutate(patch: Patch) -> None:
        made = claims.claims_of

        def changed(view: Any) -> list[Any]:
            return [
                replace(claim, terms=tuple(change(term) for term in claim.terms))
                for claim in made(view)
            ]

        patch.setattr(plan, "claims_of", changed)

    return mutate


def unscaled_bias(patch: Patch) -> None:
    made = lora._bias
    patch.setattr(lora, "_bias", lambda view, group, scaling: made(view, group, 1.0))


def dora_without_lengths(patch: Patch) -> None:
    begin = lora.Dora.begin

    def plain(change: Any, output: Any, files: Any) -> Any:
        begin(change, output, files)
        add = lora.adder(change.term, files)
        return lambda first, count: lora._sum(output, files, add, first, count)

    patch.setattr(lora.Dora, "begin", plain)


def dora_of_the_other_axis(patch: Patch) -> None:
    made = lora.Dora
    patch.setattr(lora, "Dora", lambda **w: made(**w | {"by_column": not w["by_column"]}))


def kasa_that_keeps_the_base(patch: Patch) -> None:
    from numpy import linalg

    svd = linalg.svd

    def none(*a: Any, **k: Any) -> Any:
        u, s, v = svd(*a, **k)
        return u, s * 0, v

    patch.setattr(linalg, "svd", none)


def blocks_not_on_the_diagonal(patch: Patch) -> None:
    patch.setattr(lora, "_blocks", lambda view, group: (1, 1))


def tokens_in_another_order(patch: Patch) -> None:
    places = tokens._places
    patch.setattr(tokens, "_places", lambda view, module: places(view, module)[::-1])


def replicas_of_the_wrong_layer(patch: Patch) -> None:
    made = base_module.replicate

    def shifted(tensors: Any, layers: Any) -> Any:
        return made(tensors, tuple(layers[::-1]))

    patch.setattr(plan, "replicate", shifted)


def tied_for_both_uses(patch: Patch) -> None:
    made = claims.claims_of

    def both(view: Any) -> list[Any]:
        return [replace(claim, both=True) for claim in made(view)]

    patch.setattr(plan, "claims_of", both)


def head_taken_for_the_embedding(patch: Patch) -> None:
    made = claims.claims_of

    def moved(view: Any) -> list[Any]:
        tie = view.tie
        return [
            replace(claim, target=tie.embedding) if claim.target == tie.head else claim
            for claim in made(view)
        ]

    patch.setattr(plan, "claims_of", moved)


def experts_slowest_in_b(patch: Patch) -> None:
    made = experts._terms

    def wrong(view: Any, name: str, stack: Any, pair: Any) -> Any:
        count = experts._count(view, stack)
        rank = pair.a.shape[0] // count

        def contiguous(term: Any, place: int) -> Any:
            return replace(
                term,
                left=replace(term.left, columns=slice(place * rank, (place + 1) * rank)),
            )

        return {
            target: tuple(contiguous(term, place) for place, term in enumerate(terms))
            for target, terms in made(view, name, stack, pair).items()
        }

    patch.setattr(experts, "_terms", wrong)


def gate_and_up_exchanged(patch: Patch) -> None:
    pieces = {"gate_up_proj": (("up_proj", "gate_proj"),), "down_proj": (("down_proj",),)}
    patch.setattr(experts, "_PIECES", pieces)


def replaced_tensors_kept(patch: Patch) -> None:
    made = compose._single

    def kept(plain: Any, some: Any) -> Any:
        return replace(made(plain, some), source=plain.source, shape=plain.shape)

    patch.setattr(compose, "_single", kept)


def patches_forgotten(patch: Patch) -> None:
    patch.setattr(blocks, "patched", lambda patches, files, weight, first: weight)


def rank_stabilised_as_plain(patch: Patch) -> None:
    view_factor = AdapterView.factor
    patch.setattr(AdapterView, "factor", lambda view, s: view_factor(view, s / 2))


MUTATIONS: list[tuple[str, Callable[[Patch], None]]] = [
    ("rslora", rank_stabilised_as_plain),
    ("patterns", each_term(lambda term: replace(term, factor=-term.factor))),
    ("dora", dora_without_lengths),
    ("dora", dora_of_the_other_axis),
    ("dora-embedding", dora_of_the_other_axis),
    ("lora-bias", unscaled_bias),
    ("bias-all", replaced_tensors_kept),
    ("modules-to-save", replaced_tensors_kept),
    ("tokens", tokens_in_another_order),
    ("tokens", patches_forgotten),
    ("kasa", kasa_that_keeps_the_base),
    ("bdlora-b", blocks_not_on_the_diagonal),
    ("replication", replicas_of_the_wrong_layer),
    ("tied-embedding", tied_for_both_uses),
    ("tied-head", head_taken_for_the_embedding),
]


def ids(cases: list[Any]) -> list[str]:
    return [f"{case[0]}-{getattr(case[-1], '__name__', 'term')}" for case in cases]


@pytest.mark.grid(6)
@pytest.mark.parametrize(("name", "mutate"), MUTATIONS, ids=ids(MUTATIONS))
def test_a_broken_variant_fails_its_test(
    name: str,
    mutate: Callable[[Patch], None],
    bases: Any,
    tmp_path: Path,
    monkeypatch: Patch,
) -> None:
    mutate(monkeypatch)

    with pytest.raises((AssertionError, WeightsmithError)):
        test_variants.test_llama(name, bases, tmp_path)


STACKS: list[tuple[Callable[..., None], Callable[[Patch], None]]] = [
    (test_layouts.test_stacked_experts, experts_slowest_in_b),
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
    test: Callable[..., None], mutate: Callable[[Patch], None], tmp_path: Path, monkeypatch: Patch
) -> None:
    with contextlib.suppress(FileNotFoundError):
        mutate(monkeypatch)

    with pytest.raises((AssertionError, WeightsmithError)):
        test(tmp_path)
