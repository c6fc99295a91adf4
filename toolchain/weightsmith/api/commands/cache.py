"""`invoke cache`: fill a shared cache from the store, or the store from it; clean it; count."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from weightsmith.cache.cache import SharedCache
from weightsmith.cache.document import read_document
from weightsmith.cache.store import SharedStore
from weightsmith.cache.uploads import Uploads
from weightsmith.core.errors import EnvironmentFailure, InputRefused, UsageError, WeightsmithError
from weightsmith.core.ports import Cache, Progress, Store, StoreEntry
from weightsmith.core.values import Digest, Json

ACTIONS = ("push", "pull", "prune", "stat")


def check_action(action: str) -> None:
    """Raise UsageError for anything but an action."""
    if action not in ACTIONS:
        raise UsageError(f"cache {action}: unknown", hint=f"one of {', '.join(ACTIONS)}")


def push_results(
    results: Iterable[tuple[Digest, Mapping[str, Json], StoreEntry]],
    uploads: Uploads,
    cache: Cache,
    progress: Progress,
) -> Mapping[str, Json]:
    """Upload every result that the cache does not have.

    Raises EnvironmentFailure if the cache cannot be written: here it is not just a miss.
    """
    sent = held = kept = 0
    with _named(cache):
        for number, (key, note, entry) in enumerate(results, 1):
            try:
                new = uploads.upload(key, note, entry)
            except (InputRefused, UsageError) as error:
                progress.note(f"{note.get('stage', 'a result')} stays here: {error.message}")
                kept += 1
                continue
            sent, held = sent + new, held + (not new)
            progress.advance(number, number, "items")
    return {
        "cache": cache.where,
        "pushed": sent,
        "held": held,
        "left_out": kept,
        "bytes": uploads.sent,
    }


def pull_results(store: SharedStore, local: Store, shared: SharedCache) -> Mapping[str, Json]:
    """Fetch every result of the cache that the store does not have, verified."""
    pulled = held = refused = 0
    with _named(shared.cache):
        keys = [kept.key for kept in shared.cache.entries()]
    for key in keys:
        if local.find(key):
            held += 1
            continue
        entry = store.find(key)
        try:
            if entry is None:
                refused += 1
            elif entry.tree.root:
                pulled += 1
        except WeightsmithError:
            refused += 1
        if shared.broken:
            raise EnvironmentFailure(
                f"the cache {shared.where} cannot be read any more",
                hint="run it again: what was fetched is kept",
            )
    return {
        "cache": shared.where,
        "pulled": pulled,
        "held": held,
        "refused": refused,
        "bytes": shared.bytes_read,
    }


def prune_cache(cache: Cache, keep_bytes: int) -> Mapping[str, Json]:
    """Delete least recently used results until at most so many bytes are left."""
    with _named(cache):
        rows = sorted(cache.entries(), key=lambda kept: kept.used)
        before = total = sum(kept.size for kept in rows)
        gone = []
        for kept in rows:
            if total <= keep_bytes:
                break
            gone.append(kept.key)
            total -= kept.size
        freed = cache.remove(gone)  # also what interrupted uploads left, if there is nothing else
    return {
        "cache": cache.where,
        "deleted": len(gone),
        "bytes_before": before,
        "bytes_after": total,
        "freed": freed,
    }


def describe_cache(cache: Cache) -> Mapping[str, Json]:
    """Return how much the cache has, by stage, and whose entries can be read."""
    stages: dict[str, dict[str, int]] = {}
    count = size = unread = 0
    oldest = time.time()
    with _named(cache):
        for kept in cache.entries():
            count, size, oldest = count + 1, size + kept.size, min(oldest, kept.used)
            try:
                document = cache.find(kept.key, use=False)
                note = read_document(document or b"", kept.key, None).note
            except InputRefused:
                unread += 1
                continue
            row = stages.setdefault(str(note.get("stage", "")), {"results": 0, "bytes": 0})
            row["results"] += 1
            row["bytes"] += kept.size
    return {
        "cache": cache.where,
        "results": count,
        "bytes": size,
        "unreadable": unread,
        "oldest_days": round((time.time() - oldest) / 86400, 1) if count else 0.0,
        "stages": dict(sorted(stages.items())),
    }


@contextmanager
def _named(cache: Cache) -> Iterator[None]:
    """Turn an error of a disk into one that names the cache."""
    try:
        yield
    except OSError as error:
        raise EnvironmentFailure(
            f"the cache {cache.where} cannot be used: {error.strerror or error}",
            hint="check that it is there, and your access to it",
        ) from None
