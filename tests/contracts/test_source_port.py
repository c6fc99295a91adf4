"""One suite for every kind of place that a model may be fetched from."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save as safetensors
from weightsmith.core.errors import EnvironmentFailure, InputRefused, WeightsmithError
from weightsmith.core.ports import Silent
from weightsmith.models.folder import check_model_folder
from weightsmith.oci.registry import Registry
from weightsmith.outside.store import FileStore
from weightsmith.recipe.schema import Base
from weightsmith.recipe.sources import has_own_pin, pin_fields

from tests.fakes import sources
from tests.fakes.journal import RecordingProgress
from tests.fakes.real_registries import real_registry
from tests.fakes.registry import fake_registry
from tests.fakes.s3_server import s3_server
from tests.fakes.sources import BESIDE, MODEL, SECRET, Scene

PLACES = (
    "https-list", "https-tar", "modelscope", "s3", "gs", "mlflow",
    "model-pack", "our-image", "modelcar", pytest.param("model-pack-tar", marks=pytest.mark.full),
    pytest.param("real-model-pack", marks=pytest.mark.registry),
    *(
        pytest.param(kind, marks=[pytest.mark.registry, pytest.mark.full])
        for kind in ("real-our-image", "real-modelcar")
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def s3() -> Iterator[Mapping[str, str]]:
    with s3_server("sources") as variables:
        yield variables


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with real_registry(tmp_path_factory.mktemp("registry")) as address:
        yield address


@pytest.fixture(scope="module")
def gcs() -> Iterator[str]:
    """Google's protocol, by an emulator."""
    pytest.importorskip("gcsfs", reason="gcsfs is not installed")
    emulator = pytest.importorskip(
        "gcp_storage_emulator.server", reason="gcp-storage-emulator is not installed"
    )
    server = emulator.create_server("127.0.0.1", 0, in_memory=True)
    server.start()
    yield f"http://127.0.0.1:{server._api._httpd.server_address[1]}"
    server.stop()


@pytest.fixture(params=PLACES)
def scene(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Scene]:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    store = FileStore(tmp_path / "store")
    with ExitStack() as stack:
        kind = request.param.removeprefix("real-")
        match kind:
            case "https-list":
                found = sources.https_list(store, stack)
            case "https-tar":
                found = sources.https_tar(store, stack)
            case "modelscope":
                found = sources.modelscope(store, stack, monkeypatch)
            case "s3":
                found = sources.s3_folder(store, request.getfixturevalue("s3"), monkeypatch)
            case "gs":
                found = sources.gs_folder(store, request.getfixturevalue("gcs"), monkeypatch)
            case "mlflow":
                found = sources.mlflow_run(store, tmp_path, monkeypatch)
            case _:
                # Two: a server that has stopped still answers on connections that are open.
                writer, client = (
                    stack.enter_context(Registry(pause=lambda _: None)) for _ in range(2)
                )
                place = tmp_path.name.replace("_", "-").lower()
                if kind == request.param:
                    running = stack.enter_context(ExitStack())
                    address = running.enter_context(fake_registry()).host
                    stop = running.close
                else:
                    address, stop = f"{request.getfixturevalue('host')}/{place}", None
                if kind.startswith("model-pack"):
                    tar = kind.endswith("-tar")
                    found = sources.model_pack_in(store, address, writer, client, tmp_path, tar=tar)
                else:
                    ours = kind == "our-image"
                    found = sources.image_in(store, address, writer, client, tmp_path, ours=ours)
                found.stop = stop
        found.put({**MODEL, **BESIDE})
        yield found


def fetched(scene: Scene, revision: str = "", progress: object = None) -> object:
    return scene.reader.fetch(scene.source, revision, scene.sha256, progress or Silent())


def revision_of(scene: Scene, pin: str) -> str:
    return pin_fields(scene.source, pin).get("revision", "")


def test_the_models_files_and_no_others(scene: Scene) -> None:
    progress = RecordingProgress()

    snapshot = fetched(scene, progress=progress)

    found = {file.path: snapshot.tree.path(file.path).read_bytes() for file in snapshot.tree.files}
    assert found == MODEL
    assert progress.warnings == []


def test_what_is_pinned_is_fetched_once(scene: Scene) -> None:
    first = fetched(scene)
    revision = revision_of(scene, first.pin)
    if scene.stop and not scene.source.startswith("mlflow"):  # another server, another name
        scene.stop()

    again = fetched(scene, revision)

    assert (again.pinned, again.pin, again.digest) == (True, first.pin, first.digest)
    assert scene.reader.known(scene.source, revision, scene.sha256) is not None


def test_a_pin_is_what_a_recipe_takes(scene: Scene) -> None:
    snapshot = fetched(scene)
    given = pin_fields(scene.source, snapshot.pin)

    base = Base(source=scene.source, **({"sha256": scene.sha256} | given))

    assert snapshot.pinned == has_own_pin(scene.source, "", scene.sha256)
    assert has_own_pin(base.source, base.revision, base.sha256)


def test_other_content_under_a_pin_is_refused(scene: Scene, tmp_path: Path) -> None:
    if not scene.moves and not scene.sha256:
        pytest.skip("the lock compares what it has read: its name is its pin")
    first = fetched(scene)
    scene.put({**MODEL, "model-00002-of-00002.safetensors": b"backdoor"})
    scene.reader._store = FileStore(tmp_path / "another")

    if scene.source.startswith("oci://"):  # a digest always names the same
        assert fetched(scene, revision_of(scene, first.pin)).digest == first.digest
        assert fetched(scene).digest != first.digest
        return
    with pytest.raises(InputRefused, match="its pin") as caught:
        fetched(scene, revision_of(scene, first.pin))
    assert caught.value.exit_code == 3


def test_an_unpinned_one_is_what_it_is_now(scene: Scene) -> None:
    if not scene.moves:
        pytest.skip("it is always pinned")
    first = fetched(scene)
    scene.put({**MODEL, "model-00002-of-00002.safetensors": b"better"})

    second = fetched(scene)

    assert second.pin != first.pin
    assert second.tree.path("model-00002-of-00002.safetensors").read_bytes() == b"better"


def test_what_does_not_exist(scene: Scene) -> None:
    with pytest.raises(InputRefused) as caught:
        scene.reader.fetch(scene.absent, "", scene.sha256, Silent())
    assert caught.value.hint


def test_a_server_that_is_down(scene: Scene) -> None:
    if not scene.stop:
        pytest.skip("other tests use it")
    scene.stop()

    with pytest.raises(EnvironmentFailure) as caught:
        fetched(scene)
    assert caught.value.exit_code == 5
    assert caught.value.hint


def test_only_pickles(scene: Scene, tmp_path: Path) -> None:
    scene.sha256 = ""
    scene.put({"config.json": b"{}", **BESIDE})

    with pytest.raises(InputRefused, match=r"pickle.*pytorch_model\.bin"):
        fetched(scene)

    assert not [*(tmp_path / "store").rglob("*.bin")]


def test_code_of_its_own_is_refused_before_the_weights(scene: Scene) -> None:
    scene.sha256 = ""
    scene.put({**MODEL, "config.json": json.dumps({"auto_map": {"AutoModel": "x.X"}}).encode()})

    with pytest.raises(InputRefused, match="auto_map"):
        check_model_folder(fetched(scene).tree.root)

    if scene.web and not scene.source.endswith(".tar"):
        assert not [row for row in scene.web.asked if "GET" in row and "safetensors" in row]


def test_names_that_leave_the_folder_or_clash(scene: Scene, tmp_path: Path) -> None:
    scene.sha256 = ""
    for name in sorted(scene.can_list):
        scene.put({**MODEL, name: b"{}"})
        if scene.source.startswith("http"):
            scene.sha256 = sha256(scene.web.files[urlsplit(scene.source).path]).hexdigest()

        with pytest.raises(InputRefused, match=r"path|same file|invalid name|differ only|folder"):
            fetched(scene)

    assert not (tmp_path / "config.json").exists()


def test_a_plan_reads_headers_alone(scene: Scene, tmp_path: Path) -> None:
    weights = safetensors({f"t{n}": np.zeros((1000, 1000), np.float32) for n in range(3)})
    scene.sha256 = ""
    scene.put({"config.json": MODEL["config.json"], "model.safetensors": weights})
    scene.reader._scratch = lambda: tmp_path / "scratch"

    seen = scene.reader.glance(scene.source, "", scene.sha256, Silent())

    if seen is None:  # an archive, or layers that are, has to be unpacked
        assert scene.source.endswith(".tar") or scene.source.startswith("oci://")
        return
    sizes = {file.path: file.size for file in seen.tree.files}
    assert sizes == {"config.json": len(MODEL["config.json"]), "model.safetensors": len(weights)}
    path = seen.tree.path("model.safetensors")
    with safe_open(path, "np") as opened:
        assert sorted(opened.keys()) == ["t0", "t1", "t2"]
    assert path.stat().st_blocks * 512 < len(weights) // 4
    found = fetched(scene)
    assert found.pin == seen.pin
    assert found.digest != seen.digest
    if scene.web:
        assert scene.web.sent < 1.2 * len(weights)


def test_an_interrupted_one_goes_on(scene: Scene, tmp_path: Path) -> None:
    class Stops(Silent):
        def advance(self, done: int, total: int, unit: str) -> None:
            if done >= 1 << 20:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetched(scene, progress=Stops())
    if scene.web:
        scene.web.asked.clear()

    snapshot = fetched(scene)

    assert {file.path for file in snapshot.tree.files} == MODEL.keys()
    assert not [*(tmp_path / "store").rglob(".incoming")]
    if scene.web:
        assert [row for row in scene.web.asked if "bytes=" in row and "bytes=0" not in row]


def test_no_secret_is_kept_or_shown(scene: Scene, tmp_path: Path) -> None:
    progress = RecordingProgress()
    snapshot = fetched(scene, progress=progress)
    said = [snapshot.pin, repr(progress.__dict__)]
    try:
        scene.reader.fetch(scene.absent, "", scene.sha256, progress)
    except WeightsmithError as error:
        said += [error.message, error.hint]

    kept = [path.read_bytes() for path in (tmp_path / "store").rglob("*.json") if path.is_file()]

    assert SECRET not in "".join(said)
    assert not any(SECRET.encode() in data for data in kept)
