"""`rebase`: replace an image's engine base without uploading its weights again."""

from __future__ import annotations

import re
from dataclasses import replace

from weightsmith.api.commands.requests import RebaseCommand
from weightsmith.api.commands.server import session_with
from weightsmith.core.errors import CheckFailed, InputRefused
from weightsmith.core.values import Digest, Published
from weightsmith.evaluating.client import ask, find_served, first_name
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.replaying import described, replay
from weightsmith.evaluating.session import ServerSession
from weightsmith.oci import manifests
from weightsmith.oci.image import Image, host_image, index_of
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import ImageLocation, open_location
from weightsmith.oci.streams import first_collision
from weightsmith.provenance import evidence as gathered
from weightsmith.provenance import statements
from weightsmith.provenance.bills import MODEL_BILL, SPDX_BILL, base_documents
from weightsmith.provenance.chain import trace
from weightsmith.provenance.evidence import Evidence
from weightsmith.provenance.labels import (
    BASE_DIGEST,
    BASE_NAME,
    ENGINE_LABEL,
    ENGINE_VERSION,
    REBASED,
    REPLAY_DIGEST,
    Roles,
    assemble_in_roles,
    engine_version,
    moved_labels,
    roles_of,
)
from weightsmith.provenance.proofs import replay_in
from weightsmith.provenance.statements import Resource
from weightsmith.provenance.withdrawal import withdrawn_in, withdraws
from weightsmith.steps.bases import base_image, check_own, public_base
from weightsmith.steps.launch import why_not_started
from weightsmith.steps.outputs import ImageOutputs, candidate, deliver, discard_candidate
from weightsmith.steps.stage_result import Timer
from weightsmith.steps.tools import Tools

_GREETING = Item(messages=({"role": "user", "content": "Hello"},), expected=("",), line=0)


def rebase_image(request: RebaseCommand, tools: Tools) -> tuple[Published, Digest]:
    """Push the image on its new base; weight layers are reused or mounted, never uploaded again.

    Rebases every platform of an index; returns also the digest before. Raises InputRefused if base
    and image are incompatible, CheckFailed if the new image does not start.
    """
    target = Reference.parse(request.to)
    timer = Timer("rebase", f"{request.source} onto {request.onto}", tools)
    origin = open_location(request.source, tools.registry)
    index = origin.index()
    named = manifests.platforms_in(index, request.source) if index else []
    if twice := manifests.twice_in(index, request.source) if index else []:
        raise InputRefused(
            f"{request.source} has several images for {', '.join(twice)[:200]}",
            hint="name one of them by its digest: which one an engine would take is not said",
        )
    olds = [origin.image(platform) for platform in named] or [origin.image()]
    for platform, old in zip(named, olds, strict=False):
        if platform and platform != old.platform:
            raise InputRefused(
                f"{request.source} says that an image is for {platform}, which is for"
                f" {old.platform}",
                hint="its index is wrong: name the image by its digest",
            )
    check_own(request.onto, [old.platform for old in olds], "--onto")
    tools.registry.check_push(target)
    moved, attachments = list[Image](), list[Evidence]()
    for old in olds:
        roles, engine = roles_of(old, request.source), old.labels.get(ENGINE_LABEL, "")
        base = base_image(request.onto, engine, tools, platform=old.platform)
        _check_contract(old, roles, base, request.onto, tools)
        of_base = (BASE_NAME, BASE_DIGEST, ENGINE_VERSION)
        kept = {key: text for key, text in roles.config.labels.items() if key not in of_base}
        labels = {**kept, **moved_labels(old.labels, old.digest), REBASED: old.digest}
        new = assemble_in_roles(
            roles.weights,
            roles.settings,
            replace(roles.config, labels=labels),
            base,
            public_base(request.onto),
            order="weights-first" if roles.weights_first else "engine-first",
            version=engine_version(base.labels),
        )
        moved.append(new)
        attachments.append(_evidence(old, new, base, request.onto, origin, tools))
    whole = index_of(moved)
    if request.smoke:
        _smoke(host_image(whole), request.onto, tools)
    outputs = ImageOutputs(push=True, force=request.force)
    published = deliver(whole, request.to, outputs, attachments, tools)
    seconds = timer.done(published, cached=False).seconds
    before = Digest.of(index) if index else olds[0].digest
    return replace(published, seconds=seconds), before


def _check_contract(old: Image, roles: Roles, base: Image, name: str, tools: Tools) -> None:
    """Raise InputRefused if the image is incompatible with the new base.

    Engine and platform must be the same, and the engine's major version must be the one that the
    plan was made for. The base must not have files at the paths of the image's own files.
    """
    if base.platform != old.platform:
        raise InputRefused(
            f"{name} is for {base.platform}, but the image is for {old.platform}",
            hint="choose a base for the image's platform",
        )
    before, after = old.labels.get(ENGINE_VERSION, ""), engine_version(base.labels)
    found = (re.match(r"v?(\d+)\.", version) for version in (before, after))
    majors = {one and one[1] for one in found}
    if before and after and len(majors) > 1:
        raise InputRefused(
            f"{name} has engine version {after}, but the image was planned for {before}",
            hint="another major version may read its settings differently: build the image again "
            "for it",
        )
    if not after:
        tools.progress.warn(f"{name} does not declare its engine version")
    # The folders of weights and settings, taken from the layers' titles.
    paths = [layer.file.partition(" and ")[0] for layer in (*roles.weights, *roles.settings)]
    folders = {path.rpartition("/")[0] for path in paths if "/" in path}
    tops = frozenset(f.split("/")[0] if f.startswith("models") else f for f in folders)
    if taken := first_collision(base, tops, tools.store.memo):
        raise InputRefused(
            f"{name} has /{taken}, where the image has its own files",
            hint="choose a base without files at these paths",
        )


def _smoke(image: Image, onto: str, tools: Tools) -> None:
    """Start the image once, if this machine has an engine that can run it.

    Raises CheckFailed, with the server's last lines, if it does not work.
    """
    reason = why_not_started(image, tools)
    if not reason and not tools.engine.answers():
        reason = "no container engine is available: the image was not started"
    if reason:
        tools.progress.warn(reason)
        return
    try:
        with candidate(image, None, tools) as name:
            try:
                with session_with(tools, image=name, modest=True) as session:
                    ask(session, find_served(session, first_name(session)), _GREETING, 4)
                    _replay(image, session, tools)
            except CheckFailed as error:
                raise CheckFailed(
                    f"the image does not work on {onto}: {error.message.replace(name, 'it')}",
                    hint=f"{error.hint}; or give --no-smoke to push it without starting it",
                ) from None
    finally:
        discard_candidate(image, None, tools)


def _replay(image: Image, session: ServerSession, tools: Tools) -> None:
    """Ask the image's replay set, if it has one whose questions are not secret."""
    if not image.labels.get(REPLAY_DIGEST):
        return
    try:
        wanted = replay_in(image, "the image")
    except InputRefused as error:
        tools.progress.warn(f"its replay set was not asked: {error.message}")
        return
    found = replay(session, wanted, tools.progress)
    if found.verdict == "proven":
        tools.progress.note(f"{found.questions} answers are those of the image before")
        return
    first = next((f": {described(one)}" for one in found.differences), "")
    raise CheckFailed(
        f"{len(found.differences)} of {found.questions} answers are not those of the image before;"
        f" {found.why}{first}",
        hint="build the image again for this base, so that it is tested there",
    )


def _evidence(
    old: Image, new: Image, base: Image, onto: str, origin: ImageLocation, tools: Tools
) -> Evidence:
    attachments = gathered.read_attached(origin, old.digest)
    parts = gathered.own_statements(attachments)
    attached = [gathered.read_statement(part, None) for part in parts]
    lineage = trace(old.digest, attached)
    # Keep nothing else: with a key, everything that is kept gets signed.
    if why := withdrawn_in(attached, old.digest):
        tools.progress.warn(f"{old.digest.short} was withdrawn: {why}; the new image is not")
    about = [lineage.holds(one) and one.is_ours and not withdraws(one) for one in attached]
    kept = tuple(part for part, holds in zip(parts, about, strict=True) if holds)
    if len(kept) < len(parts):
        tools.progress.warn(
            f"{len(parts) - len(kept)} statement(s) attached to {old.digest.short} do not say"
            " how it was made and were not copied"
        )
    name = public_base(onto)
    # Without the old base's SBOMs, and third-party documents about the old image.
    kinds = (gathered.EVALUATION_TYPE, gathered.ADAPTER_TYPE)
    own = [
        d
        for d in filter(lineage.names, gathered.documents_in(attachments))
        if d.artifact_type in kinds or (d.parts and d.parts[0].title in (MODEL_BILL, SPDX_BILL))
    ]
    documents = (*own, *base_documents(base, name, tools.registry))
    statement = statements.provenance(
        "rebase",
        [statements.image_resource(new.manifest_blob), *statements.layer_resources(new)],
        parameters={"first_image": lineage.images[-1]},
        dependencies=[
            statements.image_resource(old.manifest_blob),
            Resource(name="base image", digest=base.digest, uri=name),
        ],
        byproducts=[*map(gathered.resource_of, documents)],
    )
    return Evidence(statements=(statement,), kept=kept, documents=documents)
