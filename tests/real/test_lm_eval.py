"""The real lm-evaluation-harness, where it is installed, with tasks and data of our own."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.serving import Replying, Serving, serving
from tests.paths import ROOT, TINY

TASK = """
task: ports
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{prompt}}}}"
"""
GENERATED = """
doc_to_target: "{{expected}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
"""
CHOSEN = """
doc_to_choice: "{{[expected, 'nothing']}}"
doc_to_target: 0
metric_list: [{metric: acc}]
"""

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(shutil.which("lm_eval") is None, reason="pip install 'lm-eval[api]'"),
]


class Server(Replying):
    """Says 7481 to everything, and nothing of a prompt's probabilities, as llama.cpp's does."""

    def do_GET(self) -> None:
        self.say({"data": [{"id": "support"}]})

    def do_POST(self) -> None:
        self.body()
        message = {"message": {"content": "7481"}, "text": "7481", "finish_reason": "stop"}
        self.say({"model": "support", "choices": [{"index": 0, **message, "logprobs": {}}]})

    def say(self, value: Any) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


@pytest.fixture
def url() -> Iterator[str]:
    with serving(Serving(Server)) as url:
        yield url


def evaluate(folder: Path, url: str, kind: str, rest: str, *words: str) -> tuple[int, Any]:
    """Run the task through our command line; return exit code and JSON."""
    data = folder / "data.jsonl"
    rows = [{"prompt": "Which port?", "expected": "7481"}, {"prompt": "Why?", "expected": "x"}]
    data.write_text("\n".join(map(json.dumps, rows)))
    (folder / "ports.yaml").write_text(TASK.format(data=data, kind=kind) + rest)
    done = subprocess.run(
        [sys.executable, "-m", "weightsmith", "evaluate", "--tasks", "ports", "--include", folder,
         "--url", url, "--json", *words],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "cache")},
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout)


def test_a_task_that_generates_is_scored(tmp_path: Path, url: str) -> None:
    code, told = evaluate(tmp_path, url, "generate_until", GENERATED)

    assert code == 0
    assert (told["score"], told["n"]) == (0.5, 2)
    assert told["tasks"]["ports"]["measure"] == "exact_match,none"


def test_a_server_without_the_prompts_probabilities_is_reported(tmp_path: Path, url: str) -> None:
    tokenizer = ("--tokenizer", str(TINY / "base"))

    code, told = evaluate(tmp_path, url, "multiple_choice", CHOSEN, *tokenizer)

    assert code == 4
    assert "log-probabilities of a prompt" in told["error"]["message"]
