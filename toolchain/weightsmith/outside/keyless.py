"""Signs and verifies without a key of one's own: Sigstore's certificates, by its Python library.

A provider of identities, such as a CI system, gives a token; Sigstore's CA (Fulcio) gives a
certificate of ten minutes for it, and its transparency log (Rekor) keeps that the signature was
made in that time. https://docs.sigstore.dev/about/overview/
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from weightsmith.core.errors import EnvironmentFailure, UsageError, WeightsmithError, of_panic
from weightsmith.core.ports import IdentityCheck, IdentitySigner
from weightsmith.core.safe_parse import given_content
from weightsmith.core.time_limits import within
from weightsmith.recipe.user_config import WantedIdentity

if TYPE_CHECKING:
    from cryptography.x509 import Certificate
    from sigstore.models import ClientTrustConfig, TrustedRoot
    from sigstore.oidc import IdentityToken
    from sigstore.sign import Signer, SigningContext

_T = TypeVar("_T")
TOKEN = "SIGSTORE_ID_TOKEN"  # noqa: S105 - the name of a variable
"""Holds the job's identity, for example in GitLab."""
_SECONDS = 120.0
"""For one answer of Sigstore; its library would wait for ever."""
_RENEWED = 300.0
"""Seconds after which another certificate is asked for; they are valid for 600."""
_ISSUERS = ("1.3.6.1.4.1.57264.1.8", "1.3.6.1.4.1.57264.1.1")
"""Extensions with the provider: in DER since 2023, and as plain text.
https://github.com/sigstore/fulcio/blob/main/docs/oid-info.md"""
_USER_NAME = "1.3.6.1.4.1.57264.1.7"
_UTF8_STRING = 0x0C


def identity_check(wanted: WantedIdentity) -> IdentityCheck:
    """Return what checks bundles for an identity, with a trusted root's file or Sigstore's own.

    With a file, nothing is asked of the network. Raises UsageError for a file that is none,
    EnvironmentFailure if the package is missing or Sigstore's root cannot be fetched.
    """
    _require_package("to verify an identity")
    from sigstore.models import ClientTrustConfig, TrustedRoot

    if wanted.trusted_root:
        path = Path(wanted.trusted_root).expanduser()
        root = _from_file(path, "a trusted root", lambda _: TrustedRoot.from_file(str(path)))
    else:
        hint = "without a network, give --trusted-root FILE, as `cosign trusted-root create` writes"
        production = ClientTrustConfig.production
        root = _asked("Sigstore's trusted root", hint, lambda: production().trusted_root)
    return _check(wanted, root)


def open_identity_signer(trust_config: str) -> IdentitySigner:
    """Return the signer of this job's identity, with its first certificate.

    `trust_config` is the file of another Sigstore than the public one, as `sigstore --trust-config`
    takes it. Raises UsageError without an identity or for a file that is none, EnvironmentFailure
    if the package is missing or a service refuses or does not answer.
    """
    _require_package("to sign without a key")
    from sigstore.models import ClientTrustConfig
    from sigstore.sign import SigningContext

    config: ClientTrustConfig
    token = _identity_token()
    if trust_config:
        path = Path(trust_config).expanduser()
        config = _from_file(path, "a trust configuration", ClientTrustConfig.from_json)
    else:
        config = _asked("Sigstore's configuration", _ONLINE, ClientTrustConfig.production)
    session = _Session(SigningContext.from_trust_config(config), token)
    names, issuer = _named(session.certificate())
    wanted = WantedIdentity(
        certificate_identity=names[0] if names else "", certificate_oidc_issuer=issuer
    )
    return IdentitySigner(
        identity=wanted.certificate_identity,
        issuer=issuer,
        bundle=session.sign,
        check=_check(wanted, config.trusted_root),
    )


_ONLINE = "check the network, or sign with a key: --sign-key"


class _Session:
    """Signs with a certificate, and gets another one when that grows old."""

    def __init__(self, context: SigningContext, token: IdentityToken) -> None:
        self._context, self._token = context, token
        self._signer: Signer | None = None
        self._until = 0.0
        self._lock = threading.Lock()

    def certificate(self) -> Certificate:
        """Return the certificate in use."""
        with self._lock:
            return self._current()._signing_cert()  # noqa: SLF001 - only a bundle has it else

    def sign(self, statement: bytes) -> bytes:
        """Return a statement's bundle; raises EnvironmentFailure if a service refuses."""
        from sigstore.dsse import Statement

        with self._lock:
            signer = self._current()
            made = _asked(
                "Sigstore's signature", _ONLINE, lambda: signer.sign_dsse(Statement(statement))
            )
        return made.to_json().encode()

    def _current(self) -> Signer:
        if self._signer is None or time.monotonic() > self._until:
            if not self._token.in_validity_period():
                self._token = _identity_token()
            from sigstore.sign import Signer

            made = _asked(
                "a certificate of Sigstore", _ONLINE, lambda: Signer(self._token, self._context)
            )
            self._signer, self._until = made, time.monotonic() + _RENEWED
        return self._signer


def _identity_token() -> IdentityToken:
    """Return the job's identity; nothing of the token is ever shown.

    Raises UsageError if there is none, or it is not usable.
    """
    from sigstore.oidc import IdentityError, IdentityToken, detect_credential

    try:
        raw = os.environ.get(TOKEN, "") or _asked("an identity", _GRANT, detect_credential)
        if not raw:
            raise UsageError("this job has no identity to sign with", hint=_GRANT)
        return IdentityToken(raw)
    except IdentityError as error:
        raise UsageError(f"this job's identity: {str(error)[:200]}", hint=_GRANT) from None


_GRANT = (
    "GitHub: `permissions: {id-token: write}`; GitLab: `id_tokens: {SIGSTORE_ID_TOKEN: {aud: "
    "sigstore}}`; elsewhere put a token for the audience sigstore into SIGSTORE_ID_TOKEN"
)


def _check(wanted: WantedIdentity, root: TrustedRoot) -> IdentityCheck:
    from sigstore.errors import Error
    from sigstore.models import Bundle
    from sigstore.verify import Verifier

    try:
        verifier = Verifier(trusted_root=root)
    except Error as error:
        raise UsageError(f"the trusted root is not usable: {error}", hint=_ROOT) from None

    def read(data: bytes) -> tuple[bytes, str]:
        try:
            return verifier.verify_dsse(Bundle.from_json(data), _Policy(wanted))[1], ""
        except Error as error:
            return b"", _why(error)
        except Exception as error:  # noqa: BLE001 - whatever the library's parsers raise
            return b"", f"it is malformed: {type(error).__name__}"
        except BaseException as error:
            if of_panic(error, "a bundle"):
                return b"", "it is malformed"
            raise

    return IdentityCheck(who=str(wanted), read=read)


def _why(error: Exception) -> str:
    """Return an error's first line: some print whole certificates."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


@dataclass(frozen=True, slots=True)
class _Policy:
    """The library's form of a wanted identity."""

    wanted: WantedIdentity

    def verify(self, cert: Certificate) -> None:
        """Raise the library's VerificationError for a certificate of another identity."""
        from sigstore.errors import VerificationError

        names, issuer = _named(cert)
        if not self.wanted.fits(names, issuer):
            shown = ", ".join(names)[:200] or "nobody"
            raise VerificationError(f"signed by {shown} of {issuer[:100] or 'no provider'}")


def _named(certificate: Certificate) -> tuple[tuple[str, ...], str]:
    """Return a certificate's names, and the provider that vouches for them."""
    from cryptography import x509

    found = {one.oid.dotted_string: one.value for one in certificate.extensions}
    names = list[str]()
    for value in found.values():
        if isinstance(value, x509.SubjectAlternativeName):
            names += value.get_values_for_type(x509.RFC822Name)
            names += value.get_values_for_type(x509.UniformResourceIdentifier)
            others = value.get_values_for_type(x509.OtherName)
            names += [_utf8(one.value) for one in others if one.type_id.dotted_string == _USER_NAME]
    for oid in _ISSUERS:
        if isinstance(value := found.get(oid), x509.UnrecognizedExtension):
            return tuple(names), _utf8(value.value)
    return tuple(names), ""


def _utf8(der: bytes) -> str:
    """Return a text that is in DER, or plain; DER's short and long forms of lengths are known."""
    if der[:1] != bytes([_UTF8_STRING]) or len(der) < 2:
        return der.decode()
    size, start = der[1], 2
    if size & 0x80:
        start += size & 0x7F
        size = int.from_bytes(der[2:start], "big")
    if len(der) != start + size:
        raise ValueError("a text of a certificate is damaged")
    return der[start:].decode()


def _require_package(why: str) -> None:
    if find_spec("sigstore") is None:
        raise EnvironmentFailure(
            f"{why}, the package sigstore is needed",
            hint="`pip install 'weightsmith[keyless]'`",
        )


def _asked(what: str, hint: str, call: Callable[[], _T]) -> _T:
    """Return a service's answer; raises EnvironmentFailure if it refuses, or does not answer."""
    from sigstore.oidc import IdentityError

    try:
        return within(_SECONDS, call, hint=hint)
    except (WeightsmithError, IdentityError):
        raise
    except Exception as error:  # noqa: BLE001 - its own errors, those of HTTP and of JSON
        why = _why(error.__cause__ or error if not str(error) else error)  # type: ignore[arg-type]
        raise EnvironmentFailure(f"{what}: {type(error).__name__}: {why}", hint=hint) from None


_ROOT = "`cosign trusted-root create` writes one; Sigstore's own is trusted without the option"


def _from_file(path: Path, what: str, read: Callable[[str], _T]) -> _T:
    try:
        return read(given_content(path).decode())
    except Exception as error:  # noqa: BLE001 - the library has errors of its own beside ValueError
        why = getattr(error, "strerror", None) or _why(error)
        raise UsageError(f"{path} is not {what}: {why}", hint=_ROOT) from None
