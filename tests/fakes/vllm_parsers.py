"""Program for the engine's packages: reads calls back with vLLM's own parsers.

{"template", "marks", "parser", "chats", "tools", "tokenizer"} a line -> the calls of each chat,
read whole and read token by token, or the error.
"""

import json
import sys

from transformers import AutoTokenizer
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.tool_parsers import ToolParserManager


def calls_of(found):
    return [[c.function.name, json.loads(c.function.arguments)] for c in found or []]


def whole(parser, text, request):
    return calls_of(parser.extract_tool_calls(text, request).tool_calls)


def streamed(parser, ids, tokenizer, request):
    """Put the pieces together that a client gets."""
    names, arguments, before, seen, new = {}, {}, "", [], []
    for one in ids:
        new.append(one)
        now = tokenizer.decode([*seen, *new], skip_special_tokens=False)
        if now.endswith("\ufffd"):  # a letter that is not whole yet: servers wait for the rest
            continue
        delta = parser.extract_tool_calls_streaming(
            before, now, now[len(before) :], seen, [*seen, *new], new, request
        )
        before, seen, new = now, [*seen, *new], []
        for call in (delta.tool_calls if delta else None) or []:
            if call.function and call.function.name:
                names[call.index] = call.function.name
            if call.function and call.function.arguments:
                arguments[call.index] = arguments.get(call.index, "") + call.function.arguments
    return [[names[n], json.loads(arguments.get(n) or "{}")] for n in sorted(names)]


def tried(read, parser):
    try:
        return read(parser)
    except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
        return f"{type(error).__name__}: {error}"


def tell(asked):
    tokenizer = AutoTokenizer.from_pretrained(asked["tokenizer"])
    tokenizer.add_tokens(asked["marks"], special_tokens=False)
    tokenizer.chat_template = asked["template"]
    kind = ToolParserManager.get_tool_parser(asked["parser"])
    request = ChatCompletionRequest(
        model="m", messages=[{"role": "user", "content": "x"}], tools=asked["tools"]
    )
    told = []
    for chat in asked["chats"]:
        prompt = tokenizer.apply_chat_template(
            chat[:-1], tools=asked["tools"], tokenize=False, add_generation_prompt=True
        )
        text = tokenizer.apply_chat_template(chat, tools=asked["tools"], tokenize=False)
        assert text.startswith(prompt), [prompt, text]
        text = text[len(prompt) :]
        ids = tokenizer.encode(text, add_special_tokens=False)
        row = {
            "text": text,
            "whole": tried(lambda p, t=text: whole(p, t, request), kind(tokenizer, request.tools)),
            "streamed": tried(
                lambda p, i=ids: streamed(p, i, tokenizer, request), kind(tokenizer, request.tools)
            ),
        }
        told.append(row)
    return told


for line in sys.stdin:
    print("TOLD " + json.dumps(tell(json.loads(line))), flush=True)  # noqa: T201 - what the test reads
