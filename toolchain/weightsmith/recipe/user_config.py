"""Settings of a machine or a person, not of a recipe: the user's configuration, options of running.

An option of running is a flag of most commands and a keyword of the Python functions; its metadata
have the flag's help. They are one frozen value from the edge on, since each was named four times
between a flag and its use, and no section of the recipe, because where a build runs is no property
of the image.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from weightsmith.core.errors import UsageError
from weightsmith.core.files import path_in
from weightsmith.core.ports import SignatureFormat
from weightsmith.core.values import JsonValue
from weightsmith.recipe.section import Section
from weightsmith.recipe.user_text import read_yaml, require_plain

_T = TypeVar("_T")
TRUSTED = ("verify_key", "certificate_identity", "certificate_oidc_issuer", "trusted_root")
"""Keys of `CacheSettings` that say what is trusted."""
VARIABLE = "WEIGHTSMITH_CONFIG"
_HINT = "docs/reference/configuration.md lists every key"


class CacheSettings(Section):
    """A cache that machines share, and what is trusted in it."""

    where: str = Field(
        "", description="The cache: oci://REGISTRY/REPOSITORY, s3://BUCKET/PREFIX or a folder"
    )
    read_from: str = Field(
        "", alias="from", description="A second cache that is only read, such as the team's"
    )
    verify_key: str = Field(
        "",
        description="Public key as a PEM file: results that it did not sign are not used",
    )
    certificate_identity: str = Field(
        "",
        description="Identity in place of that key, such as a workflow's URL; `--keyless` then "
        "signs results too",
    )
    certificate_oidc_issuer: str = Field(
        "", description="The provider that must vouch for the identity, a URL"
    )
    trusted_root: str = Field(
        "",
        description="File with the certificates and keys of a Sigstore; default: the public one's",
    )
    sign_key: str = Field(
        "",
        description="Private key that signs what is uploaded, as for --sign-key; default: that key",
    )
    lookup_seconds: Annotated[float, Field(gt=0, le=3600)] = Field(
        20.0, description="A cache that takes longer to answer is not asked again"
    )
    upload_seconds: Annotated[float, Field(ge=0, le=86400)] = Field(
        60.0, description="How long a command's end waits for uploads"
    )

    @field_validator("verify_key", "sign_key", "trusted_root")
    @classmethod
    def _expanded(cls, value: str) -> str:
        return str(Path(value).expanduser()) if value.startswith("~") else value


class UserConfig(Section):
    """The file `config.yaml`."""

    cache: CacheSettings = Field(
        default_factory=CacheSettings, description="The shared cache; a text is its address"
    )

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: object) -> object:
        if isinstance(data, dict) and isinstance(data.get("cache"), str):
            return {**data, "cache": {"where": data["cache"]}}
        return data


def config_path() -> Path:
    """Return the configuration's path: WEIGHTSMITH_CONFIG, else in the user's own folder."""
    if named := path_in(VARIABLE):
        return named.absolute()
    import platformdirs

    return Path(platformdirs.user_config_dir("weightsmith")) / "config.yaml"


def read_config() -> UserConfig:
    """Return the user's configuration, the defaults without a file; raises UsageError."""
    path = config_path()
    try:
        data = read_yaml(path, hint=_HINT)
    except FileNotFoundError:
        if os.environ.get(VARIABLE):
            raise UsageError(f"{VARIABLE} names {path}, which does not exist", hint=_HINT) from None
        return UserConfig()
    try:
        if isinstance(data, dict):
            require_plain(data, str(path), _HINT)
        return UserConfig.model_validate(data or {})
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, item['loc'])) or 'the file'}: {item['msg']}"
            for item in error.errors(include_url=False)
        ]
        raise UsageError(f"{path}: {'; '.join(faults[:5])}", hint=_HINT) from None


def refuse_key_text(key: str, what: str) -> None:
    """Raise UsageError, without the key, for the text of a key where its file is to be named."""
    if "-----BEGIN" in key:
        raise UsageError(
            f"{what} is given as its text, and not as the name of its file",
            hint="write it to a file that only you can read, and give that file's name",
        )


def _option(default: _T, description: str) -> _T:
    return field(default=default, metadata={"description": description})


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a command is run; empty texts stand for what environment and configuration say."""

    runner: str = _option("auto", "where heavy stages run: auto, docker or local")
    allow_network_in_jobs: bool = _option(
        False, "run jobs even if this machine cannot isolate them from the network"
    )
    memory: str = _option("", "most memory that a job may use, such as 6GiB; default: what is free")
    insecure: bool = _option(False, "allow registries without HTTPS or with untrusted certificates")
    sign_key: str = _option(
        "",
        "private key to sign with: a PEM or cosign key file, or a reference such as awskms://…",
    )
    signature_format: SignatureFormat = field(
        default="cosign",
        metadata={
            "description": "form of the signatures: cosign (tags, which all verifiers read), "
            "bundle (Sigstore bundles, as cosign 3 writes them) or both"
        },
    )
    cache: str = _option(
        "",
        "cache that machines share, read and written: oci://REGISTRY/REPOSITORY, "
        "s3://BUCKET/PREFIX or a folder; off for none",
    )
    cache_from: str = _option("", "a second cache that is only read")
    keyless: bool = _option(
        False, "sign with this job's identity, by Sigstore, instead of a key: bundles alone"
    )
    trust_config: str = _option(
        "",
        "file of another Sigstore than the public one: the trust configuration with its addresses "
        "and roots",
    )

    def given(self) -> dict[str, JsonValue]:
        """Return the options that are set, for a request to another process."""
        return {name: value for name, value in asdict(self).items() if value}


@dataclass(frozen=True, slots=True)
class WantedIdentity:
    """Who must have signed, by the options of cosign; an expression may match a part."""

    certificate_identity: str = _option(
        "", "identity that must have signed, such as a workflow's URL, instead of a key's owner"
    )
    certificate_identity_regexp: str = _option(
        "", "regular expression that the identity must match, in place of it"
    )
    certificate_oidc_issuer: str = _option("", "provider that must vouch for the identity, a URL")
    certificate_oidc_issuer_regexp: str = _option(
        "", "regular expression that the provider must match, in place of it"
    )
    trusted_root: str = _option(
        "",
        "file with the certificates and keys of a Sigstore; nothing is then asked of the network. "
        "Default: those of the public one, fetched",
    )

    def asked(self) -> bool:
        """Return whether an identity is wanted; raises UsageError for half of one."""
        for name, value in asdict(self).items():
            if name.endswith("regexp"):
                try:
                    re.compile(value)
                except re.error as error:
                    flag = f"--{name.replace('_', '-')}"
                    raise UsageError(f"{flag} {value}: {error}", hint="correct it") from None
        who = self.certificate_identity or self.certificate_identity_regexp
        vouches = self.certificate_oidc_issuer or self.certificate_oidc_issuer_regexp
        if who and vouches:
            return True
        if who or vouches or self.trusted_root:
            missing = "--certificate-oidc-issuer" if who else "--certificate-identity"
            raise UsageError(
                f"{missing} is missing",
                hint="anyone may have this name with another provider, and anyone a certificate: "
                "an identity is both, or their -regexp",
            )
        return False

    def fits(self, names: Sequence[str], issuer: str) -> bool:
        """Return whether a certificate's names and provider are wanted."""
        exact, pattern = self.certificate_identity, self.certificate_identity_regexp
        if exact and exact not in names:
            return False
        if pattern and not any(re.search(pattern, name) for name in names):
            return False
        exact, pattern = self.certificate_oidc_issuer, self.certificate_oidc_issuer_regexp
        return exact in ("", issuer) and bool(re.search(pattern, issuer))

    def __str__(self) -> str:
        """Return it for people."""
        pattern, provider = self.certificate_identity_regexp, self.certificate_oidc_issuer_regexp
        who = self.certificate_identity or f"/{pattern}/"
        return f"{who} of {self.certificate_oidc_issuer or f'/{provider}/'}"
