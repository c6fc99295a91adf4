"""So few files (EMFILE) or processes that a command cannot end: it says so, and leaves no half."""

import json
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from weightsmith.oci.layout import write_layout

from tests.fakes.images import tiny_image
from tests.fakes.registry import fake_registry
from tests.fakes.users import as_user
from tests.faults.moments import Moments
from tests.faults.workshop import Workshop, check_layout
from tests.paths import ROOT

SPARE = (1, 2, 3, 4, 6, 8, 12)
"""Files that may be opened besides those that are open: none gets far with the first of these."""


def check(moments: Moments, made: Callable[[], bool], operation: str, **words: object) -> None:
    """Check that what an operation makes is there, whole, where it succeeds, and nowhere else."""
    codes = []
    for spare in SPARE:
        codes.append(moments.with_files(spare, operation, **words))
        assert made() == (codes[-1] == 0)
    assert codes[0] == 5
    assert set(codes) <= {0, 5}
    assert moments.count(operation, **words)


@pytest.mark.slow
def test_a_push(moments: Moments, tmp_path: Path) -> None:
    write_layout(tiny_image(tmp_path / "model"), tmp_path / "layout")

    def made() -> bool:
        tags = {tag for _, tag in fake.manifests if not tag.startswith("sha256")}
        assert tags <= {"1"}
        fake.manifests.clear()
        fake.blobs.clear()
        return bool(tags)

    with fake_registry() as fake:
        check(moments, made, "push", layout=str(tmp_path / "layout"), to=f"{fake.host}/app:1")


def taken(folder: Path) -> bool:
    """Say whether a folder is there, and delete it."""
    there = folder.exists()
    shutil.rmtree(folder, ignore_errors=True)
    return there


@pytest.mark.slow
def test_a_publication(moments: Moments, tmp_path: Path) -> None:
    write_layout(tiny_image(tmp_path / "model"), tmp_path / "source")
    layout = tmp_path / "results" / "image"
    words = {"source": str(tmp_path / "source"), "layout": str(layout), "swap": True}
    check(moments, lambda: taken(layout), "publish", **words)
    check_layout(layout)


@pytest.mark.slow
def test_a_merge(moments: Moments, tmp_path: Path) -> None:
    check(moments, lambda: taken(tmp_path / "out"), "merge", folder=str(tmp_path))


@pytest.mark.builders
@pytest.mark.grid(2)
@pytest.mark.parametrize("most", [12, 8])
def test_a_build(workshop: Workshop, digest: str, most: int) -> None:
    """In all; the control plane starts with 4, and a job needs more than it."""
    workshop.forget("quantize", "smoke", "trial")
    recipe = ["--recipe", str(workshop.tiny / "recipe.yaml"), "--runner", "local"]
    under = ("prlimit", f"--nofile={most}:{most}")
    outcome = workshop.start("build", *recipe, "--json", under=under).end()
    outcome.refused(5, "cannot open more files", "ulimit")
    workshop.check_quiet()
    assert not (workshop.results / "image").exists()
    workshop.check_intact(digest)


ALLOWED = (2, 3, 64)
"""Processes of the user, with the one that counts them: a job needs a few."""


@pytest.mark.root
@pytest.mark.slow
def test_a_job_with_few_processes() -> None:
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
