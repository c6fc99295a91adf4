"""Probable answers, which a model reads some tokens at a time instead of writing them.

The merged model reads the adapter's answers and accepts each token that is also its own likeliest:
16 tokens, then up to 64 at a time while all are right, after a wrong one as many as were right.
Reading a token costs as much computing as writing one; only the passes are fewer. So a draft that
does not fit is not read on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FIRST, MOST = 16, 64
"""Tokens that are read at first, and at most: twice as many whenever all of them were right."""
_NEAR = 4
"""How far a text may have moved against its draft, in tokens, to be found in it again."""


def read_at_once(asked: int, draft: int) -> int:
    """Return how many tokens of a text a pass reads at most, with so many of question and draft."""
    return max(asked + min(draft, FIRST), min(draft, MOST) + 1)


@dataclass(slots=True)
class Draft:
    """A probable answer, and how much of it is worth reading next.

    Reading a token costs about as much as writing one. So after a wrong one, only as many are read
    as were right the last time; if that was none, the model's own next token must fit first.
    """

    tokens: Sequence[int] = ()
    _place: int = 0
    _window: int = FIRST

    def guess(self, most: int, ends: Sequence[int]) -> list[int]:
        """Return at most so many probable next tokens, without one that ends the answer.

        That one is known from the token before it.
        """
        some = self.tokens[self._place : self._place + min(self._window, most)]
        end = next((i for i, token in enumerate(some) if token in ends), len(some))
        return list(some[:end])

    def learn(self, guessed: int, right: int, token: int) -> None:
        """Go on behind the guessed tokens that were right and the model's own next one.

        It stands for the one that was wrong. If none was right, it may be elsewhere in the draft.
        """
        expected = self._place + right
        reach = 0 if right else _NEAR
        near = range(max(0, expected - reach), min(len(self.tokens), expected + reach + 1))
        fits = [place for place in near if self.tokens[place] == token]
        self._place = min(fits, key=lambda place: abs(place - expected), default=expected) + 1
        all_right = bool(fits) and right == guessed
        self._window = min(MOST, 2 * max(1, self._window)) if all_right else right
