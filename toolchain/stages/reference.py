"""Sources -> answers of base and of base+adapter: what the image is held against."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from toolchain.evaluating.items import Item
from toolchain.ports import Entry, Tools
from toolchain.resources import builder_pins
from toolchain.values import AdapterSnapshot, Digest, Job, Json, Sources, StageInputs, key_of

BUILDER = "merge"
RECIPE_NUMBER = 1
_ANSWERS = "answers.json"


def inputs(
    sources: Sources, adapters: Sequence[AdapterSnapshot], items: Sequence[Item], max_tokens: int
) -> StageInputs:
    """Return all that the reference answers depend on."""
    return StageInputs(
        stage="reference",
        recipe_number=RECIPE_NUMBER,
        inputs={
            "base": sources.base.digest,
            "adapters": [a.snapshot.digest for a in adapters],
            "weights": [a.weight for a in adapters],
            "questions": questions_digest(items),
            "max_tokens": max_tokens,
            "builder": builder_pins(BUILDER),
        },
    )


def questions_digest(items: Sequence[Item]) -> Digest:
    """Return the digest of what is asked; the expected answers may change without asking again."""
    return key_of([[dict(m) for m in item.messages] for item in items])


def answers(
    sources: Sources,
    adapters: Sequence[AdapterSnapshot],
    items: Sequence[Item],
    max_tokens: int,
    tools: Tools,
) -> tuple[str, ...]:
    """Return the greedy answers of the base with these adapters on it, unmerged, in float32."""
    stage = inputs(sources, adapters, items, max_tokens)
    entry = tools.store.find(stage.key) or tools.store.produce(
        stage.key,
        {"stage": "reference", "inputs": stage.inputs},
        lambda folder: _run(folder, sources, adapters, items, max_tokens, tools),
    )
    return found(entry)


def found(entry: Entry) -> tuple[str, ...]:
    """Return the answers that a store entry holds."""
    return tuple(json.loads(entry.tree.path(_ANSWERS).read_text("utf-8")))


def _run(
    folder: Path,
    sources: Sources,
    adapters: Sequence[AdapterSnapshot],
    items: Sequence[Item],
    max_tokens: int,
    tools: Tools,
) -> Mapping[str, Json]:
    tools.runner.prepare(BUILDER, tools.progress)
    trees = {f"adapter{i}": a.snapshot.tree.root for i, a in enumerate(adapters)}
    result = tools.runner.run(
        Job(
            stage="reference",
            builder=BUILDER,
            inputs={"model": sources.base.tree.root, **trees},
            parameters={
                "weights": [a.weight for a in adapters],
                "items": [[dict(m) for m in item.messages] for item in items],
                "max_tokens": max_tokens,
            },
            output=folder,
            memory_bytes=(3 << 30) + 5 * sources.base.tree.size,
            use_gpu=True,
        ),
        tools.progress,
    )
    text = json.dumps(result["answers"], ensure_ascii=False)
    (folder / _ANSWERS).write_text(text, "utf-8")
    return {"n": len(items)}
