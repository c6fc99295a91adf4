"""What `fleet --plan` prints: cells, shared tasks, and what all of it needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightsmith.core.values import JsonValue
from weightsmith.fleets.graph import FleetTask, Graph
from weightsmith.fleets.requests import CELL
from weightsmith.serving.memory import human


def plan_of(graph: Graph) -> dict[str, JsonValue]:
    """Return the plan of a fleet; sizes in bytes.

    `total` is over what is still to do: `cpus` and `gpus` if all cells ran at once, the memory of
    the largest task and of all at once, and the disk that all results take.
    """
    todo = [task for task in graph.tasks if not task.cached and not task.failure]
    cells = [task for task in todo if task.kind == CELL]
    return {
        "cells": [
            {
                "adapter": task.cells[0].adapter,
                "target": task.targets[0].name,
                **_facts(task),
                "stages": [
                    {"stage": row.stage, "cached": row.cached, "why": row.why} for row in task.rows
                ],
                "error": task.failure.message if task.failure else None,
            }
            for task in graph.cells
        ],
        "shared": [
            {"task": task.name, "kind": task.kind, "cells": len(task.cells), **_facts(task)}
            for task in graph.shared
        ],
        "total": {
            "cells": len(graph.cells),
            "cached": sum(task.cached for task in graph.cells),
            "refused": sum(task.failure is not None for task in graph.cells),
            "shared": len(graph.shared),
            "cpus": sum(task.needs.cpus for task in cells),
            "peak_memory_bytes": max((task.needs.memory_bytes for task in todo), default=0),
            "memory_bytes": sum(task.needs.memory_bytes for task in cells),
            "disk_bytes": sum(task.needs.disk_bytes for task in todo),
            "gpus": sum(task.needs.gpus for task in cells),
        },
    }


def _facts(task: FleetTask) -> dict[str, JsonValue]:
    needs = task.needs
    return {
        "key": task.id,
        "after": list(task.after),
        "cached": task.cached,
        "cpus": needs.cpus,
        "memory_bytes": needs.memory_bytes,
        "disk_bytes": needs.disk_bytes,
        "gpus": needs.gpus,
    }


def text_of(plan: Mapping[str, Any]) -> str:
    """Return the plan for people."""

    def state(row: Mapping[str, Any]) -> str:
        if row.get("error"):
            return f"refused: {row['error']}"
        if row["cached"]:
            return "cached"
        left = [stage["stage"] for stage in row.get("stages", ()) if not stage["cached"]]
        what = f"to do ({', '.join(left)})" if left else "to do"
        return f"{what}; {row['cpus']} CPUs, {human(row['memory_bytes'])}"

    lines = [
        f"shared  {row['task']} (for {row['cells']} cells): {state(row)}" for row in plan["shared"]
    ]
    lines += [f"cell    {row['adapter']} x {row['target']}: {state(row)}" for row in plan["cells"]]
    total = plan["total"]
    lines.append(
        f"{total['cells']} cells, {total['cached']} cached, {total['refused']} refused by the plan;"
        f" {total['shared']} shared tasks"
    )
    gpus = f", {total['gpus']} GPUs" if total["gpus"] else ""
    lines.append(
        f"at once: {total['cpus']} CPUs{gpus}, {human(total['memory_bytes'])} of memory "
        f"({human(total['peak_memory_bytes'])} for the largest task), "
        f"{human(total['disk_bytes'])} of disk"
    )
    return "\n".join(lines)
