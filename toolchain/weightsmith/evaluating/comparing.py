"""Two builds beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from weightsmith.evaluating import answers
from weightsmith.evaluating.build_record import (
    ArtifactRecord,
    BuildRecord,
    ImageRecord,
    MergeRecord,
)

_NOTHING = "-"


Items: TypeAlias = Sequence[Mapping[str, Any]]


def shared_items(first: Items, second: Items) -> list[dict[str, Any]]:
    """Return the questions that both images were asked, with both answers as `A` and `B`."""
    asked = {item["prompt"]: item for item in first if "image" in item}
    found = []
    for item in second:
        other = asked.get(item["prompt"])
        if other is None or "image" not in item:
            continue
        found.append(
            {
                "prompt": item["prompt"],
                "expected": item["expected"],
                # The first is what the second is held against, as the adapter is for the image.
                "adapter": other["image"],
                "image": item["image"],
                "ok": {"adapter": other["ok"]["image"], "image": item["ok"]["image"]},
            }
        )
    return found


def answer_rows(items: Items) -> list[dict[str, Any]]:
    """Return the rows of the shared questions, with the answers of A and B."""
    named = {"adapter": "A", "image": "B"}
    rows = answers.rows(items)
    for row in rows:
        for said in row["answers"]:
            said["who"] = [named[who] for who in said["who"]]
    return rows


def fact_rows(a: BuildRecord, b: BuildRecord) -> list[dict[str, Any]]:
    """Return the table of what the two builds are: name, both values, and whether they differ."""
    both = (a, b)
    rows = [
        _row("target", a.target, b.target),
        _row("version", a.version, b.version),
        _row("built", *(_minute(one.created) for one in both), note=False),
        _row("base", a.base.digest, b.base.digest, code=True),
        _row("adapters", *(_adapters(one) for one in both), code=True),
        _row("merged", *(_digest(one.merge) for one in both), code=True),
        _row("weights", *(_digest(one.artifact) for one in both), code=True),
        _row("image", *(_digest(one.image) for one in both), code=True),
        _row("format", *(one.artifact.format if one.artifact else _NOTHING for one in both)),
    ]
    sizes = [one.artifact.size if one.artifact else None for one in both]
    rows.append(_numbers("size of the weights", sizes, "bytes"))
    bits = [one.artifact.bits_per_weight if one.artifact else None for one in both]
    rows.append(_numbers("bits per weight", bits, "number"))
    scores = [one.scores["image"].score if "image" in one.scores else None for one in both]
    rows.append(_numbers("score of the image", scores, "share"))
    layers = [{x.digest: x.size for x in one.image.layers} if one.image else {} for one in both]
    shared = sum(size for digest, size in layers[0].items() if digest in layers[1])
    total = [sum(sizes.values()) or None for sizes in layers]
    rows.append(_numbers("size of the image", total, "bytes"))
    rows.append(_numbers("of it in layers that both have", [shared, shared], "bytes", note=False))
    for key, name in (("max_num_seqs", "requests at once"), ("max_model_len", "tokens a request")):
        rows.append(_row(name, *(str((one.plan or {}).get(key, _NOTHING)) for one in both)))
    return rows


def _row(name: str, first: str, second: str, *, code: bool = False, note: bool = True) -> Any:
    same = "the same" if first == second else "differs"
    values = [value[7:19] if code and value.startswith("sha256:") else value
              for value in (first, second)]  # fmt: skip
    return {"name": name, "values": values, "code": code, "note": same if note else "", "kind": ""}


def _numbers(name: str, values: Sequence[Any], kind: str, *, note: bool = True) -> Any:
    text = ""
    if note and values[0] and values[1] is not None and values[0] != values[1]:
        text = f"B has {values[1] / values[0]:.2f} of A"
    elif note and values[0] == values[1]:
        text = "the same"
    return {"name": name, "values": list(values), "code": False, "note": text, "kind": kind}


def _digest(part: MergeRecord | ArtifactRecord | ImageRecord | None) -> str:
    return (part.digest if part else "") or _NOTHING


def _minute(created: str) -> str:
    """Return an ISO time as people write it, to the minute."""
    return created[:16].replace("T", " ")


def _adapters(build: BuildRecord) -> str:
    return ", ".join(adapter.digest[7:19] for adapter in build.adapters) or _NOTHING
