"""What the container engine is asked for, and what is made of its answers."""

from __future__ import annotations

import gc
import json
import os
import socket
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from docker.errors import APIError
from weightsmith.core.cpus import flags
from weightsmith.core.errors import InputRefused
from weightsmith.core.jobs import ConvertAdaptersJob, Input
from weightsmith.core.ports import StartSpec
from weightsmith.outside import docker
from weightsmith.outside.docker import DockerEngine, _passes_gpus, engine_host
from weightsmith.outside.docker_containers import (
    DockerLauncher,
    JobFiles,
    confinement,
    job_request,
    run_container,
    server_request,
)
from weightsmith.outside.docker_images import _only_said, base_reference, build_command
from weightsmith.outside.hardware import devices
from weightsmith.outside.process import Completed
from weightsmith.outside.rootfs import EitherLauncher, RootfsLauncher, StartInfo

PLACE = JobFiles(
    inputs={"base": Path("/models/base"), "adapter0": Path("/models/lora")},
    output=Path("/store/tmp/out"),
    job_file=Path("/staging/job.json"),
    package=Path("/src/weightsmith"),
)


def request(*, gpu: bool = False, memory: int = 1 << 30):
    job = ConvertAdaptersJob(
        builder="gguf",
        base=Input(path=PLACE.inputs["base"]),
        adapters=(Input(path=PLACE.inputs["adapter0"]),),
        folders=("lora",),
        output=PLACE.output,
        seconds=0,
        memory_bytes=memory,
        use_gpu=gpu,
    )
    return job_request(job, "builder:1", PLACE, user="1000:1001", owner="me", gpu=gpu)


def test_a_job_has_no_network_no_rights_and_no_writable_root():
    asked = request(memory=5 << 30)

    assert (
        asked.items()
        >= {
            "network_mode": "none",
            "cap_drop": ["ALL"],
            "security_opt": ["no-new-privileges"],
            "read_only": True,
            "user": "1000:1001",
            "tmpfs": {"/tmp": "rw,nosuid,nodev,mode=1777,noexec"},
            "init": True,
            "auto_remove": True,
            "labels": {"weightsmith.owner": "me", "weightsmith.job": "convert-adapters"},
            "mem_limit": 5 << 30,
            "memswap_limit": 5 << 30,  # no swap beside it
        }.items()
    )
    assert asked["pids_limit"] > 0
    assert "device_requests" not in asked
    assert "mem_limit" not in request(memory=0)


def test_a_job_sees_its_inputs_read_only_and_writes_one_folder():
    mounts = {
        mount["Target"]: (mount["Source"], mount["ReadOnly"]) for mount in request()["mounts"]
    }

    assert mounts == {
        "/in/adapter0": ("/models/lora", True),
        "/in/base": ("/models/base", True),
        "/job/job.json": ("/staging/job.json", True),
        "/weightsmith/weightsmith": ("/src/weightsmith", True),
        "/out": ("/store/tmp/out", False),
    }


def test_gpus_are_asked_for_where_there_are_any():
    asked = request(gpu=True)
    (device,) = asked["device_requests"]

    assert device["Count"] == -1
    assert device["Capabilities"] == [["gpu", "compute", "utility"]]
    assert "exec" in asked["tmpfs"]["/tmp"].split(",")


def test_a_server_is_published_on_loopback_alone_and_keeps_its_user():
    spec = StartSpec(port=8080, env={"A": "b"}, memory_bytes=1 << 30)

    asked = server_request("image:1", spec, "me", gpu=False)

    assert (
        asked.items()
        >= {
            "ports": {"8080/tcp": ("127.0.0.1", None)},
            "environment": {"HOME": "/tmp", "A": "b"},
            "read_only": True,
            "cap_drop": ["ALL"],
            "security_opt": ["no-new-privileges"],
            "mem_limit": 1 << 30,
            "pids_limit": 16384,
            "shm_size": None,
        }.items()
    )
    assert not {"user", "network_mode", "command"} & asked.keys()
    more = replace(spec, arguments=("--more",))
    asked = server_request("image:1", more, "me", gpu=False, command=["--config", "f"])
    assert asked["command"] == ["--config", "f", "--more"]
    shared = replace(spec, shm_bytes=1 << 28)
    assert server_request("image:1", shared, "me", gpu=False)["shm_size"] == 1 << 28
    assert server_request("image:1", shared, "me", gpu=True)["shm_size"] == 1 << 30


def test_the_build_command_names_everything_once_and_in_order():
    command = build_command(
        containerfile=Path("/i/builders/merge/Containerfile"),
        context=Path("/i"),
        tag="t:1",
        arguments={"FLAVOUR": "cpu", "BASE": "debian"},
        secrets={"ca_bundle": Path("/ca.pem")},
        contexts={"wheels": Path("/w")},
    )

    assert command[:3] == ["docker", "buildx", "build"]
    assert " ".join(command[3:]) == (
        "--load --progress=plain --provenance=false --file /i/builders/merge/Containerfile "
        "--tag t:1 --build-arg BASE=debian --build-arg FLAVOUR=cpu "
        "--secret id=ca_bundle,src=/ca.pem --build-context wheels=/w /i"
    )


def test_builders_start_from_the_lock_by_default(monkeypatch):
    monkeypatch.delenv("WEIGHTSMITH_BUILDER_BASE", raising=False)
    assert all("docker.io/" in base_reference(flavour) for flavour in ("cpu", "cuda"))

    monkeypatch.setenv("WEIGHTSMITH_BUILDER_BASE", "mirror/python:3.12")
    assert base_reference("cpu") == "mirror/python:3.12"


def test_of_a_failed_build_the_programs_own_words_are_shown():
    tail = ("#10 0.19 /bin/sh: 1: nope: not found", " 42 | >>> nope", "ERROR: failed to solve: x")

    def shown(lines):
        return _only_said(Completed(argv=("d",), returncode=1, seconds=0, tail=lines)).tail

    assert shown(tail) == ("/bin/sh: 1: nope: not found",)
    assert shown(tail[1:]) == ("ERROR: failed to solve: x",)


def test_an_engine_passes_gpus_by_its_runtime_or_by_device_names():
    assert _passes_gpus({"Runtimes": {"runc": {}, "nvidia": {}}})
    assert _passes_gpus({"DiscoveredDevices": [{"Source": "cdi", "ID": "nvidia.com/gpu=all"}]})
    assert not _passes_gpus({"Runtimes": {"runc": {}}, "DiscoveredDevices": None})
    assert not _passes_gpus({})


def test_the_engine_is_the_one_that_the_docker_command_uses(monkeypatch, tmp_path):
    monkeypatch.setenv("DOCKER_HOST", "tcp://engine:2375")
    assert engine_host() == "tcp://engine:2375"

    monkeypatch.delenv("DOCKER_HOST")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    assert engine_host().startswith("unix://")


def test_what_the_engine_did_not_do_is_not_reported():
    """An engine may pass over what it does not know: its own account of the container counts."""
    told = {
        "Config": {"User": "7:8"},
        "HostConfig": {
            "ReadonlyRootfs": True,
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges"],
            "Memory": 256 << 20,
        },
        "NetworkSettings": {"Networks": {"none-out": {}}},
    }

    said = "user 7:8, read-only root, no internet, no capabilities, no new privileges"
    assert ", ".join(confinement(told, "none-out")) == f"{said}, 256 MiB of memory"
    assert confinement(told, "") == confinement({**told, "NetworkSettings": {}}, "none-out")
    assert "no internet" not in confinement(told, "")
    assert confinement({"Config": {}, "HostConfig": {}}, "none-out") == ("user root",)


def test_a_socket_that_nobody_listens_on_is_closed_again(tmp_path, monkeypatch):
    """docker-py leaves its own open, which Python reports later, in the middle of other work."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "engine.sock"))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/engine.sock")
    with warnings.catch_warnings(record=True) as leaks:
        warnings.simplefilter("always")

        assert not DockerEngine().answers()

        gc.collect()
    assert not leaks


@pytest.mark.parametrize("auth", ["YWJj", "%%%", "/w=="])
def test_a_damaged_login_is_named(tmp_path, monkeypatch, auth):
    """No colon, no base64, no UTF-8: the client library ends with a ValueError of its own."""
    (tmp_path / "config.json").write_text(json.dumps({"auths": {"r.example": {"auth": auth}}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "engine.sock"))
        listener.listen()
        monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/engine.sock")
        with pytest.raises(InputRefused, match=r"`auths` in its config\.json") as caught:
            DockerEngine().answers()
    assert "docker login" in caught.value.hint
    assert auth not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "kernel", "here"),
    [
        ("unix:///var/run/docker.sock", os.uname().release, True),
        ("unix:///var/run/docker.sock", "6.12.0-linuxkit", False),  # in a virtual machine
        ("tcp://build.example.com:2376", os.uname().release, False),
        ("ssh://build.example.com", os.uname().release, False),
    ],
)
def test_an_engine_tells_its_cpu_only_under_this_machine_s_kernel(
    monkeypatch, tmp_path, host, kernel, here
):
    monkeypatch.setattr(docker, "engine_host", lambda: host)
    engine = DockerEngine()
    client: Any = SimpleNamespace(info=lambda: {"KernelVersion": kernel}, close=lambda: None)
    engine._opened = client
    launcher = DockerLauncher(engine)
    layouts = RootfsLauncher(lambda layout, root: StartInfo(argv=(), env={}), tmp_path)

    assert launcher.cpu_flags() == (flags() if here else None)
    assert EitherLauncher(launcher, layouts).cpu_flags() == launcher.cpu_flags()
    assert layouts.cpu_flags() == flags()
    either = EitherLauncher(launcher, layouts)
    assert either.devices("name") == (devices() if here else None)
    assert either.devices("oci:folder") == devices()


NOT_STARTED = "runc create failed: waiting for init preliminary setup: connection reset by peer"


@pytest.mark.parametrize(
    ("failures", "starts"),
    [([NOT_STARTED], 2), ([NOT_STARTED] * 2, 2), (["no such image"], 1)],
)
def test_a_container_that_could_not_be_started_is_started_once_more(failures, starts):
    """Not twice, and not after another failure."""
    left, removed = [*failures], []

    def start() -> None:
        if left:
            raise APIError("500", explanation=left.pop(0))

    def attach(_id: str, params: Any) -> socket.socket:
        ours, theirs = socket.socketpair()
        theirs.close()
        return ours

    stub: Any = SimpleNamespace(
        id="1", start=start, attach_socket=attach, wait=lambda *_: {"StatusCode": 0},
        remove=lambda **_: removed.append(1),
    )  # fmt: skip
    stub.api, stub.containers = stub, SimpleNamespace(create=lambda **_: stub)
    job = SimpleNamespace(seconds=0)
    conversation: Any = SimpleNamespace(job=job, on_line=print, on_error_line=print)

    with nullcontext() if failures == [NOT_STARTED] else pytest.raises(APIError):
        assert run_container(stub, {}, conversation, None) == 0
    assert (len(removed), left) == (starts, [])
