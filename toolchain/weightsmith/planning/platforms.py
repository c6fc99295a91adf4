"""The platforms that a target's image is made for, as far as they are known without a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from weightsmith.platforms import host_platform
from weightsmith.recipe_file import RecipeFile
from weightsmith.resources import engine_source
from weightsmith.serving.targets import Target
from weightsmith.stages.base import OWN, base_inputs, base_reference, check_own
from weightsmith.stages.lock import read_lock
from weightsmith.tools import Tools
from weightsmith.values import Json

STARTED, MADE = "started and tested on this machine", "made, not started on this machine"


def platforms_of(file: RecipeFile, base: str) -> Sequence[str]:
    """Return the platforms of an image on a base, sorted; () if only the registry knows them.

    Raises UsageError if the base is one of our own engines that cannot be made for one of them.
    """
    wanted = sorted(set(file.recipe.image.platforms))
    check_own(base, wanted)
    if wanted:
        return wanted
    return (
        [host_platform()] if base.startswith(OWN) else sorted(read_lock(file).bases.get(base, ()))
    )


def forecast_platforms(
    file: RecipeFile, target: Target, device: str, tools: Tools
) -> tuple[Mapping[str, str], Sequence[tuple[bool, str]]]:
    """Return each platform with what happens to its image, and the engines to make for others.

    An engine is (whether it is cached, what making it takes). Raises what `platforms_of` does.
    """
    base = base_reference(target.engine, device, file.recipe.image.base)
    said = {
        platform: STARTED if platform == host_platform() else MADE
        for platform in platforms_of(file, base)
    }
    if not base.startswith(OWN):
        return said, ()
    name = base.removeprefix(OWN)
    others = [platform for platform in said if platform != host_platform()]
    return said, [_engine(name, platform, tools) for platform in others]


def _engine(name: str, platform: str, tools: Tools) -> tuple[bool, str]:
    cached = tools.store.find(base_inputs(name, platform).key) is not None
    takes: Json = engine_source(name).get("takes", "about ten minutes on four cores")
    return cached, "" if cached else f"{name} for {platform} is made once: {takes}"
