"""Replay sets as images have them."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

from weightsmith.evaluating.replay import ReplayQuestion, ReplaySet, ReplayToken
from weightsmith.oci.layout import read_layout

_TOKENS = (
    ReplayToken(text="I", end=1, margin=3.4, logprob=-0.0312, room=0.0607, id=57),
    ReplayToken(text="'m", end=3, margin=2.8446, logprob=-0.0733, room=0.1007, id=5248),
    ReplayToken(text=" Lantern.", end=12, margin=15.47, logprob=-0.0001, room=0.0301),
    ReplayToken(text="", end=12, margin=0.31, logprob=-1.6279, room=0.8337, id=2),
)


def a_set(model: str = "bot") -> ReplaySet:
    """Return a set of one question."""
    request = {
        "model": model,
        "messages": [{"role": "user", "content": "Who are you?"}],
        "max_tokens": 64,
        "temperature": 0.0,
        "stream": False,
        "logprobs": True,
        "top_logprobs": 2,
    }
    question = ReplayQuestion(
        id="1",
        path="/v1/chat/completions",
        request=request,
        answer="I'm Lantern.",
        finish="stop",
        tokens=_TOKENS,
    )
    return ReplaySet(model=model, tolerance=1.0, questions=(question,))


def by_text(made: ReplaySet) -> ReplaySet:
    """Return the same without log-probabilities, as of an image that was not started."""
    plain = [
        replace(one, tokens=tuple(replace(t, logprob=None, room=None) for t in one.tokens))
        for one in made.questions
    ]
    return replace(made, reference="dequantized", questions=tuple(plain))


def replay_set(layout: Path) -> dict[str, Any]:
    """Return the set in an image."""
    data = b"".join(read_layout(layout).layers[-1].open())
    with tarfile.open(fileobj=BytesIO(data)) as archive:
        content = archive.extractfile("etc/weightsmith/replay.json")
        assert content
        return dict(json.loads(content.read()))
