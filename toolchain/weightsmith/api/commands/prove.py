"""`prove`: hold a started image, or a server, against the replay set of the tested image."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from ipaddress import ip_address
from urllib.parse import urlsplit

from weightsmith.api.commands.requests import ProveCommand
from weightsmith.api.commands.server import session_with
from weightsmith.core.errors import (
    CheckFailed,
    EnvironmentFailure,
    UsageError,
    WeightsmithError,
)
from weightsmith.core.escape import joined
from weightsmith.core.safe_parse import parse, read_bytes
from weightsmith.core.values import Json, JsonValue, Writable, without_passwords
from weightsmith.evaluating.replay import LARGEST, REPLAY, ReplaySet, read_replay
from weightsmith.evaluating.replaying import UNSURE, Replayed, described, replay
from weightsmith.evaluating.session import ServerSession, SessionLimits
from weightsmith.oci.image import Image
from weightsmith.oci.layout import is_layout
from weightsmith.oci.registry import ImageLocation, RegistryLocation, open_location
from weightsmith.provenance import signing
from weightsmith.provenance.labels import (
    ENGINE_LABEL,
    ENGINE_VERSION,
    plan_in,
    plan_of,
)
from weightsmith.provenance.proofs import (
    ProofDevice,
    device_of,
    held_to,
    proof_of,
    replay_in,
    require_stated,
)
from weightsmith.provenance.sealing import attach_signed
from weightsmith.provenance.statements import Statement
from weightsmith.serving.devices import is_cpu
from weightsmith.steps.destinations import write_files
from weightsmith.steps.tools import Tools

NODE_TYPE = "WEIGHTSMITH_NODE_TYPE"
_SMI_SECONDS = 20.0
_CUDA = re.compile(r"CUDA Version:\s*([0-9.]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Subject:
    """What is proven: the set, and the image that it is of, if that is known."""

    wanted: ReplaySet
    image: Image | None = None
    place: ImageLocation | None = None
    start: str = ""
    """What is started: of a registry the digest that was read, since its tag may move meanwhile."""

    @property
    def labels(self) -> Mapping[str, str]:
        return self.image.labels if self.image else {}


def prove_image(asked: ProveCommand, tools: Tools) -> tuple[Mapping[str, Json], str]:
    """Return what the replay set showed, as JSON and as text.

    Raises CheckFailed if answers are different, and for a server that is none; InputRefused for an
    image without a replay set, or another set than the image's; EnvironmentFailure if the server
    does not answer. Each has the verdict as details.
    """
    _check(asked)
    try:
        subject = _subject(asked, tools)
        device = _device(asked, subject.labels, tools)
        _check_statement(asked, subject, device)
        limits = SessionLimits(request_seconds=asked.timeout, tries=asked.retries + 1)
        count = len(subject.wanted.questions)
        tools.progress.stage("prove", f"{count} questions")
        # A server at a URL is asked there: what is named as its image is not started.
        image = "" if asked.url else subject.start
        with session_with(tools, limits, image=image, url=asked.url, modest=True) as session:
            found = replay(session, subject.wanted, tools.progress)
            server = _server(subject, session)
    except WeightsmithError as error:
        error.details = {**_facts(None, "", "", why=error.message), **error.details}
        raise
    stated = _statements(asked, subject, device, found, server)
    engine = " ".join(filter(None, (str(server["engine"]), str(server["version"]))))
    facts = {
        **_facts(found, device.model or device.name, engine, why=found.why),
        "image": subject.image.digest if subject.image else "",
        "on": device.to_json(),
        "server": server,
        **_kept(asked, subject, found, stated, tools),
    }
    text = _text(found, device)
    if found.verdict == "different":
        raise CheckFailed(text, hint=_HINT, details=facts)
    if found.verdict == "not shown":
        raise EnvironmentFailure(
            f"not shown: {found.why}",
            hint=_OTHERS if found.why == UNSURE else found.hint or _AGAIN,
            details=facts,
        )
    return facts, text


_AGAIN = "wait until the server is ready, and ask again; if it is, check that it serves this model"
_OTHERS = "build the image with questions of which it is sure: `replay: {data: …}` names them"
_HINT = "do not send it traffic; compare its image's digest with the one that was tested"


def _check(asked: ProveCommand) -> None:
    if not (asked.image or asked.url):
        raise UsageError(
            "give --image or --url",
            hint="--image REF starts an image, --url asks a running server; its replay set is that"
            " of --image, or of --replay",
        )
    if asked.url and not (asked.image or asked.replay):
        raise UsageError(
            "--url needs --image or --replay: a server does not say which questions to ask",
            hint="give the image that the server runs, or the file of its replay set",
        )


def _states(asked: ProveCommand) -> bool:
    """Return whether anything is to be stated, in a file or at the image."""
    return bool(asked.statement or asked.key or asked.run.keyless)


def _check_statement(asked: ProveCommand, subject: _Subject, device: ProofDevice) -> None:
    """Raise UsageError, before anything is asked, for a proof that could not be stated."""
    if not _states(asked):
        return
    if subject.image is None:
        raise UsageError(
            "a statement is about an image's digest, and the container engine does not say it",
            hint="give --image with a reference in a registry, or oci:DIR",
        )
    if not device.name:
        raise UsageError(
            "a statement is about a device, and the server may be on another machine",
            hint="name it with --device, such as --device nvidia-l4",
        )


def _subject(asked: ProveCommand, tools: Tools) -> _Subject:
    """Return the set that is asked, and whose it is."""
    given = None
    if asked.replay:
        given = read_replay(read_bytes(asked.replay, LARGEST), str(asked.replay))
    if not asked.image:
        if given is None:
            raise AssertionError("a server is asked with an image or a file")
        return _Subject(wanted=given)
    here = asked.image
    held: Mapping[str, Json] = {}
    if not is_layout(asked.image) and tools.engine.answers():
        held = tools.engine.inspect(asked.image)
    labels = (held.get("Config") or {}).get("Labels") or {}
    try:
        place = open_location(asked.image, tools.registry)
        image = place.image()
    except WeightsmithError:
        if not held:
            raise
        return _Subject(wanted=_of_engine(asked, given, labels, tools), start=here)
    if held and not asked.url and not _is_held(image, held, tools):
        return _Subject(wanted=_of_engine(asked, given, labels, tools), start=here)
    if isinstance(place, RegistryLocation) and not held:
        here = str(place.reference.at(image.digest))
    if given is None:
        wanted = replay_in(image, asked.image)
    else:
        wanted = held_to(given, require_stated(image.labels, asked.image), str(asked.replay))
    return _Subject(wanted=wanted, image=image, place=place, start=here)


def _is_held(image: Image, held: Mapping[str, JsonValue], tools: Tools) -> bool:
    """Return whether the engine's image, which is started, is the registry's of the same name."""
    known = held.get("Id") in (image.config_blob.digest, image.digest)
    if not known:
        tools.progress.note("the container engine has another image of that name, and it is asked")
    return known


def _of_engine(
    asked: ProveCommand, given: ReplaySet | None, labels: Mapping[str, str], tools: Tools
) -> ReplaySet:
    """Return the set of an image that only the container engine has."""
    stated = require_stated(labels, asked.image)
    if given:
        return held_to(given, stated, str(asked.replay))
    where = f"{asked.image}:{REPLAY}"
    data = tools.engine.read_file(asked.image, REPLAY, LARGEST)
    return held_to(read_replay(data, where), stated, where)


def _device(asked: ProveCommand, labels: Mapping[str, str], tools: Tools) -> ProofDevice:
    """Return what the server runs on: this machine, unless it is at a URL elsewhere.

    Raises UsageError for a device that an image is started on and that is not here. What listens on
    a port of this machine may be elsewhere, as behind `kubectl port-forward`: so it is if another
    device is named, or if the image is planned for a GPU and there is none here.
    """
    node_type = asked.node_type or os.environ.get(NODE_TYPE, "")
    away = device_of(None, asked.device, node_type)
    if asked.url and not _is_here(asked.url):
        return away
    found = tools.launcher.devices("" if asked.url else asked.image)
    if found and plan_in(labels) and is_cpu(plan_of(labels).device):
        found = replace(found, gpus=())  # its engine has no use for them
    here = device_of(found, "", node_type)
    if asked.url and plan_of(labels).gpus and not (found and found.gpus):
        return away
    if found and asked.device and not here.fits(asked.device):
        if asked.url:
            return away
        raise UsageError(
            f"--device {asked.device}: the image is started here, on {here.model or here.name}",
            hint="leave --device out, or give the --url of a server that runs on it",
        )
    made = device_of(found, asked.device, node_type)
    if not (found and found.gpus):
        return made
    driver, cuda = "", ""
    with suppress(WeightsmithError):
        driver, cuda = _driver(tools)
    return replace(made, driver=driver, cuda=cuda)


def _driver(tools: Tools) -> tuple[str, str]:
    """Return the driver's version, and the newest CUDA that it runs, as nvidia-smi says them."""
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = tools.command(words, {}, b"", _SMI_SECONDS)
    found = _CUDA.search(tools.command(["nvidia-smi"], {}, b"", _SMI_SECONDS))
    return "".join(driver.splitlines()[:1]).strip()[:60], found[1] if found else ""


def _is_here(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host == "localhost"


def _server(subject: _Subject, session: ServerSession) -> dict[str, JsonValue]:
    """Return the engine with its version, and how the model is spread over devices."""
    labels, plan = subject.labels, plan_of(subject.labels)
    version, engine = labels.get(ENGINE_VERSION, ""), labels.get(ENGINE_LABEL, "")
    with suppress(WeightsmithError, ValueError, KeyError, TypeError, AttributeError):
        said = parse(session.try_get("/version").text)["version"]
        version = str(said)[:60]
    return {
        "engine": engine,
        "version": version,
        "tensor_parallel_size": plan.tensor_parallel_size,
        "pipeline_parallel_size": plan.pipeline_parallel_size,
    }


def _statements(
    asked: ProveCommand,
    subject: _Subject,
    device: ProofDevice,
    found: Replayed,
    server: Mapping[str, JsonValue],
) -> tuple[Statement, ...]:
    if subject.image is None or found.verdict == "not shown" or not _states(asked):
        return ()
    name = _name(subject.place)
    blob, facts = subject.image.manifest_blob, {**server, "url": without_passwords(asked.url)}
    return proof_of(blob, name, subject.wanted, device, found, facts, datetime.now(UTC))


def _name(place: ImageLocation | None) -> str:
    return place.reference.name if isinstance(place, RegistryLocation) else "image"


def _kept(
    asked: ProveCommand,
    subject: _Subject,
    found: Replayed,
    stated: tuple[Statement, ...],
    tools: Tools,
) -> Mapping[str, Writable]:
    """Write and attach the statements; return where they are."""
    if not stated or subject.image is None or subject.place is None:
        return {"statement": "", "attached": False}
    signer = tools.signer
    if asked.statement:
        lines = [signing.sealed(one, signer) if signer else one.content for one in stated]
        text = "".join(line.decode() + "\n" for line in lines)
        write_files({asked.statement.name: text}, asked.statement.absolute().parent)
    attached = bool(signer and asked.attach and found.verdict == "proven")
    if attached and signer:
        attach_signed(stated, subject.image.manifest_blob, subject.place, signer)
    return {"statement": str(asked.statement or ""), "attached": attached}


def _facts(found: Replayed | None, device: str, engine: str, *, why: str) -> Mapping[str, Writable]:
    """Return what `prove --json` prints in every case."""
    rows = [one.to_json() for one in found.differences] if found else []
    return {
        "verdict": found.verdict if found else "not shown",
        "device": device,
        "engine": engine,
        "questions": found.questions if found else 0,
        "differences": rows,
        "explained": [one.to_json() for one in found.explained] if found else [],
        "why": why,
        "by_tokens": found.by_tokens if found else 0,
        "room_used": {
            "largest": found.room_used[0] if found else 0.0,
            "mean": found.room_used[1] if found else 0.0,
        },
        "seconds": found.seconds if found else 0.0,
        "tokens_per_s": round(found.tokens / found.seconds, 2) if found and found.seconds else 0.0,
    }


def _text(found: Replayed, device: ProofDevice) -> str:
    where = f" on {device.model or device.name}" if device.model or device.name else ""
    count = found.questions
    if found.verdict == "proven":
        said = f"{found.equal} of {count} answers are equal"
        said += f", {len(found.explained)} part where rounding explains it" * bool(found.explained)
        return f"proven{where}: {said}"
    differ = f"{len(found.differences)} of {count} answers; " * bool(found.differences)
    lines = [f"different{where}: {differ}{found.why}"]
    lines += [described(one) for one in found.differences[:3]]
    return joined(lines)
