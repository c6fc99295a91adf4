import socket
import struct
import threading

from weightsmith.drivers.relay import _carry


def test_a_client_notices_that_the_server_was_killed() -> None:
    """In the middle of its request, as when a server's kernel ends with SIGILL."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(
        ("127.0.0.1", 0)
    ) as relay, socket.create_connection(relay.getsockname()) as client:  # fmt: skip
        outer, _ = relay.accept()
        threading.Thread(target=_carry, args=(outer, server.getsockname()[1]), daemon=True).start()
        client.sendall(b"POST")
        asked, _ = server.accept()
        assert asked.recv(16) == b"POST"

        asked.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        asked.close()  # with a reset

        client.settimeout(10)
        assert client.recv(16) == b""
