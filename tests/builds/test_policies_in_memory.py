"""A signed build in memory writes policies: they say of its own statements what they should."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import yaml
from weightsmith.core.ports import Signer
from weightsmith.core.values import Json
from weightsmith.oci.attachments import fallback_tag
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import RegistryLocation
from weightsmith.outside.keyless import TOKEN, open_identity_signer
from weightsmith.provenance import evidence
from weightsmith.provenance.sealing import attach_signed
from weightsmith.provenance.signing import check_of_signer
from weightsmith.provenance.statements import LEVEL, VSA, Statement, image_resource, statement
from weightsmith.provenance.withdrawal import withdrawal
from weightsmith.stages.render import render_policies

from tests.fakes.memory import Memory, new_signer
from tests.fakes.sigstore import ISSUER, WORKFLOW, sigstore, token

TARGET = "llamacpp-q4_k_m"
PASSES = "evaluate.max_drop=0.3"
"""Eight questions show no smaller drop: by itself, the recipe's verdict is *not proven*."""
PROVEN = "image.proven_on=[nvidia-l4]"


def policies(memory: Memory) -> dict[str, Any]:
    """Return what would be applied, by file name."""
    folder = memory.results() / "policies"
    return {path.name: yaml.safe_load(path.read_text()) for path in folder.iterdir()}


def signed(memory: Memory) -> list[Statement]:
    """Return the statements that a cluster finds: signed, and where it looks for them.

    Those of a key are under cosign's tag, those of an identity in bundles.
    """
    assert memory.signer
    place = RegistryLocation(memory.client, Reference.parse(f"{memory.repository}:1.0.0-{TARGET}"))
    digest, check = place.image().digest, check_of_signer(memory.signer)
    attached = evidence.read_attached(place, digest)
    tagged = memory.client.attachment_under(place.reference, fallback_tag(digest, ".att"))
    parts = [*(tagged.parts if tagged else ()), *evidence.bundles_in(attached)]
    read = (evidence.read_statement(part, check) for part in parts)
    return [one for one in read if one.signed]


def kyverno_admits(policy: Json, stated: list[Statement]) -> bool:
    """Evaluate as Kyverno does: each attestation is there, and each of its type holds.

    https://github.com/kyverno/kyverno/blob/main/pkg/engine/internal/imageverifier.go
    """
    (image,) = policy["spec"]["rules"][0]["verifyImages"]
    for wanted in image["attestations"]:
        found = [one.predicate for one in stated if one.predicate_type == wanted["type"]]
        rows = [row for group in wanted["conditions"] for row in group["all"]]
        if not found or not all(_holds(row, one) for one in found for row in rows):
            return False
    return True


def _holds(row: Mapping[str, Any], predicate: Mapping[str, Json]) -> bool:
    (name,) = re.fullmatch(r"\{\{ (\w+) \}\}", row["key"]).groups()  # type: ignore[union-attr]
    if row["operator"] == "Equals":
        return bool(predicate[name] == row["value"])
    assert row["operator"] == "AnyIn"
    return any(one in row["value"] for one in predicate[name])


SCHEMA: dict[str, Any] = {
    "validationActions": [str],
    "failurePolicy": str,
    "webhookConfiguration": {"timeoutSeconds": int},
    "evaluation": {"background": {"enabled": bool}},
    "matchConstraints": {
        "resourceRules": [
            {"apiGroups": [str], "apiVersions": [str], "operations": [str], "resources": [str]}
        ]
    },
    "matchImageReferences": [{"glob": str, "expression": str}],
    "attestors": [
        {
            "name": str,
            "cosign": {
                "key": {"data": str},
                "keyless": {"identities": [{"subject": str, "issuer": str}]},
                "ctlog": {"url": str, "insecureIgnoreTlog": bool, "insecureIgnoreSCT": bool},
            },
        }
    ],
    "attestations": [{"name": str, "intoto": {"type": str}}],
    "validations": [{"expression": str, "message": str}],
}
"""What we use of an ImageValidatingPolicy's `spec`, by version v1 of Kyverno's
config/crds/policies.kyverno.io/policies.kyverno.io_imagevalidatingpolicies.yaml (111e07bb)."""


def fits(value: object, schema: Any) -> bool:
    """Say whether a value has the schema's types and no other keys."""
    if isinstance(schema, type):
        return type(value) is schema
    if isinstance(schema, list):
        return isinstance(value, list) and all(fits(one, schema[0]) for one in value)
    return isinstance(value, dict) and all(
        key in schema and fits(one, schema[key]) for key, one in value.items()
    )


_PODS = "(images.containers + images.initContainers + images.ephemeralContainers)"
_RULE = re.compile(
    re.escape(_PODS) + r"\.filter\(i, (?P<names>\[.*?\])\.exists\(n, i == n \|\|"
    r' i\.startsWith\(n \+ ":"\) \|\| i\.startsWith\(n \+ "@"\)\)\)\.all\(i, (?P<asks>.*)\)'
)
_SIGNED = re.compile(
    r"verifyAttestationSignatures\(i, attestations\.(\w+), \[attestors\.signer\]\) (> 0|== 0)"
)
_SAYS = re.compile(r"extractPayload\(i, attestations\.(\w+)\)\.predicate\.(\w+)(.*)")


def ivpol_admits(policy: Json, stated: list[Statement], *images: str) -> bool:
    """Evaluate as Kyverno's newer kind does: of each type, the last statement in a bundle counts.

    https://github.com/kyverno/kyverno/blob/main/pkg/image/verifiers/ivpol/cosign/verifier.go
    """
    spec = policy["spec"]
    types = {row["name"]: row["intoto"]["type"] for row in spec["attestations"]}
    held = {one.predicate_type: one.predicate for one in stated}
    for rule in spec["validations"]:
        found = _RULE.fullmatch(rule["expression"])
        assert found, rule["expression"]
        names = json.loads(found["names"])
        ours = [i for i in images if any(i == n or i.startswith((f"{n}:", f"{n}@")) for n in names)]
        if ours and not _answers(found["asks"], types, held):
            return False
    return True


def _answers(asks: str, types: Mapping[str, str], held: Mapping[str, Mapping[str, Json]]) -> bool:
    if signed := _SIGNED.fullmatch(asks):
        return (types[signed[1]] in held) == (signed[2] == "> 0")
    says = _SAYS.fullmatch(asks)
    assert says, asks
    value = held[types[says[1]]][says[2]]
    if says[3].startswith(" == "):
        return bool(value == json.loads(says[3].removeprefix(" == ")))
    any_of = re.fullmatch(r"\.exists\(one, one in (\[.*\])\)", says[3])
    assert any_of
    return any(one in json.loads(any_of[1]) for one in value)


def bundled(memory: Memory) -> list[Statement]:
    """Return the signed statements that are in bundles."""
    assert memory.signer
    place = RegistryLocation(memory.client, Reference.parse(f"{memory.repository}:1.0.0-{TARGET}"))
    check = check_of_signer(memory.signer)
    attached = evidence.read_attached(place, place.image().digest)
    read = (evidence.read_statement(part, check) for part in evidence.bundles_in(attached))
    return [one for one in read if one.signed]


def test_kyvernos_newer_kind_admits_what_passed(warm: Memory) -> None:
    """And images of others, but nothing that was withdrawn, or is proven elsewhere."""
    warm.signer = replace(new_signer(), format="bundle")
    warm.build(PROVEN, push=True)
    image = f"{warm.repository}:1.0.0-{TARGET}"
    policy = policies(warm)["kyverno-ivpol.yaml"]
    assert (policy["apiVersion"], policy["kind"]) == (
        "policies.kyverno.io/v1", "ImageValidatingPolicy",
    )  # fmt: skip
    assert fits(policy["spec"], SCHEMA)
    assert {"attestors", "validations"} <= policy["spec"].keys()  # required
    prove(warm, "nvidia-l4")
    assert not ivpol_admits(policy, bundled(warm), image)  # it shows nothing: WARNED

    warm.build(PASSES, PROVEN, push=True, force=True)
    policy = policies(warm)["kyverno-ivpol.yaml"]
    (attestor,) = policy["spec"]["attestors"]
    assert isinstance(warm.signer, Signer)
    assert attestor["cosign"]["key"]["data"] == warm.signer.public.decode().strip()
    assert not ivpol_admits(policy, bundled(warm), image)
    prove(warm, "nvidia-a100-80gb")
    assert not ivpol_admits(policy, bundled(warm), image)
    assert ivpol_admits(policy, [], "registry.example.com/others:1", f"{warm.repository}-2:1")
    assert not ivpol_admits(policy, [], warm.repository)
    prove(warm, "nvidia-l4")
    stated = sorted(bundled(warm), key=lambda one: "l4" in str(one.predicate))
    assert ivpol_admits(policy, stated, image, "other:1")

    place = RegistryLocation(warm.client, Reference.parse(image))
    told = withdrawal(place.image().manifest_blob, "leaks", {})
    attach_signed([told], place.image().manifest_blob, place, warm.signer)
    assert not ivpol_admits(
        policy, sorted(bundled(warm), key=lambda one: "l4" in str(one.predicate)), image
    )


@pytest.mark.parametrize(
    ("repository", "spellings"),
    [
        ("r.example.com/a/b", {"r.example.com/a/b"}),
        ("docker.io/a/b", {"docker.io/a/b", "index.docker.io/a/b", "a/b"}),
        (
            "docker.io/library/b",
            {"docker.io/library/b", "index.docker.io/library/b", "library/b",
             "docker.io/b", "index.docker.io/b", "b"},
        ),
    ],
)  # fmt: skip
def test_every_way_to_write_the_repository_is_held(repository: str, spellings: set[str]) -> None:
    signer = replace(new_signer(), format="both")
    files = render_policies("x", "1", repository=repository, signer=signer, proven_on=())
    policy = yaml.safe_load(files["kyverno-ivpol.yaml"])
    for image in spellings:
        for end in ("", ":1", "@sha256:1"):
            assert not ivpol_admits(policy, [], image + end)
    globs = {row["glob"] for row in policy["spec"]["matchImageReferences"]}
    assert globs == {one + end for one in spellings for end in ("", ":*", "@*")}


def prove(memory: Memory, device: str, result: str = "PASSED") -> None:
    """Attach the summary that `prove` signs on a node."""
    place = RegistryLocation(memory.client, Reference.parse(f"{memory.repository}:1.0.0-{TARGET}"))
    image = place.image().manifest_blob
    said = {"verificationResult": result, "verifiedLevels": [LEVEL, f"{LEVEL}_ON_{device}"]}
    assert memory.signer
    attach_signed([statement([image_resource(image)], VSA, said)], image, place, memory.signer)


def test_what_passed_is_admitted(warm: Memory) -> None:
    """And nothing that passed without showing anything, nor what is unsigned."""
    warm.signer = new_signer()
    warm.build(push=True)
    assert not kyverno_admits(policies(warm)["kyverno.yaml"], signed(warm))
    warm.build(PASSES, push=True, force=True)
    found, stated = policies(warm), signed(warm)
    assert {*found} == {"kyverno.yaml", "sigstore.yaml"}
    assert kyverno_admits(found["kyverno.yaml"], stated)
    assert not kyverno_admits(found["kyverno.yaml"], [])

    assert isinstance(warm.signer, Signer)
    key = warm.signer.public.decode().strip()
    images = [f"{warm.repository}{end}" for end in (":*", "@*")]
    (image,) = found["kyverno.yaml"]["spec"]["rules"][0]["verifyImages"]
    assert image["imageReferences"] == images
    (entry,) = image["attestors"][0]["entries"]
    assert entry["keys"]["publicKeys"] == key
    spec = found["sigstore.yaml"]["spec"]
    assert [row["glob"] for row in spec["images"]] == images
    (authority,) = spec["authorities"]
    assert authority["key"]["data"].strip() == key
    (asked,) = authority["attestations"]
    assert asked["predicateType"] in {one.predicate_type for one in stated}
    assert 'predicate: result: "PASSED"' in asked["policy"]["data"]


def test_only_where_it_is_proven(warm: Memory) -> None:
    warm.signer = new_signer()
    warm.build(PASSES, PROVEN, push=True)
    policy = policies(warm)["kyverno.yaml"]
    assert not kyverno_admits(policy, signed(warm))
    prove(warm, "nvidia-l4")
    assert kyverno_admits(policy, signed(warm))
    prove(warm, "nvidia-a100-80gb")
    assert not kyverno_admits(policy, signed(warm))

    (authority,) = policies(warm)["sigstore.yaml"]["spec"]["authorities"]
    _, asked = authority["attestations"]
    assert asked["predicateType"] == VSA
    # Held against CUE itself once: an open list would be taken for an empty one.
    assert asked["policy"]["data"].splitlines()[-2:] == [
        "predicate: verifiedLevels: _",
        'proven: true & list.Contains(predicate.verifiedLevels, "WEIGHTSMITH_PROVEN_ON_nvidia-l4")',
    ]


def test_another_device_or_other_answers_do_not_prove_it(warm: Memory) -> None:
    warm.signer = new_signer()
    warm.build(PASSES, PROVEN, push=True)
    prove(warm, "nvidia-l4", "FAILED")
    assert not kyverno_admits(policies(warm)["kyverno.yaml"], signed(warm))


def test_what_an_identity_vouches_for(warm: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Policies name it and its provider, and look for bundles."""
    monkeypatch.setenv(TOKEN, token())
    with sigstore() as services:
        warm.signer = open_identity_signer(str(services.write(warm.folder)[1]))
        warm.build(PASSES, PROVEN, push=True)
        found = policies(warm)
        assert not kyverno_admits(found["kyverno.yaml"], signed(warm))
        prove(warm, "nvidia-l4")
        assert kyverno_admits(found["kyverno.yaml"], signed(warm))
        newer = found["kyverno-ivpol.yaml"]
        assert fits(newer["spec"], SCHEMA)
        assert ivpol_admits(newer, signed(warm), f"{warm.repository}:1")
    keyless = newer["spec"]["attestors"][0]["cosign"]["keyless"]
    assert keyless["identities"] == [{"issuer": ISSUER, "subject": WORKFLOW}]
    (image,) = found["kyverno.yaml"]["spec"]["rules"][0]["verifyImages"]
    assert image["type"] == "SigstoreBundle"
    assert "attestors" not in image
    for attestation in image["attestations"]:
        ((entry,),) = (group["entries"] for group in attestation["attestors"])
        assert (entry["keyless"]["subject"], entry["keyless"]["issuer"]) == (WORKFLOW, ISSUER)
    (authority,) = found["sigstore.yaml"]["spec"]["authorities"]
    assert authority["keyless"]["identities"] == [{"issuer": ISSUER, "subject": WORKFLOW}]
    assert authority["signatureFormat"] == "bundle"
    assert "key" not in authority


@pytest.mark.parametrize("signs", [False, True])
def test_no_policies_for_what_a_cluster_cannot_check(warm: Memory, signs: bool) -> None:
    """Without a key, or without a registry."""
    warm.signer = new_signer() if signs else None
    warm.build(push=not signs)
    assert not (warm.results() / "policies").exists()
