"""A container engine in this process: it takes archives apart as `docker load` does."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from weightsmith.core.errors import EnvironmentFailure, InputRefused
from weightsmith.core.ports import CANDIDATES
from weightsmith.core.values import Digest, Json
from weightsmith.oci.references import Reference

from tests.fakes.journal import Journal


@dataclass(frozen=True)
class Held:
    """An image that can be started: its configuration, and the bytes of each layer."""

    settings: Mapping[str, Json]
    layers: tuple[bytes, ...]

    @property
    def config(self) -> Mapping[str, Json]:
        """What the image says of its process: Env, Entrypoint, Cmd, Labels."""
        return dict(self.settings["config"])

    @property
    def diff_ids(self) -> tuple[str, ...]:
        return tuple(self.settings["rootfs"]["diff_ids"])

    def files(self) -> dict[str, bytes]:
        """Return the root file system's files, upper layers last."""
        return {
            f"/{name.lstrip('./')}": data
            for layer in self.layers
            for name, data in _files(layer).items()
        }


@dataclass
class MemoryEngine:
    """Holds images by name; an archive may leave out layers that it has."""

    answering: bool = True
    owner: str = "memory-1-1"
    gpu: bool = False
    names: dict[str, str] = field(default_factory=dict)
    """Reference, as `_whole` has it -> image id, the digest of its configuration."""
    images: dict[str, Held] = field(default_factory=dict)
    sent: list[int] = field(default_factory=list)
    """Bytes of each load."""
    journal: Journal = field(default_factory=Journal)

    def answers(self) -> bool:
        return self.answering

    def load(self, archives: Iterable[Iterator[bytes]], reference: str) -> str:
        self._require()
        self.sent.append(0)
        for archive in archives:
            self._take(archive, reference)
        self.journal.add(f"load {_short(reference)}")
        return self.names[_whole(reference)]

    def chains_of(self, *repositories: str) -> tuple[tuple[str, ...], ...]:
        wanted = {_whole(repository).rpartition(":")[0] for repository in repositories}
        found = [
            self.images[image].diff_ids
            for name, image in self.names.items()
            if name.rpartition(":")[0] in wanted
        ]
        return tuple(dict.fromkeys(found))

    def inspect(self, reference: str) -> Mapping[str, Json]:
        self._require()
        image = self.names.get(_whole(reference), reference)
        if image not in self.images:
            return {}
        return {"Id": image, "Config": self.images[image].config}

    def read_file(self, reference: str, path: str, largest: int) -> bytes:
        self._require()
        held = self.held(reference)
        data = held.files().get(path, b"") if held else b""
        if len(data) > largest:
            raise InputRefused(f"{path} has more than {largest} bytes", hint="")
        return data

    def untag(self, reference: str) -> None:
        self._require()
        if image := self.names.pop(_whole(reference), ""):
            self.journal.add(f"untag {_short(reference)}")
            if image not in self.names.values():
                del self.images[image]

    def describe(self) -> Mapping[str, Json]:
        if not self.answering:
            return {}
        return {"version": "memory", "storage": "memory", "gpu": self.gpu, "layerwise": True}

    def held(self, reference: str) -> Held | None:
        return self.images.get(self.names.get(_whole(reference), ""))

    def _require(self) -> None:
        if not self.answering:
            raise EnvironmentFailure(
                "no container engine answers", hint="start one, or use --runner local"
            )

    def _take(self, archive: Iterator[bytes], reference: str) -> None:
        data = b"".join(archive)
        self.sent[-1] += len(data)
        try:
            blobs = _files(data)
            (row,) = json.loads(blobs["manifest.json"])
            settings = json.loads(blobs[row["Config"]])
            chain = zip(row["Layers"], settings["rootfs"]["diff_ids"], strict=True)
            layers = tuple(self._layer(blobs.get(place), wanted) for place, wanted in chain)
        except (tarfile.TarError, KeyError, ValueError) as error:
            raise EnvironmentFailure(
                f"the engine does not take {reference}: {error}", hint="look at its log"
            ) from None
        image = str(Digest.of(blobs[row["Config"]]))
        self.images[image] = Held(settings=settings, layers=layers)
        self.names |= dict.fromkeys(map(_whole, row["RepoTags"]), image)

    def _layer(self, data: bytes | None, diff_id: str) -> bytes:
        """Return a layer of an archive, or the one that is here already."""
        if data is None:
            held = (
                layer
                for image in self.images.values()
                for layer, known in zip(image.layers, image.diff_ids, strict=True)
                if known == diff_id
            )
            data = next(held, None)
        if data is None or Digest.of(data) != diff_id:
            raise ValueError(f"layer {diff_id} is missing, or another")
        return data


def _files(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        streams = {member.name: tar.extractfile(member) for member in tar if member.isfile()}
        return {name: stream.read() for name, stream in streams.items() if stream}


def _whole(reference: str) -> str:
    """Return a name with the registry and tag that Docker adds to a short one."""
    found = Reference.parse(reference)
    return f"{found.name}:{found.tag or 'latest'}"


def _short(reference: str) -> str:
    """Return what a journal says of a name: `candidate`, else the tag."""
    return "candidate" if CANDIDATES in reference else _whole(reference).rpartition(":")[2]
