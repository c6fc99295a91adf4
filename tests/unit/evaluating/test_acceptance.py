"""Counters of drafted tokens, as servers print them."""

from __future__ import annotations

from typing import Any, cast

import pytest
from weightsmith.evaluating.acceptance import Drafted, acceptance, drafted, last_length
from weightsmith.evaluating.session import Answer, ServerSession
from weightsmith.serving import engines

LLAMA_CPP = """# HELP llamacpp:spec_decode_num_draft_tokens_total Speculative: Total draft tokens
# TYPE llamacpp:spec_decode_num_draft_tokens_total counter
llamacpp:spec_decode_num_draft_tokens_total 88
llamacpp:spec_decode_num_accepted_tokens_total 66
llamacpp:spec_decode_num_drafts_total 22
llamacpp:spec_decode_num_accepted_tokens_per_pos_total{position="0"} 18
"""
"""From llama-server 0c1e57098 with a Q8_0 draft of the tiny example's base."""
VLLM = """# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 12.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 10.0
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 88.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 6.6e+01
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 18.0
"""
"""As v1/spec_decode/metrics.py of vLLM registers them, for two engines."""


class Server:
    def __init__(self, text: str, status: int = 200) -> None:
        self.answer = Answer(status, text)

    def try_get(self, path: str) -> Answer:
        assert path == "/metrics"
        return self.answer


def read(engine: str, server: Any) -> Drafted | None:
    return drafted(cast("ServerSession", server), engines()[engine].draft_counters)


@pytest.mark.parametrize(("engine", "text"), [("llamacpp", LLAMA_CPP), ("vllm", VLLM)])
def test_counters_are_read(engine: str, text: str) -> None:
    assert read(engine, Server(text)) == Drafted(steps=22, tokens=88, accepted=66)


def test_a_server_without_them_says_so() -> None:
    assert read("llamacpp", Server("", 501)) is None
    assert read("llamacpp", Server(LLAMA_CPP.replace("spec_", "other_"))) is None
    assert read("sglang", Server(LLAMA_CPP)) is None
    assert read("llamacpp", Server(LLAMA_CPP.replace(" 66", " 6e"))) is None  # it was cut off
    assert acceptance(None, Drafted()) == "the server counts no drafts"


SGLANG = """# TYPE sglang:spec_accept_length gauge
sglang:spec_accept_length{model_name="m",tp_rank="0"} 2.5
sglang:spec_accept_length{model_name="m",tp_rank="1"} 3.5
sglang:spec_accept_length{model_name="m",tp_rank="2"} 0.0
"""
"""As srt/observability/metrics_collector.py of SGLang registers it; 0 before the first draft."""


def test_sglang_has_a_gauge_of_its_latest_steps_alone() -> None:
    def told(text: str) -> str:
        server = cast("ServerSession", cast("Any", Server(text)))
        return last_length(server, engines()["sglang"].draft_length)

    assert told(SGLANG) == "3.00 tokens a step in the latest steps, by its own gauge"
    assert told("") == told(LLAMA_CPP) == "the server measured no drafts"


def test_what_was_drafted_in_between_is_told() -> None:
    before = Drafted(steps=2, tokens=8, accepted=1)
    after = Drafted(steps=22, tokens=88, accepted=61)
    found = acceptance(before, after)
    assert found == "60 of 80 drafted tokens were accepted (75%): 4.00 tokens a step"
    few = acceptance(before, Drafted(steps=22, tokens=88, accepted=3))
    assert few.startswith("2 of 80 drafted tokens were accepted (2%)")
    assert "`bench` says if they pay" in few
    assert acceptance(before, before) == "nothing was drafted for the questions"
