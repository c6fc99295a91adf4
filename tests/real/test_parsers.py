"""vLLM's own parsers read back the calls that each family's template renders."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from weightsmith.building.wiring import cache_folder
from weightsmith.core.errors import CheckFailed
from weightsmith.core.jobs import Input, ReadCallsJob
from weightsmith.core.ports import Endpoint, Silent
from weightsmith.evaluating.client import Served, wait_until_healthy
from weightsmith.evaluating.round_trip import CALLS, TOOLS, read_back, thoughts_read_back
from weightsmith.evaluating.session import ServerSession
from weightsmith.outside.local import LocalRunner
from weightsmith.serving.parsers import NO_CALL, ReadBack, choice_of, choice_of_thoughts
from weightsmith.serving.vllm import known_options
from weightsmith.stages.parsers import BUILDER, THINKING, chats

from tests import vllm_parts
from tests.fakes.chat_templates import FAMILIES
from tests.fakes.started import free_port
from tests.paths import ROOT, TINY

pytestmark = [pytest.mark.real, pytest.mark.vllm, pytest.mark.timeout(1800)]

ASKED = [*CALLS.values(), ()]
ONE_AT_A_TIME = {"llama3_json"}
"""Llama 3's template refuses a message with several calls."""
FLAWED = {
    "deepseek_v3": "of a call that comes token by token, nothing is sent",
    "deepseek_v31": "of a call that comes token by token, nothing is sent",
}
"""vLLM 0.32's parsers that read a stream wrongly, and a whole answer rightly."""
OWN_LOOP = {"openai": "gpt-oss' calls are read from token ids by openai_harmony, in the server"}


def chat(calls: Any) -> list[dict[str, Any]]:
    made = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
    said = {"role": "assistant", "content": "" if calls else "It rains.", "tool_calls": made}
    return [{"role": "user", "content": "?"}, said]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    program = ROOT / "tests" / "fakes" / "vllm_parsers.py"
    with vllm_parts.answering(program, tmp_path_factory.mktemp("vllm")) as asked:
        yield asked


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_what_the_template_renders_is_read_back(ask: Any, family: Any) -> None:
    if family.vllm in OWN_LOOP:
        pytest.skip(OWN_LOOP[family.vllm])
    asked = [calls for calls in ASKED if len(calls) < 2 or family.vllm not in ONE_AT_A_TIME]
    told = ask(
        {
            "template": family.template,
            "marks": family.marks,
            "parser": family.vllm,
            "chats": [chat(calls) for calls in asked],
            "tools": TOOLS,
            "tokenizer": str(TINY / "base"),
        }
    )
    for calls, row in zip(asked, told, strict=True):
        expected = [[name, arguments] for name, arguments in calls]
        assert row["whole"] == expected, row
        flawed = calls and family.vllm in FLAWED
        assert row["streamed"] == ([] if flawed else expected), row


def served(folder: Path, parser: str, port: int, thoughts: str = "") -> str:
    """Start vLLM's server without weights; return what its parser reads of its template's calls.

    Or of its template's thoughts, with a parser for these.
    """
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    words = ["--port", str(port), "--host", "127.0.0.1", "--served-model-name", "m"]
    words += ["--enable-auto-tool-choice", "--tool-call-parser", parser]
    words += ["--reasoning-parser", thoughts] if thoughts else []
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-S", "-m", "vllm.entrypoints.cli.main", "launch", "render",
             folder / "model", *words],
            env={**env, "PYTHONPATH": str(vllm_parts.packages()), "HF_HUB_OFFLINE": "1",
                 "VLLM_NO_USAGE_STATS": "1"},
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        endpoint = Endpoint(
            url=f"http://127.0.0.1:{port}",
            logs=lambda _: (folder / "log").read_text()[-2000:],
            alive=lambda: process.poll() is None,
        )
        wait_until_healthy(endpoint, "/health", 600)
        with ServerSession(endpoint) as session:
            if thoughts:
                return thoughts_read_back(session, Served(name="m"), ("qwen3",), ("hermes",))
            return read_back(session, Served(name="m"), ("hermes",))
    finally:
        process.kill()
        process.wait()


def test_a_started_server_reads_its_templates_calls_or_the_parser_is_named(tmp_path: Path) -> None:
    """As the smoke test asks an image, which is started with its weights."""
    shutil.copytree(TINY / "base", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(FAMILIES["hermes"].template)

    assert served(tmp_path, "hermes", free_port()) == "a call; two calls"
    with pytest.raises(CheckFailed, match="the server's parser makes text") as caught:
        served(tmp_path, "pythonic", free_port())
    assert "serve.tool_parser hermes" in caught.value.hint


BARE = """{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.tool_calls %}[{% for c in m.tool_calls %}{{ {"name": c.function.name, "arguments": c.function.arguments} | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}]{% else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""  # noqa: E501
"""A JSON list and no mark: a form that the table does not know."""


@pytest.mark.parametrize(
    ("template", "first", "chosen"),
    [
        (FAMILIES["qwen3-coder"].template, ("qwen3_coder", "hermes"), "qwen3_coder"),
        (FAMILIES["qwen3-coder"].template, ("hermes", "qwen3_coder"), "qwen3_coder"),
        (BARE, (), "xlam"),
    ],
    ids=["the table's first", "not the table's first", "an unknown form"],
)
def test_every_parser_is_asked_where_the_table_is_undecided(
    template: str, first: tuple[str, ...], chosen: str, tmp_path: Path
) -> None:
    """In a job's sandbox, with the engine's packages in place of the builder's."""
    shutil.copytree(TINY / "base", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    (tmp_path / "out").mkdir()
    words = known_options(cpu=True).words["tool-call-parser"]
    job = ReadCallsJob(
        builder=BUILDER,
        model=Input(path=tmp_path / "model"),
        packages=Input(path=vllm_parts.packages()),
        parsers=tuple(dict.fromkeys([*first, *words])),
        thoughts="",
        tools=tuple(json.loads(json.dumps(TOOLS))),
        chats=chats(),
        output=tmp_path / "out",
        seconds=900,
    )

    found = LocalRunner(cache_folder()).run(job, Silent())

    assert choice_of(ReadBack.from_json(found), first).tools == chosen
    assert found["read"][chosen] == {
        name: ["whole", "streamed"] for name in ("a call", "two calls", NO_CALL)
    }
    assert "leaves thoughts out" in found["skipped"]["a call after thoughts"]


def test_every_parser_of_thoughts_is_asked_about_a_form_that_the_table_does_not_know(
    tmp_path: Path,
) -> None:
    """MiniMax M3's marks, in a sandbox as above."""
    shutil.copytree(TINY / "base", tmp_path / "model")
    marks = "<mm:think>", "</mm:think>"
    template = thinker(WRITTEN.replace("think>", "mm:think>"), "")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    with_tokens(tmp_path / "model", *marks)
    (tmp_path / "out").mkdir()
    job = ReadCallsJob(
        builder=BUILDER,
        model=Input(path=tmp_path / "model"),
        packages=Input(path=vllm_parts.packages()),
        parsers=(),
        thoughts="",
        tools=tuple(json.loads(json.dumps(TOOLS))),
        chats=(),
        reasoners=known_options(cpu=True).words["reasoning-parser"],
        thinking=json.loads(json.dumps(THINKING)),
        output=tmp_path / "out",
        seconds=900,
    )

    found = LocalRunner(cache_folder()).run(job, Silent())

    assert found["skipped"] == {}
    assert choice_of_thoughts(ReadBack.from_json(found)).thoughts == "minimax_m3"
    assert found["thoughts"]["minimax_m3"] == ["whole", "streamed"]
    assert found["thoughts"]["qwen3"] == []


def thinker(written: str, begins: str) -> str:
    """Return a template that words thoughts so, and calls as Hermes' does."""
    return f"""{{% if tools %}}{{{{ tools | tojson }}}}{{% endif %}}\
{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}
{written}{{{{ m.content }}}}{{% for c in m.tool_calls or [] %}}<tool_call>
{{{{ {{"name": c.function.name, "arguments": c.function.arguments}} | tojson }}}}
</tool_call>{{% endfor %}}<|im_end|>
{{% endfor %}}{{% if add_generation_prompt %}}<|im_start|>assistant
{begins}{{% endif %}}"""


WRITTEN = """{% if m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}"""


@pytest.mark.parametrize(
    ("template", "right"),
    [
        (thinker(WRITTEN, ""), "qwen3"),
        (thinker(WRITTEN, "<think>\n"), "qwen3"),
        (thinker("", "<think>\n"), "deepseek_r1"),
    ],
    ids=["Qwen3", "Qwen3-Thinking", "DeepSeek-R1"],
)
def test_a_started_server_reads_its_templates_thoughts_or_the_parser_is_named(
    template: str, right: str, tmp_path: Path
) -> None:
    shutil.copytree(TINY / "base", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    with_tokens(tmp_path / "model", "<think>", "</think>", "<tool_call>", "</tool_call>")

    read = served(tmp_path, "hermes", free_port(), thoughts=right)
    assert read == "an answer: whole and in a stream; a call: whole and in a stream"
    with pytest.raises(CheckFailed, match="makes the thoughts ''") as caught:
        served(tmp_path, "hermes", free_port(), thoughts="granite")
    assert "serve.reasoning_parser qwen3" in caught.value.hint


def with_tokens(model: Path, *texts: str) -> None:
    """Make each text one token, as in models that think."""
    path = model / "tokenizer.json"
    value = json.loads(path.read_text("utf-8"))
    number = 1 + max(
        max(value["model"]["vocab"].values()), *(one["id"] for one in value["added_tokens"])
    )
    value["added_tokens"] += [
        {
            "id": number + place, "content": text, "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": False,
        }
        for place, text in enumerate(texts)
    ]  # fmt: skip
    path.write_text(json.dumps(value), "utf-8")
