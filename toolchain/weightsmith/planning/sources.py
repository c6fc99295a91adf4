"""Fetches a recipe's sources as pinned in its lock."""

from __future__ import annotations

from dataclasses import replace

from weightsmith.outcome import Outcome, Timer
from weightsmith.planning.request import BuildRequest
from weightsmith.stages.lock import pinned, read_lock, with_sources, write_lock
from weightsmith.stages.resolve import known, resolve
from weightsmith.tools import Tools
from weightsmith.values import Sources


def resolve_request(request: BuildRequest, tools: Tools) -> Outcome[tuple[BuildRequest, Sources]]:
    """Return the request with pinned sources, and the sources; add new pins to the lock.

    Raises what `resolve` raises, and InputRefused for sources that `locked` refuses.
    """
    timer = Timer("resolve", request.file.recipe.base.source, tools)
    lock = read_lock(request.file)
    file = request.file if request.update_lock else pinned(request.file, lock)
    cached = known(file, tools)[0] is not None
    sources = resolve(file, tools)
    now = with_sources(
        lock,
        file,
        sources,
        progress=tools.progress,
        locked=request.locked,
        update=request.update_lock,
    )
    write_lock(lock, now, tools.progress)
    return timer.done((replace(request, file=file), sources), cached=cached)
