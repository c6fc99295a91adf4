"""Several builds at once on one store."""

import json

import pytest

from tests.faults.workshop import Workshop

pytestmark = pytest.mark.builders


@pytest.mark.full  # the next test has three at once
def test_the_same_recipe_twice_at_once(empty: Workshop, digest: str) -> None:
    """The work is done once; who comes second waits for it."""
    both = [empty.start_build("--dist", str(empty.folder / f"dist-{n}")) for n in (1, 2)]
    done = [running.end() for running in both]

    assert [outcome.digest for outcome in done] == [digest, digest]
    for stage in ("merge", "quantize"):
        assert sorted(o.stages[stage]["cached"] for o in done) == [False, True], stage
    results = [
        json.loads(path.read_bytes())["note"]["stage"]
        for path in empty.store.glob("results/*/manifest.json")
    ]
    logs = [path.name.rpartition("-")[2] for path in empty.cache.glob("logs/*.log")]
    assert logs.count("merge.log") == logs.count("quantize.log") == results.count("merge") == 1
    empty.check_intact(digest)


def test_the_same_recipe_and_results_folder_at_once(workshop: Workshop, digest: str) -> None:
    both = [workshop.start_build() for _ in (1, 2, 3)]

    assert [running.end().digest for running in both] == [digest] * 3
    workshop.check_whole()
    workshop.check_intact(digest)
