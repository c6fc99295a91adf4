"""The house keeps its own rules: imports one way, light start, one file per engine."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.paths import ROOT

PACKAGE = ROOT / "toolchain" / "weightsmith"
PYTHON = sorted(PACKAGE.rglob("*.py"))
HEAVY = {"torch", "transformers", "peft", "docker", "huggingface_hub", "numpy", "httpx", "jinja2"}


def run(*argv: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None):
    return subprocess.run(
        [str(word) for word in argv],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )


@cache
def modules() -> dict[str, tuple[ast.AST, ...]]:
    """Return all nodes of each module, by its path in the package."""
    texts = {path.relative_to(PACKAGE).as_posix(): path.read_text("utf-8") for path in PYTHON}
    return {name: tuple(ast.walk(ast.parse(text))) for name, text in texts.items()}


def dotted(node: ast.expr) -> str:
    """Return the names of `a.b.c`; the first is empty where it is another expression."""
    if isinstance(node, ast.Attribute):  # `ast.unparse` takes a second for all calls
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the house that a test may spoil."""
    for name in ("toolchain", "templates", "images"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "tasks.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


BREACHES = [
    ("stages.bake", "weightsmith.stages.merge", "Stages do not know each other"),
    ("stages.bake", "subprocess", "Only drivers start processes"),
    ("stages.bake", "weightsmith.outside.store", "reached through ports"),
    ("building.checks", "torch", "The control plane is light"),
    ("serving.llamacpp", "jinja2", "Templates are rendered in one place"),
    ("core.values", "weightsmith.recipe.schema", "One direction"),
    ("merging.outputs", "weightsmith.merging.stream", "No circles"),
    ("api.models", "weightsmith.cli.commands", "One direction"),
]
"""Module, what it imports, and the contract that forbids it."""


@pytest.mark.slow
def test_each_contract_bites(copy: Path) -> None:
    package = copy / "toolchain" / "weightsmith"
    (package / "utils.py").touch()
    for name, module, _ in BREACHES:
        with (package / f"{name.replace('.', '/')}.py").open("a") as stream:
            stream.write(f"\nimport {module}\n")

    # Through the interpreter, so that the copy and not the installed package is looked at.
    code = (
        "import sys; sys.path.insert(0, 'toolchain')\n"
        "from importlinter.cli import lint_imports_command; lint_imports_command(['--no-cache'])"
    )
    result = run(sys.executable, "-c", code, cwd=copy)

    assert result.returncode != 0
    told = " ".join(result.stdout.split())
    assert "weightsmith.utils" in told
    for name, module, contract in BREACHES:
        assert re.search(rf"{contract} \S*BROKEN", told), contract
        # Of a circle, it names the import that would have to go.
        circle = ".stream -> .outputs (" if contract == "No circles" else ""
        assert (circle or f"weightsmith.{name} -> {module} (l.") in told


ENGINE = """
from dataclasses import replace
from weightsmith.serving.llamacpp import ENGINE as _LIKE

ENGINE = replace(_LIKE, name="example")
"""

QUANTIZER = """
from dataclasses import replace
from weightsmith.quantizers.gguf import QUANTIZER as _LIKE
from weightsmith.core.values import Format

QUANTIZER = replace(
    _LIKE, name="example", formats=(Format(name="q9_x", kind="gguf", bits_per_weight=9.0),)
)
"""


@pytest.mark.slow
def test_an_engine_and_a_quantizer_are_one_file_each(copy: Path) -> None:
    (copy / "toolchain" / "weightsmith" / "serving" / "example.py").write_text(ENGINE)
    (copy / "templates" / "example").mkdir()
    (copy / "toolchain" / "weightsmith" / "quantizers" / "example.py").write_text(QUANTIZER)

    words = (sys.executable, "-m", "invoke", "targets", "--json")
    result = run(*words, cwd=copy, env={"PYTHONPATH": str(copy / "toolchain")})

    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)["targets"]
    assert {"example-q4_k_m", "llamacpp-q9_x", "example-q9_x"} <= set(found)


def test_listing_commands_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['invoke', '--list']\n"
        "from invoke.main import program\n"
        "try: program.run()\n"
        "except SystemExit: pass\n"
        "print('MODULES', *sys.modules)"
    )
    result = run(sys.executable, "-c", code)
    modules = set(result.stdout.rpartition("MODULES")[2].split())

    assert "build" in result.stdout
    assert not HEAVY & modules
    assert "weightsmith.building" not in modules


def test_the_control_plane_never_imports_torch() -> None:
    code = (
        "import sys, weightsmith.building.build, weightsmith.building.wiring\n"
        "import weightsmith.api.commands.plan\n"
        "import weightsmith.api.commands.merge, weightsmith.api.commands.render\n"
        "import weightsmith.api.commands.evaluate\n"
        "print(sorted({'torch', 'transformers', 'peft', 'ml_dtypes'} & set(sys.modules)))"
    )

    assert run(sys.executable, "-c", code).stdout.strip() == "[]"


def test_nothing_unpickles_or_runs_code_of_a_model() -> None:
    opens = {"pickle", "cPickle", "dill", "joblib", "shelve", "cloudpickle"}
    found = []
    for name, nodes in modules().items():
        for node in nodes:
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            named = {one.partition(".")[0] for one in names}
            called = dotted(node.func) if isinstance(node, ast.Call) else ""
            trusts = isinstance(node, ast.keyword) and node.arg == "trust_remote_code"
            if (
                named & opens
                or called in {"torch.load", "eval", "exec"}
                or (trusts and ast.unparse(node.value) != "False")
            ):
                found.append(f"{name}:{getattr(node, 'lineno', 0)}")

    assert not found


@pytest.mark.parametrize("name", ["builders", "builders/gguf", "engines/vllm-cpu"])
def test_images_that_are_built_end_as_nobody(name: str) -> None:
    path = ROOT / "images" / name / "Containerfile"
    last = path.read_text("utf-8").rpartition("\nFROM ")[2]

    assert re.findall(r"^USER (.*)$", last, re.MULTILINE) == ["65532:65532"]
    assert {file.parent for file in (ROOT / "images").rglob("Containerfile")} == {
        ROOT / "images" / one for one in ("builders", "builders/gguf", "engines/vllm-cpu")
    }


def test_trees_are_walked_and_deleted_in_one_place() -> None:
    # Python's own call themselves for each level: a deep tree of somebody else's ends them.
    recursive = re.compile(r"\b(rmtree|rglob|os\.walk|Path\.walk)\b")
    assert [p.name for p in PYTHON if recursive.search(p.read_text("utf-8"))] == ["trees.py"]


def test_sets_grow_without_being_copied() -> None:
    # `set |= keys` has no operator of its own: it copies the set each time, of 40,000 names, too.
    copying = re.compile(r"\|= [^{]*\.keys\(\)$", re.MULTILINE)
    assert [p.name for p in PYTHON if copying.search(p.read_text("utf-8"))] == []


def test_every_error_says_what_to_do_next() -> None:
    kinds, before = {"WeightsmithError"}, set()
    nodes = [(name, node) for name, found in modules().items() for node in found]
    while kinds != before:  # errors of errors, wherever they are
        before = set(kinds)
        kinds |= {
            node.name
            for _, node in nodes
            if isinstance(node, ast.ClassDef) and {ast.unparse(base) for base in node.bases} & kinds
        }

    def hints(call: ast.Call) -> list[str]:
        return [ast.unparse(word.value) for word in call.keywords if word.arg == "hint"]

    silent = [
        f"{name}:{node.lineno}"
        for name, node in nodes
        if isinstance(node, ast.Call)
        and dotted(node.func).rpartition(".")[2] in kinds
        and hints(node) in ([], ["''"])
    ]

    assert {"TookTooLong", "Altered"} <= kinds
    assert not silent


VALUES = re.compile(
    r"(core/(values|ports|job\w*|merge_options)|steps/tools"
    r"|(recipe|building|steps|stages|serving|provenance|oci|api)/\w+)\.py"
)


def test_what_stages_hand_on_cannot_be_changed() -> None:
    made = [
        (f"{name}: {node.name}", ast.unparse(one))
        for name, nodes in modules().items()
        if VALUES.fullmatch(name)
        for node in nodes
        if isinstance(node, ast.ClassDef)
        for one in node.decorator_list
        if ast.unparse(one).startswith("dataclass")
    ]

    assert len(made) > 100
    assert [name for name, words in made if "frozen=True" not in words] == []


NO_ROOM = {"images"}
"""Folders of tests/unit for what is tested there and is no folder of the package."""


def test_unit_tests_lie_in_the_folder_of_what_they_test() -> None:
    folders = [path for path in (ROOT / "tests" / "unit").rglob("*") if any(path.glob("test_*.py"))]
    names = {path.relative_to(ROOT / "tests" / "unit").as_posix() for path in folders} - NO_ROOM

    assert [name for name in names if not (PACKAGE / name / "__init__.py").is_file()] == []


CONFIG_KEYS = {
    "architectures", "dtype", "head_dim", "hidden_size", "intermediate_size", "is_encoder_decoder",
    "layer_types", "max_position_embeddings", "model_max_length", "num_attention_heads",
    "num_hidden_layers", "num_key_value_heads", "quant_method", "quantization_config",
    "rope_parameters", "rope_scaling", "sliding_window", "text_config", "tie_word_embeddings",
    "tokenizer_class", "torch_dtype", "vision_config", "vocab_size",
}  # fmt: skip
"""Keys of a model's configuration, which `models/facts.py` and what it calls read."""
OWN_WORDS = {"dtype"}
"""Those that are also the names of an engine's options."""
OVERRIDDEN = {("serving/pooling.py", "architectures")}
"""Written into an engine's settings, to override what a configuration says."""


def test_a_models_configuration_is_read_in_one_place() -> None:
    rooms = ("building", "cli", "api", "serving", "stages", "steps")
    found = {
        (name, node.value)
        for name, nodes in modules().items()
        if name.startswith(rooms)
        for node in nodes
        if isinstance(node, ast.Constant) and node.value in CONFIG_KEYS - OWN_WORDS
    }

    assert found == OVERRIDDEN, "ask ModelFacts (models/facts.py), or give it a field"


READS_OUR_OWN = {
    "core/jobs.py", "core/resources.py", "core/safe_parse.py", "merging/families/tuners.py",
    "merging/names.py", "merging/peft_layers.py", "merging/tying.py", "models/facts.py",
    "outside/confinement.py", "outside/docker_images.py", "outside/image_sandbox.py",
    "outside/rootfs.py", "outside/sandbox_launcher.py", "outside/sandbox_probe.py",
    "quantizers/architectures.py", "quantizers/compressor.py", "quantizers/convert.py",
    "quantizers/gguf.py", "quantizers/running.py", "serving/llamacpp_options.py",
    "serving/options.py", "serving/vllm.py", "steps/bases.py", "steps/destinations.py",
}  # fmt: skip
"""Files that read JSON of this very program: its own lists, job files, results; and two that run
inside llama.cpp's converter, which parses the same files."""


def test_a_program_begins_once_all_of_it_is_read() -> None:
    """What stands below `main()` does not exist yet when it runs."""
    early = []
    for name, (tree, *_) in modules().items():
        early += [
            name
            for node in tree.body[:-1]
            if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
        ]

    assert early == []


def test_no_two_classes_have_the_same_name() -> None:
    places = defaultdict(list)
    for name, nodes in modules().items():
        for node in (node for node in nodes if isinstance(node, ast.ClassDef)):
            places[node.name].append(f"{name}:{node.lineno}")

    assert len(places) > 500
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_other_rooms_name_no_stage() -> None:
    """Most names are common words, so this looks only where one means a stage.

    `tests/unit/building/test_graph.py` looks at every word in the rooms that hold the graph.
    """
    own = {
        node.value.value: name
        for name, nodes in modules().items()
        if name.startswith("stages/")
        for node in nodes
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "name"
        if isinstance(node.value, ast.Constant)
    }

    def named(node: ast.AST) -> Iterator[object]:
        if isinstance(node, ast.Constant) and "-" in str(node.value):
            yield node.value
        if isinstance(node, ast.keyword) and node.arg == "stage":
            yield getattr(node.value, "value", None)
        if isinstance(node, ast.Compare) and dotted(node.left).endswith((".stage", "step.name")):
            yield from (getattr(one, "value", None) for one in node.comparators)

    found = {
        f"{name}: {value}"
        for name, nodes in modules().items()
        if name.partition("/")[0] not in ("building", "fleets", "steps", "stages")
        for node in nodes
        for value in named(node)
        if own.get(str(value), name) != name
    }

    assert len(own) > 20
    assert found == {
        "core/jobs.py: cache-scales",  # what the job itself is called
        "evaluating/walks.py: reference",  # whose keys stages and fleets share
    }


def test_what_others_wrote_is_parsed_in_one_place() -> None:
    def parses(node: ast.AST) -> bool:
        text = dotted(node.func) if isinstance(node, ast.Call) else ""
        return text in {"json.load", "json.loads", "yaml.load", "yaml.safe_load"} or (
            text.endswith((".json", "model_validate_json")) and not getattr(node, "args", ())
        )

    found = {name for name, nodes in modules().items() if any(map(parses, nodes))}

    assert found <= READS_OUR_OWN, "use toolchain/weightsmith/core/safe_parse.py, which has limits"


OF_THE_PROGRAM = {
    "core/json_objects.py: types_of", "core/json_objects.py: _fields",
    "core/kernels/library.py: _found", "core/resources.py: _builder_pins",
    "core/resources.py: _engine_pins", "core/small_floats.py: small_float",
    "evaluating/pages.py: _environment", "merging/names.py: _table",
    "oci/connections.py: _trusting", "quantizers/tiled.py: _values",
    "recipe/section.py: _fields_of", "serving/vllm.py: known_options",
    "stages/render.py: _environment",
}  # fmt: skip
"""What is remembered of this very program: its classes, types, files and certificates."""
OF_CONTENT = {
    "evaluating/build_record.py: _parsed", "evaluating/contamination.py: _kept",
    "evaluating/items.py: _read", "evaluating/pictures.py: _look", "merging/names.py: plain_key",
    "models/facts.py: _facts", "quantizers/calibration.py: _texts",
    "steps/served_adapters.py: _require_all_targeted", "steps/served_adapters.py: _require_fit",
    "steps/served_adapters.py: _weights",
}  # fmt: skip
"""Some small results, remembered by the content or the digest that they follow from."""
CHANGED = {
    "core/apart.py: _run": "how this process starts others, said once where it is wired",
    "core/time_limits.py: _now": "what the one job of a worker does at the moment",
    "core/time_limits.py: _tell": "who hears that",
    "core/waiting.py: _KEPT": "locks that every program gets which this process starts",
    "core/waiting.py: _STOP": "of a thread: when its waits end",
    "forward/heads.py: _here": "of a thread: the positions whose logits it wants",
    "forward/native.py: _scratch": "of a thread: memory for packed matrices",
    "forward/threads.py: _own": "of a thread: how many threads its products use",
    "models/tensors.py: _FILLED": "llama.cpp's converter opens files itself, known by their paths",
    "worker/wire.py: _wire": "a process has one standard output",
}
CHANGES = {
    "add", "append", "clear", "discard", "extend", "insert", "pop", "popitem", "remove", "set",
    "setdefault", "update",
}  # fmt: skip


def test_modules_keep_no_state() -> None:
    """What one build leaves behind, the next one in the same process would find."""
    memos, changed = set[str](), set[str]()
    for name, (module, *nodes) in modules().items():
        stored = [getattr(one, "targets", [getattr(one, "target", None)]) for one in module.body]
        bound = {one.id for some in stored for one in some if isinstance(one, ast.Name)}
        for node in nodes:
            target: ast.AST | None = None
            if isinstance(node, ast.FunctionDef):
                made = [getattr(one, "func", one) for one in node.decorator_list]
                kept = {dotted(one).rpartition(".")[2] for one in made} & {"cache", "lru_cache"}
                if kept and ast.unparse(node.args):
                    memos.add(f"{name}: {node.name}")
            elif isinstance(node, ast.Global):
                changed |= {f"{name}: {one}" for one in node.names}
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                target = node.func.value if node.func.attr in CHANGES else None
            elif isinstance(node, ast.Attribute | ast.Subscript):
                target = node.value if isinstance(node.ctx, ast.Store | ast.Del) else None
            if isinstance(target, ast.Name) and target.id in bound:
                changed.add(f"{name}: {target.id}")

    assert memos == OF_THE_PROGRAM | OF_CONTENT
    assert changed == CHANGED.keys()
