"""What reaches a server: the reference's tokens, whether there is a chat template or not."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from weightsmith.core.errors import InputRefused
from weightsmith.evaluating.client import Served, ask, find_served
from weightsmith.evaluating.session import ServerSession
from weightsmith.merging.reference import UnmergedModel, prompt_tokens, speaker
from weightsmith.serving import engines

from tests.fakes.questioned import BEGUN, ITEM, WORDED, model

NO_TEMPLATE = "default chat template is no longer allowed, so you must provide a chat template"
CASES = {
    "template": (WORDED, False),
    "plain": ("", False),
    "template and begin token": (BEGUN, True),
    "plain and begin token": ("", True),
}


def as_engines_do(tokenizer, seen, handler, body):
    """vLLM's rules, which SGLang, TGI and TensorRT-LLM share: a chat is worded by the template and
    tokenized without further tokens, a prompt is tokenized as the tokenizer does by itself."""
    if "prompt" in body:
        ids = tokenizer(body["prompt"])["input_ids"]
        choice = {"text": " Sel", "finish_reason": "stop"}
    elif not tokenizer.chat_template:
        handler.send(400, {"error": {"message": NO_TEMPLATE}})
        return
    else:
        text = tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        choice = {"message": {"content": " Sel"}, "finish_reason": "stop"}
    seen.append(list(ids))
    usage = {"prompt_tokens": len(ids)}
    handler.send(200, {"model": body["model"], "choices": [choice], "usage": usage})


@pytest.mark.parametrize("engine", sorted(set(engines()) - {"llamacpp"}))
@pytest.mark.parametrize("case", CASES)
def test_an_engine_gets_the_references_tokens(serve, tmp_path, engine, case):
    template, begins = CASES[case]
    root = model(tmp_path / "model", template, begins=begins)
    tokenizer, seen = speaker(UnmergedModel(model=root)), []
    server = serve(partial(as_engines_do, tokenizer, seen))

    with ServerSession(server.endpoint) as session:
        served = find_served(session, engine)
        answer = ask(session, served, ITEM, 4)

    expected = prompt_tokens(tokenizer, ITEM.messages, root)
    assert served.chat == bool(template)
    assert seen[-1] == expected
    assert seen[-1].count(1) == begins
    assert answer == {"answer": " Sel", "finish_reason": "stop", "prompt_tokens": len(expected)}


def test_a_chat_needs_a_template():
    two = ({"role": "system", "content": "Be brief."}, *ITEM.messages)

    with pytest.raises(InputRefused, match="no chat template, but a question has 2 messages"):
        Served(name="m", chat=False).body(replace(ITEM, messages=two), 4)
