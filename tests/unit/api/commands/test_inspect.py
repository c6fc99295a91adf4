"""What images say of themselves is told, and believed no further."""

from __future__ import annotations

import json

from weightsmith.api.commands.images import inspect_image, inspect_text
from weightsmith.api.commands.verify import table
from weightsmith.core.platforms import host_platform
from weightsmith.core.values import plain
from weightsmith.oci.registry import Registry
from weightsmith.outside.docker import DockerEngine

from tests.fakes.baking import push_base
from tests.fakes.registry import fake_registry

FORGED = "a\x1b[2K\n  ok  signature  signed by you"


def test_labels_that_cannot_be_read_are_reported_as_they_are() -> None:
    said = {
        "target": FORGED,
        "plan": "{",
        "score.base": "high",
        "score.adapter": "nan",
        "score.image": "0.5000 contains n=2",
    }
    own = {f"dev.weightsmith.{key}": text for key, text in said.items()}
    with fake_registry() as fake, Registry(pause=lambda _: None) as client:
        name = f"{fake.host}/odd/labels:1"
        push_base(client, name, own, {"a": b"1"}, platform=host_platform())
        found = inspect_image(name, client, DockerEngine())
    assert found["scores"] == {"image": 0.5}
    assert found["plan"] == {}
    assert found["provenance"] == {k: said[k] for k in said if k != "score.image"}
    assert json.dumps(plain(found), allow_nan=False)
    text = inspect_text(found)
    assert "\x1b" not in text
    assert not [row for row in text.splitlines() if row.startswith("  ok")]


def test_a_plan_that_lacks_what_is_printed_of_it() -> None:
    for plan in ({}, {"device": "cpu"}, {"max_num_seqs": 1, "max_model_len": 2, "device": "cpu"}):
        found = {"reference": "r", "digest": "d", "scores": {}, "provenance": {}, "plan": plan}
        assert ("serves 1 requests" in inspect_text({**found, "layers": []})) == (len(plan) == 3)


def test_a_layers_name_adds_no_row_to_what_was_verified() -> None:
    rows = [{"ok": False, "check": "layer 0", "found": FORGED}]
    (row,) = table({"checks": rows}).splitlines()
    assert row.startswith("  NO  layer 0")
    assert "\x1b" not in row
