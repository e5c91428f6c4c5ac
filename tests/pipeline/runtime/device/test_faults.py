"""Faults planted in the device runtime, one at a time: the fake board has to notice each.

A test double that lets a wrong runtime pass would prove nothing about a right one.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.artefact import sha256_of_file
from pipeline.engine.build import build_engine
from pipeline.engine.plan import EngineRequest
from pipeline.engine.target import Target
from pipeline.errors import InputError, PipelineError
from pipeline.gpu import ORIN
from pipeline.runtime.device import cache, token_inputs
from pipeline.runtime.device import engine as engine_module
from pipeline.runtime.device import session as session_module
from pipeline.runtime.device.bound_context import BoundContext
from pipeline.runtime.device.cache import StaticCache
from pipeline.runtime.device.driver import DeviceMemory, Driver, Stream
from pipeline.runtime.device.engine import open_engine
from pipeline.runtime.device.session import DeviceSession
from pipeline.runtime.device.token_inputs import TokenInputs
from pipeline.runtime.sessions.onnx_session import OnnxSession
from tests.support.fake_gpu.board import Board, board_engine
from tests.support.tiny_decoder import shared_export
from tests.support.tiny_graph import write_export

IDS = np.arange(65, 82, dtype=np.int64)[None]
CALLS = ((0, 9), (9, 10), (10, 11), (11, 12), (12, 13), (13, 16), (16, 17))
Plant = Callable[[pytest.MonkeyPatch, DeviceSession], None]


def logits_of(session: Any) -> list[np.ndarray]:
    """A prompt in two blocks, steps of which the second is captured, a block, and a step."""
    return [session.forward(IDS[:, start:stop]) for start, stop in CALLS]


def noticed(board: Board, run: Callable[[], list[np.ndarray]]) -> set[str]:
    """How a fault shows: an error, a complaint of the fake, or another answer than is right."""
    right = logits_of(OnnxSession(shared_export("opset24")))
    found = set()
    try:
        answers = run()
        if not all(np.allclose(a, b, atol=1e-3) for a, b in zip(answers, right, strict=True)):
            found.add("answer")
    except PipelineError:
        found.add("error")
    if board.complaints:
        found.add("complaint")
    board.cuda.fake_forget_complaints()
    return found


def address_kept_over_a_profile_switch(patch: pytest.MonkeyPatch, session: DeviceSession) -> None:
    step, block = session._contexts
    block._context = step._context
    enqueue = BoundContext.enqueue

    def switch_and_enqueue(self: BoundContext) -> None:
        self._context.set_optimization_profile_async(session._contexts.index(self), 0)
        enqueue(self)

    patch.setattr(BoundContext, "enqueue", switch_and_enqueue)


def missing_alias(patch: pytest.MonkeyPatch, session: DeviceSession) -> None:
    apart = DeviceMemory(session._opened.driver, 1 << 20)
    set_address = BoundContext.set_address

    def set_apart(self: BoundContext, name: str, address: int) -> None:
        set_address(self, name, apart.address if name.startswith("present.") else address)

    patch.setattr(BoundContext, "set_address", set_apart)


def read_without_waiting(patch: pytest.MonkeyPatch, session: DeviceSession) -> None:
    patch.setattr(Stream, "wait", lambda self: None)


def written_under_a_copy(patch: pytest.MonkeyPatch, session: DeviceSession) -> None:
    upload = TokenInputs.upload

    def upload_and_write(self: TokenInputs) -> None:
        upload(self)
        self._numbers[0] = 1

    patch.setattr(TokenInputs, "upload", upload_and_write)


def mask_one_short(patch: pytest.MonkeyPatch, session: DeviceSession) -> None:
    fill = TokenInputs.fill

    def fill_short(self: TokenInputs, input_ids: np.ndarray, past: int) -> None:
        fill(self, input_ids, past)
        if past:
            self._view("attention_mask", session.max_length)[:, past + input_ids.shape[1] - 1] = 0

    patch.setattr(TokenInputs, "fill", fill_short)


def position_off_by_one(patch: pytest.MonkeyPatch, session: DeviceSession) -> None:
    fill = TokenInputs.fill

    def fill_late(self: TokenInputs, input_ids: np.ndarray, past: int) -> None:
        fill(self, input_ids, past)
        self._view("position_ids", input_ids.shape[1])[:, -1] += 1

    patch.setattr(TokenInputs, "fill", fill_late)


def wrong_dtype_of_logits(patch: pytest.MonkeyPatch, session: DeviceSession) -> None:
    session._dtype = np.dtype(np.float16)
    session._row_bytes //= 2


def shape_outside_the_profile(patch: pytest.MonkeyPatch, session: DeviceSession) -> None:
    session._chunk *= 2


def growing_shape_under_a_graph(patch: pytest.MonkeyPatch, session: DeviceSession) -> None:
    make = token_inputs.TokenInputs
    patch.setattr(
        session_module, "TokenInputs", lambda opened, rows, most, _: make(opened, rows, most, None)
    )


def used_after_it_was_freed(patch: pytest.MonkeyPatch, session: DeviceSession) -> None:
    start = DeviceSession._start

    def start_and_free(self: DeviceSession, rows: int) -> None:
        start(self, rows)
        kept = self._step_logits
        self._step_logits = type("Freed", (), vars(kept))()

    patch.setattr(DeviceSession, "_start", start_and_free)


def cache_too_short(patch: pytest.MonkeyPatch, session: DeviceSession) -> None:
    patch.setattr(cache, "aligned", lambda size: size // 2 // 256 * 256)


def address_not_aligned(patch: pytest.MonkeyPatch, session: DeviceSession) -> None:
    patch.setattr(token_inputs, "aligned", lambda size: size)


def no_scratch_memory(patch: pytest.MonkeyPatch, session: DeviceSession) -> None:
    for context in session._contexts:
        context._context._scratch = None


FAULTS: tuple[tuple[Plant, str], ...] = (
    (address_kept_over_a_profile_switch, "error"),
    (missing_alias, "complaint"),
    (read_without_waiting, "answer"),
    (written_under_a_copy, "complaint"),
    (mask_one_short, "answer"),
    (position_off_by_one, "answer"),
    (wrong_dtype_of_logits, "complaint"),
    (shape_outside_the_profile, "error"),
    (growing_shape_under_a_graph, "complaint"),
    (used_after_it_was_freed, "complaint"),
    (cache_too_short, "complaint"),
    (address_not_aligned, "error"),
    (no_scratch_memory, "error"),
)


@pytest.mark.parametrize(("plant", "how"), FAULTS, ids=[plant.__name__ for plant, _ in FAULTS])
def test_a_fault_is_noticed(
    plant: Plant, how: str, board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = DeviceSession(open_engine(board_engine("opset24", board), board.driver()))
    plant(monkeypatch, session)
    assert how in noticed(board, lambda: logits_of(session))


def test_without_a_fault_nothing_is_noticed(board: Board) -> None:
    session = DeviceSession(open_engine(board_engine("opset24", board), board.driver()))
    assert noticed(board, lambda: logits_of(session)) == set()


def test_memory_freed_twice_is_noticed(board: Board) -> None:
    driver = board.driver()
    address = DeviceMemory(driver, 256).address  # given back at once
    with pytest.raises(PipelineError, match="CUDA fails"):
        driver.call("cuMemFree_v2", address)
    assert "freed twice" in board.complaints
    board.cuda.fake_forget_complaints()


def test_a_thread_that_does_not_make_the_gpu_current_is_noticed(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = DeviceSession(open_engine(board_engine("opset24", board), board.driver()))
    failures: list[BaseException] = []

    def run() -> None:
        try:
            session.forward(IDS)
        except PipelineError as error:
            failures.append(error)

    def in_a_thread() -> None:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    in_a_thread()
    assert failures == []
    monkeypatch.setattr(Driver, "make_current", lambda self: None)
    in_a_thread()
    assert len(failures) == 1
    board.cuda.fake_forget_complaints()


def broken_copy(source: Path, folder: Path, change: Callable[[bytes], bytes]) -> Path:
    """An engine folder whose plan was changed, and whose manifest says so."""
    shutil.copytree(source, folder)
    plan, manifest = folder / "engine.plan", folder / "manifest.json"
    plan.write_bytes(change(plan.read_bytes()))
    record = json.loads(manifest.read_text())
    record["plan"] = {"bytes": plan.stat().st_size, "sha256": sha256_of_file(plan)}
    manifest.write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan.replace(b"10.16.1.11", b"10.16.1.12", 1),
        lambda plan: plan[:-100],
        lambda plan: b"",
    ],
    ids=["of another version", "cut off", "empty"],
)
def test_a_plan_that_is_not_this_librarys_is_refused(
    change: Callable[[bytes], bytes], board: Board, tmp_path: Path
) -> None:
    folder = broken_copy(board_engine("opset24", board), tmp_path / "engine", change)
    with pytest.raises(InputError, match="TensorRT refuses this plan"):
        open_engine(folder, board.driver())


def test_a_plugin_that_is_not_loaded_is_noticed(
    board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "libskip.so"
    library.write_text("plugins: BlockSkipLinear\n")
    source = write_export(tmp_path / "onnx", profile="opset24")
    request = EngineRequest(Target("tensorrt", ORIN, "a test"), max_prefill=8, plugin=library)
    build_engine(source, tmp_path / "engine", request)
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "load_engine_plugin", lambda *arguments: None)
        with pytest.raises(InputError, match="TensorRT refuses this plan"):
            open_engine(tmp_path / "engine", board.driver())
    DeviceSession(open_engine(tmp_path / "engine", board.driver())).forward(IDS[:, :5] % 32)


def test_a_step_that_cannot_be_captured_runs_without_a_graph_and_says_so(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    session = DeviceSession(
        open_engine(board_engine("opset24", board), board.driver()), say=said.append
    )
    start = DeviceSession._start

    def start_late(self: DeviceSession, rows: int) -> None:
        start(self, rows)
        self._steps = 1  # as if the shapes had been prepared

    monkeypatch.setattr(DeviceSession, "_start", start_late)
    assert noticed(board, lambda: logits_of(session)) == {"complaint"}  # and the right answers
    assert not session.is_captured
    assert len(said) == 1
    assert "without a CUDA graph" in said[0]


def test_the_cache_is_written_in_place(board: Board) -> None:
    session = DeviceSession(open_engine(board_engine("opset24", board), board.driver()))
    session.forward(IDS)
    assert isinstance(session._cache, StaticCache)
    numbers = np.zeros(session._cache._memory.size_bytes, np.uint8)
    stream = session._opened.stream
    stream.copy_out(numbers.ctypes.data, session._cache._memory.address, numbers.size)
    stream.wait()
    shape = next(iter(session._cache._tensors.shapes.values()))
    keys = numbers.view(np.float32)[: int(np.prod(shape))].reshape(shape)
    used = IDS.shape[1]
    assert (keys[:, :, :used] != 0).any(axis=(1, 3)).all()
    assert (keys[:, :, used:] == 0).all()
