"""The images below the weights, as the lock pins them."""

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
    """Return a base's name, and its image for each platform as the lock pins it; pin what is new.

    Raises UsageError for a platform that the base is not there for, InputRefused where it is gone
    or another engine's, EnvironmentFailure where it is out of reach.
    """
    wanted = request.file.recipe.image
    name = base_reference(target.engine, device, wanted.base)
    lock = read_lock(request.file)
    known = lock.bases.get(name, {})
    pins = {} if request.update_lock else known
    try:
        bases = base_images(name, target.engine.name, tools, pins=pins, platforms=wanted.platforms)
    except InputRefused as error:
        hint = f"; it is {lock.path} that pins it, and --update-lock takes {name} as it is now"
        raise InputRefused(error.message, hint=error.hint + (hint if pins else "")) from None
    pinned = lock
    for base in bases:
        if (was := known.get(base.platform, base.digest)) != base.digest:
            tools.progress.warn(f"{name}, by --update-lock: {was} before, now {base.digest}")
        pinned = pinned.with_base(name, base)
    write_lock(lock, pinned, tools.progress)
    return name, bases
