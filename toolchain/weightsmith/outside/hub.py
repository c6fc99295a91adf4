"""Reads a source from a model hub (`hf://owner/name`) with the hub's client and cache."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from weightsmith.core.errors import Altered, EnvironmentFailure, InputRefused
from weightsmith.core.ports import Progress, Silent, Store
from weightsmith.core.values import FileEntry, Snapshot, Tree
from weightsmith.models.folder import MAKERS_FOLDERS
from weightsmith.outside.folders import read_tree

_WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.md", "LICENSE*")
_UNWANTED = [f"{folder}/*" for folder in MAKERS_FOLDERS]
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CONTENT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_CHUNK = 1 << 20


class HubReader:
    """Downloads a repository at one commit; uses `HF_ENDPOINT`, `HF_TOKEN` and `HF_HOME`.

    Every file is verified against the hub's list of the commit, by git object ids.
    """

    scheme = "hf"

    def __init__(self, store: Store) -> None:
        self._store = store

    def fetch(self, source: str, revision: str, sha256: str, progress: Progress) -> Snapshot:
        """Return the repository's files at a commit; resolves an unpinned revision first.

        Raises InputRefused if the repository does not exist or access is denied, Altered if a file
        differs from the hub's list, EnvironmentFailure if the hub cannot be reached.
        """
        if sha256:
            raise InputRefused(
                f"{source}: `sha256` is only for pypi:// sources; use `revision` here",
                hint="give the commit",
            )
        repository, revision = _split(source, revision)
        pinned = bool(_COMMIT.fullmatch(revision))
        root, commit = self._download(repository, revision, progress, pinned=pinned)
        pin = f"hf://{repository}@{commit}"
        tree = read_tree(root, self._store, progress, wanted=_is_wanted)
        said = _said(repository, commit, tree)
        if wrong := _wrong(said, tree):
            raise Altered(
                f"{pin}: {wrong} does not match this commit at {hub_endpoint()}",
                hint=_after(tree.path(wrong), _forget(tree.path(wrong), root, commit)),
            )
        if added := [file.path for file in tree.files if file.path not in said]:
            progress.warn(f"{pin}: also reading files not in this commit: {', '.join(added)[:200]}")
        return Snapshot(tree=tree, source=source, pin=pin, pinned=pinned)

    def known(self, source: str, revision: str, sha256: str) -> Snapshot | None:
        """Return the repository if its commit is pinned and in the hub's cache."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        repository, revision = _split(source, revision)
        if sha256 or not _COMMIT.fullmatch(revision):
            return None
        try:
            root = snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(_WANTED),
                ignore_patterns=_UNWANTED,
                local_files_only=True,
            )
        except (LocalEntryNotFoundError, HFValidationError, OSError):
            return None
        tree = read_tree(Path(root), self._store, Silent(), wanted=_is_wanted)
        if _wrong(_said(repository, revision, tree), tree):
            return None
        return Snapshot(tree=tree, source=source, pin=f"hf://{repository}@{revision}", pinned=True)

    def _download(
        self, repository: str, revision: str, progress: Progress, *, pinned: bool
    ) -> tuple[Path, str]:
        # Imported here: the hub's client loads too slowly for `invoke --list`.
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        # Errors of the client's HTTP library, which it does not convert.
        transport = [kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"]
        try:
            commit = revision
            if not pinned:
                commit = HfApi().model_info(repository, revision=revision or None).sha or ""
            progress.note(f"fetching hf://{repository}@{commit[:12]} (kept in the hub's cache)")
            root = snapshot_download(
                repository,
                revision=commit,
                allow_patterns=list(_WANTED),
                ignore_patterns=_UNWANTED,
            )
        except GatedRepoError:
            raise InputRefused(
                f"hf://{repository} is gated and this account has no access",
                hint="accept its terms on the hub and set HF_TOKEN",
            ) from None
        except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
            raise InputRefused(
                f"hf://{repository}@{revision or 'main'}: {str(error).splitlines()[0]}",
                hint="check owner, name and revision; a private repository needs HF_TOKEN",
            ) from None
        except (LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, *transport) as error:
            raise EnvironmentFailure(
                f"hf://{repository}: {hub_endpoint()} could not be reached: {type(error).__name__}",
                hint="check the network, HF_ENDPOINT and the proxy; "
                "a folder with the files works as a source too",
            ) from None
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise EnvironmentFailure(
                f"hf://{repository}: invalid reply from {hub_endpoint()}: {type(error).__name__}",
                hint="check HF_ENDPOINT and the proxy; a folder with the files works as a source",
            ) from None
        return Path(root), commit


def hub_endpoint() -> str:
    """Return the hub's URL, without credentials."""
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    scheme, separator, place = address.rpartition("://")
    return f"{scheme}{separator}{place.rpartition('@')[2]}"


def _is_wanted(name: str) -> bool:
    """Say whether we download this file; other programs may have cached more."""
    return any(fnmatch(name, pattern) for pattern in _WANTED)


def _wrong(said: Mapping[str, str], tree: Tree) -> str:
    """Return the first file that does not match the hub's list of the commit, or empty."""
    for file in tree.files:
        if file.path not in said:  # put there by the user; the lock's digest covers it
            continue
        name, path = said[file.path], tree.path(file.path)
        if name not in (file.digest.hex, _pointer_name(file)) and name != _git_name(path):
            return file.path
    return ""


def _said(repository: str, commit: str, tree: Tree) -> Mapping[str, str]:
    """Return the git object id of each file of a commit, as the hub listed it before the download.

    A cache written by an older client has no list, but its blobs are named by these ids:
    https://huggingface.co/docs/huggingface_hub/guides/manage-cache. Files without such a name were
    copied into the cache by the user and are accepted as they are.
    """
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return {row.path: row.blob_id for row in get_cached_repo_tree(repository, revision=commit)}
    except CachedRepoTreeNotFoundError:
        named = {file.path: tree.path(file.path).resolve().name for file in tree.files}
        return {
            file.path: named[file.path] if _CONTENT.fullmatch(named[file.path]) else file.digest.hex
            for file in tree.files
        }


def _pointer_name(file: FileEntry) -> str:
    """Return the git object id of a large file's LFS pointer.

    https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md#the-pointer
    """
    text = f"version https://git-lfs.github.com/spec/v1\noid {file.digest}\nsize {file.size}\n"
    return _blob(len(text), text.encode()).hexdigest()


def _git_name(path: Path) -> str:
    """Return a file's git object id: https://git-scm.com/book/en/v2/Git-Internals-Git-Objects."""
    state = _blob(path.stat().st_size)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return state.hexdigest()


def _blob(size: int, data: bytes = b"") -> hashlib._Hash:
    return hashlib.sha1(b"blob %d\0" % size + data, usedforsecurity=False)


def _forget(path: Path, root: Path, commit: str) -> bool:
    """Delete a file from the hub's cache, with the list that it was verified against.

    Returns whether it was deleted. Only the client's own downloads are deleted, which are links to
    blobs, and only if they can be downloaded again: a regular file is the user's own work.
    """
    from huggingface_hub import constants

    blob, home = path.resolve(), root.parents[1]
    if constants.HF_HUB_OFFLINE or not path.is_symlink():
        return False
    if blob.parent != (home / "blobs").resolve():
        return False
    for each in (blob, path, home / "trees" / f"{commit}.json"):
        with suppress(OSError):
            each.unlink()
    return not path.is_symlink() and not blob.exists()


def _after(path: Path, gone: bool) -> str:
    """Return the hint for a file that does not match the hub's list."""
    if gone:
        return (
            "it was deleted from the hub's cache: try again; if it happens again, a mirror "
            "(HF_ENDPOINT) or a proxy changes the data: ask its administrator"
        )
    return (
        f"nothing was deleted: delete {path} yourself and build where the hub can be reached; "
        "if you changed the model, use its folder as the source"
    )


def _split(source: str, revision: str) -> tuple[str, str]:
    repository, _, suffix = source.removeprefix("hf://").partition("@")
    return repository, revision or suffix
