"""Contexts of TLS: read once for the same authorities, and none read where none is asked."""

from __future__ import annotations

import ssl
from pathlib import Path

import certifi
import pytest
from weightsmith.core.errors import EnvironmentFailure
from weightsmith.oci.connections import trusted, unverified

END = "-----END CERTIFICATE-----\n"


def test_clients_of_the_same_authorities_share_a_context(tmp_path: Path) -> None:
    one = tmp_path / "one.pem"
    one.write_text(Path(certifi.where()).read_text().partition(END)[0] + END)
    first = trusted()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(one))
        patch.setenv("SSL_CERT_DIR", str(tmp_path))
        other = trusted()

    assert other.cert_store_stats()["x509_ca"] == 1
    assert other.verify_mode == ssl.CERT_REQUIRED
    assert other.check_hostname
    assert trusted() is first


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_a_bundle_of_other_programs_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    one = tmp_path / "one.pem"
    one.write_text(Path(certifi.where()).read_text().partition(END)[0] + END)
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(one))
    assert trusted().cert_store_stats()["x509_ca"] == 1
    monkeypatch.setenv("SSL_CERT_FILE", certifi.where())
    assert trusted().cert_store_stats()["x509_ca"] > 1
    monkeypatch.delenv("SSL_CERT_FILE")
    monkeypatch.setenv(variable, str(tmp_path / "none.pem"))
    assert trusted().cert_store_stats()["x509_ca"] > 1
    monkeypatch.setenv(variable, __file__)
    with pytest.raises(EnvironmentFailure, match="certificates cannot be read"):
        trusted()


def test_what_accepts_any_certificate_reads_no_authorities() -> None:
    context = unverified()

    assert context.cert_store_stats()["x509"] == 0
    assert context.verify_mode == ssl.CERT_NONE
    assert not context.check_hostname
