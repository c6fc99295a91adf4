"""Unpacks an image into a root file system; its layers are untrusted.

https://github.com/opencontainers/image-spec/blob/main/layer.md (whiteouts, change sets)

Limits are checked before: 200 times the size of a compressed layer (256 MiB in any case), a million
files, no sparse files or chains of extended headers, which no tool writes. Of a name that occurs
twice the last one wins, as in every engine, so that what is tested is what an engine starts.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
from pathlib import Path

from weightsmith.core.errors import EnvironmentFailure, InputRefused, UsageError
from weightsmith.core.trees import discard, remove
from weightsmith.oci.image import Image
from weightsmith.oci.layers import Layer
from weightsmith.oci.manifests import hostile
from weightsmith.oci.streams import opened

_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"
_MOST_LINKS = 40
_MOST_ENTRIES = 1_000_000
"""Entries in all layers of an image; CUDA images have a tenth of it."""
_BUFFER = 1 << 20
_DEEPEST = 256
"""Nested folders. Real images have a few dozen, and a Linux path (4,096 bytes) has hardly room for
more; deeper trees are made to crash the programs that read them.
"""
_TOO_DEEP = f"a layer has a path nested deeper than {_DEEPEST} folders"
_LONGEST_NAME = 255
"""Bytes of a file name on Linux file systems."""


def unpack(image: Image, root: Path) -> None:
    """Unpack the image into `root`, which must be absent or empty; all or nothing.

    Whiteouts are applied, links are followed only inside the root, device nodes and pipes are
    left out. Modes and times are kept, set-user-id bits are not, owners only as root. Raises
    InputRefused for a layer that is malformed, leaves the root or does not match its diff id;
    EnvironmentFailure for disk errors.
    """
    if image.has_files:
        raise UsageError(
            "this form holds a model's files and no program to start",
            hint="give an image of the kind `image`, or serve the files with a model runner",
        )
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UsageError(f"{root} is not empty", hint="name a folder that does not exist yet")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        needed, free = sum(x.size for x in image.layers), shutil.disk_usage(root.parent).free
        if free < needed:
            raise EnvironmentFailure(
                f"no space to unpack the image: {root.parent} has {free / 1e6:,.0f} MB free, and"
                f" its layers have {needed / 1e6:,.0f} MB",
                hint="make room there, or set WEIGHTSMITH_HOME to a folder on a larger disk",
            )
        temporary = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
        try:
            tree = _Tree(temporary)
            for layer in image.layers:
                _apply(tree, layer)
            tree.finish()
            temporary.replace(root)
        except BaseException:
            discard(temporary)
            raise
    except OSError as error:
        raise EnvironmentFailure(
            f"cannot unpack into {root}: {error.strerror or error}",
            hint="check free space and permissions",
        ) from None


class _Tree:
    """A root file system that is being written, by us alone."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.entries = 0
        self._folders: dict[Path, tarfile.TarInfo] = {}

    def place(self, name: str) -> Path | None:
        """Return an entry's path: its parent's links are followed, its own is not.

        None is the root itself. Missing parents are created.
        """
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if ".." in parts or "\0" in name:
            raise hostile(f"a layer has the path {name[:200]!r}, which leaves the image")
        for part in parts:
            if len(os.fsencode(part)) > _LONGEST_NAME:
                raise hostile(
                    f"a layer has a name longer than {_LONGEST_NAME} bytes: {part[:80]!r}..."
                )
        if not parts:
            return None
        if len(parts) > _DEEPEST:
            raise hostile(_TOO_DEEP)
        return self._inside(parts[:-1]) / parts[-1]

    def write(self, entry: tarfile.TarInfo, archive: tarfile.TarFile, target: Path) -> None:
        """Write one entry, replacing what is there."""
        keeps = entry.isdir() and target.is_dir() and not target.is_symlink()
        if not keeps:
            self.remove(target)
        if entry.isdir():
            target.mkdir(mode=0o700, exist_ok=True)
            self._folders[target] = entry
        elif entry.issym():
            target.symlink_to(entry.linkname)
            _own(target, entry)
            _touch(target, entry)
        elif entry.islnk():
            source = self.place(entry.linkname)
            if source is None or not (source.is_symlink() or source.is_file()):
                raise hostile(
                    f"a layer links {entry.name[:200]!r} to a file that is not in the image"
                )
            os.link(source, target, follow_symlinks=False)
        elif entry.isreg():
            content = archive.extractfile(entry)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            with os.fdopen(os.open(target, flags, 0o600), "wb") as file:
                if content is not None:
                    shutil.copyfileobj(content, file, _BUFFER)
            _own(target, entry)
            # A set-user-id file from an image would be a way to become root on this machine.
            target.chmod(entry.mode & 0o1777)
            _touch(target, entry)

    def remove(self, target: Path) -> None:
        """Delete a file or a folder; the target of a link stays."""
        if target.is_dir() and not target.is_symlink():
            self._folders = {
                path: entry
                for path, entry in self._folders.items()
                if path != target and target not in path.parents
            }
            remove(target)
        else:
            target.unlink(missing_ok=True)

    def finish(self) -> None:
        """Set the folders' modes and times; until now they had to be writable."""
        self.root.chmod(0o755)
        for path in sorted(self._folders, key=lambda path: len(path.parts), reverse=True):
            entry = self._folders[path]
            _own(path, entry)
            path.chmod(entry.mode & 0o7777)
            _touch(path, entry)

    def _inside(self, parts: list[str]) -> Path:
        """Resolve a path as a process in the root would, and create missing folders."""
        here, rest, links = self.root, list(parts), 0
        while rest:
            part = rest.pop(0)
            if part in ("", "."):
                continue
            if part == "..":
                here = here if here == self.root else here.parent
                continue
            step = here / part
            if len(step.parts) - len(self.root.parts) > _DEEPEST:
                raise hostile(_TOO_DEEP)
            if step.is_symlink():
                links += 1
                if links > _MOST_LINKS:
                    raise hostile("a layer has a loop of symbolic links")
                to = str(step.readlink())
                here = self.root if to.startswith("/") else here
                rest = to.split("/") + rest
                continue
            if not step.is_dir():
                step.unlink(missing_ok=True)
                step.mkdir()
                step.chmod(0o755)  # whatever the umask
            here = step
        return here


def _apply(tree: _Tree, layer: Layer) -> None:
    made: set[Path] = set()
    with opened(layer) as (archive, stream):
        while (entry := archive.next()) is not None:
            tree.entries += 1
            if tree.entries > _MOST_ENTRIES:
                raise hostile(f"the image has more than {_MOST_ENTRIES} files")
            target = tree.place(entry.name)
            if target is None:
                pass
            elif target.name == _OPAQUE:
                for child in list(target.parent.iterdir()):
                    # Files of this same layer stay: a whiteout hides only lower layers.
                    if child not in made and not any(child in path.parents for path in made):
                        tree.remove(child)
            elif target.name.startswith(_WHITEOUT):
                hidden = target.name.removeprefix(_WHITEOUT)
                if hidden in ("", ".", ".."):
                    raise hostile(
                        f"a layer has the whiteout {entry.name[:200]!r}, which names no file"
                    )
                tree.remove(target.with_name(hidden))
            else:
                made.add(target)
                tree.write(entry, archive, target)
            archive.members.clear()  # type: ignore[attr-defined]  # they would pile up
    if stream.digest != layer.diff_id:
        raise InputRefused(
            f"the layer {layer.digest.short} cannot be unpacked: it does not match its diff id",
            hint="the image is damaged; pull or build it again",
        )


def _touch(path: Path, entry: tarfile.TarInfo) -> None:
    when = max(0, min(entry.mtime, 1 << 33))
    os.utime(path, (when, when), follow_symlinks=False)


def _own(path: Path, entry: tarfile.TarInfo) -> None:
    if not (0 <= entry.uid < 1 << 31 and 0 <= entry.gid < 1 << 31):
        raise hostile(f"a layer gives {entry.name[:200]!r} an invalid owner")
    if os.geteuid() == 0:
        os.chown(path, entry.uid, entry.gid, follow_symlinks=False)
