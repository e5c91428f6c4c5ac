"""A cache of fixed length that begins short: the same logits, of a graph that reads fewer slots."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest

from pipeline.errors import InputError
from pipeline.export.contract import FLOAT32, OPSET24, WEIGHTS_FILE
from pipeline.export.export import ExportRequest, export_folder
from pipeline.runtime.sessions import onnx_graph
from pipeline.runtime.sessions.growing_slots import FIRST_SLOTS, growing_slots, slots_for
from pipeline.runtime.sessions.onnx_session import OnnxSession
from tests.support.tiny_decoder import (
    VOCAB_SIZE,
    byte_tokenizer,
    shared_export,
    shared_folder,
    tiny_llama,
)

LONG = 1000
CUTS = (0, 200, 201, 255, 300, 513, 600)


@pytest.fixture(scope="module")
def exported() -> Path:
    def make(root: Path) -> None:
        model = tiny_llama()
        model.config.max_position_embeddings = LONG
        model.save_pretrained(root / "model")
        byte_tokenizer().save_pretrained(root / "model")
        export_folder(root / "model", root / "long", ExportRequest(OPSET24, FLOAT32, LONG))

    return shared_folder("long", make)


def read(session: OnnxSession, ids: np.ndarray, cuts: tuple[int, ...] = CUTS) -> np.ndarray:
    return np.concatenate([session.forward(ids[:, a:b]) for a, b in pairwise(cuts)], axis=1)


def tokens(rows: int = 1) -> np.ndarray:
    return np.random.default_rng(3).integers(0, VOCAB_SIZE, (rows, CUTS[-1]))


@pytest.fixture
def fixed(exported: Path, monkeypatch: pytest.MonkeyPatch) -> OnnxSession:
    """The graph as it is in the file."""
    monkeypatch.setattr(onnx_graph, "growing_slots", lambda path, length: None)
    session = OnnxSession(exported, threads=1)
    assert not session._graph.grows
    return session


@pytest.mark.parametrize("rows", [1, 3])
def test_no_bit_of_a_logit_depends_on_how_long_the_cache_is(
    exported: Path, fixed: OnnxSession, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    session = OnnxSession(exported, threads=1)
    assert session._graph.grows
    ids = tokens(rows)
    np.testing.assert_array_equal(read(session, ids), read(fixed, ids))


def test_the_cache_has_the_slots_that_the_text_needs(exported: Path) -> None:
    session, ids = OnnxSession(exported, threads=1), tokens()

    def slots() -> set[int]:
        return {buffer.shape[2] for buffer in session._buffers.values()}

    found = []
    for a, b in pairwise(CUTS):
        session.forward(ids[:, a:b])
        found.append(slots())
    assert found == [{256}, {256}, {256}, {512}, {LONG}, {LONG}]
    session.reset()
    session.forward(ids[:, :10])
    assert slots() == {256}


def test_a_cache_that_was_rewound_goes_on_as_if_nothing_had_been_there(exported: Path) -> None:
    session, ids = OnnxSession(exported, threads=1), tokens()
    whole = read(session, ids)
    session.rewind(250)
    np.testing.assert_array_equal(session.forward(ids[:, 250:300]), whole[:, 250:300])
    session.rewind(100)
    assert session.length == 100
    found = read(session, ids, (100, 120, 600))
    np.testing.assert_allclose(found, whole[:, 100:], atol=5e-5)


def test_slots_double_from_the_first_and_end_at_the_most() -> None:
    wanted = {1: 256, 256: 256, 257: 512, 513: 1000, 1000: 1000}
    assert {tokens: slots_for(tokens, LONG) for tokens in wanted} == wanted


def test_a_short_cache_stays_as_it_is() -> None:
    short = shared_export("opset24")
    assert growing_slots(short / "model.onnx", FIRST_SLOTS) is None
    assert not OnnxSession(short, threads=1)._graph.grows


def _edited(source: Path, folder: Path, edit: str) -> Path:
    """The graph of an export, with something besides attention that depends on the length."""
    model = onnx.load(source / "model.onnx", load_external_data=False)
    graph = model.graph
    if edit == "the length is a number elsewhere":
        number = onnx.numpy_helper.from_array(np.array([1, LONG], np.int64), "a.shape")
        graph.initializer.append(number)
    elif edit == "another node reads the cache":
        graph.node.append(onnx.helper.make_node("ReduceMax", ["present.0.key"], ["most"]))
    else:
        graph.input[3].type.tensor_type.shape.dim[2].dim_value = LONG - 1
    onnx.save(model, folder / "model.onnx")
    shutil.copy(source / WEIGHTS_FILE, folder)
    return folder / "model.onnx"


@pytest.mark.parametrize(
    "edit",
    ["the length is a number elsewhere", "another node reads the cache", "two lengths"],
)
def test_a_graph_of_another_form_stays_as_it_is(edit: str, exported: Path, tmp_path: Path) -> None:
    assert growing_slots(exported / "model.onnx", LONG) is not None
    assert growing_slots(_edited(exported, tmp_path, edit), LONG) is None


def test_a_weight_file_cut_short_is_refused_by_name(exported: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(exported, tmp_path / "damaged")
    weights = damaged / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match=WEIGHTS_FILE):
        OnnxSession(damaged)
