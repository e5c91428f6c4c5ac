"""What attention takes beside q, k, v and a scale goes into the graph, or is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from pipeline.errors import InputError
from pipeline.export.attention import _attend, active
from pipeline.export.cache import _window_of
from pipeline.export.contract import PROFILES
from pipeline.export.export import export_folder
from pipeline.export.request import ExportRequest
from pipeline.runtime.sessions.onnx_session import OnnxSession
from tests.support.model_families import WINDOW, expected_logits, exported, in_pieces, save_model
from tests.support.unproven import unproven

# Four windows and more.
IDS = np.random.default_rng(0).integers(3, 250, size=(2, 4 * WINDOW + 5))


@pytest.mark.parametrize("length", [2, 9, 48, 500])
def test_the_window_of_a_mask_is_found(length: int) -> None:
    assert _window_of(causal_mask_function, length) == 0
    for window in (1, 8, 47, 200):
        found = _window_of(sliding_window_causal_mask_function(window), length)
        assert found == (window if window < length else 0)


@pytest.mark.parametrize(
    "mask",
    [
        bidirectional_mask_function,
        chunked_causal_mask_function(8, torch.zeros(1, dtype=torch.int64)),
        lambda batch, head, query, key: (key <= query) & ((key > query - 8) | (key == 0)),
    ],
)
def test_another_mask_is_refused(mask: Any) -> None:
    with pytest.raises(NotImplementedError, match="causal"):
        _window_of(mask, 300)


@pytest.mark.parametrize("profile", PROFILES)
def test_what_attention_is_given_and_the_graph_would_not_have_is_refused(profile: str) -> None:
    active.set((PROFILES[profile], None))
    heads = torch.ones(1, 2, 3, 16)
    for name in ("position_bias", "indices", "sinks"):
        given: dict[str, Any] = {name: heads}
        with pytest.raises(NotImplementedError, match=name):
            _attend(torch.nn.Identity(), heads, heads, heads, None, **given)
        given[name] = None
        _attend(torch.nn.Identity(), heads, heads, heads, None, **given)


@pytest.mark.parametrize(
    ("family", "profile"),
    [
        ("gemma2", "cpu"),
        ("granite_swa", "cpu"),
        pytest.param("mistral, narrow heads", "cpu", marks=pytest.mark.slow),
        pytest.param("granite_swa", "opset24", marks=pytest.mark.slow),
        pytest.param("gemma3", "cpu", marks=pytest.mark.slow),
        pytest.param("granite_swa", "compat", marks=pytest.mark.slow),
        pytest.param("gemma2", "opset24", marks=pytest.mark.slow),
        pytest.param("gemma2", "compat", marks=pytest.mark.slow),
    ],
)
def test_windows_soft_caps_and_sinks_equal_transformers_at_four_windows(
    family: str, profile: str, tmp_path: Path
) -> None:
    """The prompt, token by token, several behind a cache; rewound, and with a prefix kept."""
    source = save_model(tmp_path / "model", family)
    session = exported(source, tmp_path / "onnx", profile)
    expected = expected_logits(source, IDS)
    for cuts in ([], list(range(WINDOW, IDS.shape[1])), [11, 13, 14, 30]):
        found = in_pieces(session, IDS, cuts)
        assert abs(found - expected).max() < 1e-5 * abs(expected).max(), cuts
    for kept in (WINDOW - 1, 3 * WINDOW):
        session.rewind(kept)
        again = session.forward(IDS[:, kept:])
        assert abs(again - expected[:, kept:]).max() < 1e-5 * abs(expected).max(), kept


def _run(folder: Path, ids: list[list[int]], mask: list[list[int]]) -> np.ndarray:
    """One call of the graph, as another runtime would make it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    shapes = {node.name: node.shape for node in session.get_inputs()}
    places = np.broadcast_to(np.arange(len(ids[0])), np.shape(ids))
    feeds = {
        "input_ids": np.array(ids),
        "attention_mask": np.array(mask),
        "position_ids": places,
    }
    feeds = {name: value for name, value in feeds.items() if name in shapes}
    for name, shape in shapes.items():
        if name.startswith("past"):
            feeds[name] = np.zeros((len(ids), shape[1], 0, shape[3]), np.float32)
    logits: np.ndarray = session.run(["logits"], feeds)[0]
    return logits


def test_the_cpu_profiles_graph_refuses_a_mask_that_it_would_not_honour(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", "llama")
    exported(source, tmp_path / "onnx", "cpu")
    ids, ones = [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]], [1] * 5
    logits = _run(tmp_path / "onnx", ids, [[1, 1, 1, 0, 0], ones])
    expected = expected_logits(source, np.array(ids)[:1, :3])
    np.testing.assert_allclose(logits[:1, :3], expected, rtol=1e-4, atol=1e-4)
    for padded in ([0, 0, 1, 1, 1], [1, 0, 1, 1, 1]):
        with pytest.raises(Exception, match="attention_mask_must_be_padded_on_the_right"):
            _run(tmp_path / "onnx", ids, [padded, ones])


@pytest.mark.parametrize(
    ("family", "reason"),
    [("diffllama", "change behind the cache"), ("doge", "mask of its own")],
)
def test_attention_to_something_else_than_the_cache_is_refused_for_the_cpu(
    family: str, reason: str, tmp_path: Path
) -> None:
    source = save_model(tmp_path / "model", family)
    with pytest.raises(InputError, match=reason):
        exported(source, tmp_path / "onnx", "cpu")
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize(
    "family", ["gemma2", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gemma3", "olmo2"))]
)
def test_norms_in_float32_of_a_half_precision_model_are_valid_onnx(
    family: str, tmp_path: Path
) -> None:
    """The checker runs in the export; gains in float32 over float16 were refused by it."""
    source = save_model(tmp_path / "model", family)
    request = ExportRequest("opset24", "float16", max_length=48)
    with unproven():
        record = export_folder(source, tmp_path / "onnx", request)
    assert record["fused"]["RMSNormalization"] >= 5
    expected = expected_logits(source, IDS)
    found = in_pieces(OnnxSession(tmp_path / "onnx"), IDS, [11, 12])
    # Half precision has 11 bits; a few dozen roundings behind one another.
    assert abs(found - expected).max() < 1e-2 * abs(expected).max()
