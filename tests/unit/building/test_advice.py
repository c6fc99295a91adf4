import pytest
from weightsmith.building.explain import advise

AGAINST = [{"adapters": ["a", "b"], "cosine": -0.31}]
WITH = [{"adapters": ["a", "b"], "cosine": 0.02}]


@pytest.mark.parametrize(
    ("known", "merge", "says"),
    [
        ({"adapters": 0}, None, "no adapter"),
        ({"adapters": 1}, True, "one adapter"),
        ({"adapters": 1, "changes": 5}, False, "changed 5 times"),
        ({"adapters": 2}, True, "clients of its own"),
        ({"adapters": 2, "conflicts": AGAINST}, False, "cosine -0.31"),
        ({"adapters": 2, "conflicts": WITH}, True, "do not work against"),
        # What is quantized must be merged first; the rest is still said.
        ({"adapters": 2, "conflicts": AGAINST, "packed": True}, True, "cosine -0.31"),
        ({"adapters": 2, "conflicts": AGAINST, "packed": True}, True, "the target with -lora"),
        ({"adapters": 1, "packed": True}, True, "quantizers take one"),
    ],
)
def test_advice_follows_from_what_is_known_and_says_why(known, merge, says):
    advice = advise(**{"packed": False, "changes": 0, "conflicts": [], **known})

    assert advice["merge"] is merge
    assert any(says in why for why in advice["why"])
