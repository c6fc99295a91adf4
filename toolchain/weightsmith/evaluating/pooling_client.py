"""Asking a server for what models that do not chat say: vectors, labels, scores of documents.

OpenAI's /v1/embeddings, Jina's and Cohere's /v1/rerank, vLLM's /classify and /pooling; llama.cpp
has the first two. An answer that is none is the question's fault: others may be answered.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from weightsmith.core.jobs import Pooled, words_text
from weightsmith.core.safe_parse import parse
from weightsmith.core.values import Json, JsonValue
from weightsmith.core.vectors import packed
from weightsmith.evaluating.client import require_model
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.session import ServerSession, excerpt

Row = Mapping[str, JsonValue]
"""`answer`, in the reference's form, and `prompt_tokens` if they are known."""
_PATHS: Mapping[Pooled, str] = {
    "vectors": "/v1/embeddings",
    "relevance": "/v1/rerank",
    "label": "/classify",
    "label-set": "/classify",
    "word-labels": "/pooling",
}
_ELSEWHERE = frozenset({401, 403, 404, 429, 502, 503, 504})
"""Not of the question: of the address, of the key, or of a server that is busy."""
_TRUE = 0.5
"""The probability above which a label of a set counts as given."""
_MALFORMED = (ArithmeticError, LookupError, TypeError, ValueError, AttributeError)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingClient:
    """Asks a server's model about one text at a time."""

    session: ServerSession
    name: str
    """The model's."""
    pooled: Pooled
    prompts: tuple[str, str] = ("", "")
    """Put before queries and documents."""
    labels: tuple[str, ...] = ()
    """The model's, in order; a server names the likeliest one of a text alone."""

    def ask(self, item: Item) -> Row:
        """Return what the server says of a text.

        Raises Unanswered for a text that it refuses, or if what it says is not what was asked for;
        CheckFailed if the server fails.
        """
        try:
            match self.pooled:
                case "vectors":
                    return self._vector(item)
                case "relevance":
                    return self._relevance(item)
                case "label" | "label-set":
                    return self._label(item)
                case _:
                    return self._word_labels(item)
        except _MALFORMED as error:
            said = isinstance(error, ValueError | TypeError)
            why = str(error) if said else f"{type(error).__name__}: {error}"
            raise self.session.unanswered(_PATHS[self.pooled], excerpt(why)) from None

    def request(self, item: Item) -> tuple[str, dict[str, JsonValue]]:
        """Return the path and the body that ask about a text."""
        return request_of(self.name, self.pooled, self.prompts, item)

    def _vector(self, item: Item) -> Row:
        answer = self._posted(item)
        (row,) = answer["data"]
        numbers = [_finite(number) for number in row["embedding"]]
        if not any(numbers):
            raise ValueError("the vector is empty or zero")
        return {"answer": packed(numbers), **_counted(answer)}

    def _relevance(self, item: Item) -> Row:
        count, answer = len(item.parts), self._posted(item)
        found = {row["index"]: _finite(row["relevance_score"]) for row in answer["results"]}
        if len(answer["results"]) != count or found.keys() != set(range(count)):
            raise ValueError(f"the response does not score each of {count} documents once")
        return {
            "answer": " ".join(repr(found[place]) for place in range(count)),
            **_counted(answer),
        }

    def _label(self, item: Item) -> Row:
        answer = self._posted(item)
        (row,) = answer["data"]
        numbers = [_finite(number) for number in row["probs"]]
        if self.pooled == "label-set":
            if len(numbers) != len(self.labels):
                raise ValueError(f"the response does not have {len(self.labels)} numbers")
            true = [name for name, one in zip(self.labels, numbers, strict=True) if one > _TRUE]
            return {"answer": json.dumps(true), **_counted(answer)}
        if not isinstance(row["label"], str):
            raise TypeError("the response names no label")
        return {"answer": row["label"], **_counted(answer)}

    def _word_labels(self, item: Item) -> Row:
        answer = self._posted(item)
        (row,) = answer["data"]
        tokens = [[_finite(number) for number in token] for token in row["data"]]
        ends = [self._count(text) for text in accumulate(item.parts, "{} {}".format)]
        # Special tokens: as many before the text as behind it, or one more.
        first = (len(tokens) - ends[-1] + 1) // 2
        if len(tokens) < ends[-1] or len({len(self.labels), *map(len, tokens)}) > 1:
            raise ValueError(f"the response does not have {len(self.labels)} numbers per token")
        best = [max(range(len(token)), key=token.__getitem__) for token in tokens]
        said = [self.labels[best[first + place]] for place in (0, *ends[:-1])]
        return {"answer": words_text(said), **_counted(answer)}

    def _count(self, text: str) -> int:
        """Return the number of a text's tokens, without special ones, by vLLM's tokenizer."""
        body: JsonValue = {"model": self.name, "prompt": text, "add_special_tokens": False}
        return len(self.session.post("/tokenize", body)["tokens"])

    def _posted(self, item: Item) -> Mapping[str, Json]:
        path, body = self.request(item)
        answer = self.session.try_post(path, body)
        if answer.status in _ELSEWHERE:
            return self.session.post(path, body)  # which tries again, or says what is wrong
        if answer.status != 200:
            raise ValueError(f"HTTP {answer.status}: {excerpt(answer.text)}")
        value: Json = parse(answer.text)
        if not isinstance(value, dict):
            raise TypeError(f"the response is not a JSON object: {excerpt(answer.text)}")
        require_model(self.session, path, value, self.name)
        return value


def request_of(
    name: str, pooled: Pooled, prompts: tuple[str, str], item: Item
) -> tuple[str, dict[str, JsonValue]]:
    """Return the path and the body that ask a model of this name about a text."""
    body: dict[str, JsonValue] = {"model": name}
    match pooled:
        case "vectors":
            text = prompts[item.messages[0]["role"] == "document"] + item.prompt
            body |= {"input": text, "encoding_format": "float"}
        case "relevance":
            documents = list(item.parts)
            body |= {"query": item.prompt, "documents": documents, "top_n": len(documents)}
        case _:
            body |= {"input": item.prompt}
    return _PATHS[pooled], body


def _finite(number: Json) -> float:
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise ValueError(f"{json.dumps(number)[:40]} is not a finite number")
    return float(number)


def _counted(answer: Mapping[str, Json]) -> Row:
    usage = answer.get("usage")
    counted = usage.get("prompt_tokens") if isinstance(usage, Mapping) else None
    return {"prompt_tokens": counted} if type(counted) is int else {}
