"""Objects in S3, by moto's server: versions, checksums, archives."""

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.config import conf
from weightsmith.core.errors import EnvironmentFailure, InputRefused
from weightsmith.core.ports import Silent
from weightsmith.outside.object_stores import S3, ObjectRemote
from weightsmith.outside.remote import RemoteReader
from weightsmith.outside.store import FileStore

from tests.fakes.s3_server import s3_server
from tests.fakes.serving import Replying, Serving, serving
from tests.fakes.sources import MODEL, SECRET, archive_of

SECOND = 1.1
"""S3 tells the seconds of changes, so what is between two of them is what there was."""
LAST = "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    with s3_server("objects") as variables:
        yield dict(variables)


@pytest.fixture
def s3(server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    import boto3

    return boto3.client("s3")


@pytest.fixture
def reader(tmp_path: Path) -> RemoteReader:
    return RemoteReader(FileStore(tmp_path / "store"), ObjectRemote(S3()))


def put(s3: Any, bucket: str, **more: object) -> None:
    for name, data in MODEL.items():
        s3.put_object(Bucket=bucket, Key=f"bot/{name}", Body=data, **more)


def test_of_a_bucket_with_versions_the_listed_one_is_read(s3: Any) -> None:
    s3.create_bucket(Bucket="versions")
    s3.put_bucket_versioning(Bucket="versions", VersioningConfiguration={"Status": "Enabled"})
    put(s3, "versions")
    place = ObjectRemote(S3()).open("s3://versions/bot", "", "", Silent())
    s3.put_object(Bucket="versions", Key=f"bot/{LAST}", Body=b"newer")

    (file,) = (one for one in place.files if one.path == LAST)
    first = next(place.read(file, 0, 100))

    assert first == MODEL[LAST][:100]
    assert file.version
    assert ObjectRemote(S3()).open("s3://versions/bot", "", "", Silent()).pin != place.pin


@pytest.mark.parametrize("change", ["replace", "add", "delete"])
def test_of_a_bucket_with_versions_a_pin_is_read_as_it_was(
    s3: Any, reader: RemoteReader, change: str
) -> None:
    bucket = f"pinned-{change}"
    s3.create_bucket(Bucket=bucket)
    s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    put(s3, bucket)
    source, key = f"s3://{bucket}/bot", f"bot/{LAST}"
    place = ObjectRemote(S3()).open(source, "", "", Silent())
    pin = place.pin.removeprefix(f"{source}@")
    time.sleep(SECOND)
    match change:
        case "replace":
            s3.put_object(Bucket=bucket, Key=key, Body=b"newer")
        case "add":
            s3.put_object(Bucket=bucket, Key="bot/tokenizer.json", Body=b"{}")
        case _:
            s3.delete_object(Bucket=bucket, Key=key)

    got = reader.fetch(source, pin, "", Silent())

    assert got.pin == place.pin
    assert {f.path: got.tree.path(f.path).read_bytes() for f in got.tree.files} == dict(MODEL)
    (file,) = (one for one in place.files if one.path == LAST)
    assert b"".join(place.read(file, 0, -1)) == MODEL[LAST]
    with pytest.raises(InputRefused, match="its pin is"):
        ObjectRemote(S3()).open(source, f"sha256:{'0' * 64}", "", Silent())


def test_an_archive_that_was_replaced_is_read_as_it_was(s3: Any, reader: RemoteReader) -> None:
    s3.create_bucket(Bucket="replaced")
    s3.put_bucket_versioning(Bucket="replaced", VersioningConfiguration={"Status": "Enabled"})
    s3.put_object(Bucket="replaced", Key="bot.tar", Body=archive_of(MODEL))
    s3.put_object(Bucket="replaced", Key="bot.tar.sig", Body=b"beside it")
    pin = ObjectRemote(S3()).open("s3://replaced/bot.tar", "", "", Silent()).pin
    time.sleep(SECOND)
    s3.put_object(Bucket="replaced", Key="bot.tar", Body=b"newer")

    got = reader.fetch("s3://replaced/bot.tar", pin.rpartition("@")[2], "", Silent())

    assert {file.path for file in got.tree.files} == set(MODEL)


def test_an_object_in_parts_has_no_md5(s3: Any, reader: RemoteReader) -> None:
    """Its ETag is the MD5 of the parts' MD5s, and a dash."""
    s3.create_bucket(Bucket="parts")
    put(s3, "parts")
    key = f"bot/{LAST}"
    upload = s3.create_multipart_upload(Bucket="parts", Key=key)["UploadId"]
    part = {"Bucket": "parts", "Key": key, "UploadId": upload}
    tag = s3.upload_part(**part, PartNumber=1, Body=MODEL[LAST])["ETag"]
    done = {"Parts": [{"PartNumber": 1, "ETag": tag}]}
    s3.complete_multipart_upload(**part, MultipartUpload=done)

    listed = ObjectRemote(S3()).open("s3://parts/bot", "", "", Silent()).files
    files = {file.path: file for file in listed}
    tree = reader.fetch("s3://parts/bot", "", "", Silent()).tree

    assert files[LAST].md5 == ""
    assert files["config.json"].md5 == hashlib.md5(MODEL["config.json"]).hexdigest()
    assert tree.path(LAST).read_bytes() == MODEL[LAST]


def test_a_checksum_that_the_store_has_is_a_digest(s3: Any) -> None:
    s3.create_bucket(Bucket="checksums")
    put(s3, "checksums", ChecksumAlgorithm="SHA256")

    files = ObjectRemote(S3()).open("s3://checksums/bot", "", "", Silent()).files

    for file in files:
        assert file.digest is not None
        assert file.digest.hex == hashlib.sha256(MODEL[file.path]).hexdigest()


def test_an_archive_and_its_pin(s3: Any, reader: RemoteReader, tmp_path: Path) -> None:
    s3.create_bucket(Bucket="archives")
    s3.put_object(Bucket="archives", Key="models/bot.tar", Body=archive_of(MODEL, "bot/"))
    source = "s3://archives/models/bot.tar"

    first = reader.fetch(source, "", "", Silent())
    s3.put_object(Bucket="archives", Key="models/bot.tar", Body=archive_of({**MODEL, "x.md": b""}))
    other = RemoteReader(FileStore(tmp_path / "another"), ObjectRemote(S3()))

    assert {file.path for file in first.tree.files} == MODEL.keys()
    with pytest.raises(InputRefused, match="its pin"):
        other.fetch(source, first.pin.removeprefix(f"{source}@"), "", Silent())


def test_an_empty_folder_and_no_bucket(reader: RemoteReader, s3: Any) -> None:
    s3.create_bucket(Bucket="denied")

    with pytest.raises(InputRefused, match="does not exist"):
        reader.fetch("s3://denied/bot", "", "", Silent())
    with pytest.raises(InputRefused, match="does not exist"):
        reader.fetch("s3://no-such-bucket/bot", "", "", Silent())


class Expired(Replying):
    def do_GET(self) -> None:
        said = f"<Error><Code>ExpiredToken</Code><Message>{SECRET}</Message></Error>"
        self.reply(400, said.encode(), {"Content-Type": "application/xml"})


def test_credentials_that_have_ended_are_named(
    reader: RemoteReader, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Serving(Expired, state=None)) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(InputRefused, match=r"denied \(ExpiredToken\)") as caught:
            reader.fetch("s3://bucket/bot", "", "", Silent())
    assert SECRET not in caught.value.message


def test_a_password_in_the_endpoint_is_not_shown(
    reader: RemoteReader, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """botocore shows the address that it could not reach."""
    monkeypatch.setitem(conf, "s3", {"anon": True})
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://ann:{SECRET}@127.0.0.1:1")
    with pytest.raises(EnvironmentFailure, match=r"127\.0\.0\.1") as caught:
        reader.fetch("s3://bucket/bot", "", "", Silent())
    assert SECRET not in caught.value.message
