"""Fleets in memory: which tasks there are, what each does once, what a refusal or a loss ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from weightsmith.drivers.folders import FolderReader
from weightsmith.errors import CheckFailed, EnvironmentFailure, InputRefused, UsageError
from weightsmith.fleets import running
from weightsmith.fleets.foresight import plan_of, text_of
from weightsmith.fleets.ordering import foreseen, ordered, run_fleet
from weightsmith.fleets.parcels import packed
from weightsmith.fleets.requests import Request
from weightsmith.fleets.rows import FleetRows
from weightsmith.oci.registry import Registry
from weightsmith.quantizers import of_format
from weightsmith.sharing.cache import SharedCache
from weightsmith.sharing.store import SharedStore
from weightsmith.tools import Tools

from tests.fakes.cache import MemoryCache
from tests.fakes.fleet import MemoryFleet, by_tools
from tests.fakes.memory import Memory, in_memory
from tests.fakes.store import MemoryStore

Q4, Q5 = "llamacpp-q4_k_m", "llamacpp-q5_k_m"
GOOD = "not proven"
"""The verdict of all that goes well: eight questions prove little."""


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is tried again without a pause."""
    monkeypatch.setattr(running, "_PAUSES", (0.0, 0.0))


@pytest.fixture
def two(tmp_path: Path, client: Registry, quick: None) -> Any:
    """A user's folder with two adapters, each with its own questions."""
    with in_memory(tmp_path, client, adapters=("a", "b")) as made:
        made.write_recipe(adapters=None)
        yield made


def write_fleet(memory: Memory, **changes: Any) -> Path:
    """Write fleet.yaml: both adapters, each with its own questions, for two targets."""
    fleet = {
        "recipe": "recipe.yaml",
        "adapters": ["./a", {"source": "./b", "evaluate": {"data": "b.jsonl"}}],
        "targets": [Q4, Q5],
        **changes,
    }
    path = memory.home / "fleet.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in fleet.items() if value}))
    return path


def run(
    memory: Memory, path: Path, engine: MemoryFleet | None = None, **choices: Any
) -> tuple[FleetRows, MemoryFleet]:
    """Run a fleet with the tools of a test; its journal then tells of this run alone."""
    memory.journal.events.clear()
    memory.runner.jobs.clear()
    engine = engine or MemoryFleet(by_tools(memory.tools))
    outputs, tools = choices.pop("outputs", {}), choices.pop("tools", memory.tools)
    fleet = ordered(path, **choices)
    graph = foreseen(fleet, memory.dist, tools)
    rows = run_fleet(
        fleet, graph, engine, tools,
        dist=memory.dist, outputs=outputs, options={}, cpus=0, changed=lambda _: None,
    )  # fmt: skip
    return rows, engine


def facts(rows: FleetRows) -> list[tuple[str, str, str]]:
    return [(row.adapter, row.target, row.verdict) for row in rows.cells]


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


@pytest.mark.slow
def test_nodes_that_share_only_the_cache_send_images_and_reports(two: Memory) -> None:
    here = by_tools(two.tools)

    def elsewhere(text: str) -> str:
        request = json.loads(text)
        assert str(two.home) not in json.dumps(request["recipe"])
        return here(json.dumps({**request, "dist": "/nowhere", "token": "none"}))

    engine = MemoryFleet(elsewhere, remote=True)
    path = write_fleet(two, targets=[Q4])
    rows, _ = run(two, path, engine, outputs={"push": True})

    assert [row.verdict for row in rows.cells] == [GOOD, GOOD]
    for row in rows.cells:
        assert Path(row.report).is_file()
        assert Path(row.report).is_relative_to(two.dist)
        assert (f"team/tiny-{row.adapter}", f"1.0.0-{Q4}") in two.registry.manifests
    assert rows.bytes_moved > 0


def test_an_image_for_a_folder_that_a_node_does_not_see_is_refused(two: Memory) -> None:
    here = by_tools(two.tools)
    engine = MemoryFleet(lambda text: here(json.dumps({**json.loads(text), "token": "none"})))

    rows, _ = run(two, write_fleet(two, adapters=["./a"], targets=[Q4]), engine)

    assert rows.cells[0].verdict == "not made"
    assert "--push" in (rows.cells[0].hint or "")


def test_another_version_ends_the_fleet(two: Memory) -> None:
    here = by_tools(two.tools)
    engine = MemoryFleet(lambda text: here(json.dumps({**json.loads(text), "version": "0.0.9"})))

    with pytest.raises(EnvironmentFailure, match="another version of weightsmith"):
        run(two, write_fleet(two), engine)
    assert engine.closed


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


def test_what_cannot_go_to_a_node_ends_its_cell_and_no_other(
    two: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_a(request: Request, tools: Tools, *, again: bool) -> Request:
        if request.adapter == "b":
            raise UsageError("b.jsonl is too large", hint="use fewer questions")
        return packed(request, tools, again=again)

    monkeypatch.setattr(running, "packed", only_a)
    engine = MemoryFleet(by_tools(two.tools), remote=True)

    rows, _ = run(two, write_fleet(two, targets=[Q4]), engine)

    assert [(row.verdict, row.exit_code) for row in rows.cells] == [(GOOD, 0), ("refused", 2)]
    assert rows.cells[1].error == "b.jsonl is too large"


def test_a_cache_that_takes_nothing_for_a_while_ends_no_cell(
    two: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults: list[Exception] = [EnvironmentFailure("the cache is away"), OSError(5, "gone")]

    def share(*_: object, **__: object) -> None:
        if faults:
            raise faults.pop()

    tools = replace(two.tools, share=share)
    engine = MemoryFleet(by_tools(two.tools), remote=True)

    path = write_fleet(two, adapters=["./a"], targets=[Q4])
    rows, _ = run(two, path, engine, tools=tools)

    assert [(row.verdict, row.tries) for row in rows.cells] == [(GOOD, 3)]
    faults += [EnvironmentFailure("the cache is away")] * 3
    path = write_fleet(two, adapters=["./b"], targets=[Q4])
    rows, _ = run(two, path, engine, tools=tools)
    assert [(row.verdict, row.exit_code) for row in rows.cells] == [("not made", 5)]


def lose_entries(cache: MemoryCache) -> None:
    cache.remove([*cache.documents])


def lose_blobs(cache: MemoryCache) -> None:
    cache.blobs.clear()


@pytest.mark.parametrize("here", [True, False], ids=["a copy here", "no copy here"])
@pytest.mark.parametrize("lose", [lose_entries, lose_blobs])
def test_what_the_cache_has_lost_meanwhile_is_sent_again(
    two: Memory, lose: Callable[[MemoryCache], None], here: bool
) -> None:
    path = write_fleet(two, adapters=["./a"], targets=[Q4])
    cache = two.cache = MemoryCache()
    if not here:  # an earlier fleet sent it, and this machine's store was cleaned since
        with two.sharing():
            run_elsewhere(two, path, cache)
        lose_results(cache, two.store)
        two.store.entries.clear()

    with two.sharing():
        rows = run_elsewhere(two, path, cache, [lose])

    assert (rows.cells[0].verdict, rows.cells[0].tries) == (GOOD, 2), rows.cells[0].error


def lose_results(cache: MemoryCache, store: MemoryStore) -> None:
    """Leave in a cache only what a fleet sent to its nodes."""
    sent = {key for key, note in store.notes.items() if note["stage"] == "source"}
    cache.remove(cache.documents.keys() - sent)


def run_elsewhere(
    memory: Memory,
    path: Path,
    cache: MemoryCache,
    losses: Sequence[Callable[[MemoryCache], None]] = (),
) -> FleetRows:
    """Run a fleet whose nodes share only the cache, which has a loss before each of their tasks."""
    assert memory.shared is not None
    left = [*losses]

    def do(text: str) -> str:
        if left:
            left.pop(0)(cache)
        with TemporaryDirectory() as folder:
            remote = SharedCache(cache, None, memory.progress.warn, 60)
            store = SharedStore(MemoryStore(Path(folder) / "store"), [remote], lambda: Path(folder))
            readers = {"": FolderReader(store)}
            return by_tools(replace(memory.tools, store=store, readers=readers))(text)

    tools = replace(memory.tools, share=memory.shared.share)
    engine = MemoryFleet(do, remote=True)
    return run(memory, path, engine, tools=tools, outputs={"push": True})[0]


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


def test_a_choice_without_a_cell_is_refused(two: Memory) -> None:
    path = write_fleet(two, adapters=["./a", {"source": "./b", "targets": [Q5]}], targets=[Q4])

    with pytest.raises(UsageError, match="no cell has one of the adapters b"):
        ordered(path, adapters=["b"], targets=[Q4])
