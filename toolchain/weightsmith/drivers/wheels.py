"""Finds wheels that lie on this machine, so that a container's pip has what the host's pip has."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from weightsmith.drivers.environment import Pins
from weightsmith.drivers.pip_settings import pip_settings

_PIN = re.compile(r"([A-Za-z0-9._-]+)==([^\s;\\]+)")


def configured_wheels() -> tuple[Path, ...]:
    """Return the local folders that pip's own configuration names under `find-links`."""
    places = [place for value in pip_settings("find-links") for place in value.split()]
    folders = [Path(place.removeprefix("file://")) for place in places]
    return tuple(dict.fromkeys(folder for folder in folders if folder.is_dir()))


def pick_wheels(folders: Iterable[Path], pins: Pins, target: Path) -> bool:
    """Put the builder's pinned wheels that the folders hold into `target`; say whether any were.

    Only those: a whole folder of wheels may be many gigabytes, and all of it would be sent.
    """
    files = [file for file in (pins.light, pins.torch) if file is not None]
    wanted = {
        (_normal(name), version)
        for file in files
        for name, version in _PIN.findall(file.read_text("utf-8"))
    }
    found = False
    for wheel in (wheel for folder in folders for wheel in sorted(folder.glob("*.whl"))):
        name, version = wheel.name.split("-")[:2]
        # A pin without a local part such as `+cpu` means every build of the version.
        names = {(_normal(name), version), (_normal(name), version.partition("+")[0])}
        if names & wanted and not (target / wheel.name).exists():
            _place(wheel, target / wheel.name)
            found = True
    return found


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _place(wheel: Path, target: Path) -> None:
    try:
        os.link(wheel, target)
    except OSError:
        shutil.copyfile(wheel, target)
