"""The base images of a build, as pinned in the lock."""

from __future__ import annotations

from weightsmith.errors import InputRefused
from weightsmith.oci.image import Image
from weightsmith.planning.request import BuildRequest
from weightsmith.serving.targets import Target
from weightsmith.stages.base import base_images, base_reference
from weightsmith.stages.lock import read_lock, write_lock
from weightsmith.tools import Tools


def bases_of(
    request: BuildRequest, target: Target, device: str, tools: Tools
) -> tuple[str, tuple[Image, ...]]:
    """Return a base's name and its pinned image for each platform; pin a new base.

    Raises UsageError if the base has no image for a platform, InputRefused if it is missing or has
    a different engine, EnvironmentFailure if it cannot be reached.
    """
    settings = request.file.recipe.image
    name = base_reference(target.engine, device, settings.base)
    lock = read_lock(request.file)
    known = lock.bases.get(name, {})
    pins = {} if request.update_lock else known
    try:
        bases = base_images(
            name, target.engine.name, tools, pins=pins, platforms=settings.platforms
        )
    except InputRefused as error:
        hint = f"; {lock.path} pins it, and --update-lock pins the current {name} instead"
        raise InputRefused(error.message, hint=error.hint + (hint if pins else "")) from None
    pinned = lock
    for base in bases:
        if (was := known.get(base.platform, base.digest)) != base.digest:
            tools.progress.warn(f"{name}: {was} replaced by --update-lock, now {base.digest}")
        pinned = pinned.with_base(name, base)
    write_lock(lock, pinned, tools.progress)
    return name, bases
