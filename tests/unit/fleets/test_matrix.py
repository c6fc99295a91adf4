"""`fleet --print`: every cell is in one job, and no system gets more jobs than it takes."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from invoke.parser import Parser
from invoke.program import Program
from weightsmith.cli import namespace
from weightsmith.core.errors import UsageError
from weightsmith.fleets.cells import AdapterBuild
from weightsmith.fleets.matrix import matrix_of


def builds(count: int, *targets: str) -> list[AdapterBuild]:
    made = [
        SimpleNamespace(adapter=f"n{n}", targets=[SimpleNamespace(name=t) for t in targets])
        for n in range(count)
    ]
    return cast("list[AdapterBuild]", made)


def cells(rows: list[Any], targets: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return the cells that the jobs choose with their flags."""
    found = []
    for row in rows:
        words = row["arguments"].split()
        pairs = list(zip(words[::2], words[1::2], strict=True))
        names = [value for flag, value in pairs if flag == "--adapter"]
        chosen = [value for flag, value in pairs if flag == "--target"] or targets
        assert len(names) * 2 + len([p for p in pairs if p[0] == "--target"]) * 2 == len(words)
        found += [(name, target) for name in names for target in chosen]
    return found


def test_the_command_has_these_flags() -> None:
    parser = Parser(initial=Program().initial_context, contexts=namespace.to_contexts())
    (row,) = matrix_of(builds(1, "vllm"), "argo", "f.yaml")[0]["matrix"]["include"]
    fleet = parser.parse_argv(["fleet", *row["arguments"].split()])[1]

    assert (fleet.args.adapter.value, fleet.args.target.value) == (["n0"], ["vllm"])


@pytest.mark.parametrize(("system", "limit"), [("github", 256), ("gitlab", 200), ("argo", 10**6)])
@pytest.mark.parametrize("count", [1, 64, 100, 128, 300])
def test_every_cell_is_in_one_job(system: str, limit: int, count: int) -> None:
    targets = ("vllm-awq", "llamacpp-q4_k_m")
    facts, _ = matrix_of(builds(count, *targets), system, "fleet.yaml")

    rows = facts["matrix"]["include"]
    assert len(rows) == facts["jobs"] <= limit
    assert sorted(cells(rows, targets)) == sorted(
        (f"n{n}", target) for n in range(count) for target in targets
    )
    assert facts["split"] == (2 * count > limit)


def test_what_each_system_reads() -> None:
    few = builds(2, "vllm")
    facts, line = matrix_of(few, "github", "f.yaml")
    assert json.loads(line) == facts["matrix"]
    gitlab = yaml.safe_load(matrix_of(few, "gitlab", "f.yaml")[1])
    assert [row["ARGUMENTS"] for row in gitlab["build"]["parallel"]["matrix"]] == [
        "--adapter n0 --target vllm", "--adapter n1 --target vllm"
    ]  # fmt: skip
    argo = yaml.safe_load(matrix_of(few, "argo", "f.yaml")[1])
    steps = argo["spec"]["templates"][0]["steps"][0][0]
    assert steps["withItems"][1]["arguments"] == "--adapter n1 --target vllm"
    assert matrix_of(builds(300, "vllm"), "gitlab", "f.yaml")[1].startswith("# 300 cells are more")


def test_no_job_of_gitlab_has_too_long_a_name() -> None:
    """A matrix's job is called by all of its variables, and of 256 characters there is none."""
    many = builds(5000, "vllm", "vllm-awq")
    facts, text = matrix_of(many, "gitlab", "f.yaml")
    jobs = yaml.safe_load(text)

    script = jobs.pop(".build")["script"]
    assert "$ARGUMENTS" in script[0]
    assert all(len(name) < 256 and job["extends"] == ".build" for name, job in jobs.items())
    found = [job["variables"]["ARGUMENTS"] for job in jobs.values()]
    assert found == [row["arguments"] for row in facts["matrix"]["include"]]


@pytest.mark.parametrize("system", ["gitlab", "argo"])
def test_the_files_name_is_one_word_of_the_shell(system: str) -> None:
    with pytest.raises(UsageError, match="--print jenkins"):
        matrix_of(builds(1, "vllm"), "jenkins", "f.yaml")
    text = matrix_of(builds(1, "vllm"), system, "my fleets/$(id).yaml")[1]
    assert "--file 'my fleets/$(id).yaml' " in " ".join(text.replace("''", "'").split())
