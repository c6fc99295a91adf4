import json

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

from tests.fakes.configs import SMOL, facts

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


def test_the_env_file_is_the_images_environment():
    config = rendered()

    lines = config.files["llamacpp.env"].splitlines()
    pairs = dict(line.split("=", 1) for line in lines if not line.startswith("#"))

    assert pairs == config.env
    assert config.env["LLAMA_ARG_MODEL"] == "/models/support-smol.gguf"
    assert config.image_files["/etc/weightsmith/llamacpp.env"] == config.files["llamacpp.env"]
    assert json.loads(config.image_files["/etc/weightsmith/plan.json"]) == config.plan.portable()


def test_a_cpu_image_holds_nothing_of_the_machine_that_planned_it():
    """Its README says what runs within its limit, and not what would fit into that memory."""
    options = {"max_model_len": 1024, "max_num_seqs": 2}
    small, large = (
        rendered(options=ServeOptions(host_memory_bytes=size << 30, **options)) for size in (4, 400)
    )

    assert small.image_files == large.image_files
    assert small.env == large.env
    assert small.plan.portable() == large.plan.portable()
    assert small.plan.usable_bytes != large.plan.usable_bytes
    text = large.files["README.md"]
    assert text == small.files["README.md"]
    assert "| cache | 45.0 MiB, 2 requests of full length |" in text
    (deployment, *_) = yaml.safe_load_all(large.files["kubernetes.yaml"])
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    limit = int(container["resources"]["limits"]["memory"])
    assert f"| limit for the container, with a tenth more | {human(limit)} |" in text


@pytest.mark.parametrize(
    ("name", "image"),
    [("Mein Modell ä", "mein-modell:1.2.0"), ("llama-3.1_8b", "llama-3.1_8b:1.2.0")],
)
def test_images_get_names_that_registries_take(name, image):
    assert f'image: "{image}"' in rendered(name=name).files["kubernetes.yaml"]


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


@pytest.mark.parametrize("options", [CPU, ServeOptions(gpu_memory_bytes=4 * GIB)])
def test_what_is_written_is_read_back_the_same(options):
    config = rendered(options=options)
    assert config.plan.fits
    written = json.dumps(config.to_json())

    assert ServingConfig.from_json(json.loads(written)) == config
    assert json.loads(config.files["plan.json"]) == json.loads(written)["plan"]


def test_an_image_has_the_plan_but_for_the_machine():
    plan, unplanned = rendered().plan, ServingPlan(device="gpu")
    read = ServingPlan.from_json(json.loads(json.dumps(plan.portable())))

    assert read.portable() == plan.portable()
    assert read.usable_bytes == 0
    assert unplanned.to_json() == unplanned.portable() == {"device": "gpu"}


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
    written = rendered().to_json()
    with pytest.raises(ValueError, match=next(iter(change))):
        ServingConfig.from_json({**written, **change})

    del written["env"]
    with pytest.raises(ValueError, match="missing or unknown keys: env"):
        ServingConfig.from_json(written)
