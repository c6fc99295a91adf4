"""Constructs the drivers; nothing else does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache as cache_once
from functools import partial
from pathlib import Path
from typing import Any

import platformdirs

from weightsmith.building.apart import keep_apart
from weightsmith.building.prefetch import WithinMemory
from weightsmith.cache.address import Address, Sharing, chosen, required
from weightsmith.cache.cache import SharedCache
from weightsmith.cache.store import SharedStore
from weightsmith.cache.uploads import Uploads
from weightsmith.core.apart import start_processes_by
from weightsmith.core.errors import EnvironmentFailure, UsageError
from weightsmith.core.files import path_in
from weightsmith.core.ports import (
    AnySigner,
    Cache,
    FleetEngine,
    HubLister,
    IdentitySigner,
    Launcher,
    Progress,
    Runner,
    Signer,
    Silent,
    SourceReader,
    Store,
)
from weightsmith.core.privacy import AnothersFolder, private, require_own
from weightsmith.core.time_limits import chosen_seconds
from weightsmith.core.values import Digest
from weightsmith.oci import session
from weightsmith.oci.layout import read_layout
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry
from weightsmith.oci.registry_cache import RegistryCache
from weightsmith.oci.unpack import unpack
from weightsmith.outside.checkup import MachineReport, examine_machine
from weightsmith.outside.docker import DockerEngine
from weightsmith.outside.docker_containers import DockerLauncher, DockerRunner
from weightsmith.outside.fleet_local import LocalFleet, local_room
from weightsmith.outside.fleet_ray import RayFleet
from weightsmith.outside.fleet_slurm import SlurmFleet
from weightsmith.outside.folder_cache import FolderCache
from weightsmith.outside.folders import FolderReader
from weightsmith.outside.hardware import cores, free_memory, gpu_names, memory_bandwidth
from weightsmith.outside.https import HttpsRemote
from weightsmith.outside.hub import HubFinder, HubReader, HubWriter
from weightsmith.outside.image_sources import OciRemote
from weightsmith.outside.keyless import identity_check, open_identity_signer
from weightsmith.outside.local import FallbackRunner, LocalRunner
from weightsmith.outside.mlflow import MlflowRemote
from weightsmith.outside.modelscope import ModelScopeRemote
from weightsmith.outside.object_stores import S3, Gcs, ObjectRemote
from weightsmith.outside.ownership import private_folder
from weightsmith.outside.process import run_command
from weightsmith.outside.pypi import PypiReader
from weightsmith.outside.registries import PushedLayers, ask_helper, docker_config
from weightsmith.outside.remote import RemoteReader
from weightsmith.outside.rootfs import EitherLauncher, RootfsLauncher, StartInfo
from weightsmith.outside.s3_cache import S3Cache
from weightsmith.outside.signer import is_open_to_all, open_signer
from weightsmith.outside.store import FileStore
from weightsmith.outside.toolset import check_engine_files, make_engine_files
from weightsmith.provenance.signing import Check, check_by, check_of
from weightsmith.recipe.section import PathUse, fields_of
from weightsmith.recipe.user_config import (
    TRUSTED,
    CacheSettings,
    RunOptions,
    WantedIdentity,
    read_config,
)
from weightsmith.serving.memory import human, parse_size
from weightsmith.steps.tools import JobMemory, Tools, shares_nothing

RUNNERS = ("auto", "docker", "local")
LOGS = "fleet-logs"
"""Folder, in that of the results, of what a fleet's tasks say."""
_LEAST_MEMORY = 1 << 30
"""Importing torch and transformers takes a third of it."""


def cache_folder() -> Path:
    """Return the folder of builders, logs and store: WEIGHTSMITH_HOME, else in the user's cache.

    Raises EnvironmentFailure if the user has no home folder.
    """
    if named := path_in("WEIGHTSMITH_HOME"):
        return named.absolute()
    try:
        folder = Path(platformdirs.user_cache_dir("weightsmith")).expanduser()
    except (RuntimeError, KeyError):
        folder = Path("~")
    if not folder.is_absolute():
        raise EnvironmentFailure(
            "there is no home folder for the cache",
            hint="set HOME, or WEIGHTSMITH_HOME and WEIGHTSMITH_STORE to folders of your choice",
        )
    return folder


def store_folder() -> Path:
    """Return the folder of results: WEIGHTSMITH_STORE, else `store` in the cache folder."""
    named = path_in("WEIGHTSMITH_STORE")
    return named.absolute() if named else cache_folder() / "store"


def require_folders() -> None:
    """Raise EnvironmentFailure if cache or store cannot be created, or are another user's."""
    for variable, folder in _folders().items():
        try:
            private(folder)
        except AnothersFolder as error:
            raise _of_another(error, variable) from error
        except OSError as error:
            raise EnvironmentFailure(
                f"cannot create the folder {folder}: {error.strerror}",
                hint=f"set {variable} to a writable folder",
            ) from error


def _folders() -> dict[str, Path]:
    return {"WEIGHTSMITH_HOME": cache_folder(), "WEIGHTSMITH_STORE": store_folder()}


def _of_another(error: AnothersFolder, variable: str) -> EnvironmentFailure:
    return EnvironmentFailure(
        f"{error.filename}: {error.strerror}",
        hint=f"set {variable} to a folder of your own; one for a group is made by its owner with "
        "chmod g+rws, and is for the group's members",
    )


def keep_clean(inputs: Iterable[str | Path], *, cache: str = "", **outputs: str | Path) -> None:
    """Raise UsageError if a command would write into a folder that it reads.

    `outputs` are the values of its output flags, empty if not given. Cache and store, and the
    shared cache if it is a folder, are checked too; they may be in a hidden folder of an input.
    """
    flags: dict[str, str | Path] = {
        f"--{name.replace('_', '-')}": out for name, out in outputs.items()
    }
    folders = _folders()
    shared = chosen(cache, "", read_config().cache).both
    if shared and shared.kind == "folder":
        folders["--cache"] = shared.folder
    keep_apart(inputs, flags, folders)


def keep_places_clean(request: object, *inputs: str | Path) -> None:
    """Raise UsageError if a command would write into a folder that it reads.

    Its fields say what it does there; `inputs` are read as well.
    """
    read, written = [*inputs], {}
    for name, field in fields_of(type(request)).items():
        value = getattr(request, name)
        if value and PathUse.READ in field.metadata:
            read += value if isinstance(value, tuple) else [value]
        elif value and PathUse.WRITTEN in field.metadata:
            written[name] = value
    run = getattr(request, "run", RunOptions())
    keep_clean(read, cache=run.cache, **written)


@contextmanager
def open_for(
    request: Any, progress: Progress, *inputs: str | Path, uploads: bool = True
) -> Iterator[Tools]:
    """Yield the tools for a command's request; raises as `keep_places_clean` and `open_tools`."""
    keep_places_clean(request, *inputs)
    with open_tools(request.run, progress, uploads=uploads) as tools:
        yield tools


def make_store(tell: Callable[[str], None] | None = None) -> FileStore:
    """Return the user's store; `tell` is called when another process must be waited for.

    Raises EnvironmentFailure if store or cache belong to another user.
    """
    for variable, folder in _folders().items():
        try:
            require_own(folder)
        except AnothersFolder as error:
            raise _of_another(error, variable) from error
    return FileStore(store_folder(), tell)


def digest_of_folder(folder: Path) -> Digest:
    """Return the digest under which builds name a model's or an adapter's folder."""
    return FolderReader(make_store()).fetch(str(folder), "", "", Silent()).digest


def make_engine() -> DockerEngine:
    """Return the container engine, whether it runs or not."""
    return DockerEngine()


def make_registry(*, insecure: bool = False, memory: PushedLayers | None = None) -> Registry:
    """Return a registry client with the user's Docker credentials, which are read on demand."""
    return Registry(
        credentials=lambda host: session.credentials_in(docker_config(), ask_helper)(host),
        insecure=insecure,
        memory=memory or PushedLayers(cache_folder()),
    )


@contextmanager
def open_tools(
    run: RunOptions,
    progress: Progress,
    *,
    uploads: bool = True,
    upload_seconds: float = 0.0,
    trusted: Mapping[str, str] | None = None,
) -> Iterator[Tools]:
    """Yield everything outside this process that stages use; close connections afterwards.

    `auto` takes the container engine if one answers, and runs the jobs of builders that the
    engine cannot make (its base image is out of reach, say) on this machine. There, jobs that
    cannot be kept from the network are refused unless `allow_network_in_jobs`. No job uses more
    than `memory`, a size such as 6GiB; by default, than what is free. Warns if it is more than
    that.

    `cache` and `cache_from` are addresses of shared caches; by default, those of environment and
    configuration; so is whom they trust (`trusted`, by the names of TRUSTED). Without `uploads`,
    nothing is written to them. The end waits for uploads for `upload_seconds`, or longer if the
    configuration says so.

    Raises UsageError for an unknown runner, address, size or time limit, EnvironmentFailure if
    `docker` is asked for and no engine answers.
    """
    settings = read_config().cache
    patience = max(settings.upload_seconds, upload_seconds)
    named = {name: trusted.get(name, "") for name in TRUSTED} if trusted else {}
    settings = settings.changed(upload_seconds=patience, **named)
    sharing = chosen(run.cache, run.cache_from, settings)
    if run.runner not in RUNNERS:
        raise UsageError(f"--runner {run.runner}: unknown", hint=f"one of {', '.join(RUNNERS)}")
    chosen_seconds()
    free = free_memory()
    room = JobMemory.of(_size(run.memory), free)
    if 0 < free < room.limit:
        progress.warn(
            f"--memory {run.memory} is more than the {human(free)} that are free, so jobs may swap"
        )
    engine = DockerEngine()
    if run.runner == "docker":
        engine.require()
    answers = run.runner == "docker" or (run.runner == "auto" and engine.answers())
    signer, layers = signer_of(run, progress.warn), PushedLayers(cache_folder())
    with (
        make_registry(insecure=run.insecure, memory=layers) as registry,
        open_store(
            sharing, progress, signer, registry=registry, layers=layers, uploads=uploads
        ) as store,
        ExitStack() as stack,
    ):
        scratch = cache_once(lambda: stack.enter_context(_scratch()))
        start_processes_by(run_command)
        yield Tools(
            store=store,
            readers=make_readers(store, registry, scratch),
            runner=WithinMemory(_runner(run, engine if answers else None), room.limit),
            engine=engine,
            launcher=_launcher(engine if answers else None),
            registry=registry,
            hub=HubWriter(),
            progress=progress,
            scratch=_scratch,
            make_engine_files=partial(make_engine_files, cache_folder()),
            check_engine_files=partial(check_engine_files, cache_folder()),
            command=run_command,
            signer=signer,
            memory=room,
            two_at_once=lambda: cores() > 1 and not gpu_names(),
            bandwidth=memory_bandwidth,
            images_in_engine=answers,
            share=store.share if isinstance(store, SharedStore) else shares_nothing,
            moved=store.moved if isinstance(store, SharedStore) else lambda: 0,
        )


def make_readers(
    store: Store, registry: Registry, scratch: Callable[[], Path]
) -> Mapping[str, SourceReader]:
    """Return what fetches each kind of source, by its scheme; folders have none."""
    remotes = (
        OciRemote(registry),
        ObjectRemote(S3()),
        ObjectRemote(Gcs()),
        HttpsRemote(),
        HttpsRemote("http"),
        MlflowRemote(),
        ModelScopeRemote(),
    )
    readers: tuple[SourceReader, ...] = (
        FolderReader(store),
        HubReader(store),
        PypiReader(store),
        *(RemoteReader(store, remote, scratch) for remote in remotes),
    )
    return {reader.scheme: reader for reader in readers}


@contextmanager
def open_store(
    sharing: Sharing,
    progress: Progress,
    signer: AnySigner | None = None,
    *,
    registry: Registry,
    layers: PushedLayers,
    uploads: bool = True,
) -> Iterator[Store]:
    """Yield the user's store, in front of the shared caches if there are any.

    At the end it waits for uploads, but no longer than the configuration says. Raises UsageError
    for keys that cannot be used, or a kind of cache whose packages are not installed.
    """
    local, settings = make_store(progress.note), sharing.settings
    check = _trusted_in(settings)
    with ExitStack() as stack:
        caches: dict[Address, SharedCache] = {}
        for address in filter(None, (sharing.both, sharing.read)):
            cache = open_cache(address, registry)
            caches[address] = SharedCache(cache, check, progress.warn, settings.lookup_seconds)
        if not caches:
            yield local
            return
        queue = None
        if sharing.both and uploads:
            own = make_signer(settings.sign_key, progress.warn)
            key = own or signer
            if isinstance(key, IdentitySigner) and not settings.certificate_identity:
                key = None  # each signature is an entry of a public log, and nobody asks for it
            queue = Uploads(caches[sharing.both], local.memo, key, layers.note)
        scratch = cache_once(lambda: stack.enter_context(_scratch()))
        wait = settings.upload_seconds
        try:
            yield SharedStore(local, [*caches.values()], scratch, queue, layers.note)
        except KeyboardInterrupt:
            wait = 0.0
            raise
        finally:
            left = queue.close(wait) if queue else 0
        if left and sharing.both:
            progress.warn(
                f"{left} result(s) were not uploaded to {caches[sharing.both].where} within "
                f"{settings.upload_seconds:g} s; the next command that uses them tries again"
            )


def _trusted_in(settings: CacheSettings) -> Check | None:
    """Return what checks a cache's results, or None; raises UsageError for what cannot be used."""
    wanted = WantedIdentity(
        certificate_identity=settings.certificate_identity,
        certificate_oidc_issuer=settings.certificate_oidc_issuer,
        trusted_root=settings.trusted_root,
    )
    if settings.verify_key and wanted.asked():
        raise UsageError(
            "cache.verify_key and cache.certificate_identity exclude each other",
            hint="results are trusted by one of them",
        )
    return check_of(settings.verify_key) if settings.verify_key else check_of_identity(wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class OneCache:
    """A shared cache and the local store, for commands that move results between them."""

    local: FileStore
    shared: SharedCache
    store: SharedStore
    uploads: Uploads
    missing: bool
    """Whether it is a folder that is not there."""


@contextmanager
def open_one_cache(
    cache: str, progress: Progress, *, sign_key: str = "", insecure: bool = False
) -> Iterator[OneCache]:
    """Yield the cache of --cache, else of environment or configuration; UsageError for none."""
    sharing = required(cache, read_config().cache)
    if sharing.both is None:
        raise AssertionError("`required` returns a cache")
    settings, local = sharing.settings, make_store(progress.note)
    layers = PushedLayers(cache_folder())
    check = _trusted_in(settings)
    signer = make_signer(sign_key or settings.sign_key, progress.warn)
    with make_registry(insecure=insecure, memory=layers) as registry, _scratch() as folder:
        found = open_cache(sharing.both, registry)
        shared = SharedCache(found, check, progress.warn, settings.lookup_seconds)
        yield OneCache(
            local=local,
            shared=shared,
            store=SharedStore(local, [shared], lambda: folder),
            uploads=Uploads(shared, local.memo, signer),
            missing=sharing.both.kind == "folder" and not sharing.both.folder.is_dir(),
        )


def open_cache(address: Address, registry: Registry) -> Cache:
    """Return the cache at an address, without contacting it; UsageError if its kind is missing."""
    match address.kind:
        case "folder":
            return FolderCache(address.folder)
        case "oci":
            return RegistryCache(registry, Reference.parse(address.place))
        case "s3":
            return S3Cache(address.place)


NODE = (sys.executable, "-m", "weightsmith.fleets.node_program")
"""The program that does a fleet's task on any machine where this package is installed."""
ENGINES = ("local", "ray", "slurm")


def make_fleet_engine(on: str, address: str, dist: Path) -> FleetEngine:
    """Return where a fleet runs; nothing is started or contacted yet.

    Raises UsageError for an unknown name, or an address where there is none.
    """
    if on not in ENGINES:
        raise UsageError(f"--on {on}: unknown", hint=f"one of {', '.join(ENGINES)}")
    if address and on != "ray":
        raise UsageError(f"--address is not for --on {on}", hint="it is the address of a Ray head")
    if on == "ray":
        return RayFleet(module=NODE[-1], address=address)
    if on == "slurm":
        return SlurmFleet(argv=NODE, folder=dist / LOGS / "slurm")
    return LocalFleet(argv=NODE, room=local_room(cache_folder()), logs=dist / LOGS)


def _size(memory: str) -> int:
    """Return the bytes of --memory, 0 if it is not given; UsageError if no job could run in it."""
    if not memory:
        return 0
    size = parse_size(memory)
    if size < _LEAST_MEMORY:
        raise UsageError(
            f"--memory {memory}: too little for any job",
            hint=f"give at least {human(_LEAST_MEMORY)}, or leave it out to use what is free",
        )
    return size


def _runner(run: RunOptions, engine: DockerEngine | None) -> Runner:
    local = LocalRunner(cache_folder(), allow_network=run.allow_network_in_jobs)
    if engine is None:
        return local
    docker = DockerRunner(engine, cache_folder())
    return docker if run.runner == "docker" else FallbackRunner(docker, local)


def _launcher(engine: DockerEngine | None) -> Launcher:
    rootfs = RootfsLauncher(start_info, cache_folder())
    return EitherLauncher(DockerLauncher(engine), rootfs) if engine else rootfs


def signer_of(run: RunOptions, warn: Callable[[str], None]) -> AnySigner | None:
    """Return what signs, or None: a key, or with `keyless` the identity of this job.

    It signs once, or gets a certificate, to find out before the build. Warns and raises as
    `make_signer` and `open_identity_signer` do.
    """
    if run.trust_config and not run.keyless:
        raise UsageError("--trust-config needs --keyless", hint="a key needs no services")
    if not run.keyless:
        signer = make_signer(run.sign_key, warn)
        return replace(signer, format=run.signature_format) if signer else None
    if run.sign_key or run.signature_format == "both":
        other = "--sign-key" if run.sign_key else "--signature-format both"
        hint = "without a key, signatures are bundles; `push --sign-key` adds a key's"
        raise UsageError(f"--keyless and {other} exclude each other", hint=hint)
    return open_identity_signer(run.trust_config)


def make_signer(key: str, warn: Callable[[str], None]) -> Signer | None:
    """Return the signer of the user's key, or None without a key.

    Warns of a file that everybody can read. Raises as `open_signer` does, and UsageError for a key
    whose signatures `verify` cannot check.
    """
    if not key:
        return None
    signer, text = open_signer(key), b"weightsmith: can this key sign?"
    if is_open_to_all(key):
        warn(f"every user of this machine can read the signing key {key}: run `chmod 600` on it")
    if not check_by(signer.public)(text, signer.sign(text)):
        raise UsageError(
            f"{key} makes signatures that `verify` cannot check",
            hint="supported keys: ECDSA and RSA (PKCS #1) with SHA-256, Ed25519",
        )
    return signer


def check_of_identity(wanted: WantedIdentity) -> Check | None:
    """Return what checks for an identity, or None if none is wanted.

    Raises UsageError for half an identity, and as `identity_check` does.
    """
    return identity_check(wanted) if wanted.asked() else None


def make_hub_lister() -> HubLister:
    """Return what lists a model hub's repositories."""
    return HubFinder()


def start_info(layout: str, root: Path) -> StartInfo:
    """Unpack the image of a layout folder and return how to start it."""
    image = read_layout(Path(layout))
    unpack(image, root)
    config = image.config
    env = dict(pair.partition("=")[::2] for pair in config.get("Env") or ())
    return StartInfo(
        argv=(*(config.get("Entrypoint") or ()), *(config.get("Cmd") or ())),
        env=env,
        workdir=config.get("WorkingDir") or "/",
        user=config.get("User") or "",
    )


@contextmanager
def _scratch() -> Iterator[Path]:
    with private_folder(cache_folder()) as folder:
        output = folder / "out"
        output.mkdir()
        yield output


def examine() -> MachineReport:
    """Return the checks of `doctor`, each with what was found and what to do."""
    return examine_machine(DockerEngine(), cache_folder(), store_folder())
