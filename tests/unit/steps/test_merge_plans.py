"""A fleet plans hundreds of merges into one base, which may have 90,000 tensors."""

from pathlib import Path

import pytest
from weightsmith.core.merge_options import Merge
from weightsmith.core.values import AdapterSnapshot, Sources
from weightsmith.merging import plan as planning
from weightsmith.steps.merge_plans import MergePlans

from tests.fakes.tiny import snapshot_of
from tests.paths import TINY


def merge_of(adapter: str, weight: float = 1.0) -> Sources:
    given = AdapterSnapshot(snapshot=snapshot_of(TINY / "adapters" / adapter), weight=weight)
    return Sources(base=snapshot_of(TINY / "base"), adapters=(given,))


def test_a_base_is_read_once_and_a_merge_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read, made = list[Path](), list[float]()
    own, onto = planning.open_checkpoint, planning.plan_onto
    monkeypatch.setattr(planning, "open_checkpoint", lambda root: read.append(root) or own(root))
    monkeypatch.setattr(planning, "plan_onto", lambda *a: made.append(a[1][0][1]) or onto(*a))
    plans, weights = MergePlans(), [0.1 * number for number in range(1, 9)]

    costs = [plans.cost(merge_of("a", weight), Merge()) for weight in (*weights, *weights)]
    facts = plans.planned(merge_of("a", weights[-1]), Merge())

    assert read == [TINY / "base"]
    assert made == weights, "their costs are all remembered, and the tensors of the last"
    assert costs[:8] == costs[8:]
    assert facts.cost == costs[-1]
    whole = plans.plan(merge_of("a"), Merge())
    assert facts.changed == {n for n, o in whole.outputs.items() if o.kind != "copied"}
    assert {one.name for one in facts.tensors} == set(whole.outputs)
    assert len(read) == 1
    plans.cost(merge_of("b"), Merge(quantized_base="dequantize"))
    assert len(read) == 2, "another choice for quantized bases"
    MergePlans().cost(merge_of("a"), Merge())
    assert len(read) == 3, "another command, in whose time files may have changed"
