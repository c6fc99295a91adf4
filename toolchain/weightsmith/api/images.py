"""Functions for images: to plan, build, push, rebase, inspect, verify and find them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from weightsmith.api.commands.affected import (
    find_affected,
    keys_of,
    question_of,
    warn_of_other_keys,
    withdraw_all,
)
from weightsmith.api.commands.arguments import (
    AnyPath,
    Texts,
    options_of,
    path_of,
    paths_of,
    request_of,
    sources_of,
    texts_of,
)
from weightsmith.api.commands.bake import bake_model
from weightsmith.api.commands.images import copy_image, inspect_image, preview_copy
from weightsmith.api.commands.rebase import rebase_image
from weightsmith.api.commands.recipes import recipe_of, recipe_of_image
from weightsmith.api.commands.remake import rebase_all, write_fleets
from weightsmith.api.commands.requests import (
    AffectedCommand,
    AnyRecipe,
    BakeCommand,
    BuildCommand,
    InspectCommand,
    PlanCommand,
    PushCommand,
    RebaseCommand,
    RecipeCommand,
    VerifyCommand,
)
from weightsmith.api.commands.upload import hub_destination, preview_push, push_to_hub
from weightsmith.api.commands.verify import key_path, verify_image
from weightsmith.api.results import Affected, Baked, Built, Pushed, Rebased, Verification
from weightsmith.building import record, wiring
from weightsmith.building.build import build as build_all
from weightsmith.building.explain import forecast
from weightsmith.building.ignored import check_read
from weightsmith.building.progress import shown
from weightsmith.building.request import BuildRequest
from weightsmith.building.targets import AUTO, chosen_targets, wants_auto
from weightsmith.core.errors import UsageError
from weightsmith.core.escape import pinned
from weightsmith.core.ports import Progress, SignatureFormat, Silent
from weightsmith.core.values import Json, Published, Uploaded, plain
from weightsmith.evaluating.bench_files import ResultsFile, read_results
from weightsmith.provenance import signing
from weightsmith.recipe.file import RecipeFile
from weightsmith.recipe.schema import ImageNames
from weightsmith.recipe.user_config import RunOptions, WantedIdentity
from weightsmith.serving.targets import Target
from weightsmith.steps.outputs import ImageOutputs


def bake(
    model: AnyPath,
    target: str,
    *,
    push: str = "",
    load: str = "",
    layout: AnyPath | None = None,
    config: AnyPath | None = None,
    name: str = "",
    base_image: str = "",
    order: str = "engine-first",
    kind: str = "image",
    platform: str = "",
    max_layer_size: str = "auto",
    force: bool = False,
    insecure: bool = False,
    sign_key: str = "",
    signature_format: SignatureFormat = "cosign",
    keyless: bool = False,
    trust_config: AnyPath = "",
    runner: str = "auto",
    allow_network_in_jobs: bool = False,
    memory: str = "",
    cache: str = "",
    cache_from: str = "",
    progress: bool = True,
) -> Baked:
    """Assemble the image of a model without starting it; push it, load it or write a layout.

    At least one of `push`, `load` (references) and `layout` (a folder) is needed. `config` is the
    folder that `weightsmith render` wrote; `max_layer_size` is `auto`, `none` or text such as
    `10GB`; `kind` is `image`, `modelcar`, `volume`, `modelpack`, `modelpack-tar` or `ollama`.

    Raises UsageError for an unknown target or option, InputRefused for weights in another format,
    EnvironmentFailure if a registry or the container engine cannot be reached.

    >>> baked = weightsmith.bake(
    ...     "merged", "vllm", kind="volume", layout="capitals", progress=False
    ... )
    >>> any(layer["file"].endswith(".safetensors") for layer in baked.layers)
    True
    """
    request = request_of(
        BakeCommand,
        model=path_of(model),
        target=target,
        config=path_of(config) if config else None,
        name=name,
        image=options_of(
            ImageNames,
            "bake",
            base=base_image,
            platforms=(platform,) if platform else (),
            order=order,
            max_layer_size=max_layer_size,
        ),
        kind=kind,
        push=push,
        load=load,
        layout=path_of(layout) if layout else None,
        force=force,
        run=replace(
            _signing(insecure, sign_key, signature_format, keyless, trust_config),
            runner=runner,
            allow_network_in_jobs=allow_network_in_jobs,
            memory=memory,
            cache=cache,
            cache_from=cache_from,
        ),
    )
    with shown(progress) as told, wiring.open_for(request, told, base_image) as tools:
        made = bake_model(request, tools)
    return Baked(
        image=made.reference,
        digest=made.digest,
        layers=tuple(map(plain, made.layers)),
        uploaded_bytes=made.uploaded_bytes,
        seconds=made.seconds,
        warnings=tuple(told.warnings),
    )


def push(
    source: AnyPath,
    to: str,
    *,
    force: bool = False,
    public: bool = False,
    dry_run: bool = False,
    insecure: bool = False,
    sign_key: str = "",
    signature_format: SignatureFormat = "cosign",
    keyless: bool = False,
    trust_config: AnyPath = "",
    progress: bool = True,
) -> Pushed:
    """Copy an image to a registry, its digest stays the same; or a model to a hub, with a card.

    `source` is a reference or `oci:FOLDER`; for a hub (`to` is `hf://OWNER/NAME`) also a
    checkpoint's folder, a .gguf file or the folder of a build's results. `force` moves a tag that
    names another image, and replaces what a hub's repository has; `public` is for a new one. With
    `dry_run`, nothing is changed, and `planned` says what would be.

    Raises UsageError for an option that does not fit `to` or a tag that names another image,
    InputRefused for an invalid image or model, EnvironmentFailure if one side cannot be reached.

    >>> pushed = weightsmith.push("oci:image", f"{registry}/team/capitals:1", progress=False)
    >>> pushed.digest == built["llamacpp-q4_k_m"].digest
    True
    """
    request = request_of(
        PushCommand,
        source=str(path_of(source)),
        to=to,
        force=force,
        public=public,
        dry_run=dry_run,
        run=_signing(insecure, sign_key, signature_format, keyless, trust_config),
    )
    with shown(progress) as told:
        result, _ = run_push(request, told)
    return Pushed(
        image=result["reference"],
        digest=result.get("digest", ""),
        uploaded_bytes=result["uploaded_bytes"],
        mounted=result.get("mounted", 0),
        seconds=result.get("seconds", 0.0),
        planned=result if dry_run else {},
        warnings=tuple(told.warnings),
    )


def run_push(asked: PushCommand, progress: Progress) -> tuple[Mapping[str, Json], str]:
    """Push to a registry or a hub, or say what would be pushed; as the command says it."""
    sent: Published | Uploaded
    if hub := hub_destination(asked):
        with wiring.open_tools(replace(asked.run, runner="local"), progress) as tools:
            if asked.dry_run:
                return preview_push(asked.source, hub, tools)
            sent = push_to_hub(asked.source, hub, tools)
    else:
        signer = wiring.signer_of(asked.run, progress.warn)
        with wiring.make_registry(insecure=asked.run.insecure) as registry:
            if asked.dry_run:
                return preview_copy(asked.source, asked.to, registry, force=asked.force)
            sent = copy_image(
                asked.source, asked.to, registry, progress, force=asked.force, signer=signer
            )
    of_images = ("layers", "mounted") if hub else ()
    facts = {key: value for key, value in plain(sent).items() if key not in of_images}
    return facts, pinned(sent.reference, sent.digest)


def rebase(
    source: str,
    onto: str,
    to: str,
    *,
    smoke: bool = True,
    force: bool = False,
    insecure: bool = False,
    sign_key: str = "",
    signature_format: SignatureFormat = "cosign",
    keyless: bool = False,
    trust_config: AnyPath = "",
    cache: str = "",
    cache_from: str = "",
    progress: bool = True,
) -> Rebased:
    """Move an image to another engine base and push it; its weights are not copied.

    `source` and `onto` are references or `oci:FOLDER`. With `smoke`, the new image is started once
    and greeted, if a container engine answers.

    Raises InputRefused for a base that does not fit the image, CheckFailed if the new image does
    not start, UsageError if `to` names another image, EnvironmentFailure if a registry fails.

    >>> rebased = weightsmith.rebase(
    ...     pushed.image, f"{registry}/engines/llamacpp:2", f"{registry}/team/capitals:2",
    ...     progress=False,
    ... )
    >>> rebased.rebased_from == pushed.digest, rebased.mounted
    (True, 1)
    """
    request = request_of(
        RebaseCommand,
        source=source,
        onto=onto,
        to=to,
        smoke=smoke,
        force=force,
        run=replace(
            _signing(insecure, sign_key, signature_format, keyless, trust_config),
            cache=cache,
            cache_from=cache_from,
        ),
    )
    with shown(progress) as told, wiring.open_for(request, told) as tools:
        made, before = rebase_image(request, tools)
    return Rebased(
        image=made.reference,
        digest=made.digest,
        rebased_from=before,
        uploaded_bytes=made.uploaded_bytes,
        mounted=made.mounted,
        seconds=made.seconds,
        warnings=tuple(told.warnings),
    )


def plan(
    recipe: AnyRecipe,
    *,
    targets: Texts = (),
    set: Texts = (),  # noqa: A002 - the flag's name
    locked: bool = False,
    update_lock: bool = False,
    bench_results: AnyPath | Sequence[AnyPath] = (),
    measure: bool = False,
    dist: AnyPath = "dist",
    runner: str = "auto",
    allow_network_in_jobs: bool = False,
    insecure: bool = False,
    sign_key: str = "",
    signature_format: SignatureFormat = "cosign",
    keyless: bool = False,
    trust_config: AnyPath = "",
    memory: str = "",
    cache: str = "",
    cache_from: str = "",
) -> Mapping[str, Json]:
    """Return what `build` would do, without doing it.

    `stages` has a mapping each (`cached` or `why` not, `read_bytes`, `write_bytes`,
    `peak_memory_bytes`), `serving` each target's memory plan, and beside them are totals in bytes,
    as `weightsmith plan --json` prints them. `set` has `key.path=value` texts. With `measure`, one
    layer of the model is timed, and stages that run it have estimated `seconds`.

    Raises what the build would raise before its first long step: UsageError for a recipe that is
    invalid or does not fit the memory, InputRefused for invalid sources.

    >>> foreseen = weightsmith.plan("examples/tiny/recipe.yaml")
    >>> [row["stage"] for row in foreseen["stages"]][:2]
    ['resolve', 'merge']
    """
    request = request_of(
        PlanCommand,
        recipe=path_of(recipe) if isinstance(recipe, str) else recipe,
        targets=texts_of(targets),
        settings=texts_of(set),
        locked=locked,
        update_lock=update_lock,
        bench_results=paths_of(bench_results),
        measure=measure,
        dist=path_of(dist),
        run=replace(
            _signing(insecure, sign_key, signature_format, keyless, trust_config),
            runner=runner,
            allow_network_in_jobs=allow_network_in_jobs,
            memory=memory,
            cache=cache,
            cache_from=cache_from,
        ),
    )
    return run_plan(request)


def run_plan(asked: PlanCommand) -> Mapping[str, Json]:
    """Return what a build would do, as `plan --json` prints it."""
    _check_lock(asked)
    file = recipe_of(asked)
    wiring.keep_places_clean(asked, *sources_of(file))
    targets = chosen_targets(file, asked.targets, auto=True)
    auto = wants_auto(file, asked.targets)
    check_read(file.recipe, targets, auto=auto)
    results = _results(asked.bench_results, file, targets, auto=auto)
    with wiring.open_tools(asked.run, Silent(), uploads=False) as tools:
        return forecast(
            file,
            targets,
            asked.dist.absolute(),
            tools,
            outputs=_outputs(asked),
            locked=asked.locked,
            update_lock=asked.update_lock,
            bench_results=results,
            measure=asked.measure,
            auto=auto,
        )


def build(
    recipe: AnyRecipe,
    *,
    targets: Texts = (),
    set: Texts = (),  # noqa: A002 - the flag's name
    push: bool = False,
    load: bool = False,
    layout: AnyPath | None = None,
    force: bool = False,
    insecure: bool = False,
    sign_key: str = "",
    signature_format: SignatureFormat = "cosign",
    keyless: bool = False,
    trust_config: AnyPath = "",
    locked: bool = False,
    update_lock: bool = False,
    keep_replay: bool = False,
    bench_results: AnyPath | Sequence[AnyPath] = (),
    dist: AnyPath = "dist",
    runner: str = "auto",
    allow_network_in_jobs: bool = False,
    memory: str = "",
    cache: str = "",
    cache_from: str = "",
    progress: bool = True,
) -> Mapping[str, Built]:
    """Build, test and publish the image of each target; return them by target name.

    Relative paths of a recipe file start at its folder, those of a mapping or Recipe at the current
    one. `targets` and `set` (`key.path=value` texts) change the recipe for this run. `keep_replay`
    writes each image's replay set beside the recipe file. `bench_results` are results files of
    guidellm or AIPerf about the one target's image. Without `push`, `load` and `layout`, images go
    to the container engine, or to a layout below `dist`.

    Raises UsageError, InputRefused, CheckFailed (a gate said no; the report's path is in `hint`) or
    EnvironmentFailure. What was finished is kept, and the next call goes on from there.

    >>> built = weightsmith.build("examples/tiny/recipe.yaml", layout="image", progress=False)
    >>> built["llamacpp-q4_k_m"].scores["image"] >= built["llamacpp-q4_k_m"].scores["base"]
    True
    """
    request = request_of(
        BuildCommand,
        recipe=path_of(recipe) if isinstance(recipe, str) else recipe,
        targets=texts_of(targets),
        settings=texts_of(set),
        push=push,
        load=load,
        layout=path_of(layout) if layout else None,
        force=force,
        locked=locked,
        update_lock=update_lock,
        keep_replay=keep_replay,
        bench_results=paths_of(bench_results),
        dist=path_of(dist),
        run=replace(
            _signing(insecure, sign_key, signature_format, keyless, trust_config),
            runner=runner,
            allow_network_in_jobs=allow_network_in_jobs,
            memory=memory,
            cache=cache,
            cache_from=cache_from,
        ),
    )
    with shown(progress) as told:
        built = run_build(request, told)
    return {
        one.name: Built(
            target=one.target.name,
            image=one.published.reference,
            digest=one.published.digest,
            forms={kind: form.reference for kind, form in one.forms.items()},
            scores={name: score.score for name, score in one.scores.items()},
            verdict=one.verdict,
            sameness=one.sameness,
            report=one.report,
            stages=one.stages,
            uploaded_bytes=one.published.uploaded_bytes,
            warnings=tuple(told.warnings),
        )
        for one in built
    }


def run_build(asked: BuildCommand, progress: Progress) -> list[record.BuiltTarget]:
    """Build a recipe, or what an image says that it was built of."""
    _check_lock(asked)
    if asked.from_:
        wiring.keep_places_clean(asked)
        key, dist = key_path(asked.key), asked.dist.absolute()
        by = wiring.check_of_identity(asked.signed_by)
        if key and by:
            raise UsageError(
                "--key and --certificate-identity exclude each other", hint="give one of them"
            )
        check = signing.read_public_key(key) if key else by
        with wiring.make_registry(insecure=asked.run.insecure) as registry:
            again = recipe_of_image(
                asked.from_, asked.base, check, dist, registry, progress, asked.settings
            )
        asked = replace(asked, recipe=again, base="", locked=not asked.base)
    file = recipe_of(asked)
    wiring.keep_places_clean(asked, *sources_of(file))
    if asked.keep_replay and not (file.path and file.lasting):
        raise UsageError(
            "--keep-replay writes beside a recipe file, and this build has none",
            hint="write a recipe, and give it with --recipe",
        )
    targets = chosen_targets(file, asked.targets, to_build=True, auto=True)
    auto = wants_auto(file, asked.targets)
    check_read(file.recipe, targets, auto=auto)
    results = _results(asked.bench_results, file, targets, auto=auto)
    with wiring.open_tools(asked.run, progress) as tools:
        request = BuildRequest(
            file=file,
            targets=targets,
            outputs=replace(_outputs(asked), tag_digest=asked.push),
            dist=asked.dist.absolute(),
            engine_answers=tools.images_in_engine,
            locked=asked.locked,
            bench_results=results,
            update_lock=asked.update_lock,
            keep_replay=asked.keep_replay,
            auto=auto,
        )
        return list(build_all(request, tools))


def _signing(
    insecure: bool,
    sign_key: str,
    signature_format: SignatureFormat,
    keyless: bool,
    trust_config: AnyPath,
) -> RunOptions:
    return RunOptions(
        insecure=insecure,
        sign_key=sign_key,
        signature_format=signature_format,
        keyless=keyless,
        trust_config=str(trust_config),
    )


def _results(
    paths: Sequence[Path], file: RecipeFile, targets: Sequence[Target], *, auto: bool
) -> tuple[ResultsFile, ...]:
    """Read the results files of other tools; raises UsageError unless one target is named."""
    if paths and auto:
        raise UsageError(
            f"--bench-results is about one image, and which one {AUTO} chooses is not known yet",
            hint="name the target that was measured",
        )
    if paths and len(targets) != 1:
        raise UsageError(
            f"--bench-results is about one image, and this build makes {len(targets)}",
            hint="choose it with --target",
        )
    if not paths:
        return ()
    # With several adapters, an image serves each under a name of its own.
    serve, one_name = file.recipe.serve, not targets[0].format.unmerged
    served = targets[0].engine.fixed_name or serve.served_model_name or file.recipe.name
    return tuple(read_results(path, served if one_name else "") for path in paths)


def _outputs(asked: RecipeCommand) -> ImageOutputs:
    layout = asked.layout and asked.layout.absolute()
    return ImageOutputs(load=asked.load, layout=layout, push=asked.push, force=asked.force)


def _check_lock(asked: BuildCommand | PlanCommand) -> None:
    from_ = isinstance(asked, BuildCommand) and bool(asked.from_)
    if asked.update_lock and (asked.locked or from_):
        raise UsageError(
            f"--update-lock and {'--locked' if asked.locked else '--from'} exclude each other",
            hint="give only one of them",
        )
    if isinstance(asked, BuildCommand) and (asked.key or asked.signed_by.asked()) and not from_:
        given = "--key" if asked.key else "--certificate-identity"
        raise UsageError(
            f"{given} needs --from: it says who must have signed that image",
            hint="--sign-key and --keyless sign the images of this build",
        )


def inspect(source: str, *, platform: str = "", insecure: bool = False) -> Mapping[str, Json]:
    """Return an image's provenance, memory plan, scores, labels and layers.

    `source` is a reference or `oci:FOLDER`; the mapping is what `weightsmith inspect --json`
    prints. For an index, reads the image for `platform`, by default this machine's.

    Raises InputRefused for an invalid image, EnvironmentFailure if it cannot be reached.

    >>> weightsmith.inspect("oci:capitals")["digest"] == baked.digest
    True
    """
    run = RunOptions(insecure=insecure)
    request = request_of(InspectCommand, source=source, platform=platform, run=run)
    return run_inspect(request)


def run_inspect(asked: InspectCommand) -> Mapping[str, Json]:
    """Return what an image says of itself, as the command's JSON."""
    with wiring.make_registry(insecure=asked.run.insecure) as registry:
        return inspect_image(asked.source, registry, wiring.make_engine(), asked.platform)


def verify(
    source: str,
    *,
    key: AnyPath | None = None,
    certificate_identity: str = "",
    certificate_identity_regexp: str = "",
    certificate_oidc_issuer: str = "",
    certificate_oidc_issuer_regexp: str = "",
    trusted_root: AnyPath = "",
    proven_on: Texts = (),
    proof_key: AnyPath | None = None,
    insecure: bool = False,
    progress: bool = True,
) -> Verification:
    """Check an image's layers and statements, and with `key` (a public key, PEM) its signature.

    Instead of a key, an identity may be named that must have signed, and who vouches for it, as for
    `cosign verify`; with `trusted_root`, a file, nothing is asked of Sigstore.
    `proven_on` are devices or node types on which the image must be proven, by `proof_key`, or by
    `key` without it.

    Raises CheckFailed if a check fails, with all checks as `details["checks"]`, UsageError for a
    key that cannot be read, EnvironmentFailure if the image cannot be reached.

    >>> verification = weightsmith.verify("oci:capitals", progress=False)
    >>> any(check.ok is False for check in verification.checks)
    False
    """
    run = RunOptions(insecure=insecure)
    request = request_of(
        VerifyCommand,
        source=source,
        key=str(key or ""),
        signed_by=WantedIdentity(
            certificate_identity,
            certificate_identity_regexp,
            certificate_oidc_issuer,
            certificate_oidc_issuer_regexp,
            str(trusted_root),
        ),
        proven_on=texts_of(proven_on),
        proof_key=str(proof_key or ""),
        run=run,
    )
    with shown(progress) as told:
        return run_verify(request, told)


def run_verify(asked: VerifyCommand, progress: Progress) -> Verification:
    """Return what each check found; raises CheckFailed if one fails."""
    with wiring.make_registry(insecure=asked.run.insecure) as registry:
        return verify_image(
            asked.source,
            key_path(asked.key),
            registry,
            progress,
            signed_by=wiring.check_of_identity(asked.signed_by),
            proven_on=asked.proven_on,
            proof_key=key_path(asked.proof_key, "--proof-key"),
        )


def affected(
    in_: Texts,
    *,
    adapter: str = "",
    base: str = "",
    engine: str = "",
    builder: str = "",
    dataset_run: str = "",
    license: str = "",  # noqa: A002 - the flag's name
    cve_package: str = "",
    keys: AnyPath | Sequence[AnyPath] = (),
    certificate_identity: str = "",
    certificate_identity_regexp: str = "",
    certificate_oidc_issuer: str = "",
    certificate_oidc_issuer_regexp: str = "",
    trusted_root: AnyPath = "",
    withdraw: bool = False,
    reason: str = "",
    rebuild: bool = False,
    rebase: str = "",
    out: AnyPath | None = None,
    force: bool = False,
    insecure: bool = False,
    sign_key: str = "",
    signature_format: SignatureFormat = "cosign",
    keyless: bool = False,
    trust_config: AnyPath = "",
    progress: bool = True,
) -> Affected:
    """Return what was made from one thing: an adapter, a base, an engine, a builder and so on.

    `in_` names where to look: `REGISTRY/PREFIX`, an image, `oci:FOLDER`, the folder of a fleet's
    results. `keys` are public keys, beside them an identity may be named as for `verify`: `images`
    has what they signed, `unsigned` what only says so.
    What could not be read is in `problems`, and stops nothing else. `withdraw` marks `images` as
    withdrawn, by statements that `sign_key` signs; nothing is deleted. `rebuild` writes a fleet
    file that makes them again to `out`; `rebase` moves them to another engine base, or with `out`
    writes the fleet file for it.

    Raises UsageError unless exactly one thing is asked for, InputRefused for a place that is not
    there, EnvironmentFailure if a registry refuses a withdrawal.

    >>> found = weightsmith.affected(f"{registry}/team", engine="llamacpp", progress=False)
    >>> [row.reference.endswith("team/capitals:1") for row in found.unsigned][:1]
    [True]
    """
    request = request_of(
        AffectedCommand,
        in_=texts_of(in_),
        adapter=adapter,
        base=base,
        engine=engine,
        builder=builder,
        dataset_run=dataset_run,
        license=license,
        cve_package=cve_package,
        keys=tuple(map(str, paths_of(keys))),
        signed_by=WantedIdentity(
            certificate_identity,
            certificate_identity_regexp,
            certificate_oidc_issuer,
            certificate_oidc_issuer_regexp,
            str(trusted_root),
        ),
        withdraw=withdraw,
        reason=reason,
        rebuild=rebuild,
        rebase=rebase,
        out=path_of(out) if out else None,
        force=force,
        run=_signing(insecure, sign_key, signature_format, keyless, trust_config),
    )
    with shown(progress) as told:
        return run_affected(request, told)


def run_affected(asked: AffectedCommand, progress: Progress) -> Affected:
    """Return what was made from what the command names."""
    question = question_of(asked, wiring.digest_of_folder)
    signer = wiring.signer_of(asked.run, progress.warn)
    keys = keys_of(asked, signer, wiring.check_of_identity(asked.signed_by))
    with wiring.make_registry(insecure=asked.run.insecure) as registry:
        hub = wiring.make_hub_lister()
        found = find_affected(question, asked.in_, keys, registry, progress, hub)
        if asked.withdraw and signer:
            warn_of_other_keys(found, keys, signer, progress)
            found = withdraw_all(found, asked.reason, signer, registry, progress)
        if asked.rebuild or (asked.rebase and asked.out):
            out = (asked.out or Path("affected/fleet.yaml")).absolute()
            check = next(iter(keys.values()), None)
            return write_fleets(found, out, asked.rebase, check, registry, progress)
    if asked.rebase:
        with wiring.open_for(asked, progress) as tools:
            return rebase_all(found, asked.rebase, tools, force=asked.force)
    return found
