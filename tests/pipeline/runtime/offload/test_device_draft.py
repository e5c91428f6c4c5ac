"""A checkpoint drafts on the device, over the model's own keys and values, and changes no bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.checkpoint.folder import load_checkpoint
from pipeline.cli.main import main
from pipeline.errors import InputError, UsageError
from pipeline.runtime.generate import generate, stream_batch
from pipeline.runtime.offload import open_offloaded as opening
from pipeline.runtime.offload.device_draft import DeviceDraft
from pipeline.runtime.offload.open_offloaded import open_offloaded
from pipeline.runtime.offload.streamed_session import StreamedSession
from pipeline.runtime.sampling import GREEDY, Sampling
from pipeline.runtime.sequence import Decoding
from pipeline.runtime.sessions.static_session import StaticSession
from tests.support import quantised_layers
from tests.support.lazy_device import LazyDevice
from tests.support.quantised_layers import save_low_bit_llama, small_llama
from tests.support.scripted_drafts import PROMPT, WARM, said
from tests.support.tiny_decoder import MAX_LENGTH, byte_tokenizer

MUCH = "500MB"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small model in float16, and itself in codes of few bits."""
    root = tmp_path_factory.mktemp("pair")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantised_layers, "LAYERS", 4)
        small_llama().to(torch.float16).save_pretrained(root / "model")
        byte_tokenizer().save_pretrained(root / "model")
        return root / "model", save_low_bit_llama(root / "few")


@pytest.fixture
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "CudaDevice", LazyDevice)


def copy_of(folder: Path, path: Path, **fields: object) -> Path:
    """The same checkpoint under another name, with other words in its config."""
    shutil.copytree(folder, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | fields))
    return path


def little(model: Path, draft: Path) -> str:
    """A budget in which not all layers stay beside the draft."""
    session, _ = open_offloaded(model, None, draft, threads=1, vram=MUCH)
    assert session.traffic.resident == session.traffic.layers
    return str(session.traffic.held_bytes - 1)


@pytest.mark.parametrize("how", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_a_draft_in_few_bits_changes_no_bit(
    pair: tuple[Path, Path], how: Sampling, without_a_gpu: None
) -> None:
    model, few = pair
    vram, answers = little(model, few), []
    for length, width in ((0, None), (1, None), (7, 1), (16, 4), (None, None)):
        session, drafts = open_offloaded(
            model, None, few, threads=1, length=length, vram=vram, width=width
        )
        assert 0 < session.traffic.resident < session.traffic.layers
        assert drafts is not None
        drafter = drafts.begin(0)
        answers.append(said(session, how, drafter, tokens=20))
        assert (drafter.drafted > 0) == (length != 0)
    assert answers == [answers[0]] * len(answers)


def test_a_draft_of_the_same_numbers_is_right_so_it_sees_the_model_s_own_cache(
    pair: tuple[Path, Path], tmp_path: Path, without_a_gpu: None
) -> None:
    model = pair[0]
    session, drafts = open_offloaded(
        model, None, copy_of(model, tmp_path / "same"), threads=1, length=4, vram=MUCH, width=1
    )
    assert drafts is not None
    before = session.traffic.passes
    drafter = drafts.begin(0)
    ids, _ = said(session, GREEDY, drafter)
    # In float16 two ways of attention may differ at a near-tie.
    assert drafter.taken > 0.8 * drafter.drafted
    assert session.traffic.passes - before == 1 + len(ids) - 1 - drafter.taken
    assert set(drafts._session.call_times.medians(999)) == {1}


def test_slots_have_drafts_of_their_own_and_more_rows_new_memory(
    pair: tuple[Path, Path], without_a_gpu: None
) -> None:
    model, few = pair
    prompts = [[5, 6, 7, 8], [9], list(range(40, 60))]
    how = Decoding(10, WARM)
    session, drafts = open_offloaded(model, None, few, threads=1, slots=2, length=3, vram=MUCH)
    together = list(stream_batch(session, prompts, how, seeds=[3] * 3, drafts=drafts))
    alone, small = open_offloaded(model, None, few, threads=1, length=3, vram=MUCH)
    assert small is not None
    for running, prompt in zip(together, prompts, strict=True):
        alone.reset()
        own = Decoding(10, WARM, seed=3)
        assert running.ids == list(generate(alone, prompt, own, small.begin(0)))
    alone.reset()
    alone.forward(np.array([PROMPT, PROMPT]))  # which needs another row
    alone.reset()
    again = list(generate(alone, prompts[0], Decoding(10, WARM, seed=3), small.begin(0)))
    assert again == together[0].ids


def test_the_draft_s_bytes_are_of_the_budget(pair: tuple[Path, Path], without_a_gpu: None) -> None:
    model, few = pair
    session, _ = open_offloaded(model, None, few, threads=1, vram=MUCH)
    alone = StreamedSession(model, 500_000_000, MAX_LENGTH, device=LazyDevice())
    draft_bytes = DeviceDraft.bytes_of(DeviceDraft.load(few, torch.float16))
    assert session.traffic.held_bytes - alone.traffic.held_bytes == draft_bytes
    files = sum(path.stat().st_size for path in few.glob("*.safetensors"))
    assert 0.8 * files < draft_bytes < 1.3 * files
    with pytest.raises(UsageError, match="too small") as caught:
        open_offloaded(model, None, few, threads=1, vram=str(draft_bytes))
    assert caught.value.details["observed"] == f"{draft_bytes / 1e6:.0f} MB"


def test_a_static_session_goes_on_in_memory_that_is_there() -> None:
    model = small_llama()
    ids = np.arange(12)[None]
    whole = StaticSession(model, "whole", 32)
    expected = whole.forward(ids)[0]
    held = [(layer.keys.clone(), layer.values.clone()) for layer in whole._cache.layers]
    under_test = StaticSession(model, "bound", 32, held)
    under_test.take_up(11)
    np.testing.assert_allclose(under_test.forward(ids[:, 11:])[0, 0], expected[11], atol=1e-5)
    assert under_test.length == 12
    for (keys, _), layer in zip(held, under_test._cache.layers, strict=True):
        assert layer.keys.data_ptr() == keys.data_ptr()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 99}, "vocab_size 99"),
        ({"num_hidden_layers": 1}, "num_hidden_layers 1"),
        ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}, "rope_theta"),
    ],
)
def test_what_does_not_fit_is_refused_before_it_is_loaded(
    fields: dict[str, object],
    message: str,
    pair: tuple[Path, Path],
    tmp_path: Path,
    without_a_gpu: None,
) -> None:
    model, few = pair
    with pytest.raises(InputError, match="does not fit the model") as caught:
        open_offloaded(model, None, copy_of(few, tmp_path / "other", **fields), vram=MUCH)
    assert message in caught.value.details["observed"]


def test_the_model_itself_and_kernels_in_float32_are_refused(
    pair: tuple[Path, Path], tmp_path: Path, without_a_gpu: None
) -> None:
    model, few = pair
    with pytest.raises(UsageError, match="cannot draft for itself"):
        open_offloaded(model, None, model, vram=MUCH)
    wide = shutil.copytree(model, tmp_path / "wide")
    load_checkpoint(model, dtype=torch.float32).save_pretrained(wide)
    with pytest.raises(InputError, match="cannot share") as caught:
        open_offloaded(wide, None, few, vram=MUCH)
    assert "float32" in caught.value.details["observed"]
    with pytest.raises(UsageError, match="profile"):
        open_offloaded(model, MUCH, few)  # without --vram it would have to run on the CPU


def test_the_command_takes_a_checkpoint_as_its_draft(
    pair: tuple[Path, Path], without_a_gpu: None, capfd: pytest.CaptureFixture[str]
) -> None:
    model, few = pair
    given = ["run", str(model), "--device", "cuda", "--vram", MUCH, "--raw", "--no-lookup"]
    how = ["-p", "Hello", "--max-new-tokens", "8", "--threads", "1", "--json"]
    texts = []
    for draft in ([], ["--draft", str(few)]):
        assert main([*given, *how, *draft]) == 0
        texts.append(json.loads(capfd.readouterr().out))
    assert texts[0]["text"] == texts[1]["text"]


def test_a_draft_s_session_alone_has_a_cache_of_its_own(
    pair: tuple[Path, Path], without_a_gpu: None
) -> None:
    model, few = pair
    session, drafts = open_offloaded(model, None, few, threads=1, vram=MUCH)
    assert drafts is not None
    assert isinstance(drafts._session, DeviceDraft)
    session.forward(np.array([PROMPT]))
    before = [tensor.clone() for pair_ in session.cache.tensors() for tensor in pair_]
    drafts.session_alone().forward(np.array([PROMPT[::-1]]))
    after = [tensor for pair_ in session.cache.tensors() for tensor in pair_]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
