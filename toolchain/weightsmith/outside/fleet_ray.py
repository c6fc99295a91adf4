"""A fleet on Ray: one Ray task for each task, with the CPUs, memory and GPUs that the plan says."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from weightsmith.core.errors import EnvironmentFailure, UsageError
from weightsmith.core.ports import Ended, NodeTask
from weightsmith.core.values import JsonValue

_PROBE_SECONDS = 120.0
_CONNECT_SECONDS = 20.0
_PATIENCE = 15.0
"""Seconds for tasks that were cancelled to end by themselves."""
_NODE_ID = "ray.io/node-id"


@dataclass(slots=True)
class RayFleet:
    """Runs each task as a process on a node of a Ray cluster."""

    module: str
    """The node's program, as a module of its Python."""
    address: str = ""
    name: str = "ray"
    remote: bool = True
    _ray: Any = None
    _given: dict[Any, NodeTask] = field(default_factory=dict)
    _impossible: list[Ended] = field(default_factory=list)
    _stdout: int | None = None
    """The user's standard output while Ray, which prints there at any time, has none."""

    def check(self, version: str) -> None:
        """Connect, and ask every node for its version.

        Raises UsageError if Ray is not installed, EnvironmentFailure if the cluster does not
        answer or a node cannot run the program or has another version.
        """
        if self._stdout is None:
            # What is printed there goes to standard error, also by Ray's C++ code.
            sys.stdout.flush()
            with suppress(OSError):  # where there is none
                self._stdout = os.dup(1)
                os.dup2(2, 1)
        self._ray = _connected(self.address)
        probe = self._ray.remote(_program())
        pin = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        asked = {
            probe.options(
                num_cpus=0, max_retries=0, scheduling_strategy=pin(node["NodeID"], soft=False)
            ).remote(self.module, "version"): node
            for node in self._nodes()
        }
        done, late = self._ray.wait([*asked], num_returns=len(asked), timeout=_PROBE_SECONDS)
        if late:
            raise EnvironmentFailure(
                f"the Ray node {asked[late[0]]['NodeManagerHostname']} did not answer within "
                f"{_PROBE_SECONDS:g} s",
                hint="`ray status` shows whether it is alive",
            )
        alive = {node["NodeID"] for node in self._nodes()}
        for one in done:
            _, text, why = self._result(one)
            # Ray takes some seconds to see that a node is gone; that one gets no task.
            lost = not text and asked[one]["NodeID"] not in alive
            if text != version and not (lost and alive):
                said = f"has {text}" if text else f"cannot run weightsmith: {why}"
                raise EnvironmentFailure(
                    f"another version of weightsmith: this machine has {version}, the Ray node "
                    f"{asked[one]['NodeManagerHostname']} {said}",
                    hint="install the same version into the Python of every node",
                )

    def submit(self, works: Sequence[NodeTask]) -> None:
        """Give tasks to Ray, which queues and places them; EnvironmentFailure if it has ended."""
        with self._cluster_errors():
            nodes = self._nodes()
            gpus = any(node["Resources"].get("GPU") for node in nodes)
            for work in works:
                asks = {
                    "CPU": float(work.cpus),
                    "memory": float(work.memory_bytes),
                    "GPU": float(work.gpus if gpus else 0),
                }
                there = [node["Resources"] for node in nodes]
                if not any(all(one.get(n, 0) >= v for n, v in asks.items()) for one in there):
                    largest = {n: max((one.get(n, 0) for one in there), default=0) for n in asks}
                    short = [n for n in asks if largest[n] < asks[n]] or [*asks]
                    named = {"memory": "bytes of memory"}
                    lacking = ", ".join(f"{asks[n]:,.0f} {named.get(n, n)}" for n in short)
                    why = f"no node of the cluster has {lacking}"
                    self._impossible.append(Ended(id=work.id, node="", text="", why=why))
                    continue
                options: dict[str, JsonValue] = {
                    "num_cpus": asks["CPU"],
                    "memory": asks["memory"],
                    "num_gpus": asks["GPU"],
                    "max_retries": 0,  # the fleet tries again itself, and says so
                    "name": work.name,
                }
                others = {node["NodeID"] for node in nodes} - work.avoid
                if work.avoid and others:
                    options["label_selector"] = {_NODE_ID: f"!in({','.join(sorted(work.avoid))})"}
                task = self._ray.remote(_program()).options(**options)
                self._given[task.remote(self.module, work.text)] = work

    def wait(self, seconds: float) -> Sequence[Ended]:
        """Return the tasks that have ended since; wait for one at most so many seconds.

        Raises EnvironmentFailure if the cluster has ended.
        """
        if self._impossible:
            found, self._impossible = self._impossible, []
            return found
        if not self._given:
            time.sleep(seconds)
            return ()
        with self._cluster_errors():
            done, _ = self._ray.wait([*self._given], num_returns=1, timeout=seconds)
        ended = []
        for one in done:
            work = self._given.pop(one)
            node, text, why = self._result(one)
            ended.append(Ended(id=work.id, node=node, text=text, why=why))
        return ended

    def running(self) -> frozenset[str]:
        """Return the ids of the tasks that Ray has; it does not say which of them wait."""
        return frozenset(work.id for work in self._given.values())

    def close(self) -> None:
        """Cancel every task, with time to clean up, and leave the cluster."""
        try:
            if self._ray is not None:
                # A cluster that has ended runs nothing.
                with suppress(EnvironmentFailure), self._cluster_errors():
                    late = [*self._given]
                    for one in late:
                        self._ray.cancel(one, force=False)
                    if late:
                        _, late = self._ray.wait(late, num_returns=len(late), timeout=_PATIENCE)
                    # And no others: Ray aborts this process if it cancels what just ends.
                    for one in late:
                        self._ray.cancel(one, force=True)
                self._given.clear()
                self._ray.shutdown()
                self._ray = None
        finally:
            if self._stdout is not None:
                sys.stdout.flush()
                os.dup2(self._stdout, 1)
                os.close(self._stdout)
                self._stdout = None

    @contextmanager
    def _cluster_errors(self) -> Iterator[None]:
        try:
            yield
        except (self._ray.exceptions.RayError, OSError, RuntimeError) as error:
            raise EnvironmentFailure(
                f"the Ray cluster has ended: {_first_line(error) or type(error).__name__}",
                hint="start it again, then the fleet: what was finished is kept",
            ) from None

    def _nodes(self) -> list[Any]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _result(self, one: object) -> tuple[str, str, str]:
        """Return a task's node, its reply, and why there is none."""
        try:
            node, text, why = self._ray.get(one)
        except self._ray.exceptions.RayError as error:
            return "", "", f"lost by Ray: {type(error).__name__}: {_first_line(error)}"
        return str(node), str(text), str(why)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


def _connected(address: str) -> ModuleType:
    # Without this, Ray warns of its own future at each start.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError:
        raise UsageError(
            "--on ray needs Ray, which is not installed",
            hint="pip install 'weightsmith[ray]', in the version of the cluster",
        ) from None
    hint = "start one with `ray start --head`, or give --address HOST:PORT"
    named = address or os.environ.get("RAY_ADDRESS", "")
    host, separator, port = named.rpartition(":")
    if separator and "://" not in named and port.isdigit():  # not another of Ray's forms
        try:  # for which Ray itself waits long
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
        except (OSError, OverflowError, UnicodeError) as error:
            raise EnvironmentFailure(
                f"no Ray cluster answers at {named}: {getattr(error, 'strerror', None) or error}",
                hint=hint,
            ) from None
    try:
        ray.init(address=address or "auto", log_to_driver=False, logging_level="error")
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise EnvironmentFailure(
            f"no Ray cluster answers at {address or 'this machine'}: {_first_line(error)}",
            hint=hint,
        ) from None
    module: ModuleType = ray
    return module


def _program() -> Callable[[str, str], tuple[str, str, str]]:
    """Return the function that Ray runs on a node.

    It is defined here, inside another, so that it travels as it is: a node without this package
    can still say that it lacks it.
    """

    def on_node(module: str, text: str) -> tuple[str, str, str]:
        import os
        import signal
        import subprocess
        import sys
        import time

        import ray

        # Ray cancels by an interrupt, which nodes started in the background (`nohup`, `&`) ignore.
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        node = ray.get_runtime_context().get_node_id()
        said = os.fdopen(os.memfd_create("reply"), "w+b")  # TMPDIR may be full
        # The pipe stays open while this worker lives, and the program ends with it.
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=subprocess.STDOUT if text == "version" else None,
            start_new_session=True,
        )
        if process.stdin is None:
            raise AssertionError("it is a pipe")
        try:
            try:
                process.stdin.write(text.encode() + b"\n")
                process.stdin.flush()
            except BrokenPipeError:
                pass
            # Ray's cancelling is seen between two steps of Python, and not while one waits.
            while (code := process.poll()) is None:
                time.sleep(0.1)
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            raise
        said.seek(0)
        output = said.read().decode(errors="replace").strip()
        last = output.splitlines()[-1] if output else ""
        if code:
            return node, "", f"exit code {code}: {last}"
        return node, last, ""

    return on_node
