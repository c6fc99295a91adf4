"""The checks of `doctor`: engine, GPU, memory, disk, credentials, builders."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from weightsmith.core.errors import WeightsmithError
from weightsmith.core.platforms import host_platform, machine_of
from weightsmith.core.ports import Runner
from weightsmith.core.privacy import is_shared, owners
from weightsmith.core.resources import engine_platforms, images
from weightsmith.outside.confinement import confinement
from weightsmith.outside.docker import DockerEngine
from weightsmith.outside.docker_containers import DockerRunner
from weightsmith.outside.hardware import cores, gpu_names
from weightsmith.outside.hub import hub_endpoint
from weightsmith.outside.local import WAYS_OUT, LocalRunner
from weightsmith.outside.mlflow import MlflowRemote
from weightsmith.outside.object_stores import S3, Gcs
from weightsmith.outside.registries import docker_config
from weightsmith.outside.toolset import toolset_folder

_ENOUGH_DISK = 20 * 10**9
_ENOUGH_MEMORY = 4 * 10**9


@dataclass(frozen=True, slots=True)
class Checkup:
    """What one check found, and what to do about it."""

    ok: bool = field(default=False, kw_only=True)
    found: str
    todo: str = field(default="", kw_only=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineReport:
    """What `doctor` shows of this machine."""

    checks: Mapping[str, Checkup]
    cores: int
    cache: str
    store: str
    runner: str
    """What jobs would run in: `docker` or `local`."""


def examine_machine(engine: DockerEngine, cache: Path, store: Path) -> MachineReport:
    """Return what this machine has and lacks; changes nothing."""
    checks = {
        "engine": _engine(engine),
        "gpu": _gpu(engine),
        "memory": _memory(),
        "disk": _disk(store),
        "privacy": _privacy(cache, store),
        "credentials": _credentials(),
        "hub": _hub(),
        "sources": _sources(),
        "builders": _builders(engine, cache),
        "jobs": _jobs(),
        "platforms": _platforms(cache),
    }
    return MachineReport(
        checks=checks,
        cores=cores(),
        cache=str(cache),
        store=str(store),
        runner="docker" if checks["engine"].ok else "local",
    )


def _engine(engine: DockerEngine) -> Checkup:
    facts = engine.describe()
    if not facts:
        return Checkup(
            "no container engine answers",
            todo="builds use the local runner and write OCI layouts; to load images, start docker",
        )
    return Checkup(f"docker {facts['version']} ({facts['storage']})", ok=True)


def _gpu(engine: DockerEngine) -> Checkup:
    names = gpu_names()
    if not names:
        return Checkup("no NVIDIA GPU answers", todo="everything runs on the CPU, more slowly")
    if engine.answers() and not engine.has_gpu():
        return Checkup(
            ", ".join(names), todo="the engine cannot use it: install nvidia-container-toolkit"
        )
    return Checkup(", ".join(names), ok=True)


def _memory() -> Checkup:
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    enough = size >= _ENOUGH_MEMORY
    return Checkup(
        f"{size / 1e9:.0f} GB, {cores()} core(s)",
        ok=enough,
        todo="" if enough else "`plan` shows how much memory each stage of a build needs",
    )


def _disk(store: Path) -> Checkup:
    folder = next(p for p in (store, *store.parents) if p.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        return Checkup(
            f"{store} is not writable", todo="set WEIGHTSMITH_STORE to a writable folder"
        )
    free = shutil.disk_usage(folder).free
    enough = free >= _ENOUGH_DISK
    return Checkup(
        f"{free / 1e9:.0f} GB free at {store}",
        ok=enough,
        todo="" if enough else "`invoke clean --keep 0`, or set WEIGHTSMITH_STORE elsewhere",
    )


def _privacy(cache: Path, store: Path) -> Checkup:
    folders = [folder for folder in dict.fromkeys((cache, store)) if folder.is_dir()]
    shared = [folder for folder in folders if is_shared(folder)]
    found = [owners(folder) for folder in folders]
    anothers = {path: user for one in found for path, user in one.anothers.items()}
    if anothers:
        named = ", ".join(f"{path} ({user})" for path, user in anothers.items())
        return Checkup(
            f"other users' folders, who can read and change what is in them: {named}",
            todo="set WEIGHTSMITH_STORE and WEIGHTSMITH_HOME to folders of your own",
        )
    opened = [str(path) for one in found for path in one.opened]
    if opened:
        return Checkup(
            f"other users can read {', '.join(opened)}",
            todo="the next command that writes there closes them; to share one with a group: "
            "chmod g+rws",
        )
    if shared:
        return Checkup(
            f"shared with a group on purpose (set-group-id): {', '.join(map(str, shared))}", ok=True
        )
    return Checkup("only you can read cache and store", ok=True)


def _credentials() -> Checkup:
    """List the registries that the user is logged in to; never a secret."""
    try:
        config = docker_config()
    except WeightsmithError as error:
        return Checkup(error.message, todo=error.hint)
    tables = (config.get(key) for key in ("auths", "credHelpers"))
    logins, helpers = (table if isinstance(table, dict) else {} for table in tables)
    store = config.get("credsStore")
    hosts = sorted({*logins, *helpers})
    if hosts or store:
        found = ", ".join(hosts) or f"kept by {store}"
        named = filter(None, (store, *helpers.values()))
        programs = sorted({f"docker-credential-{name}" for name in named})
        if missing := [program for program in programs if not shutil.which(program)]:
            return Checkup(
                found, todo=f"install {missing[0]}, which config.json names: it has the logins"
            )
        return Checkup(found, ok=True)
    return Checkup("none", todo="`docker login HOST` before pushing to a registry that asks")


def _hub() -> Checkup:
    """Say whether there is a token for the model hub; never the token."""
    from huggingface_hub import get_token

    if get_token():
        return Checkup(f"a token for {hub_endpoint()}", ok=True)
    return Checkup(
        f"no token for {hub_endpoint()}",
        todo="`hf auth login`, or HF_TOKEN, before `push --to hf://…` and for private models",
    )


def _sources() -> Checkup:
    """Say which kinds of sources lack a package; the others need none."""
    lacking, ready = {}, []
    for remote in (S3(), Gcs(), MlflowRemote()):
        if all(map(find_spec, remote.packages)):
            ready.append(remote.scheme)
        else:
            lacking[remote.scheme] = remote.extra
    return Checkup(
        f"packages for {', '.join(ready) or 'none'} of s3, gs and mlflow; other sources need none",
        ok=True,
        todo="; ".join(
            f"for {scheme}: pip install 'weightsmith[{extra}]'" for scheme, extra in lacking.items()
        ),
    )


def _builders(engine: DockerEngine, cache: Path) -> Checkup:
    runners: dict[str, Runner] = {"local": LocalRunner(cache)}
    if engine.answers():
        runners = {"docker": DockerRunner(engine, cache), **runners}
    names = sorted(p.name for p in (images() / "builders").iterdir() if p.is_dir())
    ready = {kind: [n for n in names if runner.ready(n)] for kind, runner in runners.items()}
    missing = [name for name in names if not any(name in had for had in ready.values())]
    return Checkup(
        "; ".join(f"{kind}: {', '.join(had) or 'none'}" for kind, had in ready.items()),
        ok=not missing,
        todo=f"{', '.join(missing)}: made by the first build that needs it" if missing else "",
    )


def _platforms(cache: Path) -> Checkup:
    own = host_platform()
    engine = "llamacpp"
    others = [platform for platform in engine_platforms(engine) if platform != own]
    ready = [p for p in others if toolset_folder(cache, engine, machine_of(p)).is_dir()]
    lacking = ", ".join(p for p in others if p not in ready)
    said = f"images for {own} are made and started here"
    if others:
        said += f"; llamacpp-* images for {', '.join(others)} are made here, but not started"
    if lacking:
        said += f" (the engine for {lacking} is compiled by the first build that names it)"
    return Checkup(said, ok=True)


def _jobs() -> Checkup:
    found = confinement()
    left = found.left()
    todo = f"local jobs can still reach: {left}; with the docker runner they cannot"
    if not found.network:
        todo = f"local jobs are refused: {WAYS_OUT}"
    said = "local jobs have no network, and open and list no other files, sockets or processes"
    if left:
        said = f"local jobs cannot reach {found.blocked() or 'nothing'}"
    return Checkup(said, ok=not left, todo=todo if left else "")
