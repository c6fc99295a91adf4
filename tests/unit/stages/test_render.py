import json
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from weightsmith.core.errors import UsageError
from weightsmith.core.values import Digest
from weightsmith.quantizers import formats
from weightsmith.serving.engine import ServeOptions
from weightsmith.serving.memory import GIB, MIB, human
from weightsmith.serving.plan import ServingConfig, ServingPlan
from weightsmith.serving.targets import find, targets
from weightsmith.stages.render import render, render_files

from tests.fakes.configs import LLAMA_8B, SMOL, facts

CPU = ServeOptions(max_model_len=2048, max_num_seqs=4, host_memory_bytes=2 * GIB)


def rendered(*, name="support-smol", options=CPU, image="", config=SMOL, weights=105 * MIB):
    return render(
        target=find("llamacpp-q4_k_m", targets(formats().values())),
        name=name,
        version="1.2.0",
        model=facts(config),
        model_file=f"{name}.gguf",
        weight_bytes=weights,
        options=options,
        image=image,
        made_from=(Digest.of(b"artifact"),),
    )


@pytest.mark.parametrize(
    ("name", "image"),
    [("Mein Modell ä", "mein-modell:1.2.0"), ("llama-3.1_8b", "llama-3.1_8b:1.2.0")],
)
def test_images_get_names_that_registries_take(name, image):
    files = rendered(name=name).files

    assert f'image: "{image}"' in files["kubernetes.yaml"]


CASES = {
    "cpu": {"image": f"registry.example.com/ml/support-smol@{Digest.of(b'image')}"},
    "gpu": {
        "name": "support-llama3-8b",
        "config": LLAMA_8B,
        "weights": 4_920_000_000,
        "options": ServeOptions(gpu="nvidia-l4", max_model_len=8192, max_num_seqs=8),
    },
}


@pytest.mark.parametrize("case", CASES)
def test_manifests_are_the_yaml_they_look_like(case):
    config = rendered(**CASES[case])

    service = yaml.safe_load(config.files["compose.yaml"])["services"]["model"]
    deployment, kubernetes_service = yaml.safe_load_all(config.files["kubernetes.yaml"])

    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == service["image"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    # NVIDIA's hook, which brings the GPU in, writes to the container's root.
    assert container["securityContext"]["readOnlyRootFilesystem"] is (case == "cpu")
    assert container["startupProbe"]["failureThreshold"] * 10 >= 600
    assert deployment["spec"]["selector"]["matchLabels"] == kubernetes_service["spec"]["selector"]
    assert service["read_only"] is True
    on_gpu = case == "gpu"
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) is on_gpu
    assert ("deploy" in service) is on_gpu
    assert bool(config.healthcheck) is not on_gpu


def test_the_env_file_is_the_images_environment():
    config = rendered()

    lines = config.files["llamacpp.env"].splitlines()
    pairs = dict(line.split("=", 1) for line in lines if not line.startswith("#"))

    assert pairs == config.env
    assert config.env["LLAMA_ARG_MODEL"] == "/models/support-smol.gguf"
    assert config.image_files["/etc/weightsmith/llamacpp.env"] == config.files["llamacpp.env"]
    assert json.loads(config.image_files["/etc/weightsmith/plan.json"]) == config.plan.portable()


def test_a_cpu_image_holds_nothing_of_the_machine_that_planned_it():
    options = {"max_model_len": 1024, "max_num_seqs": 2}
    small, large = (
        rendered(options=ServeOptions(host_memory_bytes=size << 30, **options)) for size in (4, 400)
    )

    assert small.image_files == large.image_files
    assert small.env == large.env
    assert small.plan.portable() == large.plan.portable()
    assert small.plan.usable_bytes != large.plan.usable_bytes


def test_the_readme_of_a_cpu_image_says_what_runs_within_its_limit():
    """Not what would fit into the memory of the machine that planned it."""
    options = {"max_model_len": 1024, "max_num_seqs": 2}
    small, large = (
        rendered(options=ServeOptions(host_memory_bytes=size << 30, **options)) for size in (4, 400)
    )
    text = large.files["README.md"]

    assert text == small.files["README.md"]
    assert "| cache | 45.0 MiB, 2 requests of full length |" in text
    assert f"| limit for the container, with a tenth more | {human(_limit(large))} |" in text


def _limit(config):
    """Return the memory limit of the Deployment, in bytes."""
    (deployment, *_) = yaml.safe_load_all(config.files["kubernetes.yaml"])
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return int(container["resources"]["limits"]["memory"])


def test_the_plan_has_the_names_that_every_engine_has():
    plan = rendered().plan

    # 30 layers x 3 heads x 256 bytes x 2048 tokens
    assert plan.kv_bytes_per_request == 23040 * 2048
    assert plan.weights_bytes_per_gpu == 105 * MIB
    assert plan.fits is True
    assert plan.nearest is None
    assert plan.max_concurrency >= 4
    assert plan.margin_bytes >= 0


def test_the_same_facts_give_the_same_files():
    assert rendered() == rendered()


def test_without_an_image_the_manifests_name_a_local_one():
    config = rendered()

    assert "support-smol:1.2.0" in config.files["compose.yaml"]


NASTY = [
    "a: b",
    'quo"te',
    "back\\slash",
    "${HOME} $$ $(x)",
    "emoji 🦙 é",
    "- [x] {y}",
    "#comment",
    "'; rm -rf / #",
]


@pytest.mark.parametrize("name", NASTY)
def test_no_name_breaks_out_of_its_place(name):
    config = rendered(name=name, image=f"example.com/{name}")

    deployment, _ = yaml.safe_load_all(config.files["kubernetes.yaml"])
    compose = yaml.safe_load(config.files["compose.yaml"])
    assert deployment["spec"]["template"]["spec"]["containers"][0]["image"] == f"example.com/{name}"
    # Compose itself reads `$$` as one dollar sign.
    assert compose["services"]["model"]["image"].replace("$$", "$") == f"example.com/{name}"
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", deployment["metadata"]["name"])


@pytest.mark.parametrize("name", ["line\nLLAMA_ARG_TOOLS=all", "\u2028", "\x85", "\x7f"])
def test_a_name_with_control_characters_is_refused(name):
    with pytest.raises(UsageError, match="LLAMA_ARG_ALIAS"):
        rendered(name=name)


@pytest.mark.slow
@given(st.text(max_size=40))
def test_any_text_comes_back_from_yaml(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("templates")
    (folder / "x.yaml.j2").write_text("value: {{ value | yaml }}\n")

    (loaded,) = yaml.safe_load_all(render_files((folder,), {"value": text})["x.yaml"])

    assert loaded == {"value": text}


def test_a_variable_that_is_not_there_is_named(tmp_path):
    (tmp_path / "broken.yaml.j2").write_text("x: {{ mistyped }}\n")

    with pytest.raises(UsageError, match=r"broken\.yaml\.j2.*mistyped") as caught:
        render_files((tmp_path,), {"name": "x"})

    assert "name" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{% if %}", r"x\.j2, line 1"),
        ("{% include 'none.j2' %}", r"none\.j2, which does not exist"),
    ],
)
def test_a_template_that_is_none_is_named(tmp_path, text, says):
    (tmp_path / "x.j2").write_text(text)

    with pytest.raises(UsageError, match=says):
        render_files((tmp_path,), {})


def test_an_engines_own_template_hides_the_shared_one(tmp_path):
    for folder in ("own", "shared"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.j2").write_text(folder)

    assert render_files((tmp_path / "own", tmp_path / "shared"), {}) == {"a": "own"}


def test_a_plan_that_leaves_layers_on_the_host_says_that_it_does_not_fit():
    config = rendered(
        config=LLAMA_8B, weights=4_920_000_000, options=ServeOptions(gpu_memory_bytes=4 * GIB)
    )

    assert config.plan.fits is False
    assert "layers fit" in config.plan.notes[0]
    assert config.plan.nearest


@pytest.mark.parametrize("options", [CPU, ServeOptions(gpu_memory_bytes=4 * GIB)])
def test_what_is_written_is_read_back_the_same(options):
    config = rendered(options=options)
    written = json.dumps(config.to_json())

    assert ServingConfig.from_json(json.loads(written)) == config
    assert json.loads(config.files["plan.json"]) == json.loads(written)["plan"]


def test_an_image_has_the_plan_but_for_the_machine():
    plan = rendered().plan
    read = ServingPlan.from_json(json.loads(json.dumps(plan.portable())))

    assert read.portable() == plan.portable()
    assert read.usable_bytes == 0


def test_of_a_plan_that_was_not_made_the_device_is_written():
    plan = ServingPlan(device="gpu")

    assert plan.to_json() == plan.portable() == {"device": "gpu"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_model_len", "8192"),
        ("max_num_seqs", True),
        ("fits", 1),
        ("notes", "one"),
        ("nearest", [1]),
        ("settings", []),
        ("gpu_memory_utilization", "0.9"),
    ],
)
def test_a_plan_with_a_value_of_another_type_is_refused(key, value):
    with pytest.raises(ValueError, match=key):
        ServingPlan.from_json({**rendered().plan.to_json(), key: value})


@pytest.mark.parametrize("change", [{"port": "8080"}, {"env": {"A": 1}}, {"more": 1}, {"plan": []}])
def test_a_damaged_configuration_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        ServingConfig.from_json({**rendered().to_json(), **change})


def test_a_configuration_without_a_key_is_refused():
    written = rendered().to_json()
    del written["env"]

    with pytest.raises(ValueError, match="missing or unknown keys: env"):
        ServingConfig.from_json(written)
