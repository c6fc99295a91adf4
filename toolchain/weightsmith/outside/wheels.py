"""Finds local wheels, so that a container's pip has the same ones as the host's."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from weightsmith.outside.environment import Pins
from weightsmith.outside.pip_settings import PipSettings

_PIN = re.compile(r"([A-Za-z0-9._-]+)==([^\s;\\]+)")


def configured_wheels() -> tuple[Path, ...]:
    """Return the local folders in pip's `find-links` configuration."""
    links = [link for value in PipSettings().every("find-links") for link in value.split()]
    folders = [Path(link.removeprefix("file://")) for link in links]
    return tuple(dict.fromkeys(folder for folder in folders if folder.is_dir()))


def pick_wheels(folders: Iterable[Path], pins: Pins, target: Path) -> bool:
    """Put the builder's pinned wheels from the folders into `target`; say whether there were any.

    Only those: a folder of wheels may have many gigabytes, and all of it would be sent.
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
        # A pin without a local part such as `+cpu` matches every build of the version.
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
