"""Contexts of TLS: read once for the same authorities, and none read where none is asked."""

from __future__ import annotations

import ssl
from pathlib import Path

import certifi
import pytest
from weightsmith.oci.tls import trusted, unverified

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


def test_what_accepts_any_certificate_reads_no_authorities() -> None:
    context = unverified()

    assert context.cert_store_stats()["x509"] == 0
    assert context.verify_mode == ssl.CERT_NONE
    assert not context.check_hostname
