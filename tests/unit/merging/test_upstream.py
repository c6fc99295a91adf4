"""The faults of PEFT that docs/upstream.md shows are there: what is mended leaves the page."""

import ast
import re
import warnings
from typing import Any

import pytest

from tests.paths import ROOT

PAGE = (ROOT / "docs" / "upstream.md").read_text("utf-8")
PEFTS = PAGE.partition("\n## axolotl")[0]
SETUP, *SHOWN = re.findall(r"```python\n(.*?)```", PEFTS, re.DOTALL)
pytestmark = pytest.mark.slow


def values(block: str, names: dict[str, Any]) -> list[tuple[float, float]]:
    """Run a block; return each value that it computes, and the one that its comment says."""
    found = []
    rows = block.splitlines()
    for line in ast.parse(block).body:
        text = ast.unparse(line)
        said = re.search(r"# ([\d.]+)", rows[(line.end_lineno or 1) - 1])
        if said:
            found.append((eval(text, names), float(said[1])))
        else:
            exec(text, names)
    return found


@pytest.mark.parametrize("block", SHOWN, ids=range(len(SHOWN)))
def test_the_page_says_what_happens(block: str) -> None:
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(SETUP, names)
        found = values(block, names)
    assert found
    for got, said in found:
        assert got == pytest.approx(said, rel=0.15)


def test_what_peft_merges_right_shows_nothing() -> None:
    names: dict[str, Any] = {}
    exec(SETUP, names)
    adapter = names["LoraConfig"](target_modules=["q_proj", "down_proj"])
    assert names["moved"](names["model"](adapter)) < 1e-4
