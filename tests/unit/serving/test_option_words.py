"""Values that an engine's own parser refuses are refused before its image is made."""

import pytest
from weightsmith.core.errors import UsageError
from weightsmith.serving import llamacpp_options, sglang, tgi, vllm

CHECKS = {
    "vllm": vllm.known_options().checked,
    "vllm-cpu": vllm.known_options(cpu=True).checked,
    "sglang": sglang.known_options().checked,
    "tgi": tgi.known_options().checked,
    "llamacpp": llamacpp_options.extra_options,
}


@pytest.mark.parametrize(
    ("engine", "extra", "hint"),
    [
        ("vllm", {"tool-call-parser": "hermess"}, "did you mean hermes"),
        ("vllm", {"tool-call-parser": True}, "hermes"),
        ("vllm", {"tool-call-parser": ["hermes"]}, "hermes"),
        ("vllm", {"reasoning-parser": "deepseek"}, "did you mean deepseek"),
        ("vllm", {"enable-auto-tool-choice": True}, "set serve.extra.tool-call-parser too: "),
        ("vllm", {"enable-log-outputs": True}, "set serve.extra.enable-log-requests too"),
        ("vllm", {"seed": "seven"}, "number"),
        ("vllm", {"seed": True}, "number"),
        ("vllm", {"max-logprobs": [5]}, "number"),
        ("vllm", {"seed": "2020-01-01"}, "number"),
        ("vllm", {"scheduling-policy": "fifo"}, "fcfs"),
        ("vllm", {"chat-template-content-format": "parts"}, "openai"),
        ("vllm", {"runner": "generation"}, "did you mean generate"),
        ("vllm-cpu", {"tool-call-parser": "step5"}, "step3"),  # later than the build for CPUs
        ("sglang", {"tool-call-parser": "hermess"}, "hermes"),
        ("sglang", {"reasoning-parser": "qwen"}, "qwen3"),
        ("sglang", {"schedule-policy": "first"}, "fcfs"),
        ("sglang", {"page-size": "big"}, "number"),
        ("tgi", {"rope-scaling": "yarn"}, "linear"),
        ("llamacpp", {"reasoning-format": "deepseeks"}, "did you mean deepseek"),
        ("llamacpp", {"flash-attn": "maybe"}, "auto, off, on"),
        ("llamacpp", {"top-k": "many"}, "number"),
        ("llamacpp", {"LLAMA_ARG_TOP_K": "many"}, "number"),
    ],
)
def test_a_value_that_the_engine_does_not_know(engine, extra, hint):
    with pytest.raises(UsageError, match=r"serve\.extra") as caught:
        CHECKS[engine](extra)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("engine", "extra"),
    [
        ("vllm", {"tool-call-parser": "hermes", "enable-auto-tool-choice": True}),
        ("vllm", {"tool_call_parser": "granite_20b_fc", "seed": "7", "watermark": 0.01}),
        ("vllm", {"tool-call-parser": "step5"}),
        ("vllm", {"tool-call-parser": "mine", "tool-parser-plugin": "/models/mine.py"}),
        ("vllm", {"enable-auto-tool-choice": False, "log-level": "info"}),
        ("vllm", {"kv-cache-metrics-sample": "1e-2", "max-log-len": -1}),
        ("sglang", {"tool-call-parser": "auto", "reasoning-parser": "deepseek-r1"}),
        ("sglang", {"log-requests-level": 2, "schedule-conservativeness": 0.3}),
        ("llamacpp", {"flash-attn": True, "reasoning": "off", "threads": -1, "temp": ".5"}),
        ("llamacpp", {"flash-attn": "enabled", "pooling": "mean"}),
    ],
)
def test_a_value_that_it_knows(engine, extra):
    assert CHECKS[engine](extra)
