"""So few processes may be started that a job cannot run: it says so, and which limit it is."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import tempfile

import pytest

from tests.fakes.users import as_user
from tests.paths import ROOT

ALLOWED = (2, 3, 5, 64)
"""Processes of the user, with the one that counts them: a job needs a few."""


@pytest.mark.root
@pytest.mark.slow
def test_a_job() -> None:
    user = 1_000_000 + os.getpid()  # of whom nothing else runs
    command, env = as_user(user)
    answers = []
    for most in ALLOWED:
        with tempfile.TemporaryDirectory() as home:
            os.chown(home, user, user)
            done = subprocess.run(
                [*command, "-m", "tests.fakes.bare_builder", home],
                cwd=ROOT, env={**env, "HOME": home}, capture_output=True, text=True, check=False,
                preexec_fn=lambda most=most: resource.setrlimit(
                    resource.RLIMIT_NPROC, (most, most)
                ),
            )  # fmt: skip
        assert done.returncode == 0, done.stderr
        answers.append(json.loads(done.stdout))

    refused = [answer for answer in answers if "text" not in answer]
    assert len(refused) >= 2
    assert "text" in answers[-1]
    for answer in refused:
        assert answer["exit_code"] == 5
        assert "no more processes or threads" in answer["message"]
        assert "ulimit -u" in answer["hint"]
