"""`cache`: fill a shared cache from the store, or the store from it; clean it; count."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from weightsmith.api.commands.requests import CacheCommand, Said
from weightsmith.building.wiring import OneCache, open_one_cache
from weightsmith.cache.cache import SharedCache
from weightsmith.cache.document import read_document
from weightsmith.cache.store import SharedStore
from weightsmith.cache.uploads import Uploads
from weightsmith.core.errors import EnvironmentFailure, InputRefused, UsageError, WeightsmithError
from weightsmith.core.escape import escaped, joined
from weightsmith.core.ports import Cache, Progress, Store, StoreEntry
from weightsmith.core.values import Digest, Writable
from weightsmith.serving.memory import human, parse_size

_ACTIONS = ("push", "pull", "prune", "stat")


def run_cache(asked: CacheCommand, progress: Progress) -> Said:
    """Do one of the actions on the cache; raises UsageError for any other."""
    if asked.action not in _ACTIONS:
        raise UsageError(f"cache {asked.action}: unknown", hint=f"one of {', '.join(_ACTIONS)}")
    if asked.action == "prune" and not asked.keep:
        raise UsageError("missing: --keep", hint="`--help cache` lists every flag")
    size, insecure = parse_size(asked.keep or "0"), asked.run.insecure
    with open_one_cache(asked.cache, progress, sign_key=asked.sign_key, insecure=insecure) as one:
        match asked.action:
            case "push":
                results = one.local.results()
                return _push(results, one.uploads, one.shared.cache, progress)
            case "pull":
                return _pull(one.store, one.local, one.shared)
            case action:
                _require_there(one)
                if action == "prune":
                    return prune_cache(one.shared.cache, size)
                return describe_cache(one.shared.cache)


def _require_there(one: OneCache) -> None:
    """Raise EnvironmentFailure for a folder that is missing; the first push makes one."""
    if one.missing:
        raise EnvironmentFailure(
            f"the cache {one.shared.where} cannot be used: there is no such folder",
            hint="correct --cache, or mount the share; the first `cache push` makes the folder",
        )


def _push(
    results: Iterable[tuple[Digest, Mapping[str, Writable], StoreEntry]],
    uploads: Uploads,
    cache: Cache,
    progress: Progress,
) -> Said:
    # A cache that cannot be written is an error here, not just a miss.
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
    }, f"pushed {sent} result(s), {human(uploads.sent)}; {held} were there"


def _pull(store: SharedStore, local: Store, shared: SharedCache) -> Said:
    pulled = held = refused = 0
    with _named(shared.cache):
        keys = [kept.key for kept in shared.cache.entries()]
    for key in keys:
        if local.find(key):
            held += 1
            continue
        entry = store.find(key)
        try:  # a root that is asked for is fetched, and verified
            there = entry is not None and bool(entry.tree.root)
        except WeightsmithError:
            there = False
        pulled, refused = pulled + there, refused + (not there)
        if shared.broken:
            raise EnvironmentFailure(
                f"the cache {shared.where} cannot be read any more",
                hint="run it again: what was fetched is kept",
            )
    text = f"pulled {pulled} result(s), {human(shared.bytes_read)}; {held} were here"
    return {
        "cache": shared.where,
        "pulled": pulled,
        "held": held,
        "refused": refused,
        "bytes": shared.bytes_read,
    }, text + (f"; {refused} not used" if refused else "")


def prune_cache(cache: Cache, keep_bytes: int) -> Said:
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
    }, f"deleted {len(gone)} result(s); kept {human(total)}"


def describe_cache(cache: Cache) -> Said:
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
    lines = [f"{escaped(cache.where)}: {count} results, {human(size)}"]
    lines += [
        f"  {escaped(stage):<18} {row['results']:>5}  {human(row['bytes']):>10}"
        for stage, row in sorted(stages.items())
    ]
    lines += [f"  {unread} cannot be read"] if unread else []
    return {
        "cache": cache.where,
        "results": count,
        "bytes": size,
        "unreadable": unread,
        "oldest_days": round((time.time() - oldest) / 86400, 1) if count else 0.0,
        "stages": dict(sorted(stages.items())),
    }, joined(lines)


@contextmanager
def _named(cache: Cache) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EnvironmentFailure(
            f"the cache {cache.where} cannot be used: {error.strerror or error}",
            hint="check that it is there, and your access to it",
        ) from None
