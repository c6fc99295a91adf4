"""What a job's container does when the engine fails; the engine is a stub."""

import socket
from types import SimpleNamespace
from typing import Any

import pytest
from docker.errors import APIError
from weightsmith.outside.docker import run_container

NOT_STARTED = "runc create failed: waiting for init preliminary setup: connection reset by peer"


class Stub:
    """An engine whose containers end at once, after failing to start with these explanations."""

    def __init__(self, *failures: str) -> None:
        self.failures = list(failures)
        self.removed = 0
        self.containers = SimpleNamespace(create=lambda **_: self)
        self.api = self
        self.id = "1"

    def attach_socket(self, _id: str, params: Any) -> socket.socket:
        ours, theirs = socket.socketpair()
        theirs.close()
        return ours

    def wait(self, *_: Any) -> dict[str, int]:
        return {"StatusCode": 0}

    def start(self) -> None:
        if self.failures:
            raise APIError("500", explanation=self.failures.pop(0))

    def remove(self, **_: Any) -> None:
        self.removed += 1


def run(stub: Any) -> int:
    conversation: Any = SimpleNamespace(
        job=SimpleNamespace(seconds=0), on_line=print, on_error_line=print
    )
    return run_container(stub, {}, conversation, None)


def test_a_container_that_could_not_be_started_is_started_once_more():
    stub = Stub(NOT_STARTED)

    assert run(stub) == 0
    assert stub.removed == 2


@pytest.mark.parametrize("failures", [[NOT_STARTED] * 2, ["no such image"]])
def test_but_not_twice_and_not_after_another_failure(failures):
    stub = Stub(*failures)

    with pytest.raises(APIError):
        run(stub)
    assert stub.failures == []
