"""Two builds beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weightsmith.reporting import answers

_NOTHING = "-"


def shared_items(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the questions that both images were asked, with both answers as `A` and `B`."""
    asked = {item["prompt"]: item for item in a["items"] if "image" in item}
    found = []
    for item in b["items"]:
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


def answer_rows(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the shared questions, with the answers of A and B."""
    named = {"adapter": "A", "image": "B"}
    rows = answers.rows(items)
    for row in rows:
        for said in row["answers"]:
            said["who"] = [named[who] for who in said["who"]]
    return rows


def fact_rows(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the table of what the two builds are: name, both values, and whether they differ."""
    rows = [
        _row("target", a["target"], b["target"]),
        _row("version", a["version"], b["version"]),
        _row("built", *(_minute(side["created"]) for side in (a, b)), note=False),
        _row("base", *(side["base"]["digest"] for side in (a, b)), code=True),
        _row("adapters", *(_adapters(side) for side in (a, b)), code=True),
        _row("merged", *(_of(side, "merge", "digest") for side in (a, b)), code=True),
        _row("weights", *(_of(side, "artifact", "digest") for side in (a, b)), code=True),
        _row("image", *(_of(side, "image", "digest") for side in (a, b)), code=True),
        _row("format", *(_of(side, "artifact", "format") for side in (a, b))),
    ]
    sizes = [(side["artifact"] or {}).get("size") for side in (a, b)]
    rows.append(_numbers("size of the weights", sizes, "bytes"))
    bits = [(side["artifact"] or {}).get("bits_per_weight") for side in (a, b)]
    rows.append(_numbers("bits per weight", bits, "number"))
    scores = [side["scores"].get("image", {}).get("score") for side in (a, b)]
    rows.append(_numbers("score of the image", scores, "share"))
    both = [{x["digest"]: x["size"] for x in (side["image"] or {"layers": []})["layers"]}
            for side in (a, b)]  # fmt: skip
    shared = sum(size for digest, size in both[0].items() if digest in both[1])
    total = [sum(layers.values()) or None for layers in both]
    rows.append(_numbers("size of the image", total, "bytes"))
    rows.append(_numbers("of it in layers that both have", [shared, shared], "bytes", note=False))
    for key, name in (("max_num_seqs", "requests at once"), ("max_model_len", "tokens a request")):
        rows.append(_row(name, *(str((s["plan"] or {}).get(key, _NOTHING)) for s in (a, b))))
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


def _of(side: Mapping[str, Any], part: str, key: str) -> str:
    return str((side[part] or {}).get(key) or _NOTHING)


def _minute(created: str) -> str:
    """Return an ISO time as people write it, to the minute."""
    return created[:16].replace("T", " ")


def _adapters(side: Mapping[str, Any]) -> str:
    return ", ".join(adapter["digest"][7:19] for adapter in side["adapters"]) or _NOTHING
