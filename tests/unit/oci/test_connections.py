"""Proxies are taken as Docker takes them from the environment; authorities are read once."""

from __future__ import annotations

import ssl
from pathlib import Path

import certifi
import httpx
import pytest
from weightsmith.core.errors import EnvironmentFailure
from weightsmith.oci.connections import ProxyTransport, proxy_of, trusted

PROXY = "http://proxy.corp:3128"
END = "-----END CERTIFICATE-----\n"


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
def test_which_way(url, rules, direct):
    names = {"http": PROXY, "https": PROXY, "no": rules}
    assert proxy_of(httpx.URL(url), names) == ("" if direct else PROXY)


def test_which_proxy():
    url = httpx.URL("https://ghcr.io/")
    assert proxy_of(url, {"https": "proxy.corp:3128"}) == PROXY
    assert proxy_of(url, {"http": PROXY}) == ""
    assert proxy_of(url, {"all": PROXY}) == PROXY


@pytest.mark.parametrize(
    "proxy", ["socks5://u:hush@127.0.0.1:9", "ftp://u:hush@x", "http://u:hush@proxy:port", "x:y"]
)
def test_one_that_cannot_be_used_is_an_error_when_it_is_needed(proxy):
    way = ProxyTransport(ssl.create_default_context(), {"all": proxy})
    with httpx.Client(transport=way) as client, pytest.raises(EnvironmentFailure) as caught:
        client.get("https://registry.invalid/v2/")
    assert "hush" not in f"{caught.value} {caught.value.hint}"


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """A file with one authority's certificate."""
    path = tmp_path / "one.pem"
    path.write_text(Path(certifi.where()).read_text().partition(END)[0] + END)
    return path


def test_clients_of_the_same_authorities_share_a_context(one):
    first = trusted()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(one))
        patch.setenv("SSL_CERT_DIR", str(one.parent))
        other = trusted()

    assert other.cert_store_stats()["x509_ca"] == 1
    assert other.verify_mode == ssl.CERT_REQUIRED
    assert other.check_hostname
    assert trusted() is first


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_a_bundle_of_other_programs_is_trusted(one, monkeypatch, variable):
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(one))
    assert trusted().cert_store_stats()["x509_ca"] == 1
    monkeypatch.setenv("SSL_CERT_FILE", certifi.where())
    assert trusted().cert_store_stats()["x509_ca"] > 1
    monkeypatch.delenv("SSL_CERT_FILE")
    monkeypatch.setenv(variable, str(one.with_name("none.pem")))
    assert trusted().cert_store_stats()["x509_ca"] > 1
    monkeypatch.setenv(variable, __file__)
    with pytest.raises(EnvironmentFailure, match="certificates cannot be read"):
        trusted()
