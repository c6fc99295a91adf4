"""The recipe: faults are named with the nearest right spelling, the schema is what is checked."""

import json

import jsonschema
import pytest
import yaml
from weightsmith.core.errors import UsageError
from weightsmith.recipe.file import check_recipe, read_recipe, with_settings

from tests.paths import ROOT

EXAMPLES = sorted(ROOT.glob("examples/*/recipe*.yaml"))
SMALLEST = {"name": "bot", "base": {"source": "./base"}}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_examples_pass_the_published_schema(path):
    schema = json.loads((ROOT / "docs/reference/recipe.schema.json").read_text())
    jsonschema.validate(yaml.safe_load(path.read_text()), schema)

    assert read_recipe(path).recipe.targets
    assert path.read_text().startswith("# yaml-language-server: $schema=")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adaptors": []}, "unknown key `adaptors`, did you mean `adapters`"),
        ({"merge": {"presicion": "exact"}}, "did you mean `precision`"),
        (
            {"adapters": [{"source": "a", "wieght": 2}]},
            "`adapters.0.wieght`, did you mean `weight`",
        ),
        ({"name": "Not A Name"}, "`name`"),
        ({"serve": {"max_model_len": 0}}, "`serve.max_model_len"),
        ({"base": {}}, "`base.source` is missing"),
        ({"merge": {"method": "soup"}}, "`merge.method`"),
        ({"adapters": [{"source": "a", "weight": float("nan")}]}, "`adapters.0.weight`"),
        ({"merge": {"densty": 0.5}}, "unknown key `merge.densty`, did you mean `density`"),
        (
            {"quality": {"limits": {"q4_k_m": {"kl_men": 1}}}},
            "`quality.limits.q4_k_m.kl_men`, did you mean `kl_mean`",
        ),
        ({"targets": "vllm"}, "`targets`: expected a list"),
        ({"base": "./base"}, "`base`: expected keys below it, such as source"),
        ({"adapters": ["./a"]}, "`adapters.0`: expected keys below it, such as source"),
        ({"serve": None}, "`serve`: expected keys below it, such as gpu"),
        ({"merge": "ties"}, "`merge`: expected keys below it, such as method"),
        ({"image": {"labels": ["x"]}}, "`image.labels`: expected names with a value each"),
        ({"image": {"labels": {"int": []}}}, "`image.labels.int`: input should be"),
        ({"int": 1}, "unknown key `int`"),
        (
            {"quantize": {"size": "-1"}},
            "'-1' is not in the expected form, such as `8GB`",
        ),
        ({"serve": {"gpu_memory": "nan"}}, "'nan' is not in the expected form, such as `24GiB`"),
        (
            {"auto": {"engine": "vllm", "at_most": "1e9"}},
            "'1e9' is not in the expected form, such as `6GB`",
        ),
        ({"serve": {"max_num_seqs": 0}}, "`serve.max_num_seqs`: must be at least 1"),
        ({"serve": {"gpu_memory_utilization": 0}}, "_utilization`: must be above 0 and at most 1"),
        ({"serve": {"gpu_memory_utilization": 90}}, "_utilization`: must be above 0 and at most"),
        ({"serve": {"max_num_seqs": 1.5}}, ".yaml: `serve.max_num_seqs`: expected a whole number"),
        ({"bench": {"max_ttft_ms": 5}}, "`bench.max_ttft_ms`, did you mean `max_ttft_p95_ms`"),
        ({"bench": {"max_ttft_p95_ms": 0}}, "`bench.max_ttft_p95_ms`"),
        ({"bench": {"max_itl_p95_ms": float("inf")}}, "`bench.max_itl_p95_ms`"),
        ({"bench": {"min_tokens_per_s": -1}}, "`bench.min_tokens_per_s`"),
        ({"bench": {"concurrency": 0}}, "`bench.concurrency`"),
        ({"bench": {"goodput": 1.5, "max_itl_p95_ms": 5}}, "`bench.goodput`"),
        ({"bench": {"goodput": 0.9}}, "`bench`: `goodput` is the share of requests that meet"),
        ({"bench": {"device": "NVIDIA GPU"}}, "`bench`: device 'NVIDIA GPU' tells no device from"),
        ({"bench": "fast"}, "`bench`: expected keys below it"),
        ({"quality": {"gate": "x"}}, ".yaml: `quality.gate`: expected true, false or 'measure'"),
        ({"serve": {"dtype": "bf16"}}, "`serve.dtype`: unknown 'bf16', did you mean `bfloat16`?"),
        (
            {"evaluate": {"data": "x", "metric": "Contain"}},
            "`evaluate.metric`: unknown 'Contain', did you mean `contains`?",
        ),
        ({"evaluate": {"data": "x", "metric": "zzz"}}, "`evaluate.metric`: input should be"),
        ({"evaluate": []}, "`evaluate`: an empty list asks nothing: name a suite, or leave the"),
        (
            {"evaluate": {"data": "x", "tolerance": "2%"}},
            "`evaluate`: `tolerance` is for metric `numeric`, and the metric is `contains`",
        ),
        (
            {"evaluate": {"data": "x", "recall_at": 5}},
            "`evaluate`: `recall_at` is for metric `embedding`, and the metric is `contains`",
        ),
        ({"image": {"labels": {"a b": "c"}}}, "`image.labels`: 'a b' is no label's name"),
        ({"image": {"labels": {"": "c"}}}, "'' is no label's name"),
        ({"image": {"labels": {"a=b": "c"}}}, "'a=b' is no label's name"),
        ({"image": {"proven_on": [""]}}, "`image.proven_on`: an empty text is no node type"),
        ({"image": {"proven_on": [" "]}}, "`image.proven_on`: an empty text is no node type"),
    ],
)
def test_faults_are_named(change, message):
    with pytest.raises(UsageError) as caught:
        check_recipe(SMALLEST | change, "recipe.yaml")

    assert message in caught.value.message
    assert caught.value.hint


def test_bench_may_be_left_out_null_or_empty():
    """Null is nothing; an empty one measures, without a limit."""
    without = check_recipe(SMALLEST, "here")

    assert check_recipe(SMALLEST | {"bench": None}, "here") == without
    assert "bench" not in without.model_dump(mode="json", exclude_defaults=True)
    found = check_recipe(SMALLEST | {"bench": {}}, "here").bench
    assert found
    assert found.limits == {}


def test_settings_override_and_leave_the_original_alone():
    data = {"serve": {"gpu": "x"}}
    changed = with_settings(
        data, ["serve.max_model_len=4096", "serve.extra.flash-attn=on", "a=1.5"]
    )

    assert changed == {
        "serve": {"gpu": "x", "max_model_len": 4096, "extra": {"flash-attn": True}},
        "a": 1.5,
    }
    assert data == {"serve": {"gpu": "x"}}


@pytest.mark.parametrize(
    "text",
    ["1.20", "2026-11-28", "0123", "1_000", "12:30", "1e5", "yes", "null", "a #b", "[x]",
     "{a: b}", ""],
)  # fmt: skip
def test_what_the_recipe_has_as_text_is_set_as_it_stands(text):
    """YAML would make a number, a date, a truth or a list of it, and cut a comment off."""
    settings = [f"image.labels.team={text}", f"base.revision={text}", f"adapters.0.run_id={text}"]
    data = SMALLEST | {"adapters": [{"source": "a"}]}
    recipe = check_recipe(with_settings(data, settings), "here")

    assert recipe.image.labels == {"team": text}
    assert recipe.base.revision == recipe.adapters[0].run_id == text
    quoted = with_settings(SMALLEST, ['version="1.2"', "base.license='a: b'"])
    assert (quoted["version"], quoted["base"]["license"]) == ("1.2", "a: b")


def test_a_label_is_set_by_its_name_which_has_dots():
    settings = ["image.labels.org.opencontainers.image.revision=0f3e", "image.labels.team=x"]
    settings += ["quantize.tensor_types.blk.0.attn_v=q8_0", "quality.limits.q8_0.top1=0.5"]
    recipe = check_recipe(with_settings(SMALLEST, settings), "here")

    assert recipe.image.labels == {"org.opencontainers.image.revision": "0f3e", "team": "x"}
    assert recipe.quantize.tensor_types == {"blk.0.attn_v": "q8_0"}
    assert recipe.quality.limits["q8_0"].top1 == 0.5


def test_keys_that_are_shared_in_the_file(tmp_path):
    """YAML's merge key: what stands beside it wins, as its specification says."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: bot\nbase: {source: ./base}\nadapters:\n"
        "  - &first {source: ./a, weight: 0.5, version: v1}\n"
        "  - {<<: *first, source: ./b}\n  - <<: [*first]\n    version: v3\n"
    )
    rows = read_recipe(path).recipe.adapters

    assert [(row.source, row.weight, row.version) for row in rows] == [
        ("./a", 0.5, "v1"), ("./b", 0.5, "v1"), ("./a", 0.5, "v3"),
    ]  # fmt: skip


def test_keys_that_the_mapping_around_them_shares(tmp_path):
    """A mapping is looked at as it is written, whatever was merged into it before."""
    path = tmp_path / "recipe.yaml"
    path.write_text("base: &one {<<: &any {source: ./a}, source: ./b}\n<<: [{name: x}, *one]\n")
    with pytest.raises(UsageError, match="unknown key `source`"):
        read_recipe(path)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("base: {source: a, source: b}", "'source'"),
        ("base: {<<: {source: a, source: b}}", "'source'"),
        ("base: {<<: {source: a}, <<: {source: b}}", "'<<'"),
        ("image: {labels: {1: a, 1: b}}", "1"),
    ],
)
def test_a_key_that_is_there_twice(tmp_path, text, key):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"name: bot\n{text}\n")
    with pytest.raises(UsageError, match=f"line 2, column .*duplicate key {key}"):
        read_recipe(path)


@pytest.mark.parametrize(("version", "kind"), [("1.2", "a number"), ("on", "true or false")])
def test_a_version_that_yaml_does_not_read_as_text(tmp_path, version, kind):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"name: bot\nversion: {version}\nbase: {{source: ./base}}\n")

    with pytest.raises(UsageError, match=f"`version`.* as {kind}; write it in quotes"):
        read_recipe(path)


def test_a_date_is_text_as_it_stands(tmp_path):
    """Not a type of its own, which no engine and no label could hold."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: bot\nversion: 2026-11-28\nbase: {source: ./base}\n"
        "serve: {extra: {since: 2026-11-28 12:00:00, sign: =}}\n"
    )
    recipe = read_recipe(path, ["serve.extra.until=2026-12-01"]).recipe

    assert recipe.version == "2026-11-28"
    assert recipe.serve.extra == {
        "since": "2026-11-28 12:00:00", "sign": "=", "until": "2026-12-01",
    }  # fmt: skip


PATHS = {
    "base.source": "./x",
    "adapters": "[{source: ./x, evaluate: {data: ./x, training: ./x}}]",
    "evaluate": "{data: ./x}",
    "evaluate.training": "x",
    "calibration.data": "./x",
    "validate.probes": "../here/x",
    "quantize.imatrix": "x",
    "image.base": "oci:x",
}
"""Settings that name `x` of the current folder."""


def test_paths_of_a_setting_are_the_callers_and_those_of_the_file_its_own(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = tmp_path / "there" / "recipe.yaml"
    path.write_text(
        "name: bot\nbase: {source: ./x}\nevaluate: {data: x}\nimage: {base: 'oci:x:name'}\n"
    )
    whole = read_recipe(path, [f"{key}={value}" for key, value in PATHS.items()])
    recipe, (adapter,) = whole.recipe, whole.recipe.adapters
    assert recipe.calibration
    found = [
        recipe.base.source, adapter.source, adapter.evaluate[0].data, adapter.evaluate[0].training,
        recipe.evaluate[0].data, recipe.evaluate[0].training, recipe.calibration.data,
        recipe.validation.probes, recipe.quantize.imatrix, recipe.image.base.removeprefix("oci:"),
    ]  # fmt: skip
    assert {(whole.folder / name).resolve() for name in found} == {tmp_path / "here" / "x"}

    own = read_recipe(path)
    assert own.folder / own.recipe.evaluate[0].data == tmp_path / "there" / "x"
    assert own.recipe.base.source == "./x"  # as the lock names it
    assert own.recipe.image.base == f"oci:{tmp_path}/there/x:name"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("base.source=hf://a/b", "hf://a/b"),
        ("quantize.imatrix=walk", "walk"),
        ("image.base=registry.example.com/engine:1", "registry.example.com/engine:1"),
        ("image.base=engine:llamacpp", "engine:llamacpp"),
        ("adapters.0.source=hf://a/c", "hf://a/c"),
        ("base.license=mit", "mit"),
    ],
)
def test_what_is_no_path_stays(setting, value):
    data = with_settings(SMALLEST | {"adapters": [{"source": "./a"}]}, [setting])
    for key in setting.split("=")[0].split("."):
        data = data[int(key) if key.isdecimal() else key]
    assert data == value


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("serve.extra={a: 1, a: 2}", r" serve\.extra: not valid YAML: line 1"),
        ("serve.extra={a: [1}", r" serve\.extra: not valid YAML: line 1"),
        ("novalue", ""), ("=x", ""), ("name.first=x", ""),
    ],
)  # fmt: skip
def test_settings_that_are_none(setting, said):
    with pytest.raises(UsageError, match=f"--set{said}"):
        with_settings(SMALLEST, [setting])


def test_elements_of_a_list_are_set_by_number():
    data = {"adapters": [{"source": "a"}, {"source": "b"}]}

    changed = with_settings(data, ["adapters.1.weight=0.5", "adapters.0={source: hf://c}"])
    assert changed["adapters"] == [{"source": "hf://c"}, {"source": "b", "weight": 0.5}]
    for setting in ("adapters.2={source: c}", "adapters.x=1", "adapters.7.weight=1"):
        with pytest.raises(UsageError, match="--set"):
            with_settings(data, [setting])
