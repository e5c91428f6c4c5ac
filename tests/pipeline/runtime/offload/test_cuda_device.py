"""A real GPU does what the lazy device does: the same bits; and where there is none, it is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.errors import InputError
from pipeline.runtime.language_model import LanguageModel
from pipeline.runtime.offload.cuda_device import CudaDevice
from pipeline.runtime.offload.device_ring import DeviceRing
from pipeline.runtime.offload.open_offloaded import open_offloaded
from pipeline.runtime.offload.streamed_session import StreamedSession
from pipeline.runtime.sampling import GREEDY
from tests.support import quantised_layers
from tests.support.families import save_family, tiny_model
from tests.support.quantised_layers import save_low_bit_llama, small_llama
from tests.support.scripted_drafts import DRAFTS, Scripted, said
from tests.support.tiny_decoder import byte_tokenizer

MUCH, PLACES, LAYERS = 2_000_000_000, 120, 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sees no NVIDIA GPU"):
        CudaDevice()
    folder = save_family(tmp_path / "model", "llama")
    with pytest.raises(InputError, match="sees no NVIDIA GPU"):
        LanguageModel.open(folder, device="cuda", vram="1GB")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_on_a_gpu_drafts_and_copies_change_no_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048}
    folder = tmp_path / "model"
    tiny_model("llama", layers=LAYERS, **sizes).to(dtype).save_pretrained(folder)
    whole = StreamedSession(folder, MUCH, PLACES, device=CudaDevice())
    assert whole.traffic.resident == LAYERS
    budget = whole.traffic.held_bytes - 1
    expected = said(whole, GREEDY, None)
    session = StreamedSession(folder, budget, PLACES, device=CudaDevice())
    assert 0 < session.traffic.resident < LAYERS
    assert said(session, GREEDY, None) == expected
    for choose in DRAFTS.values():
        assert said(session, GREEDY, Scripted(expected[0], 7, choose)) == expected
    found = session.traffic
    assert found.copied_bytes >= found.passes * found.pass_bytes
    assert found.waited_s > 0


@pytest.mark.gpu
def test_on_a_gpu_a_draft_in_few_bits_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised_layers, "LAYERS", 4)
    model, answers = tmp_path / "model", []
    small_llama().to(torch.float16).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    few = save_low_bit_llama(tmp_path / "few")
    for length in (0, 4):
        session, drafts = open_offloaded(model, None, few, length=length, vram="2GB")
        assert drafts is not None
        drafter = drafts.begin(0)
        answers.append(said(session, GREEDY, drafter))
        assert (drafter.drafted > 0) == (length > 0)
    assert answers[0] == answers[1]


@pytest.mark.gpu
def test_on_a_gpu_no_buffer_is_filled_before_it_was_computed_with() -> None:
    device = CudaDevice()
    slabs = [device.pinned(1 << 22) for _ in range(5)]
    for number, slab in enumerate(slabs):
        slab.fill_(number + 1)
    ring, sums = DeviceRing(device, slabs), []
    for _ in range(40):
        buffer = ring.take()
        torch.cuda._sleep(3_000_000)  # so that a copy would have the time to come too early
        sums.append(buffer.sum(dtype=torch.int64))
        ring.release()
    assert torch.stack(sums).tolist() == [(1 + n % 5) << 22 for n in range(40)]
