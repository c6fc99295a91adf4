"""Who keeps a source: a server that redirects, cuts, lies or is slow, and archives made to harm."""

import gzip
import hashlib
import io
import socket
import ssl
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from weightsmith.core import network
from weightsmith.core.errors import Altered, EnvironmentFailure, InputRefused
from weightsmith.core.ports import Silent
from weightsmith.outside import http_files
from weightsmith.outside.archives import extract
from weightsmith.outside.http_files import HttpFiles, _addresses, _may_reach
from weightsmith.outside.https import HttpsRemote, parse_list
from weightsmith.outside.modelscope import parse_files
from weightsmith.outside.object_stores import S3, ObjectRemote
from weightsmith.outside.remote import Broken, RemoteReader
from weightsmith.outside.store import FileStore

from tests.fakes.auth_server import make_certificate
from tests.fakes.images import entry, tar_of
from tests.fakes.journal import RecordingProgress
from tests.fakes.s3_server import s3_server
from tests.fakes.serving import Serving, answering, serving
from tests.fakes.sources import (
    MODEL,
    SECRET,
    WebHandler,
    WebServer,
    archive_of,
    list_of,
    web_server,
)

LARGE = "model-00001-of-00002.safetensors"


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    with web_server() as state:
        state.files = {f"/bot/{name}": data for name, data in MODEL.items()}
        state.files["/bot/SHA256SUMS"] = list_of(MODEL)
        state.files["/bot.tar"] = archive_of(MODEL)
        yield state


@pytest.fixture
def reader(tmp_path: Path) -> RemoteReader:
    return RemoteReader(FileStore(tmp_path / "store"), HttpsRemote("http"))


def fetch(reader: RemoteReader, web: WebServer, path: str = "/bot/SHA256SUMS") -> object:
    digest = hashlib.sha256(web.files[path]).hexdigest()
    return reader.fetch(f"{web.url}{path}", "", digest, Silent())


@pytest.mark.parametrize("fault", ["reset", "half", "503", "429", "short"])
def test_a_download_that_broke_goes_on(web: WebServer, reader: RemoteReader, fault: str) -> None:
    web.faults = [(LARGE, fault), (LARGE, fault)]

    snapshot = fetch(reader, web)

    assert snapshot.tree.path(LARGE).read_bytes() == MODEL[LARGE]
    if fault == "short":
        half, whole = len(MODEL[LARGE]) // 2, len(MODEL[LARGE])
        assert [row for row in web.asked if f"bytes={half}-" in row]
        assert web.sent < whole + sum(map(len, MODEL.values()))


def test_a_server_without_ranges_sends_it_again(web: WebServer, reader: RemoteReader) -> None:
    web.faults = [(LARGE, "half"), (LARGE, "norange")]

    assert fetch(reader, web).tree.path(LARGE).read_bytes() == MODEL[LARGE]


def test_a_server_that_says_0_of_every_size(
    web: WebServer, reader: RemoteReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def empty(handler: WebHandler) -> None:
        handler.reply(200, b"", {"Content-Length": "0"})

    monkeypatch.setattr(WebHandler, "do_HEAD", empty)

    assert fetch(reader, web).tree.path(LARGE).read_bytes() == MODEL[LARGE]


def test_one_that_always_breaks_ends(web: WebServer, reader: RemoteReader) -> None:
    web.faults = [(LARGE, "reset")] * 20

    with pytest.raises(EnvironmentFailure, match=LARGE) as caught:
        fetch(reader, web)
    assert "not fetched again" in caught.value.hint
    assert len(web.faults) == 16


@pytest.mark.parametrize("fault", ["spoil", "long"])
def test_a_file_that_is_not_as_listed_is_altered(
    web: WebServer, reader: RemoteReader, tmp_path: Path, fault: str
) -> None:
    web.faults = [(LARGE, fault)]

    with pytest.raises(Altered, match=LARGE) as caught:
        fetch(reader, web)
    assert caught.value.exit_code == 5
    assert not [*(tmp_path / "store").rglob(LARGE)]
    assert fetch(reader, web).tree.path(LARGE).read_bytes() == MODEL[LARGE]


@pytest.mark.parametrize("path", ["/bot.tar", "/bot/SHA256SUMS"])
def test_another_file_than_the_pinned_one_is_refused(
    web: WebServer, reader: RemoteReader, path: str
) -> None:
    with pytest.raises(InputRefused, match="not its pin") as caught:
        reader.fetch(f"{web.url}{path}", "", "0" * 64, Silent())
    assert caught.value.exit_code == 3


def test_a_redirect_on_this_machine(web: WebServer, reader: RemoteReader) -> None:
    web.redirects = {f"/bot/{LARGE}": f"{web.url}/moved"}
    web.files["/moved"] = MODEL[LARGE]

    assert fetch(reader, web).tree.path(LARGE).read_bytes() == MODEL[LARGE]


@pytest.mark.parametrize(
    "target",
    [
        "file:///etc/passwd",
        "ftp://example.com/x",
        "http://example.com/bot.tar",
        "http://169.254.169.254/latest/meta-data/",
        "https://169.254.169.254/latest/meta-data/",
        "https://[fe80::1]/x",
        "https://[::ffff:169.254.169.254]/x",
        "https://user:password@example.com/x",
        "//169.254.169.254/x",
        "http://[",
        "gopher:",
    ],
)
def test_a_redirect_that_leads_away(web: WebServer, reader: RemoteReader, target: str) -> None:
    web.redirects = {"/bot.tar": target}

    with pytest.raises(InputRefused, match="redirects to") as caught:
        fetch(reader, web, "/bot.tar")
    assert "password" not in caught.value.message


def test_a_redirect_without_end(web: WebServer, reader: RemoteReader) -> None:
    web.redirects = {"/bot.tar": "/bot.tar"}

    with pytest.raises(EnvironmentFailure, match="redirects"):
        fetch(reader, web, "/bot.tar")


def test_over_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Certificates are checked, and no redirect leads back to plain HTTP, not even here."""
    key, certificate = make_certificate(tmp_path, "localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    reader = RemoteReader(FileStore(tmp_path / "store"), HttpsRemote())
    with web_server() as plain, ExitStack() as stack:
        web = WebServer()
        server = Serving(WebHandler, state=web)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        stack.enter_context(serving(server))
        source = f"https://localhost:{server.server_address[1]}/bot.tar"
        web.files["/bot.tar"] = plain.files["/bot.tar"] = data = archive_of(MODEL)
        digest = hashlib.sha256(data).hexdigest()
        with pytest.raises(EnvironmentFailure, match="CERTIFICATE_VERIFY_FAILED"):
            reader.fetch(source, "", digest, Silent())
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))

        web.redirects = {"/bot.tar": f"{plain.url}/bot.tar"}
        with pytest.raises(InputRefused, match="not HTTPS"):
            reader.fetch(source, "", digest, Silent())
        web.redirects = {}
        snapshot = reader.fetch(source, "", digest, Silent())

    assert {file.path for file in snapshot.tree.files} == MODEL.keys()
    assert plain.asked == []


@pytest.mark.parametrize(
    ("address", "home", "may"),
    [
        ("93.184.216.34", "93.184.216.35", True),
        ("10.0.0.1", "93.184.216.35", False),
        ("127.0.0.1", "93.184.216.35", False),
        ("::1", "93.184.216.35", False),
        ("fd12::1", "93.184.216.35", False),
        ("100.64.0.1", "93.184.216.35", False),
        ("10.0.0.1", "10.0.0.2", True),
        ("127.0.0.1", "10.0.0.2", False),
        ("127.0.0.1", "127.0.0.1", True),
        ("169.254.169.254", "10.0.0.2", False),
        ("169.254.169.254", "127.0.0.1", False),
        ("::ffff:127.0.0.1", "10.0.0.2", False),
        ("fd00:ec2::254", "10.0.0.2", False),
        ("100.100.100.200", "10.0.0.2", False),
        ("0.0.0.0", "127.0.0.1", False),
        ("10.0.0.1", "", False),
        ("93.184.216.34", "", True),
    ],
)
def test_where_a_redirect_may_lead(address: str, home: str, may: bool) -> None:
    assert _may_reach(address, _addresses(home) if home else ()) is may


def test_a_name_is_another_address_when_it_is_used(
    web: WebServer, reader: RemoteReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name that a redirect leads to is looked up once, and that address is connected to."""
    real, looked = socket.getaddrinfo, []

    def lookup(host: str, *args: object, **options: object) -> object:
        if host == "rebound.example":
            looked.append(host)
            host = "169.254.169.254"
        return real(host, *args, **options)

    monkeypatch.setattr(network.socket, "getaddrinfo", lookup)
    web.redirects = {"/bot.tar": "https://rebound.example/bot.tar"}

    with pytest.raises(InputRefused, match="this machine or its network"):
        fetch(reader, web, "/bot.tar")
    assert looked == ["rebound.example"]


def test_a_password_is_sent_to_the_first_address_alone(
    web: WebServer, reader: RemoteReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = tmp_path / "netrc"
    rules.write_text(f"machine 127.0.0.1 login ann password {SECRET}\n")
    rules.chmod(0o600)
    monkeypatch.setenv("NETRC", str(rules))
    with web_server() as other:
        other.files["/there"] = MODEL[LARGE]
        web.redirects = {f"/bot/{LARGE}": f"{other.url}/there"}
        web.password = "Basic "

        fetch(reader, web)

        assert all("Authorization" in row for row in web.headers if web.redirects)
        assert not [row for row in other.headers if "Authorization" in row]


def test_access_denied_says_where_passwords_are_kept(web: WebServer, reader: RemoteReader) -> None:
    web.password = "never"

    with pytest.raises(InputRefused, match="denied") as caught:
        fetch(reader, web, "/bot.tar")
    assert "netrc" in caught.value.hint
    assert SECRET not in caught.value.message


def test_a_server_that_drips(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then keeps each timeout of a read."""
    monkeypatch.setattr(network, "WINDOW", 0.3)

    def drip(caller: socket.socket) -> None:
        caller.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        for _ in range(2000):
            caller.sendall(b"x")
            pause.wait(0.01)

    pause = threading.Event()
    with answering(drip) as place, pytest.raises(Broken):
        for _ in HttpFiles("x").read(f"http://{place}/model.tar"):
            pass


@pytest.mark.parametrize(
    "line",
    [
        "../x",
        "/etc/passwd",
        "a/../../b.json",
        "https://example.com/model.safetensors",
        "a//b.json",
        "./../x",
        "a\tb.json",
        "x" * 300 + ".json",
        "/".join("a" * 20) + "/x.json",
    ],
)
def test_a_list_that_names_what_is_not_below_it(
    web: WebServer, reader: RemoteReader, line: str
) -> None:
    web.files["/bot/SHA256SUMS"] = list_of(MODEL) + f"{'0' * 64}  {line}\n".encode()

    with pytest.raises(InputRefused, match="path that leaves"):
        fetch(reader, web)
    assert web.asked == ["GET /bot/SHA256SUMS"]


@pytest.mark.parametrize("text", [b"<html>", b"\xff\xfe", b"SHA256 (x) = " + b"0" * 64, b"\\" * 70])
def test_a_list_that_is_none(text: bytes) -> None:
    with pytest.raises(InputRefused, match=r"sha256sum|SHA-256|UTF-8"):
        parse_list(text, "SHA256SUMS")


def test_a_name_in_a_list_is_no_address(web: WebServer, reader: RemoteReader) -> None:
    odd = "a?b#c%2e%2e.json"
    files = {**MODEL, odd: b"{}"}
    web.files |= {f"/bot/{odd}": b"{}", "/bot/SHA256SUMS": list_of(files)}

    assert fetch(reader, web).tree.path(odd).read_bytes() == b"{}"


LINK, HARD, DEVICE, PIPE = tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE
BASE = [(entry("config.json"), b"{}"), (entry("model.safetensors"), b"w")]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([entry("tokenizer.json", LINK, to="/etc/passwd")], "a link"),
        ([entry("readme", LINK, to="config.json")], "a link"),
        ([entry("tokenizer.json", HARD, to="config.json")], "a link"),
        ([entry("x", DEVICE)], "device"),
        ([entry("x", PIPE)], "device"),
        ([(entry("../x.json"), b"{}")], "leaves its folder"),
        ([(entry("/etc/x.json"), b"{}")], "leaves its folder"),
        ([(entry("a/../../x.json"), b"{}")], "leaves its folder"),
        ([(entry("a\\x.json"), b"{}")], "leaves its folder"),
        ([(entry("config.json"), b"[]")], "two files"),
        ([(entry("Config.json"), b"[]")], "two files"),
        ([(entry("config.json/x.json"), b"{}")], "file and as a folder"),
        ([(entry("/".join("a" * 20) + "/x.json"), b"{}")], "leaves its folder"),
        ([(entry("x" * 300 + ".json"), b"{}")], "leaves its folder"),
    ],
)
def test_an_archive_made_to_harm(tmp_path: Path, rows: list, said: str) -> None:
    archive = tmp_path / "model.tar"
    archive.write_bytes(tar_of(*BASE, *rows))
    (tmp_path / "out").mkdir()

    with pytest.raises(InputRefused, match=said):
        extract(archive, tmp_path / "out", "model.tar", lambda *_: None)
    assert {path.name for path in tmp_path.iterdir()} <= {"model.tar", "out"}


def test_an_archive_that_unpacks_to_far_more(tmp_path: Path) -> None:
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", mtime=0) as packed:
        packed.write(tar_of((entry("model.safetensors"), bytes(80 << 20))))
    archive = tmp_path / "model.tar.gz"
    archive.write_bytes(out.getvalue())
    (tmp_path / "out").mkdir()

    with pytest.raises(InputRefused, match="unpacks to more than"):
        extract(archive, tmp_path / "out", "model.tar.gz", lambda *_: None)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a/config.json": b"", "b/config.json": b"", "a/m.safetensors": b""}, "several models"),
        ({"model.safetensors": b""}, "no config.json"),
        ({"config.json": b"{}"}, "no .safetensors"),
    ],
)
def test_an_archive_without_one_model(tmp_path: Path, files: dict, said: str) -> None:
    archive = tmp_path / "model.tar"
    archive.write_bytes(archive_of(files))
    (tmp_path / "out").mkdir()

    with pytest.raises(InputRefused, match=said):
        extract(archive, tmp_path / "out", "model.tar", lambda *_: None)


@pytest.mark.parametrize("pack", [lambda data: data, lambda data: gzip.compress(data, mtime=0)])
@pytest.mark.parametrize("top", ["", "./", "some/where/"])
def test_an_honest_archive(tmp_path: Path, pack: Callable[[bytes], bytes], top: str) -> None:
    archive = tmp_path / "model.tar"
    archive.write_bytes(pack(archive_of({**MODEL, "train.py": b"x"}, top)))
    folder = tmp_path / "out"
    folder.mkdir()

    found = extract(archive, folder, "model.tar", lambda *_: None)

    assert found == {name: hashlib.sha256(data).hexdigest() for name, data in MODEL.items()}
    here = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert here == set(MODEL)


@pytest.mark.parametrize(
    "reply",
    [
        b"<html>",
        b"[]",
        b'{"Data": 1}',
        b'{"Data": {"Files": {}}}',
        b'{"Data": {"Files": [1]}}',
        b'{"Data": {"Files": [{"Path": 1, "Size": 1, "Sha256": "x"}]}}',
        b'{"Data": {"Files": [{"Path": "a", "Size": true, "Sha256": "' + b"0" * 64 + b'"}]}}',
        b'{"Data": {"Files": [{"Path": "a", "Size": -1, "Sha256": "' + b"0" * 64 + b'"}]}}',
        b'{"Data": {"Files": [{"Path": "a", "Size": 1, "Sha256": null}]}}',
    ],
)
def test_a_list_of_modelscope_that_is_none(reply: bytes) -> None:
    with pytest.raises((InputRefused, EnvironmentFailure)):
        parse_files(reply, "modelscope://a/b")


def test_an_object_that_changes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a bucket without versions the second half may be another object's."""
    with s3_server("moving") as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        import boto3

        client = boto3.client("s3")
        for name, data in MODEL.items():
            client.put_object(Bucket="moving", Key=f"bot/{name}", Body=data)

        class Changes(RecordingProgress):
            def advance(self, done: int, total: int, unit: str) -> None:
                client.put_object(
                    Bucket="moving", Key=f"bot/{LARGE}", Body=bytes(len(MODEL[LARGE]))
                )

        reader = RemoteReader(FileStore(tmp_path / "store"), ObjectRemote(S3()))
        monkeypatch.setattr("weightsmith.outside.object_stores._CHUNK", 1 << 20)
        with pytest.raises(Altered, match="while it was read"):
            reader.fetch("s3://moving/bot", "", "", Changes())
        sizes = [path.stat().st_size for path in (tmp_path / "store").rglob("*")]
        assert len(MODEL[LARGE]) not in sizes


def test_an_address_is_shown_without_secrets() -> None:
    assert http_files.shown(f"https://a:{SECRET}@h/x?sig={SECRET}#{SECRET}") == "https://h/x"
