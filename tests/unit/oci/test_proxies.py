"""Proxies are taken as Docker takes them from the environment."""

from __future__ import annotations

import ssl

import httpx
import pytest
from weightsmith.core.errors import EnvironmentFailure
from weightsmith.oci.connections import ProxyTransport, proxy_of

PROXY = "http://proxy.corp:3128"


@pytest.mark.parametrize(
    ("url", "rules", "direct"),
    [
        ("https://ghcr.io/v2/", "", False),
        ("https://ghcr.io/v2/", "*", True),
        ("https://ghcr.io/v2/", "hcr.io", False),
        ("https://eu.ghcr.io/v2/", "ghcr.io", True),
        ("https://ghcr.io/v2/", " quay.io , GHCR.io", True),
        ("https://ghcr.io/v2/", ".ghcr.io", False),
        ("https://eu.ghcr.io/v2/", ".ghcr.io", True),
        ("https://eu.ghcr.io/v2/", "*.ghcr.io", True),
        ("https://ghcr.io/v2/", "ghcr.io:443", True),
        ("https://ghcr.io:5000/v2/", "ghcr.io:443", False),
        ("https://10.1.2.3:5000/v2/", "10.0.0.0/8", True),
        ("https://11.1.2.3:5000/v2/", "10.0.0.0/8", False),
        ("https://10.1.2.3:5000/v2/", "10.1.2.3", True),
        ("https://10.1.2.3:5000/v2/", "10.1.2.3:5000", True),
        ("https://[fd00::5]:5000/v2/", "localhost,::1,fd00::/8", True),
        ("https://[fd00::5]:5000/v2/", "[fd00::5]:5000", True),
        ("https://[fd00::5]/v2/", "fe80::/10, [::1]:1, http://, :5, a b", False),
        ("http://127.0.0.7:5000/v2/", "", True),
        ("http://registry.localhost:5000/v2/", "", True),
        ("http://[::1]:5000/v2/", "", True),
    ],
)
def test_which_way(url: str, rules: str, direct: bool) -> None:
    names = {"http": PROXY, "https": PROXY, "no": rules}
    assert proxy_of(httpx.URL(url), names) == ("" if direct else PROXY)


def test_which_proxy() -> None:
    url = httpx.URL("https://ghcr.io/")
    assert proxy_of(url, {"https": "proxy.corp:3128"}) == PROXY
    assert proxy_of(url, {"http": PROXY}) == ""
    assert proxy_of(url, {"all": PROXY}) == PROXY


@pytest.mark.parametrize(
    "proxy", ["socks5://u:hush@127.0.0.1:9", "ftp://u:hush@x", "http://u:hush@proxy:port", "x:y"]
)
def test_one_that_cannot_be_used_is_an_error_when_it_is_needed(proxy: str) -> None:
    way = ProxyTransport(ssl.create_default_context(), {"all": proxy})
    with httpx.Client(transport=way) as client, pytest.raises(EnvironmentFailure) as caught:
        client.get("https://registry.invalid/v2/")
    assert "hush" not in f"{caught.value} {caught.value.hint}"
