"""Which parser a plan takes for a model's tool calls and thoughts."""

from dataclasses import replace

import pytest
from weightsmith.core.errors import UsageError
from weightsmith.serving import sglang, vllm
from weightsmith.serving.engine import ServeOptions
from weightsmith.serving.parsers import THOUGHTS, TOOLS
from weightsmith.serving.plan import summary

from tests.fakes.chat_templates import FAMILIES, PLAIN
from tests.fakes.configs import LLAMA_8B, LLAMA_8B_BYTES, facts
from tests.fakes.rendering import rendered

ENGINES = {"vllm": vllm, "sglang": sglang}
GPU = ServeOptions(gpu="nvidia-h100-80gb")


def planned(template, model_type="llama", engine="vllm", options=GPU):
    model = replace(facts(LLAMA_8B), chat_template=template, model_type=model_type)
    return ENGINES[engine].plan(model, LLAMA_8B_BYTES, options)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_each_familys_template_has_its_parsers(family):
    own = planned(family.template, family.model_type)
    other = planned(family.template, family.model_type, "sglang")

    assert own.settings["tool-call-parser"] == family.vllm
    assert own.settings["enable-auto-tool-choice"] is True
    assert f"the server reads tool calls by {family.vllm}" in summary("vllm", own)
    assert own.settings.get("reasoning-parser", "") == family.thoughts
    assert other.settings.get("tool-call-parser", "") == family.sglang
    assert "enable-auto-tool-choice" not in other.settings


def test_every_name_is_one_that_the_pinned_engine_has():
    """SGLang's and vLLM's own parsers of the option take these words."""
    for dialects, option in ((TOOLS, "tool-call-parser"), (THOUGHTS, "reasoning-parser")):
        for engine, known in (("vllm", vllm.known_options()), ("sglang", sglang.known_options())):
            names = {one.of(engine) for one in dialects} - {""}
            assert names <= set(known.words[option])


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (PLAIN, "has no tools, so the server has no parser"),
        ("{{ tools }} <my_call>", "the form of its calls is not known here: the server will"),
    ],
)
def test_a_template_without_known_calls_gets_none_and_a_sentence(template, says):
    plan = planned(template)
    (note,) = [note for note in plan.notes if "chat template" in note]

    assert {"tool-call-parser", "enable-auto-tool-choice"}.isdisjoint(plan.settings)
    assert says in note


def test_a_model_that_does_not_chat_has_no_parser_and_no_sentence():
    plan = planned("")

    assert {"tool-call-parser", "enable-auto-tool-choice"}.isdisjoint(plan.settings)
    assert not [note for note in plan.notes if "chat template" in note]


def test_a_parser_may_be_named_or_turned_off():
    template = FAMILIES["qwen3"].template
    none = planned(template, options=replace(GPU, tool_parser="none", reasoning_parser="none"))
    named = planned(PLAIN, options=replace(GPU, tool_parser="mistral"))
    extra = planned(template, options=replace(GPU, extra={"tool-call-parser": "qwen3_json"}))

    assert {"tool-call-parser", "reasoning-parser"}.isdisjoint(none.settings)
    assert [note.partition(":")[0] for note in none.notes if "is none" in note] == [
        "serve.tool_parser is none", "serve.reasoning_parser is none",
    ]  # fmt: skip
    assert not [note for note in named.notes if "is none" in note]
    assert named.settings["tool-call-parser"] == "mistral"
    assert extra.settings["tool-call-parser"] == "qwen3_json"
    assert extra.settings["enable-auto-tool-choice"] is True


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tool_parser": "hermess"}, "serve.tool_parser is 'hermess'"),
        ({"reasoning_parser": "qwen"}, "serve.reasoning_parser is 'qwen'"),
        ({"extra": {"enable-auto-tool-choice": True}}, "needs tool-call-parser"),
        ({"tool_parser": "hermes", "extra": {"tool_call_parser": "xlam"}}, "both say which parser"),
        ({"reasoning_parser": "none", "extra": {"reasoning-parser": "mimo"}}, "both say which"),
    ],
)
def test_what_the_engine_lacks_is_refused(options, says):
    with pytest.raises(UsageError, match=says):
        planned(PLAIN, options=replace(GPU, **options))


def test_an_engine_that_reads_calls_itself_says_that_it_does_not_use_a_parser():
    named, none = (rendered("llamacpp-q4_k_m", tool_parser=p) for p in ("hermes", "none"))
    auto = rendered("llamacpp-q4_k_m", tool_parser="auto")
    said = "serve.tool_parser is for other targets: llama.cpp's server reads calls and thoughts"
    said += " itself"
    assert said in named.plan.notes
    assert said not in (*none.plan.notes, *auto.plan.notes)
    assert named.command == none.command


@pytest.mark.parametrize("target", ["vllm", "sglang"])
def test_the_readme_says_that_tools_work_where_they_do(target):
    wishes = {"tool_parser": "mistral", "reasoning_parser": "mistral"}
    own = rendered(target, gpu="nvidia-h100-80gb", **wishes).files["README.md"]
    none = rendered(target, gpu="nvidia-h100-80gb").files["README.md"]

    said = "Requests with `tools` get `tool_calls`: the parser `mistral` reads them.\n\n"
    assert said in own
    assert "Thoughts come apart from the answer: the parser `mistral`" in own
    assert "`tool_calls`" not in none
    assert "Thoughts" not in none
    assert "\n\n\n" not in own
