"""A cache of codes: no bit of an answer depends on where a prompt was cut, or what was reused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.bench.targets import traffic_of_folder
from pipeline.errors import InputError
from pipeline.runtime.prefix_cache import PrefixCache
from pipeline.runtime.sessions import onnx_cpu_session as cpu_session
from pipeline.runtime.sessions.onnx_cpu_session import CpuSession
from tests.support.tiny_decoder import shared_export, shared_rounded_export

IDS = np.random.default_rng(0).integers(0, 250, size=(3, 70))


@pytest.fixture
def session() -> CpuSession:
    return CpuSession(shared_rounded_export(), threads=1, slots=3)


def held(session: CpuSession, slot: int, length: int) -> list[bytes]:
    return [buffer[slot, :, :length].tobytes() for buffer in session.values.buffers.values()]


def test_a_quarter_of_the_bytes_is_held_and_the_session_says_so(session: CpuSession) -> None:
    assert session.name == "onnxruntime cpu float, cache int8"
    assert {str(buffer.dtype) for buffer in session.values.buffers.values()} == {"int8"}
    rounded, plain = (traffic_of_folder(f) for f in (shared_rounded_export(), shared_export("cpu")))
    assert 4 * rounded.cache_bytes(100) == plain.cache_bytes(100)


def test_no_bit_depends_on_where_a_prompt_was_cut(
    session: CpuSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = session.prefill(0, IDS[0])
    session.prefill(1, IDS[0, :33])
    assert np.array_equal(session.prefill(1, IDS[0, 33:]), whole)
    monkeypatch.setattr(cpu_session, "_PREFILL_TOKENS", 16)
    assert np.array_equal(session.prefill(2, IDS[0]), whole)
    assert held(session, 0, 70) == held(session, 1, 70) == held(session, 2, 70)


def test_a_rewound_row_holds_and_answers_what_a_new_one_does(session: CpuSession) -> None:
    session.prefill(0, IDS[0])
    for length in (40, 20):
        session.rewind_slot(0, length)
    again = session.prefill(0, IDS[1, 20:50])
    fresh = session.prefill(1, np.concatenate([IDS[0, :20], IDS[1, 20:50]]))
    assert np.array_equal(again, fresh)
    assert held(session, 0, 50) == held(session, 1, 50)
    assert np.array_equal(session.decode([0], [7]), session.decode([1], [7]))


def test_a_reused_beginning_changes_no_bit(session: CpuSession) -> None:
    cache, prompt = PrefixCache(session), IDS[0, :40].tolist()
    first = cache.read(cache.begin(prompt)).copy()
    cache.read([3, 4])
    other = [*prompt[:25], *IDS[1, :9].tolist()]
    after = cache.read(cache.begin(other)).copy()
    assert np.array_equal(cache.read(cache.begin(prompt)), first)
    fresh = PrefixCache(CpuSession(shared_rounded_export(), threads=1))
    assert np.array_equal(fresh.read(fresh.begin(other)), after)


def test_several_rows_decode_together_as_they_would_alone(session: CpuSession) -> None:
    for slot in range(3):
        session.prefill(slot, IDS[slot, : 20 + slot])
    together = session.decode([0, 1, 2], [5, 6, 7])
    alone = CpuSession(shared_rounded_export(), threads=1)
    for slot in range(3):
        alone.clear(0)
        alone.prefill(0, IDS[slot, : 20 + slot])
        np.testing.assert_allclose(alone.decode([0], [5 + slot])[0], together[slot], atol=1e-4)


@pytest.mark.parametrize(("folder", "said"), [("codes", "float"), ("floats", "int8")])
def test_a_cache_of_another_type_than_the_record_says_is_refused(
    tmp_path: Path, folder: str, said: str
) -> None:
    source = shared_rounded_export() if folder == "codes" else shared_export("cpu")
    shutil.copytree(source, tmp_path / "onnx")
    path = tmp_path / "onnx" / "export.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"cache_format": said}))
    with pytest.raises(InputError, match=r"past_key_values.0.key is not what export.json promises"):
        CpuSession(tmp_path / "onnx")
    path.write_text(json.dumps(record | {"cache_format": "int2"}))
    with pytest.raises(InputError, match="cache_format"):
        CpuSession(tmp_path / "onnx")
