from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.export.record import ExportRecord
from pipeline.runtime.sessions.onnx_graph import _require_runtime_version
from pipeline.runtime.sessions.onnx_session import OnnxSession
from pipeline.runtime.sessions.torch_session import TorchSession
from tests.support.tiny_decoder import MAX_LENGTH, VOCAB_SIZE, tiny_llama, write_record

PROFILES = ("opset24", "compat")
# float32 on both sides, sums in another order; logits are about 7.
TOLERANCE = 5e-5


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB_SIZE, (2, 24))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("cuts", [(24,), (10, 1, 1, 7, 5), (1,) * 24])
def test_cached_decoding_equals_torch_in_one_pass(
    exports: dict[str, Path], tokens: np.ndarray, profile: str, cuts: tuple[int, ...]
) -> None:
    expected = TorchSession(tiny_llama()).forward(tokens)
    session = OnnxSession(exports[profile])
    edges = np.cumsum((0, *cuts))
    pieces = [session.forward(tokens[:, a:b]) for a, b in itertools.pairwise(edges)]
    assert pieces[0].dtype == np.float32
    np.testing.assert_allclose(np.concatenate(pieces, 1), expected, atol=TOLERANCE)


@pytest.mark.parametrize("profile", PROFILES)
def test_reset_forgets_even_when_the_batch_size_changes(
    exports: dict[str, Path], tokens: np.ndarray, profile: str
) -> None:
    session = OnnxSession(exports[profile])
    first = session.forward(tokens[:1])
    session.reset()
    session.forward(tokens)
    session.reset()
    np.testing.assert_array_equal(session.forward(tokens[:1]), first)


def test_opset24_writes_the_cache_in_place(exports: dict[str, Path], tokens: np.ndarray) -> None:
    session = OnnxSession(exports["opset24"])
    session.forward(tokens)
    written = session._buffers["past_key_values.1.value"]  # [B, heads, max_length, width]
    assert (written[:, :, : tokens.shape[1]] != 0).all()
    assert (written[:, :, tokens.shape[1] :] == 0).all()


@pytest.mark.parametrize("profile", PROFILES)
def test_the_cache_takes_max_length_tokens_and_no_more(
    exports: dict[str, Path], profile: str
) -> None:
    session = OnnxSession(exports[profile])
    session.forward(np.ones((1, MAX_LENGTH), dtype=np.int64))
    with pytest.raises(InputError, match=f"at most {MAX_LENGTH}"):
        session.forward(np.ones((1, 1), dtype=np.int64))


def test_wrong_tokens_are_refused(exports: dict[str, Path], tokens: np.ndarray) -> None:
    session = OnnxSession(exports["compat"])
    with pytest.raises(InputError, match="outside the vocabulary"):
        session.forward(np.full((1, 2), VOCAB_SIZE))
    with pytest.raises(InputError, match=r"int64 \[B, S\]"):
        session.forward(np.zeros((1, 0), dtype=np.int64))
    session.forward(tokens)
    with pytest.raises(InputError, match="batch size changed"):
        session.forward(tokens[:1])


@pytest.fixture
def copy(exports: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(exports["opset24"], tmp_path / "copy")


@pytest.mark.parametrize("name", ["export.json", "model.onnx", "model.onnx.data"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(InputError, match=name):
        OnnxSession(copy)


def test_another_graph_than_the_recorded_one_is_refused(copy: Path) -> None:
    with (copy / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(InputError, match="does not belong"):
        OnnxSession(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "another version"),
        ({"profile": "opset99"}, "'profile'"),
        ({"vocab_size": "many"}, "'vocab_size'"),
        ({"num_layers": 3}, "inputs are not those"),
        ({"max_length": 64}, "past_key_values.0.key is not"),
        ({"dtype": "float16"}, "past_key_values.0.key is not"),
        ({"profile": "compat"}, "past_key_values.0.key is not"),
    ],
)
def test_a_record_that_contradicts_the_graph_is_refused(
    copy: Path, changes: dict[str, Any], message: str
) -> None:
    write_record(copy, **{"profile": "opset24", **changes})
    with pytest.raises(InputError, match=message):
        OnnxSession(copy)


def test_an_old_runtime_is_refused_for_opset24_only() -> None:
    _require_runtime_version("1.24.4", ExportRecord("compat", "float32", ""))
    _require_runtime_version("1.25.0", ExportRecord("opset24", "float32", ""))
    with pytest.raises(InputError, match=r"1\.25"):
        _require_runtime_version("1.24.4", ExportRecord("opset24", "float32", ""))


def test_an_old_runtime_is_refused_for_a_cache_of_codes() -> None:
    record = ExportRecord("cpu", "float32", "", cache_format="int8")
    _require_runtime_version("1.27.0", record)
    with pytest.raises(InputError, match="cache of few bits") as caught:
        _require_runtime_version("1.26.0", record)
    assert caught.value.details["expected"] == "onnxruntime 1.27 or newer"
