"""Nobody attacks: the user puts a secret, a folder or a file where it should not be."""

from __future__ import annotations
