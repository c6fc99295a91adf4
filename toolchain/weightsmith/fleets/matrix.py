"""`fleet --print`: the cells as a matrix, for those who schedule elsewhere."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence

import yaml

from weightsmith.core.errors import UsageError
from weightsmith.core.values import JsonValue, Writable
from weightsmith.fleets.cells import AdapterBuild

_LIMITS: Mapping[str, int] = {"github": 256, "gitlab": 200, "argo": 0}
"""Most jobs of one matrix; 0 for no limit.

https://docs.github.com/en/actions/reference/limits, https://docs.gitlab.com/ci/yaml/#parallelmatrix
"""
_LONGEST_NAME = 255
"""Characters of a job's name in GitLab, which has all variables of a matrix's job in it.

https://gitlab.com/gitlab-org/gitlab/-/issues/584573: no pipeline appears if one is longer.
"""


def matrix_of(
    builds: Sequence[AdapterBuild], system: str, file: str
) -> tuple[Mapping[str, Writable], str]:
    """Return a system's matrix as JSON, and as text to put where the system reads it.

    More cells than the system takes jobs are split: each job then builds several adapters with all
    of their targets. Raises UsageError for an unknown system.
    """
    if system not in _LIMITS:
        raise UsageError(f"--print {system}: unknown", hint=f"one of {', '.join(_LIMITS)}")
    limit, note = _LIMITS[system], ""
    names = [build.adapter for build in builds]
    cells = sum(len(build.targets) for build in builds)
    rows = [_row([build.adapter], [one.name]) for build in builds for one in build.targets]
    if limit and cells > limit:
        each = -(-len(names) // limit)
        rows = [_row(names[start : start + each], []) for start in range(0, len(names), each)]
        note = (
            f"# {cells} cells are more than the {limit} jobs of one matrix: each of {len(rows)} "
            "jobs builds several adapters with all of their targets\n"
        )
    facts: dict[str, Writable] = {
        "system": system,
        "jobs": len(rows),
        "cells": cells,
        "limit": limit or None,
        "split": len(rows) != cells,
        "matrix": {"include": rows},
    }
    return facts, _TEXTS[system](rows, shlex.quote(file), note)


def _row(adapters: Sequence[str], targets: Sequence[str]) -> dict[str, str]:
    """Return one job: a cell, or several adapters where there are too many cells."""
    more = f" and {len(adapters) - 1} more" if len(adapters) > 1 else ""
    words = [f"--adapter {name}" for name in adapters]
    return {
        "name": f"{adapters[0]}{more} {' '.join(targets)}".strip(),
        "adapter": ",".join(adapters),
        "target": ",".join(targets),
        "arguments": " ".join((*words, *(f"--target {name}" for name in targets))),
    }


def _github(rows: Sequence[Mapping[str, str]], _file: str, _note: str) -> str:
    """Return one line for `echo "matrix=$(…)" >> "$GITHUB_OUTPUT"` and `fromJSON`."""
    return json.dumps({"include": rows}, separators=(",", ":"))


def _gitlab(rows: Sequence[Mapping[str, str]], file: str, note: str) -> str:
    """Return a child pipeline, for `trigger: include: artifact`.

    It has one job with a matrix, or a job for each row if their names would be too long.
    """
    job: dict[str, JsonValue] = {
        "stage": "test",
        "script": [f"weightsmith fleet --file {file} $ARGUMENTS --push --json"],
    }
    cells = [{"CELL": row["name"], "ARGUMENTS": row["arguments"]} for row in rows]
    jobs: dict[str, JsonValue] = {"build": {**job, "parallel": {"matrix": cells}}}
    if any(len(f"build: [{', '.join(cell.values())}]") > _LONGEST_NAME for cell in cells):
        each: dict[str, JsonValue] = {
            f"build {number}/{len(cells)}": {"extends": ".build", "variables": cell}
            for number, cell in enumerate(cells, 1)
        }
        jobs = {".build": job, **each}
    return note + yaml.safe_dump(jobs, sort_keys=False, width=1000)


def _argo(rows: Sequence[Mapping[str, str]], file: str, note: str) -> str:
    """Return a Workflow that runs a template `build`, which the user fills in, for each item."""
    command = f"weightsmith fleet --file {file} {{{{inputs.parameters.arguments}}}} --push --json"
    parameters = [{"name": "arguments", "value": "{{item.arguments}}"}]
    workflow = {
        "apiVersion": "argoproj.io/v1alpha1",
        "kind": "Workflow",
        "metadata": {"generateName": "weightsmith-fleet-"},
        "spec": {
            "entrypoint": "fleet",
            "templates": [
                {
                    "name": "fleet",
                    "steps": [
                        [
                            {
                                "name": "build",
                                "template": "build",
                                "arguments": {"parameters": parameters},
                                "continueOn": {"failed": True},
                                "withItems": [dict(row) for row in rows],
                            }
                        ]
                    ],
                },
                {
                    "name": "build",
                    "inputs": {"parameters": [{"name": "arguments"}]},
                    "container": {
                        "image": "IMAGE-WITH-WEIGHTSMITH",
                        "command": ["sh", "-c"],
                        "args": [command],
                    },
                },
            ],
        },
    }
    return note + yaml.safe_dump(workflow, sort_keys=False, width=1000)


_TEXTS = {"github": _github, "gitlab": _gitlab, "argo": _argo}
