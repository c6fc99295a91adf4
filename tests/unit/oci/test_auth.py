"""Credentials as Docker keeps them, challenges as registries send them."""

import base64

import pytest
from weightsmith.core.errors import InputRefused
from weightsmith.oci.session import Challenge, credentials_in, parse_challenge


def _auth(text: str) -> dict[str, str]:
    return {"auth": base64.b64encode(text.encode()).decode()}


def test_docker_config():
    config = {
        "auths": {
            "r.example:5000": _auth("ann:a:b"),
            "https://index.docker.io/v1/": _auth("hub:pw"),
            "id.example": {"identitytoken": "refresh"},
            "plain.example": {"username": "u", "password": "p"},
            "both.example": {"username": "u", **_auth("ann:new"), "password": "old"},
            "empty.example": {},
            "end.example": {"auth": _auth("ann:pw")["auth"] + "\n"},
            "https://team.example/team": _auth("team:pw"),
            "team.example": _auth("ann:pw"),
        }
    }
    find = credentials_in(config)
    assert find("r.example:5000") == ("ann", "a:b")
    assert find("docker.io") == ("hub", "pw")
    assert find("id.example") == ("<token>", "refresh")
    assert find("plain.example") == ("u", "p")
    assert find("both.example") == ("ann", "new")
    assert find("empty.example") is None
    assert find("other.example") is None
    assert find("end.example") == ("ann", "pw")
    assert find("team.example") == ("ann", "pw"), "the host itself comes before addresses with it"


def test_helpers_come_first():
    asked = []

    def helper(program: str, server: str) -> tuple[str, str] | None:
        asked.append((program, server))
        return None if server == "b.example" else ("h", "s")

    config = {
        "credHelpers": {"a.example": "gcr"},
        "credsStore": "desktop",
        "auths": {"b.example": _auth("b:c")},
    }
    find = credentials_in(config, helper)
    assert find("a.example") == ("h", "s")
    assert find("b.example") == ("b", "c")
    assert find("docker.io") == ("h", "s")
    assert asked == [
        ("gcr", "a.example"), ("desktop", "b.example"), ("desktop", "https://index.docker.io/v1/"),
    ]  # fmt: skip


@pytest.mark.parametrize("auth", ["c2VjcmV0*", 7, ["c2VjcmV0"]])
def test_a_damaged_entry_is_not_shown(auth):
    for entry in ({"auth": auth}, auth):
        with pytest.raises(InputRefused, match=r"r\.example") as caught:
            credentials_in({"auths": {"r.example": entry}})("r.example")
        assert "c2VjcmV0" not in str(caught.value)


@pytest.mark.parametrize(
    "written",
    ["r.example:5000", "https://r.example:5000", "http://r.example:5000/", "r.example:5000/team",
     "https://r.example:5000/v1/"],
)  # fmt: skip
def test_addresses_are_read_as_docker_reads_them(written):
    find = credentials_in({"auths": {"other.example": _auth("x:y"), written: _auth("ann:pw")}})
    assert find("r.example:5000") == ("ann", "pw")
    assert find("r.example") is None


def test_lists_where_tables_belong_hold_nothing():
    find = credentials_in({"auths": ["r.example"], "credHelpers": ["r.example"]}, lambda *_: None)
    assert find("r.example") is None


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        (
            ['Bearer realm="https://a/t",service="s",scope="x,y"'],
            Challenge("bearer", "https://a/t", "s"),
        ),
        (["bearer Realm = https://a/t , service=s"], Challenge("bearer", "https://a/t", "s")),
        (['BASIC realm="r"'], Challenge("basic")),
        (['Basic realm="r"', 'Bearer realm="https://a/t"'], Challenge("bearer", "https://a/t")),
        (["Negotiate"], None),
        ([], None),
    ],
)
def test_challenges(headers, found):
    assert parse_challenge(headers) == found
