"""A server that renders calls and reads its own tokens back, as vLLM does, and what goes wrong."""

import json

import pytest
from weightsmith.core.errors import CheckFailed
from weightsmith.evaluating.client import Served
from weightsmith.evaluating.round_trip import read_back
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
        ({"most_calls": 1}, "a call; two calls: refused by the template"),
        ({"most_calls": 0}, "a call: refused by the template"),
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
