"""Program for SGLang's code and vLLM's packages: reads calls and thoughts back with its parsers.

{"template", "marks", "parsers", "chats", "tools", "tokenizer"} a line -> by parser the calls of
each chat, read whole and in pieces, or the error. {"thoughts": parser, "texts", "marks",
"template"} -> thoughts and answer of each text, read whole and in pieces.
"""

import json
import sys

from sglang.srt.entrypoints.openai.protocol import Tool
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.srt.parser.reasoning_parser import ReasoningParser
from sglang.srt.parser.template_detection import detect_reasoning_pattern
from transformers import AutoTokenizer

PIECE = 4
"""Letters that come at a time: a mark that is one token comes whole, as from a server."""


def pieces(text, marks):
    """Yield a text in pieces; what is one token for the tokenizer is one of them."""
    while text:
        mark = next((one for one in marks if text.startswith(one)), "")
        places = [text.find(one) for one in marks if one in text]
        size = len(mark) or min([PIECE, *places, len(text)])
        yield text[:size]
        text = text[size:]


def whole(parser, text):
    _, calls = parser.parse_non_stream(text)
    return [[one.name, json.loads(one.parameters)] for one in calls]


def streamed(parser, parts):
    """Put the pieces together that a client gets."""
    names, given = {}, {}
    every = [call for part in parts for call in parser.parse_stream_chunk(part)[1]]
    for call in [*every, *parser.parse_stream_end()[1]]:
        if call.name:
            names[call.tool_index] = call.name
        given[call.tool_index] = given.get(call.tool_index, "") + (call.parameters or "")
    return [[names[n], json.loads(given.get(n) or "{}")] for n in sorted(names)]


def tried(read):
    try:
        return read()
    except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
        return f"{type(error).__name__}: {error}"


def calls(asked):
    tokenizer = AutoTokenizer.from_pretrained(asked["tokenizer"])
    tokenizer.add_tokens(asked["marks"], special_tokens=False)
    tokenizer.chat_template = asked["template"]
    tools = [Tool(**one) for one in asked["tools"]]
    told = {name: [] for name in asked["parsers"]}
    for chat in asked["chats"]:
        prompt = tokenizer.apply_chat_template(
            chat[:-1], tools=asked["tools"], tokenize=False, add_generation_prompt=True
        )
        text = tokenizer.apply_chat_template(chat, tools=asked["tools"], tokenize=False)
        assert text.startswith(prompt), [prompt, text]
        text = text[len(prompt) :]
        parts = list(pieces(text, asked["marks"]))
        for name in told:

            def parser(name=name):
                return FunctionCallParser(tools, name, tokenizer=tokenizer)

            told[name].append(
                {
                    "text": text,
                    "whole": tried(lambda p=parser, t=text: whole(p(), t)),
                    "streamed": tried(lambda p=parser, s=parts: streamed(p(), s)),
                }
            )
    return told


def thoughts(asked, text):
    always, switch = detect_reasoning_pattern(asked["template"])
    opened = always or bool(switch and switch.default_enabled)  # as its server decides

    def parser():
        return ReasoningParser(asked["thoughts"], force_reasoning=opened or None)

    def in_pieces():
        one, said = parser(), ["", ""]
        parts = map(one.parse_stream_chunk, pieces(text, asked["marks"]))
        for found in [*parts, one.parse_stream_end()]:
            said = [before + (new or "") for before, new in zip(said, found, strict=True)]
        return [text.strip() for text in said]

    return {
        "whole": tried(lambda: [(one or "").strip() for one in parser().parse_non_stream(text)]),
        "streamed": tried(in_pieces),
    }


def tell(asked):
    if "thoughts" in asked:
        return [thoughts(asked, text) for text in asked["texts"]]
    return calls(asked)


for line in sys.stdin:
    print("TOLD " + json.dumps(tell(json.loads(line))), flush=True)  # noqa: T201 - what the test reads
