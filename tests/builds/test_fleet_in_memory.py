"""Fleets in memory: which tasks there are, what each does once, what a refusal or fault ends."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import yaml
from weightsmith.core.errors import CheckFailed, EnvironmentFailure, InputRefused, UsageError
from weightsmith.fleets.graph import plan_of, text_of
from weightsmith.fleets.ordering import foreseen, ordered
from weightsmith.quantizers import of_format

from tests.fakes.fleet import GOOD, Q4, Q5, MemoryFleet, by_tools, facts, run, write_fleet
from tests.fakes.memory import Memory, in_memory
from tests.fakes.records import as_of_old


@pytest.mark.slow
def test_every_cell_has_the_digest_of_its_build_alone(two: Memory, tmp_path: Path) -> None:
    rows, _ = run(two, write_fleet(two))

    assert facts(rows) == [("a", Q4, GOOD), ("a", Q5, GOOD),
                           ("b", Q4, GOOD), ("b", Q5, GOOD)]  # fmt: skip
    assert len({row.digest for row in rows.cells}) == 4
    with in_memory(tmp_path / "alone", adapters=("a", "b")) as alone:
        for name in ("a", "b"):
            alone.write_recipe(
                name=f"tiny-{name}",
                adapters=[{"source": f"./{name}"}],
                evaluate={"data": f"{name}.jsonl", "max_drop": 0.05},
                image={"repository": f"{two.repository}-{name}"},
            )
            built = alone.build(targets=[Q4, Q5])
            assert {t: one.published.digest for t, one in built.items()} == {
                row.target: row.digest for row in rows.cells if row.adapter == name
            }


@pytest.mark.slow
def test_what_several_builds_need_is_done_once(two: Memory) -> None:
    path = write_fleet(two)
    before = plan_of(foreseen(ordered(path), two.dist, two.tools))
    assert before["total"]["cached"] == 0
    assert before["total"]["cpus"] == 4
    assert before["total"]["disk_bytes"] > 0
    assert [row["cells"] for row in before["shared"]] == [4, 2, 2]
    rows, engine = run(two, path)

    assert [row.kind for row in rows.shared] == ["base", "merge", "merge"]
    assert engine.done[-4:] == [f"a x {Q4}", f"a x {Q5}", f"b x {Q4}", f"b x {Q5}"]
    jobs = two.jobs()
    assert (jobs.count("merge"), jobs.count("validate")) == (2, 2)
    assert jobs.count("reference merged") == 2
    assert rows.stages["merge"] == {"run": 2, "cached": 4}

    after = plan_of(foreseen(ordered(path), two.dist, two.tools))
    assert (after["total"]["cached"], after["total"]["disk_bytes"]) == (4, 0)
    assert "4 cells, 4 cached" in text_of(after)
    again, engine = run(two, path)
    assert engine.done == []
    assert two.jobs() == []
    assert all(row.cached for row in again.cells)
    assert [row.digest for row in again.cells] == [row.digest for row in rows.cells]
    assert again.share_cached == 1.0


def test_answers_of_the_base_to_questions_of_all_are_given_once(two: Memory) -> None:
    rows, engine = run(two, write_fleet(two, adapters=["./[ab]"], targets=[Q4]))

    assert two.jobs().count("reference base") == 1
    assert rows.stages["base answers"] == {"run": 1, "cached": 0}
    assert not rows.shared[0].cached
    assert [(row.kind, row.cells) for row in rows.shared] == [("base", 2)]
    assert engine.done[0].startswith("base ")


def test_an_unchanged_cell_asks_for_its_tags_and_its_list_and_writes_nothing(
    two: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_fleet(two, targets=[Q4])
    for _ in range(2):  # the second still writes that all of it was cached
        first, _ = run(two, path, outputs={"push": True})
    for record in two.dist.rglob("build.json"):
        as_of_old(record)
    synced: list[Path] = []
    sync = os.fsync

    def seen(handle: int) -> None:
        synced.append(Path(f"/proc/self/fd/{handle}").readlink())
        sync(handle)

    monkeypatch.setattr(os, "fsync", seen)
    two.registry.log.clear()
    rows, _ = run(two, path, outputs={"push": True})

    assert [row.digest for row in rows.cells] == [row.digest for row in first.cells]
    assert {place if place.is_dir() else place.parent for place in synced} == {two.dist}
    assert set(two.registry.counts()) == {"HEAD", "GET"}
    assert len(two.registry.log) <= 2 * 8  # it states no digests, so a tag is read beside its HEAD
    asked = {re.sub("[0-9a-f]{64}", "…", url) for _, url in two.registry.log}
    for row in rows.cells:
        assert row.digest is not None
        place = f"/v2/team/tiny-{row.adapter}"
        assert {url for url in asked if url.startswith(place)} == {
            f"{place}/manifests/1.0.0-{Q4}",
            f"{place}/manifests/1.0.0-{Q4}-{row.digest[7:19]}",
            f"{place}/manifests/sha256-…",
            f"{place}/referrers/sha256:…",
        }


def test_the_record_of_an_unchanged_cell_keeps_its_warnings(two: Memory) -> None:
    two.bench.quantized["warnings"] = ["a warning of the quantizer"]
    path = write_fleet(two, adapters=["./a"], targets=[Q4])
    for _ in range(2):
        run(two, path)
        (record,) = two.dist.rglob("build.json")
        assert "a warning of the quantizer" in json.loads(record.read_text())["warnings"]


def test_a_cell_whose_image_is_gone_is_pushed_again(two: Memory) -> None:
    path = write_fleet(two, targets=[Q4])
    first, _ = run(two, path, outputs={"push": True})
    gone = {name: held for name, held in two.registry.manifests.items() if name[0].endswith("-b")}
    for name in gone:
        del two.registry.manifests[name]
    blobs = [name for name in two.registry.blobs if name[0].endswith("-b")]
    for name in blobs:
        del two.registry.blobs[name]
    again, engine = run(two, path, outputs={"push": True})

    assert engine.done == []
    assert [row.digest for row in again.cells] == [row.digest for row in first.cells]
    assert all(name in two.registry.blobs for name in blobs)
    assert {k: v for k, v in two.registry.manifests.items() if k[0].endswith("-b")} == gone


def test_a_refusal_ends_its_cell_and_no_other(two: Memory) -> None:
    (two.home / "b" / "adapter_config.json").write_text("{}")

    rows, engine = run(two, write_fleet(two))

    assert facts(rows)[:2] == [("a", Q4, GOOD), ("a", Q5, GOOD)]
    assert [(row.verdict, row.exit_code, row.tries) for row in rows.cells[2:]] == [
        ("refused", 3, 0), ("refused", 3, 0)
    ]  # fmt: skip
    assert all(row.error for row in rows.cells[2:])
    error = rows.error()
    assert isinstance(error, CheckFailed)
    assert error.details["cells"][0]["verdict"] == GOOD
    assert not any(" b " in name for name in engine.done)


def test_a_gate_that_says_no_ends_its_cell_and_leaves_its_report(two: Memory) -> None:
    path = write_fleet(two, targets=[Q4])
    (two.home / "b.jsonl").write_text(json.dumps({"prompt": "What?", "expected": "That."}) + "\n")
    fleet = yaml.safe_load(path.read_text())
    fleet["adapters"][1]["evaluate"]["min_score"] = 0.5
    path.write_text(yaml.safe_dump(fleet))

    rows, _ = run(two, path)

    good, bad = rows.cells
    assert (good.verdict, bad.verdict, bad.exit_code, bad.tries) == (GOOD, "refused", 4, 1)
    assert Path(bad.report).is_file()
    assert bad.digest is None
    page = (two.dist / "fleet.html").read_text()
    assert page.index(">b</a>") < page.index(">a</a>")  # what needs attention comes first
    assert f'href="{Path(bad.report).relative_to(two.dist)}"' in page
    assert json.loads((two.dist / "fleet.json").read_text())["cells"][1]["verdict"] == "refused"


def test_some_cells_by_name(two: Memory) -> None:
    rows, _ = run(two, write_fleet(two), adapters=["b"], targets=[Q5])

    assert facts(rows) == [("b", Q5, GOOD)]
    with pytest.raises(UsageError, match="--adapter c"):
        ordered(write_fleet(two), adapters=["c"])
    path = write_fleet(two, adapters=["./a", {"source": "./b", "targets": [Q5]}], targets=[Q4])
    with pytest.raises(UsageError, match="no cell has one of the adapters b"):
        ordered(path, adapters=["b"], targets=[Q4])


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
