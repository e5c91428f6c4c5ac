"""Kernels for RTX are compiled once for an engine folder, not once for a run."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from pipeline.runtime.sessions.tensorrt_session import TensorRTSession
from tests.support import fake_rtx
from tests.support.fake_rtx import FakeRtxEngine, fake_rtx_engine

CACHE = "runtime.cache"


def answer(folder: Path, environment: str = "sm_86, 1.7") -> int:
    """How many kernels a run compiled for a prompt and three steps."""
    opened, engine = fake_rtx_engine(folder, environment)
    session = TensorRTSession(folder, name="fake", engine=opened)
    ids = [np.array([[7] * count]) for count in (5, 1, 1, 1)]
    assert [session.forward(one)[0, -1, 0] for one in ids] == [4007, 5007, 6007, 7007]
    del session, opened
    gc.collect()
    return len(engine.compiled)


def test_the_second_run_compiles_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answer(tmp_path) == 2  # of a prompt of five tokens, and of a step of one
    assert "kernels for this GPU are compiled once" in capsys.readouterr().err
    written = (tmp_path / CACHE).stat().st_mtime_ns
    assert answer(tmp_path) == 0
    assert capsys.readouterr().err == ""
    assert (tmp_path / CACHE).stat().st_mtime_ns == written  # what has not changed is left alone
    assert [path.name for path in tmp_path.iterdir()] == [CACHE]


@pytest.mark.parametrize("content", [b"damaged", None])
def test_kernels_that_are_not_for_this_gpu_are_compiled_again_aloud(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(tmp_path, "sm_89, 1.7")
    if content is not None:
        (tmp_path / CACHE).write_bytes(content)
    assert answer(tmp_path) == 2
    assert "of another GPU, driver or TensorRT" in capsys.readouterr().err
    assert answer(tmp_path) == 0


def test_sessions_of_one_engine_share_their_kernels(tmp_path: Path) -> None:
    opened, engine = fake_rtx_engine(tmp_path)
    first = TensorRTSession(tmp_path, name="fake", engine=opened)
    for session in (first, first.sibling()):
        session.forward(np.array([[1, 2, 3]]))
    assert len(engine.compiled) == 1


def test_where_nothing_can_be_written_it_answers_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "engine"
    folder.write_text("no folder, so that nothing can be made in it, by root neither")
    assert answer(folder) == 2
    assert "cannot be kept for the next run" in capsys.readouterr().err


def test_the_fake_has_no_name_that_the_real_bindings_lack() -> None:
    real = pytest.importorskip("tensorrt_rtx")
    config = fake_rtx.IRuntimeConfig(FakeRtxEngine())
    faked = {
        "IRuntimeCache": config.create_runtime_cache(),
        "IRuntimeConfig": config,
        "DynamicShapesKernelSpecializationStrategy": (
            fake_rtx.DynamicShapesKernelSpecializationStrategy
        ),
    }
    for name, one in faked.items():
        public = {part for part in dir(one) if not part.startswith("_")}
        assert public - set(dir(getattr(real, name))) - {"name", "value", "mro"} == set(), name
    assert "create_runtime_config" in dir(real.ICudaEngine)
