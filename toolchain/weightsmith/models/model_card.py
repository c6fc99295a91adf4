"""What a folder's README.md says in its front matter.

https://huggingface.co/docs/hub/model-cards#model-card-metadata
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from weightsmith.core.errors import InputRefused
from weightsmith.core.safe_parse import parse_yaml
from weightsmith.core.values import JsonValue
from weightsmith.models.task import read_task

_MOST = 65536
"""Bytes of a model card that are searched for its front matter."""
_TASKS = frozenset({"text-ranking", "feature-extraction", "sentence-similarity"})
"""A hub's names of tasks of models that do not chat, and may be of a generating class."""


def front_matter(folder: Path) -> Mapping[str, JsonValue]:
    """Return the metadata of a folder's model card; empty if it has none that can be read."""
    try:
        with (folder / "README.md").open("rb") as file:
            first, *lines = file.read(_MOST).decode("utf-8", "replace").split("\n")
        fence = [line.rstrip() for line in lines].index("---")
        found = parse_yaml("\n".join(lines[:fence])) if first.rstrip() == "---" else None
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def card_denies_chat(folder: Path, base: Path, adapter: Path | None = None) -> str:
    """Return why a model that its files make a generating one is perhaps none; "" if it is.

    Such as an early Qwen3-Reranker's: its class generates, and nothing but the card says more. The
    card is the `folder`'s, which is the base's or an adapter's.
    """
    task = front_matter(folder).get("pipeline_tag")
    if not isinstance(task, str) or task not in _TASKS:
        return ""
    try:
        chats = read_task(base, adapter).kind == "generate"
    except InputRefused:
        return ""
    return (
        f"its model card says {task}, but its class generates text and it has no modules.json of"
        " sentence-transformers: it is served as a model that chats; take a revision with that file"
        if chats
        else ""
    )
