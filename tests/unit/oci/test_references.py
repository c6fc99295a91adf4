"""References are read as Docker reads them, and nothing else is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from weightsmith.core.errors import UsageError
from weightsmith.oci.references import Reference

HEX = "a" * 64


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("ubuntu", "docker.io/library/ubuntu:latest"),
        ("me/app:1", "docker.io/me/app:1"),
        ("index.docker.io/me/app", "docker.io/me/app:latest"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/a/b:v1.2", "localhost:5000/a/b:v1.2"),
        ("ghcr.io/a/b_c__d-e.f/g", "ghcr.io/a/b_c__d-e.f/g:latest"),
        (f"r.example:443/a@sha256:{HEX}", f"r.example:443/a@sha256:{HEX}"),
        (f"r.example/a:t@sha256:{HEX}", f"r.example/a:t@sha256:{HEX}"),
        ("[::1]:5000/a", "[::1]:5000/a:latest"),
        ("Registry/app", "Registry/app:latest"),
    ],
)
def test_spelled_in_full(text, full):
    assert str(Reference.parse(text)) == full
    assert Reference.parse(full) == Reference.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "UPPER", "a/B", "a//b", "a/", "/a", "a:", "a:b:c", "a@", "a@sha256:12", "a b", "a\n",
        f"a@sha512:{HEX}", "r.io:99999/a", "r.io:0/a", "user:pass@r.io/a", "http://r.io/a", "a:-t",
        "a/../b", "r.io/a:" + "t" * 129, "r.io/" + "a" * 260,
        "oci:folder", "oci:a/b", "[1.2.3]/a", "[::1:5000/a", "a" * 64 + ".io/a", "-r.io/a", "a?b",
        "\uff41",
    ],
)  # fmt: skip
def test_refused_with_the_form_to_write(text):
    with pytest.raises(UsageError) as caught:
        Reference.parse(text)
    assert "repository" in caught.value.hint
    reasons = {"http": "a scheme", "r.io/a:": "longer than 128 characters"}
    assert all(
        why in caught.value.message for start, why in reasons.items() if text.startswith(start)
    )


@pytest.mark.parametrize(
    ("registry", "loopback"),
    [("localhost:5000", True), ("LocalHost:5000", True), ("a.localhost", True),
     ("127.0.0.1", True), ("127.9.9.9:1", True), ("[::1]:5", True),
     ("10.0.0.1", False), ("localhost.evil.example", False), ("127.0.0.1.evil.example", False)],
)  # fmt: skip
def test_loopback(registry, loopback):
    assert Reference.parse(f"{registry}/a").is_loopback is loopback


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text):
    try:
        found = Reference.parse(text)
    except UsageError:
        return
    assert Reference.parse(str(found)) == found
