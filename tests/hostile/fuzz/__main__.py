"""Fuzz by the hour: `python -m tests.hostile.fuzz [SUBJECT …]`, for WEIGHTSMITH_FUZZ_SECONDS.

A finding is saved in fuzz-findings/, named by its subject and seed, and ends the run with 1.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
import traceback
from pathlib import Path
from random import SystemRandom

from tests.hostile.fuzz.subjects import SUBJECTS, Finding, once

FINDINGS = Path("fuzz-findings")
MOST = 10


def say(text: str) -> None:
    sys.stdout.write(f"fuzz: {text}\n")
    sys.stdout.flush()


def main() -> int:
    names = sys.argv[1:] or list(SUBJECTS)
    seconds = float(os.environ.get("WEIGHTSMITH_FUZZ_SECONDS", "3600"))
    begin = int(os.environ.get("WEIGHTSMITH_FUZZ_SEED") or SystemRandom().randrange(1 << 48))
    say(f"{', '.join(names)} for {seconds:g} s from seed {begin}")
    end, found, done = time.monotonic() + seconds, 0, 0
    for seed in itertools.count(begin):
        if time.monotonic() > end or found >= MOST:
            break
        for name in names:
            try:
                once(name, seed)
            except Finding as finding:
                found += 1
                FINDINGS.mkdir(exist_ok=True)
                path = FINDINGS / f"{name}-{seed}"
                path.write_bytes(finding.data)
                traceback.print_exception(finding.__cause__)
                say(f"{name} fails by seed {seed}; the input is {path}")
            done += 1
    say(f"{done} inputs, {found} findings")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
