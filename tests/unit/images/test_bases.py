"""Upstream's base images are pinned where a registry is, and a release needs all of them."""

import json
import subprocess
import sys

from weightsmith.oci.image import ImageConfig, assemble, index_of
from weightsmith.oci.layers import Member, TarLayer
from weightsmith.oci.registry import Registry

from tests.fakes.registry import at, fake_registry
from tests.paths import ROOT

NONE = {"linux/amd64": None, "linux/arm64": None}


def run(*words):
    command = [sys.executable, ROOT / "images" / "bases.py", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def made(platform):
    layer = TarLayer(members=(Member.of_bytes("/etc/os", platform.encode()),), epoch=0)
    return assemble((), [layer], config=ImageConfig(), platform=platform, epoch=0)


def test_digests_are_those_of_each_platform(tmp_path):
    file = tmp_path / "bases.lock"
    both = index_of([made("linux/amd64"), made("linux/arm64")])
    with fake_registry() as fake, Registry(credentials=lambda _: None, insecure=True) as registry:
        registry.push(both, at(fake, "up/engine:1"))
        registry.push(made("linux/amd64"), at(fake, "up/other:2"))
        lock = {
            name: {"digests": NONE, "reference": f"{fake.host}/up/{tag}"}
            for name, tag in (("a", "engine:1"), ("b", "other:2"), ("c", "gone:3"))
        }
        file.write_text(json.dumps(lock))
        asked = run("--lock", file, "--insecure")

    found = {name: entry["digests"] for name, entry in json.loads(file.read_text()).items()}
    assert asked.returncode == 1
    assert "error: c: " in asked.stderr
    assert found["a"] == {image.platform: image.digest for image in both.images}
    assert found["b"] == {"linux/amd64": made("linux/amd64").digest}
    assert found["c"] == NONE


def test_a_release_refuses_what_is_not_pinned(tmp_path):
    file = tmp_path / "bases.lock"
    lock = {"a": {"digests": {"linux/amd64": "sha256:" + "0" * 64}, "reference": "a:1"}}
    file.write_text(json.dumps(lock))
    assert run("--check", "--lock", file).returncode == 0
    lock["b"] = {"digests": NONE, "reference": "b:1"}
    file.write_text(json.dumps(lock))
    checked = run("--check", "--lock", file)
    assert checked.returncode == 1
    assert "b for linux/arm64 has no digest" in checked.stderr
