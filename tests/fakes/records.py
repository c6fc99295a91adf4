"""build.json of a build that passed, of one that did not, and of one with many questions."""

import copy
import json
import os
from pathlib import Path
from typing import Any

DIGEST = "sha256:" + "ab" * 32
SOURCE = {"source": "./base", "pin": "./base@" + DIGEST, "digest": DIGEST}
BUILD: dict[str, Any] = {
    "name": "support-smol",
    "version": "1.2.0",
    "target": "llamacpp-q4_k_m",
    "created": "2026-11-25T12:00:00Z",
    "base": SOURCE,
    "adapters": [
        {**SOURCE, "source": "./adapter", "version": "v3", "run_id": "w/1", "weight": 0.5}
    ],
    "merge": {
        "method": "sequential",
        "precision": "exact",
        "tensors": {"merged": 60, "copied": 212},
        "findings": ["one tensor is tied"],
    },
    "artifact": {
        "format": "q4_k_m",
        "size": 105454016,
        "bits_per_weight": 6.165,
        "file": "support-smol.gguf",
        "digest": DIGEST,
        "details": {"types": {"Q4_K": 16}},
    },
    "plan": {
        "device": "cpu",
        "max_num_seqs": 4,
        "max_model_len": 2048,
        "weight_bytes": 100,
        "kv_bytes_total": 50,
        "overhead_bytes": 25,
        "usable_bytes": 250,
        "notes": ["a note"],
    },
    "image": {
        "reference": "",
        "digest": DIGEST,
        "layers": [{"digest": DIGEST, "size": 105454016, "file": "support-smol.gguf"}],
    },
    "task": {"name": "", "metric": "contains", "max_drop": 0.05},
    "scores": {
        "base": {"score": 0.0, "n": 5, "metric": "contains", "interval": [0.0, 0.434]},
        "adapter": {"score": 1.0, "n": 5, "metric": "contains", "interval": [0.566, 1.0]},
        "image": {"score": 1.0, "n": 5, "metric": "contains", "interval": [0.566, 1.0]},
    },
    "verdicts": [
        {
            "subject": "image",
            "against": "adapter",
            "passed": True,
            "binding": True,
            "reason": "the image scores 1.000",
            "drop": 0.0,
            "interval": [-0.3, 0.3],
            "lost": 0,
            "won": 0,
            "n": 5,
            "p": 1.0,
        }
    ],
    "checks": [{"name": "health", "seen": "ready after 0.1 s", "seconds": 0.1}],
    "items": [
        {
            "prompt": "<script>alert(1)</script> | port?",
            "expected": ["7481"],
            "base": "no | idea",
            "adapter": "7481",
            "image": "7481 it is",
            "ok": {"base": False, "adapter": True, "image": True},
        }
    ],
    "stages": {"merge": {"cached": False, "seconds": 12.5}, "bake": {"cached": True, "seconds": 0}},
    "warnings": ["unpinned source"],
    "next": ["invoke push dist/x --to registry.example.com/x"],
}
SMALLEST = {key: BUILD[key] for key in ("name", "version", "target", "created", "base")}


def failing() -> dict[str, Any]:
    """The image answers a question wrong that the adapter had right, and lost too much."""
    build = copy.deepcopy(BUILD)
    build["items"][0] |= {
        "image": "no | idea",
        "ok": {"base": False, "adapter": True, "image": False},
    }
    build["verdicts"][0] |= {"passed": False, "reason": "the image lost too much"}
    return build


def many(count: int, length: int) -> dict[str, Any]:
    """Questions in this number, with answers of about so many letters; each seventh is wrong."""
    build = copy.deepcopy(BUILD)
    build["items"] = [
        {
            "prompt": f"question {i} " + "why " * 20,
            "expected": [f"answer {i}"],
            **{who: f"{who} {i} " + "because " * (length // 8)
               for who in ("base", "adapter", "merged", "image")},
            "ok": dict.fromkeys(("base", "adapter", "merged", "image"), i % 7 > 0),
        }
        for i in range(count)
    ]  # fmt: skip
    return build


def as_of_old(record: Path) -> None:
    """Change a build.json as if it had been written on another day, but for the file's own time."""
    times = record.stat()
    document = json.loads(record.read_text("utf-8"))
    document["created"] = "2001-01-01T00:00:00+00:00"
    record.write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    os.utime(record, ns=(times.st_atime_ns, times.st_mtime_ns))
