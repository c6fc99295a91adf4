"""Whether a job had the machine's network."""

from __future__ import annotations

from weightsmith.tools import Tools
from weightsmith.values import Artifact, Checkpoint


def network_in_jobs(checkpoint: Checkpoint, artifact: Artifact | None, tools: Tools) -> bool:
    """Say whether a job had the machine's network: one of now, or one that made what is cached."""
    made = (checkpoint.details, artifact.details if artifact else {})
    return tools.runner.networked or any(details.get("network_in_jobs") for details in made)
