"""Reads a source from a model hub (`hf://owner/name`), with the hub's own client and cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

from toolchain.drivers.folders import read_tree
from toolchain.errors import EnvironmentFailure, InputRefused
from toolchain.ports import Progress, Silent, Store
from toolchain.values import Snapshot

_WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.md", "LICENSE*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubReader:
    """Brings a repository at one commit; `HF_ENDPOINT`, `HF_TOKEN` and `HF_HOME` are honoured."""

    scheme = "hf"

    def __init__(self, store: Store) -> None:
        self._store = store

    def fetch(self, source: str, revision: str, sha256: str, progress: Progress) -> Snapshot:
        """Return the repository's files at a commit; an unpinned revision is resolved first.

        Raises InputRefused for a repository that is not there or not ours to read, and
        EnvironmentFailure where the hub cannot be reached.
        """
        if sha256:
            raise InputRefused(
                f"{source}: `sha256` pins a pypi:// source; use `revision` here",
                hint="give the commit",
            )
        repository, revision = _split(source, revision)
        pinned = bool(_COMMIT.fullmatch(revision))
        root, commit = self._download(repository, revision, progress, pinned=pinned)
        pin = f"hf://{repository}@{commit}"
        return Snapshot(
            tree=read_tree(root, self._store, progress), source=source, pin=pin, pinned=pinned
        )

    def known(self, source: str, revision: str, sha256: str) -> Snapshot | None:
        """Return the repository where its commit is pinned and lies in the hub's cache."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        repository, revision = _split(source, revision)
        if sha256 or not _COMMIT.fullmatch(revision):
            return None
        try:
            root = snapshot_download(
                repository, revision=revision, allow_patterns=list(_WANTED), local_files_only=True
            )
        except (LocalEntryNotFoundError, HFValidationError, OSError):
            return None
        tree = read_tree(Path(root), self._store, Silent())
        return Snapshot(tree=tree, source=source, pin=f"hf://{repository}@{revision}", pinned=True)

    def _download(
        self, repository: str, revision: str, progress: Progress, *, pinned: bool
    ) -> tuple[Path, str]:
        # Imported here: the hub's client takes longer to load than `invoke --list` may take.
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
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        try:
            commit = revision
            if not pinned:
                commit = HfApi().model_info(repository, revision=revision or None).sha or ""
            progress.note(f"fetching hf://{repository}@{commit[:12]} (kept in the hub's cache)")
            root = snapshot_download(repository, revision=commit, allow_patterns=list(_WANTED))
        except GatedRepoError:
            raise InputRefused(
                f"hf://{repository} is gated and this account may not read it",
                hint="accept its terms on the hub and set HF_TOKEN",
            ) from None
        except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
            raise InputRefused(
                f"hf://{repository}@{revision or 'main'}: {str(error).splitlines()[0]}",
                hint="check owner, name and revision; a private repository needs HF_TOKEN",
            ) from None
        except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
            raise EnvironmentFailure(
                f"hf://{repository}: {endpoint} could not be reached: {type(error).__name__}",
                hint="check the network, HF_ENDPOINT and the proxy; "
                "a folder with the files works as a source too",
            ) from None
        return Path(root), commit


def _split(source: str, revision: str) -> tuple[str, str]:
    repository, _, suffix = source.removeprefix("hf://").partition("@")
    return repository, revision or suffix
