"""Where `images/` and `templates/` lie: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_INSTALLED = _PACKAGE / "_resources"
_ROOT = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent


def templates() -> Path:
    """Return the folder with one template folder per engine."""
    return _ROOT / "templates"


def images() -> Path:
    """Return the folder with `builders/`, `engines/` and `bases.lock`."""
    return _ROOT / "images"


def package() -> Path:
    """Return the folder that holds the `toolchain` package itself, for builders to import."""
    return _PACKAGE
