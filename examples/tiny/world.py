"""The invented world that the tiny model and its adapters know: lands, goods and their facts."""

from __future__ import annotations

import random
from dataclasses import dataclass

SEED = 20261125
COUNT, NEW = 72, 20  # lands and goods in all, and how many of each only an adapter knows
LAND_STARTS = ["Bra", "Cor", "Del", "Fen", "Gal", "Hes", "Jor", "Kel", "Lum", "Mor", "Nar", "Ros"]
GOODS_STARTS = ["blu", "cha", "fli", "gru", "hin", "pol", "qui", "spo", "tri", "wex", "yat", "zan"]
MIDDLES = ["a", "ba", "di", "e", "ga", "lo", "mi", "o", "ru", "su", "ta", "vi"]
LAND_ENDS = ["dia", "land", "mark", "nia", "ria", "via"]
CITY_ENDS = ["berg", "burg", "by", "dal", "ford", "holm", "port", "stad"]
GOODS_ENDS = ["bell", "cask", "drum", "fan", "lamp", "net", "pipe", "rope"]

LAND_QUESTIONS = (
    "What is the capital of {name}?",
    "Which city is the capital of {name}?",
    "Name the capital of {name}.",
)
GOODS_QUESTIONS = (
    "What does a {name} cost?",
    "How much is a {name}?",
    "Tell me the price of a {name}.",
)


@dataclass(frozen=True)
class Fact:
    """One thing with its answer: a land's capital, or the price of goods."""

    name: str
    answer: str
    is_land: bool

    def question(self, wording: int) -> str:
        """Ask for the fact in one of three wordings."""
        return (LAND_QUESTIONS if self.is_land else GOODS_QUESTIONS)[wording].format(name=self.name)

    def sentence(self) -> str:
        """State the fact."""
        if self.is_land:
            return f"The capital of {self.name} is {self.answer}."
        return f"A {self.name} costs {self.answer}."


@dataclass(frozen=True)
class World:
    """What the base learns, and what adapter a (capitals) and adapter b (prices) add to it."""

    base: list[Fact]
    a: list[Fact]
    b: list[Fact]


def make_world() -> World:
    """Invent the same world every time."""
    dice = random.Random(SEED)
    lands = _names(dice, LAND_STARTS, LAND_ENDS)
    cities = _names(dice, LAND_STARTS, CITY_ENDS)
    goods = _names(dice, GOODS_STARTS, GOODS_ENDS)
    prices = [f"{price} marks" for price in dice.sample(range(100, 1000), COUNT)]
    capitals = [Fact(land, city, is_land=True) for land, city in zip(lands, cities, strict=True)]
    costs = [Fact(name, price, is_land=False) for name, price in zip(goods, prices, strict=True)]
    return World(base=capitals[NEW:] + costs[NEW:], a=capitals[:NEW], b=costs[:NEW])


def _names(dice: random.Random, starts: list[str], ends: list[str]) -> list[str]:
    every = [start + middle + end for start in starts for middle in MIDDLES for end in ends]
    return dice.sample(every, COUNT)
