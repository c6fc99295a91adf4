"""What a source of a model or an adapter may be: its forms, and what pins each.

A pin is the source as it is written, with what makes it immutable after it: `@COMMIT` of a hub,
`@sha256:…` of an image's manifest or of a list of files, `@VERSION` of an alias in a model
registry, `#sha256=…` of a file. Credentials are never a part of a source: it becomes a label.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from weightsmith.core.errors import UsageError
from weightsmith.oci.references import Reference, is_loopback

LIST_PIN = re.compile(r"sha256:[0-9a-f]{64}")
"""A `revision` that pins a list of files, or an image's manifest."""
ARCHIVES = (".tar", ".tar.gz", ".tgz")
_MLFLOW = "mlflow"
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://")
_PASSWORD = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^@]*:.*@", re.DOTALL)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
BUCKET = re.compile(
    r"(?P<scheme>s3|gs)://(?P<bucket>[A-Za-z0-9][A-Za-z0-9._-]{1,221})(/(?P<key>[^?#]*))?"
)
MODELSCOPE = re.compile(
    rf"modelscope://(?P<name>{_PART}/{_PART})(@(?P<revision>[\w./-]+))?", re.ASCII
)
MLFLOW = re.compile(
    r"mlflow:(?P<uri>runs:/(?P<run>[A-Za-z0-9_-]+)"
    r"|models:/(?P<id>m-[A-Za-z0-9]+)"
    r"|models:/(?P<name>[^/:@]+)(/(?P<version>[1-9][0-9]*)|(?P<alias>@[A-Za-z0-9_-]+)))"
    r"(?P<path>(/[^/]+)*)"
)
_LISTING = re.compile(r"sha256sums?(\.txt)?|.+\.sha256(sums?)?", re.IGNORECASE)
"""Names of a list of files with their SHA-256, as the program sha256sum writes it."""
_FORMS = {
    "oci": "oci://REGISTRY/REPOSITORY[:TAG][@sha256:…]",
    "s3": "s3://BUCKET/FOLDER, or an archive (.tar, .tar.gz) or a .gguf file there",
    "gs": "gs://BUCKET/FOLDER, or an archive (.tar, .tar.gz) or a .gguf file there",
    "https": "https://HOST/PATH of an archive (.tar, .tar.gz), a .gguf file or a list SHA256SUMS",
    "modelscope": "modelscope://OWNER/NAME[@BRANCH]",
    _MLFLOW: "mlflow:runs:/RUN[/PATH], mlflow:models:/NAME/VERSION[/PATH] or "
    "mlflow:models:/NAME@ALIAS[/PATH]",
}
_SLASHES = ("hf", "pypi", *(one for one in _FORMS if one != _MLFLOW))
SCHEMES = (*(f"{one}://" for one in _SLASHES), f"{_MLFLOW}:")
"""How a source begins that is no folder."""
_ONE_SLASH = re.compile(rf"({'|'.join(_SLASHES)}|http):/(?!/)", re.IGNORECASE)


def scheme_of(source: str) -> str:
    """Return a source's scheme, such as `hf`; empty for a folder."""
    if source.startswith(f"{_MLFLOW}:"):
        return _MLFLOW
    found = _SCHEME.match(source)
    return found["scheme"] if found else ""


def is_remote(source: str) -> bool:
    """Return whether a source is no folder: also one that `check_source` refuses."""
    return bool(scheme_of(source) or _ONE_SLASH.match(source))


def check_source(source: str) -> str:
    """Return a source; raises ValueError for a wrong form, or for one with credentials.

    What else is wrong with `hf://` and `pypi://` is said by those who read them.
    """
    if found := _ONE_SLASH.match(source):
        raise ValueError(f"{found[1]}:// needs two slashes (a folder of that name: ./{found[0]}…)")
    scheme = "https" if source.startswith("http://") else scheme_of(source)
    if scheme not in _FORMS:
        if scheme.lower() in (*_FORMS, "http"):
            raise ValueError(f"write {scheme.lower()} in lower case")
        if _PASSWORD.match(source):
            raise ValueError(
                "a source with a user name and a password, which belong in HF_TOKEN (hf://) or in "
                "pip's settings (pypi://)"
            )
        return source
    if not source.isprintable() or "\\" in source or ".." in source.split("/"):
        raise ValueError(f"has a `..`, a backslash or a control character: {source[:200]!r}")
    # What follows may hold a secret, so it is shown only if it is well formed.
    if why := _fault(scheme, source):
        raise ValueError(f"{why}; write {_FORMS[scheme]}")
    return source


def check_revision(source: str, revision: str) -> str:
    """Return a revision; raises ValueError for one that this kind of source cannot have."""
    scheme = "https" if source.startswith("http://") else scheme_of(source)
    if not revision or scheme not in _FORMS:
        return revision
    if LIST_PIN.fullmatch(revision) and scheme not in ("https", _MLFLOW):
        return revision
    if scheme == "modelscope" and re.fullmatch(r"[\w.-]+", revision, re.ASCII):
        return revision
    found = MLFLOW.fullmatch(source)
    if found and found["alias"] and revision.isdecimal():
        return revision
    kinds = {
        "https": "is pinned by `sha256`",
        _MLFLOW: "is pinned by its version, or an alias by a number",
        "modelscope": "takes a branch, a tag, a commit or sha256:…",
    }
    raise ValueError(f"{scheme}:// {kinds.get(scheme, 'takes sha256:…')}, not {revision[:80]!r}")


def check_sha256(source: str, sha256: str) -> str:
    """Return a SHA-256; raises ValueError if this source needs another or cannot have one."""
    scheme, written = scheme_of(source), _fragment(source)
    if scheme not in ("http", "https"):
        if sha256 and scheme in _FORMS:
            raise ValueError(f"{scheme}:// is not pinned by `sha256` but by `revision`")
        return sha256
    if sha256 and written and sha256 != written:
        raise ValueError("is not the one after # in the source")
    if not sha256 and not written:
        raise ValueError(
            "https:// needs the SHA-256 of its file: write it after the address as "
            "#sha256=… (as pip does), or as `sha256`"
        )
    return sha256


def has_own_pin(source: str, revision: str, sha256: str = "") -> bool:
    """Return whether a recipe pins a source itself; folders are not pinned, and may change."""
    scheme = scheme_of(source)
    if revision or sha256 or scheme in ("", "http", "https"):
        return True
    if scheme == _MLFLOW:
        found = MLFLOW.fullmatch(source)
        return not (found and found["alias"])
    if scheme == "modelscope":
        return bool(_COMMIT.fullmatch(source.partition("@")[2]))
    return ("@sha256:" if scheme == "oci" else "@") in source and scheme not in ("s3", "gs")


def pin_fields(source: str, pin: str) -> Mapping[str, str]:
    """Return what to write beside a source so that it means a pin; {} if it cannot."""
    given = pin.removeprefix(source) if pin.startswith(source) else ""
    if given.startswith("#sha256="):
        return {"sha256": given.removeprefix("#sha256=")}
    if given.startswith("@") and scheme_of(source) not in ("", "pypi"):
        return {"revision": given.removeprefix("@")}
    return {}


def without_pin(source: str) -> str:
    """Return a source without what pins it: what it is called."""
    if scheme_of(source) == "oci":
        name = source.partition("@")[0]
        last = name.rpartition("/")[2]
        return name.removesuffix(f":{last.partition(':')[2]}") if ":" in last else name
    return source.partition("#")[0].partition("@")[0] if is_remote(source) else source


def last_name(source: str) -> str:
    """Return the last part of a source's name; of a hub or an index with what is pinned there."""
    named = source if scheme_of(source) in ("", "hf", "pypi") else without_pin(source)
    return named.rstrip("/").rpartition("/")[2]


def sha256_of(source: str, sha256: str) -> tuple[str, str]:
    """Return an `https://` source's address and the SHA-256 of its file."""
    return source.partition("#")[0], sha256 or _fragment(source)


def is_archive(name: str) -> bool:
    """Return whether a file of this name is unpacked."""
    return name.endswith(ARCHIVES)


def is_listing(name: str) -> bool:
    """Return whether a file of this name is a list of files with their SHA-256."""
    return bool(_LISTING.fullmatch(name.rpartition("/")[2]))


def _fragment(source: str) -> str:
    key, _, value = source.partition("#")[2].partition("=")
    return value if key == "sha256" else ""


def _fault(scheme: str, source: str) -> str:
    if scheme == "https":
        return _fault_of_address(source)
    if scheme == "oci":
        try:
            Reference.parse(source.removeprefix("oci://"))
        except UsageError as error:
            return error.message
        return ""
    forms = {"modelscope": MODELSCOPE, _MLFLOW: MLFLOW}
    return "" if forms.get(scheme, BUCKET).fullmatch(source) else f"not a {scheme} source"


def _fault_of_address(source: str) -> str:
    try:
        parts = urlsplit(source)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        return "not an address"
    if "@" in parts.netloc:
        return "an address with a user name or a password, which belong in ~/.netrc"
    if parts.query or "?" in source:
        return (
            "an address with a query (?…): signatures and tokens end, and must not be in a recipe "
            "(a user name and a password may be in ~/.netrc)"
        )
    if not host or (parts.scheme == "http" and not is_loopback(host)):
        return "not an address that begins with https:// and a host"
    if "#" in source and not _SHA256.fullmatch(_fragment(source)):
        return "only #sha256= and 64 hexadecimal digits may follow the address"
    name = parts.path.rpartition("/")[2]
    if not (is_archive(name) or is_listing(name) or name.endswith(".gguf")):
        return f"{name[:80]!r} is no file of a kind that can be read"
    return ""
