"""Fleets in memory: which tasks there are, what each does once, what a refusal ends."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import yaml
from weightsmith.core.errors import CheckFailed, UsageError
from weightsmith.fleets.foresight import plan_of, text_of
from weightsmith.fleets.ordering import foreseen, ordered
from weightsmith.oci.registry import Registry

from tests.fakes.fleet_runs import GOOD, Q4, Q5, facts, run, write_fleet
from tests.fakes.memory import Memory, in_memory
from tests.fakes.records import as_of_old


@pytest.mark.slow
def test_every_cell_has_the_digest_of_its_build_alone(
    two: Memory, tmp_path: Path, client: Registry
) -> None:
    rows, _ = run(two, write_fleet(two))

    assert facts(rows) == [("a", Q4, GOOD), ("a", Q5, GOOD),
                           ("b", Q4, GOOD), ("b", Q5, GOOD)]  # fmt: skip
    assert len({row.digest for row in rows.cells}) == 4
    with in_memory(tmp_path / "alone", client, adapters=("a", "b")) as alone:
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
    rows, engine = run(two, write_fleet(two))

    assert [row.kind for row in rows.shared] == ["base", "merge", "merge"]
    assert engine.done[-4:] == [f"a x {Q4}", f"a x {Q5}", f"b x {Q4}", f"b x {Q5}"]
    jobs = two.jobs()
    assert (jobs.count("merge"), jobs.count("validate")) == (2, 2)
    assert jobs.count("reference merged") == 2
    assert rows.stages["merge"] == {"run": 2, "cached": 4}


def test_answers_of_the_base_to_questions_of_all_are_given_once(two: Memory) -> None:
    rows, engine = run(two, write_fleet(two, adapters=["./[ab]"], targets=[Q4]))

    assert two.jobs().count("reference base") == 1
    assert rows.stages["base answers"] == {"run": 1, "cached": 0}
    assert not rows.shared[0].cached
    assert [(row.kind, row.cells) for row in rows.shared] == [("base", 2)]
    assert engine.done[0].startswith("base ")


@pytest.mark.slow
def test_a_second_run_does_nothing(two: Memory) -> None:
    path = write_fleet(two)
    first, _ = run(two, path)
    again, engine = run(two, path)

    assert engine.done == []
    assert two.jobs() == []
    assert all(row.cached for row in again.cells)
    assert [row.digest for row in again.cells] == [row.digest for row in first.cells]
    assert again.share_cached == 1.0


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


@pytest.mark.slow
def test_the_plan_says_what_there_is_to_do(two: Memory) -> None:
    path = write_fleet(two)
    fleet = ordered(path)
    before = plan_of(foreseen(fleet, two.dist, two.tools))
    run(two, path)
    after = plan_of(foreseen(fleet, two.dist, two.tools))

    assert before["total"]["cached"] == 0
    assert before["total"]["cpus"] == 4
    assert before["total"]["disk_bytes"] > 0
    assert [row["cells"] for row in before["shared"]] == [4, 2, 2]
    assert (after["total"]["cached"], after["total"]["disk_bytes"]) == (4, 0)
    assert "4 cells, 4 cached" in text_of(after)


def test_a_choice_without_a_cell_is_refused(two: Memory) -> None:
    path = write_fleet(two, adapters=["./a", {"source": "./b", "targets": [Q5]}], targets=[Q4])

    with pytest.raises(UsageError, match="no cell has one of the adapters b"):
        ordered(path, adapters=["b"], targets=[Q4])
