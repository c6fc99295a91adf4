"""A model hub (`hf://owner/name`), through its own client: reads sources, publishes files.

Publishing is all or nothing: one commit with the difference, which is read back. `upload_folder`
leaves old files beside new ones. Large files go by Git LFS, except to huggingface.co: the client
uses Xet whenever its library is there, and other hubs may not speak it. The client's error texts
are not shown: they can contain signed addresses. New repositories are private, since a publication
by mistake cannot be taken back.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from weightsmith.core.errors import Altered, EnvironmentFailure, InputRefused, WeightsmithError
from weightsmith.core.ports import HubCommit, HubContent, Progress, Silent, Store
from weightsmith.core.safe_parse import SMALL, read_bytes
from weightsmith.core.values import Snapshot, Tree
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

    def check(self, source: str) -> None:
        """Do nothing: what reads it is always installed."""

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
            kept = [one for one in wrong if not _forget(tree.path(one), root, commit)]
            hint = (
                "it was deleted from the hub's cache: try again; if it happens again, a mirror "
                "(HF_ENDPOINT) or a proxy changes the data: ask its administrator"
            )
            if kept:
                hint = (
                    f"it was not deleted: delete {tree.path(kept[0])} yourself and build where the "
                    "hub can be reached; if you changed the model, use its folder as the source"
                )
            raise Altered(
                f"{pin}: {(kept or wrong)[0]} does not match this commit at {hub_endpoint()}",
                hint=hint,
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

    def glance(
        self, source: str, revision: str, sha256: str, progress: Progress
    ) -> Snapshot | None:
        """Return None: the hub's client fetches whole files."""
        del source, revision, sha256, progress
        return None

    def _download(
        self, repository: str, revision: str, progress: Progress, *, pinned: bool
    ) -> tuple[Path, str]:
        # Imported here: the hub's client loads too slowly for `invoke --list`.
        from huggingface_hub import HfApi, errors, snapshot_download
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
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
        except errors.GatedRepoError:
            raise InputRefused(
                f"hf://{repository} is gated and this account has no access",
                hint="accept its terms on the hub and set HF_TOKEN",
            ) from None
        except (
            errors.RepositoryNotFoundError,
            errors.RevisionNotFoundError,
            errors.HFValidationError,
        ) as error:
            raise InputRefused(
                f"hf://{repository}@{revision or 'main'}: {str(error).splitlines()[0]}",
                hint="check owner, name and revision; a private repository needs HF_TOKEN",
            ) from None
        except (
            errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError, *_transport()
        ) as error:  # fmt: skip
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


def _transport() -> tuple[type[Exception], ...]:
    """Return the errors of the client's HTTP library that it does not convert."""
    from huggingface_hub.errors import HfHubHTTPError

    return tuple(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")


def hub_endpoint() -> str:
    """Return the hub's URL, without credentials."""
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    scheme, separator, place = address.rpartition("://")
    return f"{scheme}{separator}{place.rpartition('@')[2]}"


def _is_wanted(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _WANTED)


def _wrong(said: Mapping[str, str], tree: Tree) -> list[str]:
    """Return the files that do not match the hub's list of the commit."""
    found = []
    for file in tree.files:
        name = said.get(file.path)
        if name in (None, file.digest.hex):  # None: put there by the user; the lock covers it
            continue
        # The id of a large file's pointer:
        # https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md#the-pointer
        text = f"version https://git-lfs.github.com/spec/v1\noid {file.digest}\nsize {file.size}\n"
        if name == _git_name(len(text), (text.encode(),)):
            continue
        path = tree.path(file.path)
        with path.open("rb") as content:
            if name != _git_name(path.stat().st_size, iter(partial(content.read, _CHUNK), b"")):
                found.append(file.path)
    return found


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


def _git_name(size: int, chunks: Iterable[bytes]) -> str:
    """Return a file's git object id: https://git-scm.com/book/en/v2/Git-Internals-Git-Objects."""
    state = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    for chunk in chunks:
        state.update(chunk)
    return state.hexdigest()


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


def _split(source: str, revision: str) -> tuple[str, str]:
    repository, _, suffix = source.removeprefix("hf://").partition("@")
    return repository, revision or suffix


_PUBLIC = "https://huggingface.co"
_UNAUTHORIZED, _FORBIDDEN, _ABSENT, _CONFLICT, _MOVED, _TOO_MANY = 401, 403, 404, 409, 412, 429
_TOKEN = "set HF_TOKEN to a token that may write there, or run `hf auth login`"  # noqa: S105 - a hint


class HubWriter:
    """Commits to repositories; uses `HF_ENDPOINT`, `HF_TOKEN` and the hub's token file.

    The token is only sent to the hub by its own client; no message contains it.
    """

    def check(self, repository: str) -> HubContent | None:
        """Return what a repository holds, None if it does not exist."""
        from huggingface_hub import get_token

        if hub_endpoint() == _PUBLIC and not get_token():
            raise EnvironmentFailure(
                f"hf://{repository}: there is no token for the hub", hint=_TOKEN
            )
        with _explained(repository, "look at"):
            return _content(repository)

    def create(self, repository: str, *, public: bool) -> HubContent:
        """Create a repository."""
        from huggingface_hub import HfApi

        with _explained(repository, "create"):
            HfApi().create_repo(repository, private=not public, exist_ok=True)
            return _content(repository) or HubContent(commit="", files={})

    def commit(
        self,
        repository: str,
        parent: str,
        files: Mapping[str, Path | bytes],
        deleted: Sequence[str],
        message: str,
    ) -> str:
        """Upload files and delete others in one commit after `parent`; return the commit."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
        from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

        # The client shows its own progress, on standard error; a log needs none.
        (enable_progress_bars if sys.stderr.isatty() else disable_progress_bars)()
        # The client takes the public hub's own protocol for granted once its library is installed,
        # but mirrors and private hubs may not speak it.
        before = constants.HF_HUB_DISABLE_XET
        constants.HF_HUB_DISABLE_XET = before or hub_endpoint() != _PUBLIC
        try:
            with _explained(repository, "write to"):
                added = [CommitOperationAdd(name, source) for name, source in files.items()]
                gone = [CommitOperationDelete(name, is_folder=False) for name in deleted]
                done = HfApi().create_commit(
                    repository,
                    [*added, *gone],
                    commit_message=message,
                    parent_commit=parent or None,
                )
        finally:
            constants.HF_HUB_DISABLE_XET = before
        return str(done.oid)


class HubFinder:
    """Lists repositories, their commits and small files; uses the same variables as the reader."""

    def repositories(self, owner: str) -> Sequence[str]:
        """Return an owner's repositories."""
        from huggingface_hub import HfApi

        with _explained(owner, "list"):
            return sorted(one.id for one in HfApi().list_models(author=owner))

    def commits(
        self, repository: str, names: Sequence[str], commit: str = ""
    ) -> Iterator[HubCommit]:
        """Yield a repository's commits, newest first, or those whose name begins with `commit`."""
        from huggingface_hub import HfApi

        # One that is named in full may be on any branch.
        branch = commit if _COMMIT.fullmatch(commit) else None
        with _explained(repository, "look at"):
            found = HfApi().list_repo_commits(repository, revision=branch)
        found = [one for one in found if one.commit_id.startswith(commit)]
        if commit and not found:
            raise InputRefused(
                f"hf://{repository} has no commit {commit}", hint="look at its history on the hub"
            )
        for one in found:
            with _explained(repository, "look at"):
                files = self._files(repository, one.commit_id, names)
            yield HubCommit(
                repository=repository,
                commit=one.commit_id,
                created=one.created_at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                files=files,
            )

    def _files(self, repository: str, commit: str, names: Sequence[str]) -> dict[str, bytes]:
        from huggingface_hub import HfApi, hf_hub_download

        rows = HfApi().get_paths_info(repository, list(names), revision=commit)
        found = {}
        for row in rows:
            if getattr(row, "size", 0) > SMALL:
                raise InputRefused(
                    f"hf://{repository}@{commit}: {row.path} has {row.size} bytes",
                    hint="no card is that large",
                )
            path = hf_hub_download(repository, row.path, revision=commit)
            found[row.path] = read_bytes(Path(path), SMALL)
        return found


def _content(repository: str) -> HubContent | None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError

    try:
        commit = HfApi().model_info(repository).sha or ""
        if not commit:
            return HubContent(commit="", files={})
        rows = [*HfApi().list_repo_tree(repository, recursive=True, revision=commit)]
    except EntryNotFoundError:
        return HubContent(commit="", files={})
    except RepositoryNotFoundError as error:
        if _status(error) == _UNAUTHORIZED:
            raise
        return None
    except HfHubHTTPError as error:
        if _status(error) == _ABSENT:
            return None
        raise
    named = [row for row in rows if hasattr(row, "blob_id")]
    files = {row.path: row.lfs.sha256 if row.lfs else row.blob_id for row in named}
    return HubContent(commit=commit, files=files)


@contextmanager
def _explained(repository: str, what: str) -> Iterator[None]:
    """Turn the client's errors into ours: without its texts, which may hold signed addresses."""
    from huggingface_hub.errors import HFValidationError

    failures: tuple[type[Exception], ...] = (OSError, RuntimeError, ValueError, KeyError, TypeError)
    failures += _transport()
    try:
        yield
    except HFValidationError:
        raise InputRefused(
            f"hf://{repository}: not a repository name that the hub accepts",
            hint="give hf://OWNER/NAME with letters, digits, '-', '_' and '.'",
        ) from None
    except failures as error:
        raise _failure(error, repository, what) from None


def _failure(error: Exception, repository: str, what: str) -> WeightsmithError:
    from huggingface_hub.errors import OfflineModeIsEnabled, RevisionNotFoundError

    name, place = f"hf://{repository}", hub_endpoint()
    said = f"{name}: {place} refused to let us {what} it"
    if isinstance(error, OfflineModeIsEnabled):
        return EnvironmentFailure(f"{name}: HF_HUB_OFFLINE is set", hint="unset it to publish")
    if "README.md" in str(error) and isinstance(error, ValueError):  # the client's check of a card
        why = " ".join(str(error).split())[:300]
        return InputRefused(
            f"{name}: {place} does not accept the model's card: {why}",
            hint="correct `card` in the recipe, for example its licence",
        )
    if not (status := _status(error)):
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        return EnvironmentFailure(
            f"{name}: {place} could not be reached: {type(first).__name__}",
            hint="check the network, HF_ENDPOINT and the proxy, and push again: what has arrived "
            "is not sent twice",
        )
    if isinstance(error, RevisionNotFoundError):
        return InputRefused(f"{name} has no such commit", hint="look at its history on the hub")
    if status == _ABSENT:
        return InputRefused(
            f"{name}: {place} has no such owner or repository",
            hint="check owner and name, and that the token may see them",
        )
    another = (f"{name}: somebody else wrote to it at the same time", "push again")
    message, hint = {
        _UNAUTHORIZED: (f"{said}: not signed in, or the token is not valid", _TOKEN),
        _FORBIDDEN: (
            f"{said}: this account or its token may not do that",
            f"use a token with write access to {repository.partition('/')[0]}, or another owner",
        ),
        _CONFLICT: another,
        _MOVED: another,
        _TOO_MANY: (f"{said}: too many requests", "wait a few minutes, push again"),
    }.get(
        status,
        (
            f"{said}: HTTP status {status}",
            "try again later; if it happens again, check the name and the account's storage",
        ),
    )
    return EnvironmentFailure(message, hint=hint)


def _status(error: BaseException) -> int:
    """Return the HTTP status of the reply that an error is about; 0 if there was none."""
    cause: BaseException | None = error
    while cause is not None:
        response: Any = getattr(cause, "response", None)
        if response is not None:
            return int(response.status_code)
        cause = cause.__cause__
    return 0
