"""Fleets in memory whose nodes, disk, builders or questions have a fault: what it ends."""

from __future__ import annotations

import json

import pytest
from weightsmith.core.errors import EnvironmentFailure, InputRefused
from weightsmith.quantizers import of_format

from tests.fakes.fleet import MemoryFleet, by_tools
from tests.fakes.fleet_runs import GOOD, Q4, Q5, run, write_fleet
from tests.fakes.memory import Memory


def test_a_lost_node_is_replaced_by_another(two: Memory) -> None:
    engine = MemoryFleet(by_tools(two.tools), remote=True, lost=[f"a x {Q4}"])

    rows, _ = run(two, write_fleet(two, adapters=["./a"], targets=[Q4]), engine)

    assert engine.placed == [(f"a x {Q4}", "one"), (f"a x {Q4}", "two")]
    assert (rows.cells[0].verdict, rows.cells[0].tries) == (GOOD, 2)
    assert rows.error() is None


def test_a_task_that_no_node_can_do_is_given_up(two: Memory) -> None:
    engine = MemoryFleet(by_tools(two.tools), remote=True, nodes=("one",))
    engine.lost = [f"a x {Q4}"] * 9

    rows, _ = run(two, write_fleet(two, adapters=["./a"], targets=[Q4]), engine)

    assert len(engine.placed) == 3
    assert rows.cells[0].verdict == "not made"
    assert isinstance(rows.error(), EnvironmentFailure)


def test_a_shared_task_that_fails_ends_those_that_wait_for_it(two: Memory) -> None:
    engine = MemoryFleet(by_tools(two.tools), remote=True, nodes=("one",), lost=["merge a"] * 3)

    rows, _ = run(two, write_fleet(two), engine)

    assert [row.verdict for row in rows.cells] == ["not made", "not made", GOOD, GOOD]
    assert rows.shared[1].error


@pytest.mark.slow
def test_an_interrupt_ends_all_and_the_next_run_does_what_is_missing(two: Memory) -> None:
    path = write_fleet(two)
    engine = MemoryFleet(by_tools(two.tools), faults={f"b x {Q4}": KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        run(two, path, engine)
    assert engine.closed

    rows, again = run(two, path)

    assert again.done == [f"b x {Q4}", f"b x {Q5}"]
    assert [row.cached for row in rows.cells] == [True, True, False, False]


def test_another_version_ends_the_fleet(two: Memory) -> None:
    here = by_tools(two.tools)
    engine = MemoryFleet(lambda text: here(json.dumps({**json.loads(text), "version": "0.0.9"})))

    with pytest.raises(EnvironmentFailure, match="another version of weightsmith"):
        run(two, write_fleet(two), engine)
    assert engine.closed


def test_a_disk_that_takes_nothing_ends_its_cell_and_is_no_bug(two: Memory) -> None:
    (two.dist / "tiny-b").parent.mkdir(parents=True, exist_ok=True)
    (two.dist / "tiny-b").write_text("a file, where the results would be")

    rows, _ = run(two, write_fleet(two, targets=[Q4]))

    assert [(row.verdict, row.exit_code) for row in rows.cells] == [(GOOD, 0), ("not made", 5)]


def test_an_engine_that_fails_leaves_the_rows_to_the_error(two: Memory) -> None:
    engine = MemoryFleet(by_tools(two.tools), nodes=())

    with pytest.raises(EnvironmentFailure, match="no node") as caught:
        run(two, write_fleet(two), engine)

    assert [row["adapter"] for row in caught.value.details["cells"]] == ["a", "a", "b", "b"]
    assert engine.closed
    assert "Stopped" in (two.dist / "fleet.html").read_text()


def test_a_builder_that_only_some_targets_need_does_not_end_the_base(two: Memory) -> None:
    two.runner.lacking.add(of_format("q4_k_m").builder)

    rows, _ = run(two, write_fleet(two, adapters=["./[ab]"], targets=[Q4]))

    assert rows.shared[0].kind == "base"
    assert rows.shared[0].error is None
    assert any("the cells that need it will say so" in text for text in two.progress.warnings)
    assert {row.verdict for row in rows.cells} == {"not made"}


def test_questions_that_are_refused_do_not_end_the_base(two: Memory) -> None:
    two.journal.faults["job reference"] = InputRefused("no such question", hint="correct it")

    rows, _ = run(two, write_fleet(two, adapters=["./[ab]"], targets=[Q4]))

    assert [row.verdict for row in rows.cells] == [GOOD, GOOD]
    assert rows.shared[0].error is None
