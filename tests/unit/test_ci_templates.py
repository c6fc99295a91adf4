"""The CI templates are YAML, use flags that exist, and their scripts do what they should."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from weightsmith.cli import namespace

from tests.paths import ROOT

CI = ROOT / "examples" / "ci"
ACTION = ROOT / ".github" / "actions" / "build" / "action.yml"
COMPONENT = ROOT / "templates" / "build" / "template.yml"
TEMPLATES = [
    *sorted(path for path in CI.iterdir() if path.suffix in (".yml", ".yaml")),
    ACTION,
    COMPONENT,
]
DIGEST = "sha256:" + "a" * 64
STANDIN = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["SEEN"], "w") as file:
    json.dump(sys.argv[1:], file)
os.makedirs("dist/x/1/t", exist_ok=True)
open("dist/x/1/t/report.md", "w").write("# the report")
print(json.dumps({{"targets": {{"llamacpp-q4_k_m": {{
    "image": "r.example:5000/a/b:1-t", "digest": "{DIGEST}", "verdict": "passed",
    "report": "dist/x/1/t/report.html"}}}}}}))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run scripts in, with programs that only say what they were given."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (
        ("weightsmith", STANDIN),
        ("python3", f'#!/bin/sh\nexec {sys.executable} "$@"\n'),
    ):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(script: str, shell: str = "bash", **env: str) -> None:
    words = [shell, "-eu", "-c", script]
    subprocess.run(words, check=True, env={**os.environ, **env}, capture_output=True)


def seen(place: Path) -> list[str]:
    return json.loads((place / "seen").read_text())


def load(name: str) -> Any:
    return yaml.safe_load((CI / name).read_text("utf-8"))


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_every_flag_exists(path: Path) -> None:
    text = path.read_text("utf-8").replace("\\\n", " ")
    commands = re.findall(r"weightsmith (build|verify|plan)\b([^>|]*)", text)
    assert commands or "component:" in text
    for name, rest in commands:
        known = {
            f"--{key.replace('_', '-')}"
            for key in namespace.tasks[name].body.__signature__.parameters
        }
        assert set(re.findall(r"--[a-z-]+", rest)) <= known


def check_schema(file: Path, schema: str) -> None:
    """Without the grammars of IRIs, which take two seconds; neither schema has any."""
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema",
         "--builtin-schema", f"vendor.{schema}", file],
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests/without")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "schema"),
    [
        (CI / "github-actions.yml", "github-workflows"),
        (ACTION, "github-actions"),
        (CI / "gitlab-ci.yml", "gitlab-ci"),
    ],
    ids=("workflow", "action", "gitlab"),
)
def test_the_schemas_of_the_makers(file: Path, schema: str) -> None:
    """GitHub's and GitLab's own schemas, as check-jsonschema brings them along."""
    pytest.importorskip("check_jsonschema")
    check_schema(file, schema)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_nothing_from_outside_is_put_into_a_script(path: Path) -> None:
    documents = list(yaml.safe_load_all(path.read_text()))
    scripts = [value for key, value in walk(documents) if key in
               ("run", "script", "before_script")]  # fmt: skip
    assert scripts or "component:" in path.read_text()
    assert not [s for s in scripts if any(m in str(s) for m in ("${{", "$(params", "$[["))]


def walk(value: Any) -> Any:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from walk(inner)


def settings(words: list[str]) -> dict[str, Any]:
    pairs = [words[n + 1] for n, word in enumerate(words) if word == "--set"]
    return {p.partition("=")[0]: yaml.safe_load(p.partition("=")[2]) for p in pairs}


def test_github(place: Path) -> None:
    steps = {
        step.get("name"): step for step in load("github-actions.yml")["jobs"]["image"]["steps"]
    }
    env = {
        "ADAPTER": "v3",
        "VERSION": "1.10",
        "REPOSITORY": "ghcr.io/A/b",
        "CACHE": "ghcr.io/A/cache",
    }
    branch, tag = "--layout image", "--push --keyless"
    assert branch in (text := steps["build"]["env"]["OUTPUT"])
    assert tag in text
    run(steps["build"]["run"], OUTPUT=branch, **env)
    assert {"--layout", "image"} <= set(seen(place))
    run(steps["build"]["run"], OUTPUT=tag, **env)
    assert {"--push", "--keyless"} <= set(seen(place))
    found = settings(seen(place))
    assert found == {
        "adapters": [{"source": "./adapters/v3", "version": "v3"}],
        "version": "1.10",
        "image.repository": "ghcr.io/a/b",
    }
    assert "oci://ghcr.io/a/cache" in seen(place)
    run(steps["summary"]["run"], GITHUB_STEP_SUMMARY=str(place / "summary"))
    assert (place / "summary").read_text() == "# the report"


def test_the_action(place: Path) -> None:
    action = yaml.safe_load(ACTION.read_text("utf-8"))
    steps = {step["name"]: step for step in action["runs"]["steps"] if "name" in step}
    (place / "bin" / "python").symlink_to("python3")
    given = {**dict.fromkeys(steps["build"]["env"], ""), "RECIPE": "a b.yaml", "PUSH": "true"}
    given["SETTINGS"] = "version=1.10\nimage.repository=r.example/a; false\n"
    env = {"GITHUB_OUTPUT": str(place / "output"), "RUNNER_TEMP": str(place)}
    run(steps["build"]["run"], **given, **env)

    assert seen(place)[:4] == ["build", "--recipe", "a b.yaml", "--push"]
    assert settings(seen(place)) == {"version": 1.1, "image.repository": "r.example/a; false"}
    said = dict(row.split("=", 1) for row in (place / "output").read_text().splitlines())
    assert said.keys() == action["outputs"].keys()
    assert (said["digest"], said["verdict"]) == (DIGEST, "passed")
    run(steps["summary"]["run"], GITHUB_STEP_SUMMARY=str(place / "summary"))
    assert (place / "summary").read_text() == "# the report"


def component(**inputs: Any) -> dict[str, Any]:
    """The component with its inputs, as GitLab writes them: docs.gitlab.com/ci/inputs."""
    header, jobs = yaml.safe_load_all(COMPONENT.read_text("utf-8"))
    declared = header["spec"]["inputs"]
    unknown = inputs.keys() - declared.keys()
    lacking = {name for name, row in declared.items() if "default" not in row} - inputs.keys()
    assert not (unknown | lacking)
    given = {name: row.get("default") for name, row in declared.items()} | inputs
    return interpolated(jobs, {f"$[[ inputs.{name} ]]": v for name, v in given.items()})


def interpolated(value: Any, given: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        pairs = value.items()
        return {interpolated(k, given): interpolated(v, given) for k, v in pairs}
    if isinstance(value, list):
        return [interpolated(one, given) for one in value]
    if not isinstance(value, str):
        return value
    for name, text in given.items():
        value = value.replace(name, str(text).lower() if isinstance(text, bool) else str(text))
    assert "$[[" not in value
    return value


def test_gitlabs_component(place: Path) -> None:
    given = component(image="r.example/weightsmith:1", push=True, job="b", cache="oci://r.example/c",
                      set="version=1.10\nimage.repository=r.example/a; false\n")  # fmt: skip
    (job,) = given.values()
    own = {"CI_REGISTRY": "r.example", "CI_REGISTRY_USER": "u", "CI_REGISTRY_PASSWORD": "p",
           "CI_PROJECT_DIR": str(place)}  # fmt: skip
    variables = {k: v.replace("$CI_PROJECT_DIR", str(place)) for k, v in job["variables"].items()}
    for script in job["script"]:
        run(script, "sh", **own, **variables)

    file = place / ".docker" / "config.json"
    config = json.loads(file.read_text())
    assert config == {"auths": {"r.example": {"auth": "dTpw"}}}
    assert seen(place)[:4] == ["build", "--recipe", "recipe.yaml", "--runner"]
    assert {"--push", "oci://r.example/c"} <= set(seen(place))
    assert settings(seen(place)) == {"version": 1.1, "image.repository": "r.example/a; false"}
    assert not {"--keyless", "--sign-key", "--target"} & set(seen(place))
    assert json.loads((place / "built.json").read_text())["targets"]
    run(job["script"][1], "sh", **variables, SIGNING_KEY="key.pem")
    assert "key.pem" in seen(place)
    file.unlink()
    run(job["script"][0], "sh", **variables, CI_REGISTRY_USER="")  # a project without a registry
    assert not file.exists()


def test_gitlab(place: Path) -> None:
    """The runner expands variables in a job's variables before the shell sees them."""
    whole = load("gitlab-ci.yml")
    inputs = whole["include"][0]["inputs"]
    (job,) = component(**inputs).values()
    own = {"ADAPTER": "v3", "CI_COMMIT_TAG": "1.10", "CI_REGISTRY_IMAGE": "r.example/a",
           "CI_PROJECT_DIR": str(place)}  # fmt: skip
    run(job["script"][1], "sh", **{k: expanded(v, own) for k, v in job["variables"].items()})
    assert set(whole) == {"include", "stages", inputs["job"]}
    assert {"--push", "--keyless", "oci://r.example/a/cache"} <= set(seen(place))
    assert settings(seen(place)) == {
        "adapters": [{"source": "./adapters/v3", "version": "v3"}],
        "version": "1.10",
        "image.repository": "r.example/a/v3",
    }


def expanded(text: str, variables: dict[str, str]) -> str:
    return re.sub(r"\$(\w+)", lambda found: variables[found[1]], text)


@pytest.mark.slow
def test_gitlabs_component_keeps_to_gitlabs_schema(tmp_path: Path) -> None:
    pytest.importorskip("check_jsonschema")
    (tmp_path / ".gitlab-ci.yml").write_text(yaml.safe_dump(component(image="r.example/a:1")))
    check_schema(tmp_path / ".gitlab-ci.yml", "gitlab-ci")


TEKTON = {
    "spec": {"description", "displayName", "params", "results", "sidecars", "stepTemplate", "steps",
             "volumes", "workspaces"},
    "params": {"default", "description", "enum", "name", "properties", "type"},
    "workspaces": {"description", "mountPath", "name", "optional", "readOnly"},
    "results": {"description", "name", "properties", "type", "value"},
    "steps": {"args", "command", "computeResources", "displayName", "env", "envFrom", "image",
              "imagePullPolicy", "name", "onError", "params", "ref", "results", "script",
              "securityContext", "stderrConfig", "stdoutConfig", "timeout", "volumeDevices",
              "volumeMounts", "when", "workingDir", "workspaces"},
    "env": {"name", "value", "valueFrom"},
}  # fmt: skip
"""Fields of tekton.dev/v1, whose webhook refuses every other: config/300-crds/300-task.yaml of
https://github.com/tektoncd/pipeline at 3ee1745."""


def test_tekton_knows_every_field() -> None:
    task = load("tekton-task.yaml")
    assert (task["apiVersion"], task["kind"]) == ("tekton.dev/v1", "Task")
    assert set(task["spec"]) <= TEKTON["spec"]
    for kind, row in ((k, row) for k, rows in walk(task["spec"]) if k in TEKTON for row in rows):
        assert set(row) <= TEKTON[kind], kind


def test_tekton(place: Path) -> None:
    (step,) = load("tekton-task.yaml")["spec"]["steps"]
    env = {row["name"]: "" for row in step["env"]}
    env |= {"RECIPE": "recipe.yaml", "ADAPTER": "./adapters/v3", "REPOSITORY": "r.example/a",
            "TARGET": "llamacpp-q4_k_m", "URL_RESULT": str(place / "url"),
            "DIGEST_RESULT": str(place / "digest")}  # fmt: skip
    run(step["script"], shell="sh", **env)
    assert (place / "digest").read_text() == DIGEST
    assert (place / "url").read_text() == "r.example:5000/a/b:1-t"
    assert settings(seen(place))["adapters"] == [{"source": "./adapters/v3"}]
    assert "--keyless" not in seen(place)
    run(step["script"], shell="sh", SIGSTORE_ID_TOKEN="token", **env)
    assert "--keyless" in seen(place)
    assert shlex.join(seen(place)).startswith("build --recipe recipe.yaml --target llamacpp-q4_k_m")
