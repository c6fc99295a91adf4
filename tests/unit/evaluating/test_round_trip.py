"""A server that renders calls and reads its own tokens back, as vLLM does, and what goes wrong."""

import json
import re

import pytest
from weightsmith.core.errors import CheckFailed
from weightsmith.evaluating.client import Served
from weightsmith.evaluating.round_trip import read_back, thoughts_read_back
from weightsmith.evaluating.session import ServerSession, SessionLimits
from weightsmith.evaluating.tool_calls import read_calls

from tests.fakes.openai_server import servers

END = "<end>\n"


class Engine:
    """Its tokens are letters, and its template is Hermes' in few words."""

    reads = True
    begins = "<assistant>"
    words = staticmethod(json.dumps)
    most_calls = 9
    longest = 64
    streams = True
    offered = True

    def rendered(self, body):
        said = "".join(self.written(one) for one in body["messages"][1:])
        return f"<user>?{END}" + (self.begins if body["add_generation_prompt"] else said)

    def written(self, message):
        calls = message.get("tool_calls", [])
        if len(calls) > self.most_calls:
            raise ValueError("a template's own error")
        made = (
            {"name": one["function"]["name"], "arguments": json.loads(one["function"]["arguments"])}
            for one in calls
        )
        text = "".join(f"<tool_call>{self.words(one)}</tool_call>" for one in made)
        return f"<assistant>{message['content']}{text}{END}"

    def __call__(self, handler, body):
        try:
            status, value = self.answer(handler.path, body)
        except ValueError as error:
            status, value = 400, {"error": str(error)}
        handler.send(status, value)

    def answer(self, path, body):
        if path == "/tokenize":
            return 200, {"tokens": [ord(letter) for letter in self.rendered(body)]}
        if path == "/detokenize":
            return 200, {"prompt": "".join(map(chr, body["tokens"]))}
        if not self.offered:
            return 403, {"error": {"message": "Scale-out endpoints are disabled."}}
        assert path == "/v1/chat/completions/derender"
        if len(body["prompt_token_ids"]) > self.longest:
            return 400, {"error": "exceeds max_model_len"}
        if not body["stream"]:
            (choice,) = body["generate_response"]["choices"]
            return 200, {"choices": [{"message": self.message(choice["token_ids"], body)}]}
        (choice,) = body["generate_chunk"]["choices"]
        ids = [*(body["stream_state"] or []), *choice["token_ids"]]
        before = len(self.message(body["stream_state"] or [], body).get("tool_calls", []))
        calls = self.message(ids, body).get("tool_calls", []) if self.streams else []
        delta = {
            "tool_calls": [{"index": before + n, **one} for n, one in enumerate(calls[before:])]
        }
        return 200, {"chunk": {"choices": [{"delta": delta}]}, "stream_state": ids}

    def message(self, ids, body):
        text = "".join(map(chr, ids))
        assert END not in text, "the end of a turn is no part of an answer"
        names = [tool["function"]["name"] for tool in body["chat_request"]["tools"]]
        whole = text.rpartition("</tool_call>")
        calls = read_calls(whole[0] + whole[1], names) if self.reads else ()
        rows = [{"function": {"name": n, "arguments": json.dumps(a)}} for n, a in calls]
        return {"tool_calls": rows} if rows else {"content": text}


def asked(engine, fitting=("hermes",)):
    with servers() as start:
        limits = SessionLimits(tries=1, pause_seconds=0.01)
        with ServerSession(start(engine).endpoint, limits) as session:
            return read_back(session, Served(name="support"), fitting)


def engine(**changes):
    made = Engine()
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_calls_are_read_back_whole_and_streamed():
    assert asked(engine()) == "a call; two calls"


@pytest.mark.parametrize(
    ("fitting", "hint"), [(("hermes", "granite4"), "hermes or granite4"), ((), "another serve")]
)
def test_a_parser_that_does_not_read_the_template_is_named(fitting, hint):
    with pytest.raises(CheckFailed, match=r"the server's parser makes text") as caught:
        asked(engine(reads=False), fitting)
    assert hint in caught.value.hint
    assert "<tool_call>" in caught.value.message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"streams": False}, "a call: read whole, not in a stream; two calls: read whole"),
        ({"words": str}, "a call: read otherwise; the template writes <tool_call>{'name'"),
        ({"most_calls": 1}, "a call; two calls: refused by the template, or too long"),
        ({"most_calls": 0}, "a call: refused by the template, or too long"),
        ({"begins": "<assistant><think>"}, "not tried, for the template writes it otherwise"),
        ({"longest": 8}, "a call: not tried (HTTP 400"),
        ({"offered": False}, r"not tried: the server reads no tokens (HTTP 403)"),
    ],
)
def test_what_was_not_tried_is_told(changes, said):
    assert said in asked(engine(**changes))


@pytest.mark.parametrize("reply", ["[]", "{}", '{"tokens": "x"}', "<html>"])
def test_a_server_that_tokenizes_no_chats_is_not_asked_further(reply):
    def behave(handler, body):
        handler.reply(200, reply.encode(), {"Content-Length": str(len(reply))})

    assert asked(behave).startswith("not tried: the server does not say")


@pytest.mark.parametrize(
    "said", [[], {"choices": []}, {"choices": [{"message": {"tool_calls": 5}}]}]
)
def test_an_answer_that_is_none_is_a_parser_that_fails(said):
    made = engine()

    def behave(handler, body):
        if handler.path.endswith("tokenize"):
            made(handler, body)
        else:
            handler.send(200, said)

    with pytest.raises(CheckFailed, match="the server's parser makes text"):
        asked(behave)


class Thinker(Engine):
    """Its template writes thoughts in tags, and its parser takes them out."""

    leaves_out = False
    refuses = False
    reads_streams = True
    reads_calls = True
    opens = ""

    def rendered(self, body):
        if "prompt" in body:
            assert body["add_special_tokens"] is False
            return body["prompt"]
        said = "".join(self.written(one) for one in body["messages"][1:])
        begins = f"<assistant>{self.opens}"
        return f"<user>?{END}" + (begins if body["add_generation_prompt"] else said)

    def written(self, message):
        if self.refuses and "reasoning" in message:
            raise ValueError("a template's own error")
        said = f"<think>{message.get('reasoning_content', '')}</think>"
        rest = super().written(message)
        return rest if self.leaves_out else rest.replace("<assistant>", f"<assistant>{said}")

    def message(self, ids, body):
        text = "".join(map(chr, ids))
        assert END not in text, "the end of a turn is no part of an answer"
        before, mark, after = text.partition("</think>")
        if not self.reads or (body["stream"] and not self.reads_streams):
            return {"content": text}
        # A tag that is not whole yet is neither.
        thoughts = re.sub("<[^>]*$", "", before.removeprefix("<think>"))
        if not mark or "tools" not in body["chat_request"] or not self.reads_calls:
            return {"reasoning": thoughts, "content": after}
        return {"reasoning": thoughts, **super().message([*map(ord, after)], body)}

    def answer(self, path, body):
        if not path.endswith("derender") or not body.get("stream") or not self.offered:
            return super().answer(path, body)
        (choice,) = body["generate_chunk"]["choices"]
        so_far = body["stream_state"] or []
        ids = [*so_far, *choice["token_ids"]]
        before, now = self.message(so_far, body), self.message(ids, body)
        wanted = body["chat_request"].get("tools")
        delta = {"reasoning": now.get("reasoning", "")[len(before.get("reasoning", "")) :]}
        # Of an answer with tools, nothing but a whole call is sent.
        if not wanted:
            delta["content"] = now["content"][len(before["content"]) :]
        made = before.get("tool_calls", []), now.get("tool_calls", [])
        delta["tool_calls"] = [{"index": 0, **one} for one in made[1][len(made[0]) :]]
        return 200, {"chunk": {"choices": [{"delta": delta}]}, "stream_state": ids}


def thoughts(of_calls=("hermes",), **changes):
    made = Thinker()
    for name, value in changes.items():
        setattr(made, name, value)
    with servers() as start:
        limits = SessionLimits(tries=1, pause_seconds=0.01)
        with ServerSession(start(made).endpoint, limits) as session:
            return thoughts_read_back(session, Served(name="support"), ("qwen3",), of_calls)


BOTH = "an answer: whole and in a stream; a call: whole and in a stream"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, BOTH),
        ({"opens": "<think>"}, BOTH),
        ({"opens": "<think>\n", "leaves_out": True}, BOTH),
        ({"of_calls": None}, "an answer: whole and in a stream"),
        ({"reads_streams": False}, "an answer: read whole, not in a stream; a call: read whole"),
        ({"leaves_out": True}, "an answer: not tried: the template leaves thoughts out; a call: "),
        ({"refuses": True}, "an answer: not tried: the template refuses a chat with thoughts"),
        ({"opens": "<ponder>"}, "an answer: not tried, for the template writes them otherwise"),
        ({"opens": "<think></think>", "leaves_out": True}, "an answer: not tried, for the"),
        ({"offered": False}, "an answer: not tried (HTTP 403"),
    ],
)
def test_thoughts_are_read_back(changes, said):
    found = thoughts(**changes)

    assert found.startswith(said)
    assert ("a call" in found) is ("of_calls" not in changes)


@pytest.mark.parametrize(
    ("opens", "leaves_out"), [("", False), ("<think>", False), ("<think>\n", True)]
)
def test_a_parser_that_leaves_thoughts_in_the_answer_is_named(opens, leaves_out):
    with pytest.raises(CheckFailed, match="makes the thoughts ''") as caught:
        thoughts(reads=False, opens=opens, leaves_out=leaves_out)
    assert "serve.reasoning_parser qwen3" in caught.value.hint


def test_a_parser_that_leaves_a_call_after_thoughts_in_the_answer_is_named():
    with pytest.raises(CheckFailed, match="and no call") as caught:
        thoughts(reads_calls=False)
    assert "serve.tool_parser hermes" in caught.value.hint
