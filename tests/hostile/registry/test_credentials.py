"""A registry names where tokens, blobs and uploads are: credentials and weights stay safe."""

from __future__ import annotations

import httpx
import pytest
from weightsmith.core.errors import WeightsmithError
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry


def answer(status: int, body: bytes = b"", **headers: str) -> httpx.Response:
    return httpx.Response(status, headers=headers, stream=httpx.ByteStream(body))


class Wire(httpx.BaseTransport):
    """A registry that asks for a token, and keeps what it and every other host was sent."""

    def __init__(self, realm: str, blob: str = "") -> None:
        self.realm, self.blob, self.seen = realm, blob, list[tuple[str, str]]()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        sent = request.headers.get("authorization", "")
        self.seen.append((str(request.url.copy_with(query=None)), sent))
        if "/token" in request.url.path:
            return answer(200, b'{"token": "hush"}')
        if sent != "Bearer hush":
            ask = f'Bearer realm="{self.realm}",service="x"'
            return answer(401, **{"WWW-Authenticate": ask})
        return answer(307, Location=self.blob)

    def ask(self, registry: str, *, insecure: bool = False) -> str:
        """Ask for an image; return why it was not had."""
        with Registry(
            transport=self,
            credentials=lambda _: ("ann", "s3cret"),
            insecure=insecure,
            pause=lambda _: None,
        ) as client, pytest.raises(WeightsmithError) as caught:  # fmt: skip
            client.pull(Reference.parse(f"{registry}/team/app:1"))
        return caught.value.message

    def in_clear(self) -> list[str]:
        """Return the other machines that were sent anything by plain HTTP."""
        return [url for url, _ in self.seen if url.startswith("http:") and "localhost" not in url]

    def told(self, host: str) -> list[str]:
        """Return the credentials that a host was sent."""
        return [sent for url, sent in self.seen if f"//{host}/" in url and sent]


@pytest.mark.parametrize("registry", ["localhost:5000", "registry.example"])
def test_a_token_service_without_https_gets_no_password(registry):
    """A registry, on loopback too, names a token service that is reached in clear: refused."""
    wire = Wire("http://tokens.example/token")
    why = wire.ask(registry)
    assert "http://tokens.example" in why
    assert not wire.in_clear()
    assert not wire.told("tokens.example")


def test_token_services_that_may_be_asked():
    """By HTTPS anywhere, as Docker does; in clear on loopback for loopback, or with --insecure."""
    for registry, realm, insecure in (
        ("registry.example", "https://tokens.example/token", False),
        ("localhost:5000", "https://tokens.example/token", False),
        ("localhost:5000", "http://localhost:5001/token", False),
        ("localhost:5000", "http://tokens.example/token", True),
        ("registry.example", "http://tokens.example/token", True),
    ):
        wire = Wire(realm, blob="ftp://nowhere.example/")
        assert "nowhere.example" in wire.ask(registry, insecure=insecure)
        assert any(url == realm and sent.startswith("Basic ") for url, sent in wire.seen)


@pytest.mark.parametrize("registry", ["localhost:5000", "registry.example"])
@pytest.mark.parametrize(
    "target",
    ["http://blobs.example/x", "http://registry.example/x", "http://169.254.169.254/latest/"],
)
def test_a_redirect_to_plain_http_is_refused(registry, target):
    """Neither a loopback registry nor one with HTTPS leads to another machine in clear."""
    wire = Wire(f"https://{registry}/token", blob=target)
    assert target.split("/")[2] in wire.ask(registry)
    assert not wire.in_clear()


def test_a_registry_with_https_does_not_lead_to_this_machine_in_clear():
    """What listens on loopback here is no business of a registry elsewhere."""
    wire = Wire("https://registry.example/token", blob="http://localhost:8080/admin")
    assert "http://localhost" in wire.ask("registry.example")
    assert not any("localhost" in url for url, _ in wire.seen)


def test_a_redirect_to_another_host_takes_no_credentials_along():
    """The token goes to the registry alone: not to where it redirects, nor to another port."""
    for target in ("https://blobs.example/x", "https://registry.example:8443/x"):
        wire = Wire("https://registry.example/token", blob=target)
        wire.ask("registry.example")
        assert (target, "") in wire.seen
        assert not wire.told(target.split("/")[2])


def test_a_token_service_that_redirects_is_not_followed():
    """The password was meant for the service that the registry named, and for no other."""

    class Moved(Wire):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            if "/token" not in request.url.path:
                return super().handle_request(request)
            return answer(307, Location="https://mallory.example/token")

    wire = Moved("https://tokens.example/token")
    assert "registry.example" in wire.ask("registry.example")
    assert not any("mallory" in url for url, _ in wire.seen)


@pytest.mark.parametrize("registry", ["localhost:5000", "registry.example"])
def test_an_upload_goes_on_nowhere_in_clear(registry):
    """Weights are not sent to an upload's place that is another machine without HTTPS."""

    class Opens(Wire):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            if request.method != "POST" or "authorization" not in request.headers:
                return super().handle_request(request)
            return answer(202, Location="http://blobs.example/upload")

    wire = Opens(f"https://{registry}/token")
    with (
        Registry(transport=wire, pause=lambda _: None) as client,
        pytest.raises(WeightsmithError, match=r"http://blobs\.example"),
    ):
        client.check_push(Reference.parse(f"{registry}/team/app:1"))
    assert not wire.in_clear()
