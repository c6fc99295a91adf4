"""lm-evaluation-harness by its command line and its result files."""

import contextlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from weightsmith.api.commands.evaluate import evaluate_tasks, harness_command, read_results
from weightsmith.api.commands.requests import EvaluateCommand
from weightsmith.core.errors import CheckFailed
from weightsmith.core.ports import Silent

from tests.fakes.serving import serving


def test_tasks_are_asked_by_chat_without_a_tokenizer():
    request = EvaluateCommand(tasks="gsm8k,ifeval", limit=10, concurrency=4)
    words = harness_command(request, "http://127.0.0.1:1", "support", Path("/out"))

    assert words[:5] == (
        "lm_eval", "--model", "local-chat-completions", "--model_args",
        "model=support,base_url=http://127.0.0.1:1/v1/chat/completions,num_concurrent=4,max_retries=3",
    )  # fmt: skip
    assert "--apply_chat_template" in words
    assert words[words.index("--tasks") + 1] == "gsm8k,ifeval"
    assert words[words.index("--limit") + 1] == "10"


def test_likelihoods_are_asked_of_completions_with_a_tokenizer():
    request = EvaluateCommand(tasks="arc_easy", tokenizer="merged", include="tasks")
    words = harness_command(request, "http://127.0.0.1:1", "support", Path("/out"))

    assert "local-completions" in words
    assert "tokenizer=merged" in words[4]
    assert "/v1/completions," in words[4]
    assert "--apply_chat_template" not in words
    assert words[words.index("--include_path") + 1] == "tasks"


def write(folder, results, counts):
    place = folder / "support"
    place.mkdir(exist_ok=True)
    samples = {name: {"original": 999, "effective": count} for name, count in counts.items()}
    text = json.dumps({"results": results, "n-samples": samples})
    (place / "results_2026-11-25T12-00-00.json").write_text(text)


def test_results_are_read_by_their_main_measure(tmp_path):
    write(
        tmp_path,
        {
            "arc_easy": {"alias": "arc_easy", "acc,none": 0.7, "acc_stderr,none": 0.01,
                         "acc_norm,none": 0.8, "acc_norm_stderr,none": 0.02},
            "gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.4,
                      "exact_match_stderr,strict-match": "N/A"},
        },
        {"arc_easy": 100, "gsm8k": 50},
    )  # fmt: skip
    found, _ = read_results(tmp_path)

    assert found["score"] == pytest.approx(0.6)
    assert found["n"] == 150
    assert found["tasks"]["arc_easy"]["measure"] == "acc_norm,none"
    assert found["tasks"]["arc_easy"]["stderr"] == 0.02
    assert found["tasks"]["gsm8k"]["stderr"] is None


def test_a_run_without_results_is_reported(tmp_path):
    with pytest.raises(CheckFailed, match=r"lm-eval|lm_eval"):
        read_results(tmp_path)
    write(tmp_path, {"odd": {"alias": "odd", "strangeness,none": 1.0}}, {})
    with pytest.raises(CheckFailed, match="odd"):
        read_results(tmp_path)


class NoEcho(BaseHTTPRequestHandler):
    """llama.cpp's way: a list of models, and completions without the prompt's probabilities."""

    def do_GET(self):
        self.reply({"data": [{"id": "support"}]})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.reply({"model": "support", "choices": [{"text": "x", "logprobs": {"content": []}}]})

    def reply(self, value):
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args):
        pass


@pytest.mark.parametrize(("tokenizer", "told"), [("merged", True), ("", False)])
def test_a_server_without_the_prompts_probabilities_is_reported(tmp_path, tokenizer, told):
    """What lm-evaluation-harness 0.4.13 says then is a KeyError of its own."""

    def fails(*_):
        raise CheckFailed("lm_eval failed: KeyError: 'token_logprobs'", hint="run it by hand")

    tools = SimpleNamespace(
        progress=Silent(), command=fails, scratch=lambda: contextlib.nullcontext(tmp_path)
    )
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), NoEcho)) as url:
        request = EvaluateCommand(tasks="arc", url=url, tokenizer=tokenizer)
        with pytest.raises(CheckFailed, match="token_logprobs") as caught:
            evaluate_tasks(request, tools)

    assert ("log-probabilities of a prompt" in caught.value.message) == told
    assert ("--metric choice" in caught.value.hint) == told
