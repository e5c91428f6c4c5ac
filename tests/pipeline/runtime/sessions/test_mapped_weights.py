"""Pages of a weight file leave the process and come again; sessions over them give the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from pipeline.errors import InputError
from pipeline.export.contract import WEIGHTS_FILE
from pipeline.runtime.sessions import onnx_graph
from pipeline.runtime.sessions.onnx_cpu_session import CpuSession
from pipeline.runtime.sessions.onnx_graph import _borrows_files, _map_weights, _MappedWeights
from pipeline.runtime.sessions.onnx_session import OnnxSession
from tests.support.tiny_decoder import shared_export

PAGES = 512
PAGE_BYTES = 4096
IDS = np.random.default_rng(0).integers(0, 250, size=(1, 20))


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    values = np.random.default_rng(1).integers(0, 256, PAGES * PAGE_BYTES, dtype=np.uint8)
    (tmp_path / WEIGHTS_FILE).write_bytes(values.tobytes())
    return values.tobytes()


def resident_bytes(path: Path) -> int:
    """Bytes of a mapped file that are in this process, as Linux counts them."""
    lines = iter(Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines())
    total = 0
    for line in lines:
        if line.endswith(str(path)):
            total += next(int(row.split()[1]) for row in lines if row.startswith("Rss:")) * 1024
    return total


def test_released_pages_leave_the_process_and_come_again_unchanged(
    tmp_path: Path, content: bytes
) -> None:
    weights = _MappedWeights(tmp_path / WEIGHTS_FILE)
    assert weights.pages[:] == content
    assert resident_bytes(tmp_path / WEIGHTS_FILE) == len(content)
    weights.release_pages()
    assert resident_bytes(tmp_path / WEIGHTS_FILE) == 0
    assert weights.pages[:] == content


def test_what_the_body_read_is_gone_at_its_end_even_when_it_fails(
    tmp_path: Path, content: bytes
) -> None:
    weights = _MappedWeights(tmp_path / WEIGHTS_FILE)

    def read_and_fail() -> None:
        with weights.releasing_pages():
            assert weights.pages[:] == content
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        read_and_fail()
    assert resident_bytes(tmp_path / WEIGHTS_FILE) == 0


def test_nothing_to_map_is_left_to_onnx_runtime(tmp_path: Path) -> None:
    assert _map_weights(tmp_path / WEIGHTS_FILE) is None
    (tmp_path / WEIGHTS_FILE).touch()
    assert _map_weights(tmp_path / WEIGHTS_FILE) is None


@pytest.mark.parametrize(
    ("profile", "kind"), [("cpu", CpuSession), ("opset24", OnnxSession), ("compat", OnnxSession)]
)
def test_lent_weights_give_the_logits_of_weights_that_onnx_runtime_maps(
    profile: str, kind: type[CpuSession | OnnxSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    lent = kind(shared_export(profile), threads=1)
    assert (lent._graph.weights is not None) == _borrows_files(onnxruntime.__version__)
    monkeypatch.setattr(onnx_graph, "_map_weights", lambda path: None)
    own = kind(shared_export(profile), threads=1)
    assert own._graph.weights is None
    for session in (lent, own):
        session.forward(IDS[:, :9])
    np.testing.assert_array_equal(lent.forward(IDS[:, 9:]), own.forward(IDS[:, 9:]))


def test_a_session_keeps_none_of_the_file_once_it_has_read_a_prompt() -> None:
    folder = shared_export("cpu")
    session = CpuSession(folder, threads=1)
    if session._graph.weights is None:
        pytest.skip("this ONNX Runtime copies what it is lent")
    session.forward(IDS)
    assert resident_bytes(folder / WEIGHTS_FILE) == 0


def test_a_weight_file_cut_short_is_refused(tmp_path: Path) -> None:
    for path in shared_export("cpu").iterdir():
        whole = path.read_bytes()
        (tmp_path / path.name).write_bytes(
            whole[: len(whole) // 2] if path.name == WEIGHTS_FILE else whole
        )
    with pytest.raises(InputError, match="cannot load this graph"):
        CpuSession(tmp_path, threads=1)


@pytest.mark.parametrize(
    ("version", "borrows"), [("1.31.1", False), ("1.32.0", True), ("1.32", True), ("2.0.0", True)]
)
def test_older_runtimes_map_the_file_by_themselves(version: str, borrows: bool) -> None:
    assert _borrows_files(version) == borrows
