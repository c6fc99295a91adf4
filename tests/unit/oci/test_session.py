"""The conversation with a registry: credentials, redirects, proxies, limits, retries."""

from __future__ import annotations

import base64
import socket

import pytest
from weightsmith.core.errors import EnvironmentFailure, InputRefused
from weightsmith.oci.image import Image
from weightsmith.oci.layers import Member, TarLayer
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry
from weightsmith.oci.session import Challenge, RegistrySession, credentials_in, parse_challenge

from tests.fakes.registry import at, fake_registry


@pytest.mark.parametrize("kind", ["reset", "429", "500", "503"])
@pytest.mark.parametrize(
    "place", ["HEAD /blobs/", "POST /uploads/", "PUT /uploads/", "PUT /manifests/"]
)
def test_a_bad_moment_is_survived(fake, client, image, pauses, kind, place):
    method, path = place.split()
    fake.faults = [(method, path, kind)] * 2
    seen: list[int] = []
    client.push(image, at(fake), progress=lambda done, _: seen.append(done))
    assert len(pauses) == 2
    assert seen[-1] == sum(layer.size for layer in image.layers)
    if kind == "429":
        assert pauses == [7, 7]
    assert client.digest_of(at(fake)) == image.digest


@pytest.mark.parametrize("status", ["405", "501"])
def test_a_proxy_that_passes_no_head_on(fake, client, image, status):
    """What HEAD would say is in GET's headers; no layer is read for it, and none is sent twice."""
    fake.faults = [("HEAD", "/", status)] * 100
    client.push(image, at(fake))
    assert client.push(image, at(fake)).uploaded_bytes == 0
    assert client.digest_of(at(fake)) == image.digest
    assert client.digest_of(Reference.parse(f"{fake.host}/team/app:none")) is None


def test_patience_ends_and_a_full_registry_is_not_asked_again(fake, client, image, pauses):
    fake.faults = [("PUT", "/uploads/", "full")] * 100
    with pytest.raises(EnvironmentFailure, match="HTTP 500") as caught:
        client.push(image, at(fake))
    assert "full" in caught.value.hint
    assert not pauses
    fake.faults = [("PUT", "/uploads/", "500")] * 100
    with pytest.raises(EnvironmentFailure, match=r"HTTP 500.*bad moment") as caught:
        client.push(image, at(fake))
    assert fake.host in caught.value.message
    assert "disk space" in caught.value.hint
    assert ("team/app", "1") not in fake.manifests
    assert len(pauses) >= 5


@pytest.mark.parametrize("kind", ["basic", "bearer"])
def test_signed_in(fake, image, kind):
    fake.auth = kind
    asked: list[str] = []

    def credentials(host: str) -> tuple[str, str]:
        asked.append(host)
        return fake.user, fake.password

    with Registry(credentials=credentials) as client:
        client.push(image, at(fake), mount_from=["team/base"])
        assert client.digest_of(at(fake)) == image.digest
    assert set(asked) == {fake.host}
    if kind == "bearer":
        token = next(path for method, path in fake.log if "/token" in path)
        assert "scope=repository%3Ateam%2Fapp%3Apull%2Cpush" in token
        assert "scope=repository%3Ateam%2Fbase%3Apull" in token


@pytest.mark.parametrize("lasts", [300, 10**400])
def test_an_anonymous_token(fake, client, image, lasts):
    fake.auth, fake.token_lasts = "bearer", lasts
    client.push(image, at(fake))
    assert fake.tokens_given == 1


def test_an_identity_token(fake, image):
    fake.auth = "bearer"
    with Registry(credentials=lambda _: ("<token>", fake.password)) as client:
        client.push(image, at(fake))
    assert ("POST", "/token") in fake.log


def test_a_token_that_ends_in_the_middle(fake, image, tmp_path):
    fake.auth = "bearer"
    (tmp_path / "w").write_bytes(bytes(3 << 20))
    layer = TarLayer(members=(Member.of_file("/w", tmp_path / "w"),))

    class Slow:
        digest, diff_id, size = layer.digest, layer.diff_id, layer.size
        media_type, file, annotations = layer.media_type, layer.file, layer.annotations

        def open(self) -> object:
            if fake.tokens_given == 1:
                fake.expire_tokens()
            return layer.open()

    with Registry(pause=lambda _: None) as client:
        client.push(Image(layers=(Slow(), *image.layers), settings=image.settings), at(fake))
    assert fake.tokens_given == 2


@pytest.mark.parametrize("kind", ["basic", "bearer"])
def test_a_wrong_password_is_named_but_not_shown(fake, image, kind):
    fake.auth = kind
    with Registry(credentials=lambda _: ("ann", "wr0ng")) as client:
        for act in (lambda: client.push(image, at(fake)), lambda: client.check_push(at(fake))):
            with pytest.raises(EnvironmentFailure, match="401") as caught:
                act()
            assert "docker login" in caught.value.hint
            assert "wr0ng" not in str(caught.value)


def test_leave_to_push_is_asked_for_and_leaves_nothing(fake, client):
    client.check_push(at(fake))
    client.check_push(at(fake, "team/other:1"))  # the same holds beside it
    assert [method for method, _ in fake.log] == ["POST", "DELETE"]
    client.check_push(at(fake, "others/app:1"))
    assert len(fake.log) == 4
    assert not fake.uploads


def test_a_first_look_is_short(client, image, pauses):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        place = Reference.parse(f"127.0.0.1:{closed.getsockname()[1]}/a/b:1")
        with pytest.raises(EnvironmentFailure, match=r"does not answer.*refused"):
            client.check_push(place)
        assert sum(pauses) < 2
        with pytest.raises(EnvironmentFailure, match=r"does not answer.*refused"):
            client.push(image, place)


@pytest.mark.parametrize(("status", "kind"), [("403", EnvironmentFailure), ("404", InputRefused)])
def test_refusals_name_host_and_status(fake, client, status, kind):
    fake.faults = [("GET", "/manifests/", status)]
    with pytest.raises(kind, match=status) as caught:
        client.pull(at(fake))
    assert fake.host in caught.value.message
    assert caught.value.hint


def test_no_secret_in_a_message(fake, image):
    fake.auth = "bearer"
    fake.faults = [("PUT", "/uploads/", "403")] * 9
    with (
        Registry(credentials=lambda _: (fake.user, fake.password)) as client,
        pytest.raises(EnvironmentFailure, match=r"bad moment \*\*\*") as caught,
    ):
        client.push(image, at(fake))
    assert "hush" not in str(caught.value)


def test_a_proxy_is_not_asked_for_this_machine(fake, image, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "localhost,::1,fd00::/8")
    with Registry(pause=lambda _: None) as client:
        client.push(image, at(fake))
        client.push(image, Reference.parse(f"LocalHost:{fake.host[10:]}/team/app:2"))


def test_a_proxy_is_asked_for_others(monkeypatch):
    with fake_registry() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        with Registry(insecure=True, pause=lambda _: None) as client:
            place = Reference.parse("registry.invalid/a/b:1")
            assert client.digest_of(place) is None
        assert "registry.invalid" in proxy.log[0][1]


@pytest.mark.parametrize(
    "address", ["http://[/", "http://127.0.0.1:99999/", f"http://{'a' * 64}.localhost/"]
)
def test_invalid_urls(fake, client, image, address):
    fake.faults = [("GET", "/manifests/", f"redirect:{address}")]
    with pytest.raises(EnvironmentFailure, match="an invalid URL"):
        client.pull(at(fake))
    fake.faults = [("POST", "/uploads/", f"place:{address}")] * 9
    with pytest.raises(EnvironmentFailure, match="an invalid URL"):
        client.push(image, at(fake))


def test_redirects_are_followed_but_no_loops_and_other_schemes(fake, client, image):
    fake.faults = [("POST", "/uploads/", f"redirect:{fake.url}/v2/team/app/blobs/uploads/")]
    client.push(image, at(fake))
    fake.faults = [("GET", "/manifests/", f"redirect:{fake.url}/v2/team/app/manifests/1")] * 20
    with pytest.raises(EnvironmentFailure, match="loop"):
        client.pull(at(fake))
    fake.faults = [("GET", "/manifests/", "redirect:file:///etc/passwd")]
    with pytest.raises(EnvironmentFailure, match="redirects"):
        client.pull(at(fake))


def test_huge_manifests_are_not_read(fake, client):
    fake.manifests["team/app", "1"] = ("application/json", b" " * (5 << 20))
    with pytest.raises(InputRefused, match="more than"):
        client.pull(at(fake))


def test_https_unless_loopback_or_insecure():
    def root(text: str, **options: bool) -> str:
        reference = Reference.parse(text)
        return RegistrySession(
            None, reference, actions="pull", credentials=lambda _: None, **options
        ).root

    assert root("ubuntu") == "https://registry-1.docker.io"
    assert root("r.example/a") == "https://r.example"
    assert root("localhost:5000/a") == "http://localhost:5000"
    assert root("r.example/a", insecure=True) == "http://r.example"


def test_a_long_refusal_is_reported_by_its_beginning(fake, client, image):
    """CUE Labs' server puts the whole blob into its message."""
    fake.trouble = "x" * (1 << 20)
    fake.faults = [("PUT", "/uploads/", "403")] * 9
    with pytest.raises(EnvironmentFailure, match="HTTP 403"):
        client.push(image, at(fake))


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
