"""Deals what only `make test-all` runs into parts that take about as long as each other."""

import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ONE = frozenset({"docker", "ray", "slurm", "vllm"})
"""Marks of tests that run one by one, as the Makefile has them."""
SECONDS = {
    r"real/test_tool_calls.*vllm": 230,
    r"real/test_tool_calls": 150,
    r"real/test_support_bot.*four_images": 300,
    r"real/test_support_bot": 50,
    r"real/test_vllm\.py.*checkpoints_numbers": 190,
    r"real/test_vllm\.py.*by_its_name": 140,
    r"real/test_vllm\.py": 15,
    r"real/test_vllm_engine": 110,
    r"real/test_vllm_pooling.*judged": 220,
    r"real/test_vllm_pooling.*(vectors|two_tokens)": 110,
    r"real/test_vllm_pictures": 35,
    r"real/test_pictures.*vllm": 125,
    r"real/test_compressor.*package": 50,
    r"real/test_compressor": 35,
    r"real/test_installing": 35,
    r"real/test_parsers.*started_server": 35,
    r"real/test_parsers.*every_parser": 10,
    r"real/test_arm": 10,
    r"test_fleet_clusters.*(lost|six|stops)": 90,
    r"test_fleet_clusters": 25,
    r"test_thin_starts": 90,
    r"test_importance_bits.*EPYC": 60,
    r"test_importance_bits.*Haswell": 36,
    r"test_library.*page_runs": 66,
    r"test_gguf_pass.*iq(1_m|1_s|2_xxs|2_xs|2_s|3_xxs)-with": 35,
    r"test_gguf_pass.*iq2_m-with": 25,
    r"test_whole_builds.*light": 25,
    r"test_docs.*whole_page": 10,
}
"""Pattern of a test's name -> the time that it takes of a part on two quiet cores; half of what
it takes itself where another runs beside it. The first that fits counts; below ten, none."""

TOGETHER = re.compile(r"real/test_vllm_loads.*\[\w+")
"""Cases that share what takes long: vLLM's classes of an architecture, and its plain model."""


def dealt(items: Sequence[pytest.Item], parts: int) -> Iterator[int]:
    """Yield the part of each: long tests go where least is yet, others in turn within a file.

    Those that run one by one are dealt apart from those that run beside them.
    """
    sizes = {item.nodeid: _seconds(item) for item in items}
    alone = {item.nodeid: bool(ONE & _marks(item)) for item in items}
    full, place = ([0] * parts, [0] * parts), {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        if sizes[name]:
            sums = full[alone[name]]
            place[name] = sums.index(min(sums))
            sums[place[name]] += sizes[name]
    turns = {path: zlib.crc32(path.name.encode()) for path in {item.path for item in items}}
    last = ""
    for item in items:
        shared = TOGETHER.search(item.nodeid)
        name = shared[0] if shared else item.nodeid
        turns[item.path] += name != last
        last = name
        yield place.get(item.nodeid, turns[item.path] % parts)


def in_order(items: Sequence[pytest.Item], workers: int) -> list[pytest.Item]:
    """Return tests so that each worker of xdist gets some of the long ones, early.

    A worker takes an equal run of the tests, and then what others have left. Whole builds and
    pages are the longest; those of a file stay together. The first run begins with the pages, and
    makes what all share; the others begin with a quarter of their short tests meanwhile.
    """
    files = dict[Path, list[pytest.Item]]()
    short = []
    for item in items:
        if "shared_store" in getattr(item, "fixturenames", ()):
            files.setdefault(item.path, []).append(item)
        else:
            short.append(item)
    shares: list[list[pytest.Item]] = [[] for _ in range(workers)]
    for path in sorted(files, key=lambda path: (path.name != "test_docs.py", path)):
        min(shares, key=len).extend(files[path])
    found: list[pytest.Item] = []
    for number, share in enumerate(shares):
        size = (len(items) - len(found)) // (workers - number)
        own, short = short[: size - len(share)], short[size - len(share) :]
        begun = len(own) // 4 if number else 0
        found += [*own[:begun], *share, *own[begun:]]
    return found + short


def _seconds(item: pytest.Item) -> int:
    """Return 0 for a short one, and for one that `make test` runs."""
    if not _marks(item) & {"full", "real"}:
        return 0
    fits = (seconds for name, seconds in SECONDS.items() if re.search(name, item.nodeid))
    return next(fits, 0)


def _marks(item: pytest.Item) -> set[str]:
    return {mark.name for mark in item.iter_markers()}
