"""Publishes files on a model hub (`hf://owner/name`) with the hub's own client.

All or nothing: one commit with the difference, which is read back. `upload_folder` leaves old files
beside new ones. Large files go by Git LFS, except to huggingface.co: the client uses Xet whenever
its library is there, and other hubs may not speak it. The client's error texts are not shown: they
can contain signed addresses. New repositories are private, since a publication by mistake cannot be
taken back.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from weightsmith.core.errors import EnvironmentFailure, InputRefused, WeightsmithError
from weightsmith.core.ports import HubContent
from weightsmith.outside.hub import hub_endpoint

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
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
        from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

        # The client shows its own progress, on standard error; a log needs none.
        (enable_progress_bars if sys.stderr.isatty() else disable_progress_bars)()
        with _explained(repository, "write to"), _large_files():
            added = [CommitOperationAdd(name, source) for name, source in files.items()]
            gone = [CommitOperationDelete(name, is_folder=False) for name in deleted]
            done = HfApi().create_commit(
                repository,
                [*added, *gone],
                commit_message=message,
                parent_commit=parent or None,
            )
        return str(done.oid)


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
def _large_files() -> Iterator[None]:
    """Send large files as Git LFS objects, except to the public hub, which has its own protocol.

    The client takes that protocol for granted once its library is installed, but mirrors and
    private hubs may not speak it.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_DISABLE_XET = before or hub_endpoint() != _PUBLIC
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


@contextmanager
def _explained(repository: str, what: str) -> Iterator[None]:
    """Turn the client's errors into ours: without its texts, which may hold signed addresses."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # Errors of the client's HTTP library, which it does not convert.
    transport = [kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"]
    try:
        yield
    except HFValidationError:
        raise InputRefused(
            f"hf://{repository}: not a repository name that the hub accepts",
            hint="give hf://OWNER/NAME with letters, digits, '-', '_' and '.'",
        ) from None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, *transport) as error:
        raise _failure(error, repository, what) from None


def _failure(error: Exception, repository: str, what: str) -> WeightsmithError:
    """Return what a failure of the client means, and what to do."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    name, place = f"hf://{repository}", hub_endpoint()
    status = _status(error)
    said = f"{name}: {place} refused to let us {what} it"
    if isinstance(error, OfflineModeIsEnabled):
        return EnvironmentFailure(f"{name}: HF_HUB_OFFLINE is set", hint="unset it to publish")
    if "README.md" in str(error) and isinstance(error, ValueError):  # the client's check of a card
        why = " ".join(str(error).split())[:300]
        return InputRefused(
            f"{name}: {place} does not accept the model's card: {why}",
            hint="correct `card` in the recipe, for example its licence",
        )
    if status == _UNAUTHORIZED:
        return EnvironmentFailure(f"{said}: not signed in, or the token is not valid", hint=_TOKEN)
    if status == _FORBIDDEN:
        owner = repository.partition("/")[0]
        return EnvironmentFailure(
            f"{said}: this account or its token may not do that",
            hint=f"use a token with write access to {owner}, or another owner",
        )
    if status == _ABSENT:
        return InputRefused(
            f"{name}: {place} has no such owner or repository",
            hint="check owner and name, and that the token may see them",
        )
    if status in (_CONFLICT, _MOVED):
        return EnvironmentFailure(
            f"{name}: somebody else wrote to it at the same time", hint="push again"
        )
    if status == _TOO_MANY:
        return EnvironmentFailure(
            f"{said}: too many requests", hint="wait a few minutes, push again"
        )
    if status:
        return EnvironmentFailure(
            f"{said}: HTTP status {status}",
            hint="try again later; if it happens again, check the name and the account's storage",
        )
    return EnvironmentFailure(
        f"{name}: {place} could not be reached: {type(_root(error)).__name__}",
        hint="check the network, HF_ENDPOINT and the proxy, and push again: what has arrived is "
        "not sent twice",
    )


def _root(error: BaseException) -> BaseException:
    """Return the first cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException) -> int:
    """Return the HTTP status of the reply that an error is about; 0 if there was none."""
    cause: BaseException | None = error
    while cause is not None:
        response: Any = getattr(cause, "response", None)
        if response is not None:
            return int(response.status_code)
        cause = cause.__cause__
    return 0
