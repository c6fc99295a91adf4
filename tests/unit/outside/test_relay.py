import os
import socket
import struct
import threading
import time

import pytest
from weightsmith.outside import image_sandbox
from weightsmith.outside.image_sandbox import _carry


def test_a_client_notices_that_the_server_was_killed() -> None:
    """In the middle of its request, as when a server's kernel ends with SIGILL."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(
        ("127.0.0.1", 0)
    ) as between, socket.create_connection(between.getsockname()) as client:  # fmt: skip
        outer, _ = between.accept()
        carried = (outer, server.getsockname()[1], threading.Event())
        threading.Thread(target=_carry, args=carried, daemon=True).start()
        client.sendall(b"POST")
        asked, _ = server.accept()
        assert asked.recv(16) == b"POST"

        asked.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        asked.close()  # with a reset

        client.settimeout(10)
        assert client.recv(16) == b""


def test_what_a_server_sent_before_it_ended_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also to a client that reads late, while another one keeps its connection open."""
    monkeypatch.setattr(image_sandbox, "die_with_parent", lambda parent: None)
    answer = b"x" * (8 << 20)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(
        ("127.0.0.1", 0)
    ) as between:  # fmt: skip
        end = image_sandbox.start_relay(
            os.dup(between.fileno()), server.getsockname()[1], lambda: None
        )
        with socket.create_connection(between.getsockname()) as client:
            asked, _ = server.accept()
            with socket.create_connection(between.getsockname()):
                server.accept()[0].close()
                threading.Thread(target=_say, args=(asked, answer)).start()
                ended = threading.Thread(target=end)
                ended.start()
                time.sleep(0.5)
                client.settimeout(60)
                got = b"".join(iter(lambda: client.recv(1 << 20), b""))
                ended.join(60)
    assert got == answer
    assert not ended.is_alive()


def _say(asked: socket.socket, answer: bytes) -> None:
    with asked:
        asked.sendall(answer)
