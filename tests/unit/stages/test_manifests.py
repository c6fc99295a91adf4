"""Rendered manifests against the schemas of those who read them."""

import itertools
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from weightsmith.building.targets import all_targets
from weightsmith.core.errors import UsageError
from weightsmith.core.values import Digest
from weightsmith.recipe.file import check_recipe
from weightsmith.serving.engine import ServedAdapter
from weightsmith.stages.render import render_volume
from weightsmith.steps.served_adapters import adapter_name

from tests.fakes import rendering
from tests.paths import ROOT

# What our documents use of serving.kserve.io/v1beta1 and v1alpha2, KServe at aaac4e29 (August
# 2026), config/crd/full: names and types, nothing else allowed. Pods are held against Kubernetes.
KSERVE = json.loads(Path(__file__).with_name("kserve.schema.json").read_text("utf-8"))
# InferenceModelRewrite is of its chart, charts/kserve-llmisvc-resources.
# The same of vLLM's production-stack chart at a6c01db0, helm/values.schema.json.
PRODUCTION_STACK = json.loads(
    Path(__file__).with_name("production-stack.schema.json").read_text("utf-8")
)
# The same of llm-d's modelservice chart at 3051935e, values.yaml and templates/.
LLM_D = json.loads(Path(__file__).with_name("llm-d.schema.json").read_text("utf-8"))
# The same of the Prometheus operator at 0ff52b38, KEDA at 756b2de7 and the Gateway API Inference
# Extension 1.0: config/crd.
CLUSTERS = json.loads(Path(__file__).with_name("clusters.schema.json").read_text("utf-8"))
# The oldest and the newest release that are looked after when this is written, and between.
KUBERNETES = ("1.33", "1.35", "1.37")

IMAGE = f"registry.example.com:5000/ml/support:1.0-vllm@{Digest.of(b'image')}"
CASES = {
    "vllm": {"gpu": "nvidia-l40s"},
    "vllm-awq": {"gpu": "nvidia-h100-80gb", "gpu_count": 2},
    "vllm-fp8": {"gpu": "amd-mi300x", "extra": {"override-generation-config": {"top_k": 5}}},
    "vllm-gptq": {"max_model_len": 2048, "max_num_seqs": 2},
    "llamacpp-q4_k_m": {"max_model_len": 2048, "max_num_seqs": 2, "host_memory_bytes": 64 << 30},
    "llamacpp-q8_0": {"gpu": "nvidia-l40s"},
    "tgi": {"gpu": "nvidia-l40s"},
    "sglang": {"gpu": "nvidia-h100-80gb", "gpu_count": 4},
    "trtllm": {"gpu": "nvidia-h100-80gb", "gpu_count": 2},
}


def rendered(target, name="support", image=IMAGE, **wishes):
    own = {**CASES[target], "max_num_seqs": 4, "max_model_len": 4096, **wishes}
    return rendering.rendered(target, name=name, image=image, **own)


@pytest.fixture(params=CASES)
def config(request):
    return rendered(request.param)


def documents(config, name):
    return list(yaml.safe_load_all(config.files[name]))


@pytest.mark.grid(4)
@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_takes_the_deployment_and_its_service(config, version):
    found = documents(config, "kubernetes.yaml")

    assert [document["kind"] for document in found] == ["Deployment", "Service"]
    for document in found:
        kubernetes_validate.validate(document, version, strict=True)


def test_more_manifests_are_for_clusters_that_have_their_kinds():
    wanted = ("pod-monitor", "keda", "inference-pool")
    config = rendered("vllm-awq", max_num_seqs=10, manifests=wanted)
    deployment, _ = documents(config, "kubernetes.yaml")
    pods = deployment["spec"]["selector"]["matchLabels"]
    found = {name: documents(config, f"{name}.yaml")[0] for name in wanted}

    kubernetes_validate.validate(deployment, KUBERNETES[-1], strict=True)
    assert "annotations" not in deployment["spec"]["template"]["metadata"]  # scraped once
    assert "replicas" not in deployment["spec"]  # KEDA's to say
    for document in found.values():
        jsonschema.validate(document, CLUSTERS[document["kind"]])
    for name in ("pod-monitor", "inference-pool"):
        assert found[name]["spec"]["selector"]["matchLabels"] == pods
    assert found["inference-pool"]["spec"]["targetPorts"] == [{"number": config.port}]
    (endpoint,) = found["pod-monitor"]["spec"]["podMetricsEndpoints"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert endpoint["port"] == container["ports"][0]["name"]
    scaled = found["keda"]["spec"]
    assert scaled["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert scaled["triggers"][0]["metadata"]["threshold"] == "8"  # of ten at once


@pytest.mark.parametrize(
    ("target", "name", "why"),
    [
        ("trtllm", "keda", "TensorRT-LLM has no metrics for Prometheus"),
        ("llamacpp-q4_k_m", "inference-pool", "no metrics that an endpoint picker reads"),
    ],
)
def test_a_manifest_that_an_engine_cannot_have_is_refused(target, name, why):
    with pytest.raises(UsageError, match=why):
        rendered(target, manifests=(name,))


def test_the_pod_is_asked_for_what_was_planned(config):
    deployment, ours = documents(config, "kubernetes.yaml")
    template = deployment["spec"]["template"]
    (container,) = template["spec"]["containers"]
    plan = config.plan

    assert container["image"] == IMAGE
    annotations = template["metadata"]["annotations"]
    assert annotations["prometheus.io/scrape"] == "true"
    assert annotations["prometheus.io/port"] == str(config.port)
    assert int(container["resources"]["limits"]["memory"]) == plan.memory_limit_bytes
    gpus = [value for key, value in container["resources"]["limits"].items() if "gpu" in key]
    assert gpus == ([plan.gpus] if plan.gpus else [])
    # NVIDIA's hook, which brings the GPU in, writes to the container's root.
    assert container["securityContext"]["readOnlyRootFilesystem"] is not bool(plan.gpus)
    compose = documents(config, "compose.yaml")[0]["services"]["model"]
    assert compose["read_only"] is True
    assert ("deploy" in compose) == any("nvidia" in key for key in container["resources"]["limits"])
    probe = container["startupProbe"]
    assert probe["failureThreshold"] * probe["periodSeconds"] >= 600
    assert template["spec"]["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert "/tmp" in mounted
    assert ("/dev/shm" in mounted) == (plan.shm_bytes > 0)
    assert ours["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]


def test_kserve_takes_its_documents(config):
    found = documents(config, "kserve.yaml")

    assert found[0]["kind"] == "InferenceService"
    for document in found:
        jsonschema.validate(document, KSERVE[document["kind"]])
    predictor = found[0]["spec"]["predictor"]
    own = {"minReplicas", "deploymentStrategy"}
    pod = {key: value for key, value in predictor.items() if key not in own}
    as_pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod}
    kubernetes_validate.validate(as_pod, "1.35", strict=True)
    assert pod["containers"][0]["name"] == "kserve-container"


def lora_service(*uris):
    """The LLMInferenceService of two adapters, and the words of its server."""
    adapters = tuple(
        ServedAdapter(name=f"a{n}", folder=f"adapters/a{n}", rank=16, uri=uri)
        for n, uri in enumerate(uris)
    )
    made = rendering.rendered("vllm-awq-lora", image=IMAGE, gpu="nvidia-l40s", max_model_len=4096,
                              max_num_seqs=4, adapters=adapters)  # fmt: skip
    _, service = documents(made, "kserve.yaml")
    jsonschema.validate(service, KSERVE["LLMInferenceService"])
    (container,) = service["spec"]["template"]["containers"]
    text = {entry["name"]: entry["value"] for entry in container["env"]}["VLLM_ADDITIONAL_ARGS"]
    return service["spec"]["model"], shlex.split(text)


def test_kserve_gets_adapters_of_a_hub_in_its_own_field():
    uris = [f"hf://acme/a{n}:{n:040}" for n in range(2)]
    model, words = lora_service(*uris)

    rows = [{"name": f"a{n}", "uri": uri} for n, uri in enumerate(uris)]
    assert model["lora"] == {"adapters": rows, "maxRank": 16, "maxAdapters": 2}
    assert not [word for word in words if "lora" in word]  # else the controller skips its own


def test_adapters_of_a_folder_are_named_where_they_lie_in_the_image():
    """KServe takes no oci:// for them."""
    model, words = lora_service("hf://acme/a0:1", "")

    assert "lora" not in model
    at = words.index("--lora-modules")
    assert words[at + 1 :] == [f"a{n}=/mnt/models/adapters/a{n}" for n in range(2)]


def test_the_rollout_of_the_page_is_what_llm_ds_router_reads():
    page = (ROOT / "docs" / "how-to" / "roll-out-an-adapter.md").read_text("utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    recipe, rewrite = map(yaml.safe_load, blocks)

    jsonschema.validate(rewrite, KSERVE["InferenceModelRewrite"])
    names = [adapter_name(row["source"], row["version"]) for row in recipe["adapters"]]
    (rule,) = rewrite["spec"]["rules"]
    assert [one["modelRewrite"] for one in rule["targets"]] == names
    assert rewrite["spec"]["poolRef"]["name"] == f"{recipe['name']}-llm-inference-pool"
    assert check_recipe(recipe, "the page").targets == ("vllm-awq-lora",)


def expanded(text):
    """What Kubernetes makes of a value without variables (third_party/forked/golang/expansion)."""
    return re.sub(r"\$(\$|\(\w+\))", lambda m: "$" if m[1] == "$" else "", text)


def test_dollar_signs_reach_the_server(tmp_path):
    text = "a $$ b $(x) $$(y) $"
    wishes = {"served_model_name": text, "max_model_len": 2048, "max_num_seqs": 2}
    config = rendered("llamacpp-q4_k_m", **wishes)
    engine = all_targets()[config.target].engine
    given = {"volume": VOLUME, "engine_image": ENGINE, "merged": True}
    found = render_volume(config, engine, "support", "1.0.0", **given)
    deployment = next(yaml.safe_load_all(found["kubernetes.yaml"]))
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    values = {entry["name"]: entry.get("value", "") for entry in container["env"]}
    assert expanded(values["LLAMA_ARG_ALIAS"]) == text

    config = rendered("vllm", extra={"override-generation-config": {"a": text}})
    found = render_volume(config, all_targets()["vllm"].engine, "support", "1.0.0", **given)
    (values,) = yaml.safe_load_all(found["llm-d-values.yaml"])
    (container,) = values["decode"]["containers"]
    words = [expanded(word) for word in container["args"]]
    assert json.loads(words[words.index("--override-generation-config") + 1]) == {"a": text}


@pytest.mark.parametrize("name", ["a" * 100, "model-" + "b" * 33 + "-3.1-8b-instruct-support-v2"])
def test_a_long_name_leaves_room_for_what_controllers_add(name):
    """KServe's Service is NAME-predictor, and its host name has the namespace as well."""
    config = rendered("vllm", name=name)
    label = r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?"
    for document in documents(config, "kserve.yaml"):
        assert re.fullmatch(label, f"{document['metadata']['name']}-predictor-default")
    (values,) = documents(config, "production-stack.yaml")
    (model,) = values["servingEngineSpec"]["modelSpec"]
    assert re.fullmatch(label, model["name"])  # the chart makes a label of it
    assert len(model["name"]) <= 40


@pytest.mark.parametrize(
    ("target", "wishes", "seconds"),
    [
        ("vllm", {}, 5),
        ("vllm-gptq", {}, 5),
        ("llamacpp-q4_k_m", {}, 5),
        # Upstream's server, which loses what is running.
        ("llamacpp-q4_k_m", {"gpu": "nvidia-l4"}, 50),
    ],
)
def test_requests_may_end_wherever_the_image_is_stopped(target, wishes, seconds):
    config = rendered(target, **wishes)
    (deployment, _) = documents(config, "kubernetes.yaml")
    pod = deployment["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 60
    (container,) = pod["containers"]
    assert container["lifecycle"] == {"preStop": {"sleep": {"seconds": seconds}}}
    (compose,) = documents(config, "compose.yaml")
    assert compose["services"]["model"]["stop_grace_period"] == "60s"
    assert "docker run --rm --stop-timeout 60 " in config.files["README.md"]
    if target.startswith("vllm"):
        (settings,) = documents(config, "vllm.yaml")
        assert settings["shutdown-timeout"] + seconds < 60


@pytest.mark.parametrize(
    ("target", "flags"),
    [
        ("vllm", {"--gpus": "all"}),
        ("vllm-awq", {"--gpus": "all", "--shm-size": "2147483648"}),
        ("vllm-fp8", {"--device": "/dev/dri"}),  # the last of two; an MI300X
        ("vllm-gptq", {"--shm-size": "268435456"}),
        ("llamacpp-q4_k_m", {}),
    ],
)
def test_the_readme_starts_the_image_on_its_device(target, flags):
    config = rendered(target)
    (line,) = (row for row in config.files["README.md"].splitlines() if "docker run --rm" in row)
    words = shlex.split(line)
    found = dict(itertools.pairwise(words))
    assert {key: found[key] for key in found if key.startswith("--") and key not in
            ("--rm", "--publish", "--stop-timeout")} == flags  # fmt: skip
    assert words[-1] == IMAGE
    assert ("/dev/kfd" in words) == ("--device" in flags)


def test_kserves_own_vllm_gets_the_plan_as_words_of_a_shell():
    config = rendered("vllm-fp8", extra={"override-generation-config": {"a": "$(x) 'y'"}})
    _, service = documents(config, "kserve.yaml")
    (container,) = service["spec"]["template"]["containers"]
    text = {entry["name"]: entry["value"] for entry in container["env"]}["VLLM_ADDITIONAL_ARGS"]

    words = shlex.split(expanded(text))
    assert words[words.index("--max-model-len") + 1] == "4096"
    assert json.loads(words[words.index("--override-generation-config") + 1]) == {"a": "$(x) 'y'"}
    assert service["spec"]["model"] == {"uri": f"oci://{IMAGE}", "name": "support"}


@pytest.mark.parametrize("target", ["vllm", "vllm-awq", "vllm-fp8"])
def test_production_stack_takes_its_values(target):
    config = rendered(target)
    (values,) = documents(config, "production-stack.yaml")
    (model,) = values["servingEngineSpec"]["modelSpec"]

    jsonschema.validate(values, PRODUCTION_STACK)
    assert f"{model['repository']}:{model['tag']}" == IMAGE
    assert model["requestGPU"] == config.plan.gpus
    # The chart turns prefix caching off where nothing is said.
    assert model["vllmConfig"]["enablePrefixCaching"] is True


def test_only_vllm_has_values_for_vllms_chart(config):
    for places in (config.files, config.files["README.md"]):
        assert ("production-stack.yaml" in places) == config.target.startswith("vllm")


VOLUME = f"registry.example.com:5000/ml/support:1.0-vllm-volume@{Digest.of(b'weights')}"
ENGINE = f"registry.example.com:5000/engines/stock@{Digest.of(b'engine')}"


@pytest.fixture
def beside(config):
    """A target's manifests of an image of weights, parsed, by file name."""
    engine = all_targets()[config.target].engine
    found = render_volume(
        config, engine, "support", "1.0.0", volume=VOLUME, engine_image=ENGINE, merged=True
    )
    return {name: list(yaml.safe_load_all(text)) for name, text in found.items()}


@pytest.mark.grid(4)
@pytest.mark.parametrize("version", ["1.33", "1.35", "1.37"])
def test_kubernetes_takes_weights_beside_an_engine(config, beside, version):
    *settings, deployment, service = beside["kubernetes.yaml"]
    for document in (*settings, deployment, service):
        kubernetes_validate.validate(document, version, strict=True)

    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == ENGINE
    assert container["command"] == [*config.entrypoint, *config.command]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["weights"]["image"] == {"reference": VOLUME, "pullPolicy": "IfNotPresent"}
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts["/models"] == {
        "name": "weights", "mountPath": "/models", "subPath": "models", "readOnly": True,
    }  # fmt: skip
    names = [entry["name"] for entry in container["env"]]
    assert len(names) == len(set(names))
    # Every file that the command names is there, with the same text as in the image.
    for path in (word for word in config.command if word in config.image_files):
        (document,) = settings
        assert document["data"][mounts[path]["subPath"]] == config.image_files[path]
        assert volumes["settings"]["configMap"]["name"] == document["metadata"]["name"]


def test_kserve_mounts_weights_beside_an_engine(config, beside):
    *_, service = beside["inferenceservice.yaml"]
    jsonschema.validate(service, KSERVE["InferenceService"])
    predictor = service["spec"]["predictor"]
    assert predictor["storageUris"] == [{"uri": f"oci+native://{VOLUME}", "mountPath": "/models"}]
    (container,) = predictor["containers"]
    assert "/models" not in [mount["mountPath"] for mount in container["volumeMounts"]]


def test_vllms_weights_have_two_more_manifests(config, beside):
    more = {"llminferenceservice.yaml", "llm-d-values.yaml"}
    expected = config.target.startswith("vllm") and config.plan.gpus > 0
    assert more & beside.keys() == (more if expected else set())
    if not expected:
        return
    (service,) = beside["llminferenceservice.yaml"]
    jsonschema.validate(service, KSERVE["LLMInferenceService"])
    assert service["spec"]["model"] == {"uri": f"oci+native://{VOLUME}", "name": "support"}
    (values,) = beside["llm-d-values.yaml"]
    jsonschema.validate(values, LLM_D)
    (container,) = values["decode"]["containers"]
    assert values["modelArtifacts"]["uri"] == f"oci://{VOLUME}"
    # The chart mounts the whole image there, and the model is in its folder models.
    assert container["args"][0] == f"{values['modelArtifacts']['mountPath']}/models"
    words = container["args"]
    assert words[words.index("--max-model-len") + 1] == str(config.plan.max_model_len)
    assert values["decode"]["parallelism"]["tensor"] == config.plan.gpus


def compose():
    """The command, or None."""
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    if not shutil.which("docker"):
        return None
    probe = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    return ["docker", "compose"] if probe.returncode == 0 else None


@pytest.mark.skipif(compose() is None, reason="docker compose is not installed")
def test_compose_takes_its_file(config, tmp_path):
    path = tmp_path / "compose.yaml"
    path.write_text(config.files["compose.yaml"])
    command = [*(compose() or []), "--file", str(path), "config", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    service = json.loads(done.stdout)["services"]["model"]
    assert service["image"] == IMAGE


@pytest.mark.grid(4)
@pytest.mark.parametrize(
    "name",
    ['a: b"', "back\\slash", "#x", "${HOME} $$ $(x)", "{{ name }} - [x] {y}", "ümläut 🦙",
     "'; rm -rf / #"],
)  # fmt: skip
@pytest.mark.parametrize("target", CASES)
def test_no_name_breaks_a_manifest(target, name):
    image = f"example.com/{name}"
    config = rendered(target, name=name, image=image)

    for file in (name for name in config.files if name.endswith(".yaml")):
        assert documents(config, file)
    deployment, service = documents(config, "kubernetes.yaml")
    for document in (deployment, service):
        kubernetes_validate.validate(document, "1.35", strict=True)
    assert deployment["spec"]["template"]["spec"]["containers"][0]["image"] == image
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", deployment["metadata"]["name"])
    # Compose itself reads `$$` as one dollar sign.
    (compose,) = documents(config, "compose.yaml")
    assert compose["services"]["model"]["image"].replace("$$", "$") == image


def test_the_readme_says_how_to_ask(config):
    line = next(row for row in config.files["README.md"].splitlines() if "--data" in row)
    body = json.loads(shlex.split(line.strip())[1])

    assert body["model"] == config.served_name
    assert f"127.0.0.1:{config.port}" in config.files["README.md"]


def uncommented(text):
    """Switch on what a comment that begins with `Off:` offers, and what belongs to it."""
    offers = r"^( *)# (- [{n.]|  persist|volumes:$|  - [.]|serving[.])"
    return re.sub(offers, r"\1\2", text, flags=re.MULTILINE)


def test_the_cache_of_compiled_code_can_be_switched_on():
    config = rendered("vllm")
    before = documents(config, "kubernetes.yaml")[0]["spec"]["template"]["spec"]
    text = uncommented(config.files["kubernetes.yaml"])
    deployment = next(yaml.safe_load_all(text))
    pod = deployment["spec"]["template"]["spec"]
    mounts = pod["containers"][0]["volumeMounts"]
    places = {mount["mountPath"] for mount in mounts if mount["name"] == "compiled"}
    names = ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")

    assert places == {config.env[name] for name in names}
    claim = {"claimName": "support-compiled"}
    assert {"name": "compiled", "persistentVolumeClaim": claim} in pod["volumes"]
    assert "compiled" not in json.dumps(before)
    for version in KUBERNETES:
        kubernetes_validate.validate(deployment, version, strict=True)
    compose = yaml.safe_load(uncommented(config.files["compose.yaml"]))
    assert {v.split(":")[1] for v in compose["services"]["model"]["volumes"]} == places
    service = next(yaml.safe_load_all(uncommented(config.files["kserve.yaml"])))
    assert service["metadata"]["annotations"]["serving.kserve.io/kernelcache-supported"] == "true"
    assert not any("Off:" in file for file in rendered("llamacpp-q8_0").files.values())
