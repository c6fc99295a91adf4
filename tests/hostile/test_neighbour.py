"""The attacker is another user or process on the same machine, or on a volume that both mount."""

from __future__ import annotations

import os

import pytest

from tests.fakes.deep import NOBODY, somebody_else
from toolchain.drivers.store import FileStore
from toolchain.values import key_of

# Other users' files.


@pytest.mark.root
def test_another_users_results_do_not_stop_cleaning() -> None:
    """A shared store holds results of a user who gave nobody the right to delete them."""
    with somebody_else() as home:
        mine, theirs = FileStore(home), key_of("theirs")
        for key in (theirs, key_of("mine")):
            mine.produce(key, {}, lambda folder: {"n": (folder / "f").write_bytes(b"12")})
        mine.close()
        os.seteuid(0)
        for path in (home / "results" / theirs.hex, home / "locks" / theirs.hex):
            os.chown(path, 0, 0)
        (home / "results" / theirs.hex / "manifest.json").chmod(0o644)
        os.seteuid(NOBODY)
        done = FileStore(home).clean(0)
        assert (done["deleted"], done["in_use"]) == (1, 1)
        assert [path.name for path in (home / "results").iterdir()] == [theirs.hex]
