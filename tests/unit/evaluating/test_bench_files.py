"""Results files of other tools: what is read of them, and what is refused."""

import hashlib
import json

import pytest
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.evaluating import bench_files
from weightsmith.evaluating.bench_files import read_results
from weightsmith.recipe.schema import Bench

from tests.fakes.bench_results import aiperf, guidellm, write


def figures(evidence):
    return {one.name: (one.value, one.verdict) for one in evidence.figures}


def test_guidellms_load_that_is_the_recipes_is_taken(tmp_path):
    path = write(tmp_path / "benchmarks.json", guidellm(streams=8))
    bench = Bench(concurrency=8, max_ttft_p95_ms=30, max_itl_p95_ms=5, min_tokens_per_s=100)
    found = read_results(path, "tiny").evidence(bench)

    assert (found.tool, found.version, found.model) == ("guidellm", "0.8.1", "tiny")
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (found.concurrency, found.requests, found.errors) == (8, 98, 2)
    assert (found.prompt_tokens, found.output_tokens, found.devices) == (128, 64, ())
    assert figures(found) == {
        "ttft_p95_ms": (40.0, "exceeded"),
        "itl_p95_ms": (5.0, "met"),
        "tokens_per_s": (300.0, "met"),
    }


def test_aiperfs_units_and_gpus_are_read(tmp_path):
    path = write(tmp_path / "profile_export_aiperf.json", aiperf())
    found = read_results(path, "tiny").evidence(Bench(concurrency=2, max_itl_p95_ms=5))

    assert (found.tool, found.version, found.model) == ("aiperf", "0.13.0", "tiny")
    assert found.devices == ("NVIDIA H100 80GB HBM3",)
    assert (found.concurrency, found.requests, found.errors) == (2, 100, 3)
    assert figures(found)["itl_p95_ms"] == (5.0, "met")
    assert figures(found)["ttft_p95_ms"] == (40.0, "")


def test_names_and_loads_of_other_versions_are_read(tmp_path):
    new, old = aiperf(), guidellm()
    del new["is_complete"]
    new["input_config"] = {
        "endpoint": {"model_names": ["tiny"]},
        "loadgen": {"concurrency": 2},
    }
    for run in old["benchmarks"]:
        # As 0.3.1 wrote it: of two at once, the mean of few requests is less.
        run["args"] = {"strategy": run.pop("config")["strategy"]}
        run["metrics"]["request_concurrency"]["successful"]["mean"] *= 0.85
        run["worker"] = {"backend_model": "tiny"}
        del run["metrics"]["request_totals"]
        run["run_stats"] = {"requests_made": {"successful": 7, "errored": 1}}
    bench = Bench(concurrency=2, max_ttft_p95_ms=50)
    found = [
        read_results(write(tmp_path / name, one), "tiny").evidence(bench)
        for name, one in (("aiperf.json", new), ("guidellm.json", old))
    ]

    assert [one.model for one in found] == ["tiny", "tiny"]
    assert [figures(one)["ttft_p95_ms"] for one in found] == [(40.0, "met")] * 2
    assert (found[1].requests, found[1].errors) == (7, 1)


def test_another_load_says_nothing_of_a_limit(tmp_path):
    path = write(tmp_path / "a.json", aiperf(streams=16))
    found = read_results(path).evidence(Bench(concurrency=4, max_ttft_p95_ms=1))

    assert figures(found)["ttft_p95_ms"] == (40.0, "another load")


def without(found, *keys):
    for key in keys:
        del found[key]
    return found


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({}, "no `benchmarks` and no `time_to_first_token`"),
        ([], "no `benchmarks`"),
        ({"benchmarks": []}, "looks like guidellm's, but has no 95th percentile"),
        ({"benchmarks": [1, {"metrics": 3}]}, "looks like guidellm's"),
        ({"time_to_first_token": {"p95": "fast", "unit": "ms"}}, "looks like aiperf's"),
        ({"time_to_first_token": {"p95": 3, "unit": "parsec"}}, "looks like aiperf's"),
        ({"time_to_first_token": {"p95": -3, "unit": "ms"}}, "looks like aiperf's"),
        ({"time_to_first_token": {"p95": 1e300, "unit": "ms"}}, "looks like aiperf's"),
        ({"time_to_first_token": {"p95": True, "unit": "ms"}}, "looks like aiperf's"),
        (without(aiperf(), "time_to_first_token"), "no `benchmarks`"),
        (aiperf() | {"was_cancelled": True}, "its run was cancelled"),
        (aiperf() | {"is_complete": False}, "its run was cancelled"),
        (guidellm(model="other"), "about the model 'other', and this image serves 'tiny'"),
        (aiperf(model="other"), "about the model 'other'"),
    ],
)
def test_a_file_of_another_shape_or_model_is_refused(tmp_path, value, says):
    path = write(tmp_path / "x.json", value)
    with pytest.raises(InputRefused) as caught:
        read_results(path, "tiny")

    assert says in caught.value.message
    assert str(path) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    "text", [b"", b"{half", b"\xff\xfe", b"[" * 5000, b'{"benchmarks": [NaN]}']
)
def test_what_is_no_json_is_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_bytes(text)
    with pytest.raises(InputRefused):
        read_results(path)


def test_a_file_that_is_too_large_or_missing_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="cannot be read"):
        read_results(tmp_path / "none.json")
    with pytest.raises(UsageError, match="cannot be read"):
        read_results(tmp_path)
    path = write(tmp_path / "x.json", guidellm())
    monkeypatch.setattr(bench_files, "_LARGEST", path.stat().st_size - 1)
    with pytest.raises(InputRefused, match="more than"):
        read_results(path)


def test_a_truncated_file_is_refused_at_every_length(tmp_path):
    """As after a full disk: it is never taken for less than was measured."""
    whole = json.dumps(aiperf()).encode()
    path = tmp_path / "x.json"
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(InputRefused):
            read_results(path)
