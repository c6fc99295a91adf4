"""The pins of the kernels are those of llama.cpp's tools."""

import json

from tests.paths import ROOT

ENGINES = ROOT / "images/engines"


def pins(engine: str) -> dict:
    return json.loads((ENGINES / engine / "source.json").read_text())


def test_both_are_compiled_from_one_commit_by_one_compiler():
    ours, tools = pins("kernels"), pins("llamacpp")
    assert ours["llama_cpp"]["commit"] == tools["llama_cpp"]["commit"]
    assert ours["compiler"]["ziglang"] == tools["compiler"]["ziglang"]
    required = (ENGINES / "kernels" / "requirements.txt").read_text().splitlines()[1:]
    assert set(required) <= set(
        (ENGINES / "llamacpp" / "requirements.txt").read_text().splitlines()
    )
    assert f"ziglang=={ours['compiler']['ziglang']} \\" in required
