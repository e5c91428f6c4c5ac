"""A model whose layers come from disk says what it says in memory, and no bit depends on drafts."""

from __future__ import annotations

import errno
import functools
import gc
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from pipeline.checkpoint.folder import load_checkpoint
from pipeline.errors import InputError, UsageError
from pipeline.memory import disk_read_bytes
from pipeline.runtime.generate import generate, stream_batch
from pipeline.runtime.offload import streamed_session
from pipeline.runtime.offload.residency import RING_BUFFERS
from pipeline.runtime.offload.side_by_side import ModelCall
from pipeline.runtime.offload.stored_model import StoredModel
from pipeline.runtime.offload.streamed_session import StreamedSession
from pipeline.runtime.sampling import GREEDY, Sampling
from pipeline.runtime.sequence import Decoding
from pipeline.runtime.sessions.session import Block
from pipeline.runtime.sessions.torch_session import TorchSession
from tests.support.families import FAMILIES, save_family
from tests.support.layered_model import DEPTH, PLACES
from tests.support.scripted_drafts import DRAFTS, PROMPT, WARM, Scripted, said

LAYERS = DEPTH
MUCH = 50_000_000


@functools.cache
def little(folder: Path, slots: int) -> int:
    """A budget for all that is always held, and for a single layer that stays."""
    session = StreamedSession(folder, MUCH, PLACES, slots)
    sizes = layer_bytes(folder)
    held = session.traffic.held_bytes
    session.close()
    return held - sum(sizes) + (RING_BUFFERS + 1) * max(sizes)


def layer_bytes(folder: Path) -> list[int]:
    """Of each layer, as it is read."""
    stored = StoredModel(folder)
    stored.reader.close()
    return [layout.size for layout in stored.layouts]


def streamed(folder: Path, memory_bytes: int | None = None, slots: int = 1) -> StreamedSession:
    """Of five layers one stays, unless there is more memory."""
    wanted = memory_bytes or little(folder, slots)
    session = StreamedSession(folder, wanted, PLACES, slots)
    assert session.traffic.held_bytes <= wanted
    assert session.traffic.resident == (1 if memory_bytes is None else LAYERS)
    return session


def folder_of(model: Path, dtype: str) -> Path:
    return model if dtype == "float32" else model.parent / dtype


# --- what it says ---


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_every_family_are_those_of_the_model_in_memory(
    family: str, tmp_path: Path
) -> None:
    folder = save_family(tmp_path / family, family, layers=LAYERS)
    ids = np.random.default_rng(0).integers(0, 250, (1, 60))
    session, whole = streamed(folder), TorchSession(load_checkpoint(folder, dtype=torch.float32))
    for part in np.split(ids, [3, 25, 26, 32], axis=1):
        # Rounding of float32 alone: attention is summed in another order.
        np.testing.assert_allclose(session.forward(part), whole.forward(part), atol=5e-5)
    session.rewind(10)
    np.testing.assert_allclose(
        session.forward(ids[:, 10:20], last_only=True)[0, 0],
        whole_row(folder, ids[:, :20]),
        atol=5e-5,
    )


def whole_row(folder: Path, ids: np.ndarray) -> np.ndarray:
    model = load_checkpoint(folder, dtype=torch.float32)
    logits: np.ndarray = TorchSession(model).forward(ids)[0, -1]
    return logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_which_layers_stay_changes_no_bit(model: Path, dtype: str) -> None:
    folder = folder_of(model, dtype)
    found = [said(streamed(folder, memory), GREEDY, None) for memory in (None, MUCH)]
    assert found[0] == found[1]
    bfloat16 = load_file(folder / "model.safetensors")["model.norm.weight"].dtype
    assert str(bfloat16) == f"torch.{dtype}"


@pytest.mark.parametrize(
    ("dtype", "how"),
    [("float32", GREEDY), ("bfloat16", GREEDY), ("float32", WARM)],
    ids=["float32", "bfloat16", "sampled"],
)
def test_ids_logits_and_cache_are_those_without_drafts(
    model: Path, dtype: str, how: Sampling
) -> None:
    session = streamed(folder_of(model, dtype))
    plain = said(session, how, None, tokens=20)
    for name, choose in DRAFTS.items():
        for length in (0, 1, 2, 3, 7, 16) if name == "right" else (1, 3, 7):
            drafter = Scripted(plain[0], length, choose)
            assert said(session, how, drafter, tokens=20) == plain
            assert (drafter.drafted > 0) == (length > 0)


def test_the_cache_is_after_every_call_what_it_is_without_drafts(model: Path) -> None:
    ids = np.random.default_rng(1).integers(0, 250, 30)
    drafted, plain = streamed(model), streamed(model)
    for session in (drafted, plain):
        session.prefill(0, ids[:9])
    for place in range(9, 27):
        wrong = np.array([ids[place], ids[place + 1], 3, 4])
        rows = drafted.read_block(0, wrong)[:1]
        drafted.rewind_slot(0, place + 1)
        assert rows.tobytes() == plain.decode([0], [int(ids[place])]).tobytes()
        for name, held in drafted.values.buffers.items():
            own = plain.values.buffers[name]
            assert held[0, :, : place + 1].tobytes() == own[0, :, : place + 1].tobytes()


def test_what_lies_behind_the_tokens_changes_nothing(model: Path) -> None:
    ids = np.random.default_rng(2).integers(0, 250, 20)
    session = streamed(model)
    session.prefill(0, ids[:9])
    clean = session.read_block(0, ids[9:12])
    session.rewind_slot(0, 9)
    for held in session.values.buffers.values():
        held[0, :, 9:12] = np.nan  # as a draft may have left it
        held[0, :, 12:] = 1e4
    assert session.read_block(0, ids[9:12]).tobytes() == clean.tobytes()


def test_a_prompt_longer_than_a_call_is_read_by_parts_and_a_full_cache_is_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed_session, "_ROWS", (17, 40))
    ids = np.random.default_rng(3).integers(0, 250, (1, PLACES))
    session = streamed(model)
    before = session.traffic.passes
    last = session.forward(ids, last_only=True)
    assert session.traffic.passes - before == 1  # three calls of each layer while it is there
    np.testing.assert_allclose(last[0, 0], whole_row(model, ids), atol=5e-5)
    with pytest.raises(InputError, match="Too many tokens"):
        session.forward(ids[:, :1])
    session.rewind(PLACES - 1)
    assert session.forward(ids[:, -1:]).shape == (1, 1, session.vocab_size)


def test_slots_answer_as_one_does_alone(model: Path) -> None:
    prompts = [[5, 6, 7, 8], [9], [1, 2, 3, 4, 5, 6, 7]]
    together = stream_batch(streamed(model, slots=2), prompts, Decoding(9, WARM), seeds=[3] * 3)
    alone = streamed(model)
    for running, prompt in zip(together, prompts, strict=True):
        alone.reset()
        assert running.ids == list(generate(alone, prompt, Decoding(9, WARM, seed=3)))
    two = streamed(model)
    rows = two.forward(np.array([PROMPT, PROMPT[::-1]]))
    np.testing.assert_array_equal(rows[0], alone_rows(model, PROMPT))


@pytest.mark.parametrize("family", ["gemma3_text", "smollm"])
def test_many_slots_share_a_pass_and_each_block_has_the_bits_it_has_alone(
    family: str, tmp_path: Path
) -> None:
    folder = save_family(tmp_path / family, family, layers=LAYERS)
    together, apart = streamed(folder, slots=4), streamed(folder, slots=4)
    random = np.random.default_rng(4)
    # A prompt of several calls beside short ones, answers of one token and with draft tokens.
    for lengths in ((90, 3, 0, 30), (1, 1, 1, 1), (5, 17, 9, 0), (2, 1, 90, 1)):
        ids = [random.integers(0, 250, length) for length in lengths]
        blocks = [Block(n, own, n == 3) for n, own in enumerate(ids) if len(own)]
        before = together.traffic.passes
        found = together.read_blocks(blocks)
        assert together.traffic.passes == before + 1
        for block, rows in zip(blocks, found, strict=True):
            own = apart.read_blocks([block])[0]
            assert rows.tobytes() == own.tobytes()
            assert rows.shape == (1 if block.last_only else len(block.ids), together.vocab_size)
    for name, held in together.values.buffers.items():
        assert held.tobytes() == apart.values.buffers[name].tobytes()


def test_a_block_that_does_not_fit_leaves_all_slots_as_they_were(model: Path) -> None:
    session = streamed(model, slots=2)
    blocks = [Block(0, np.array(PROMPT)), Block(1, np.arange(PLACES + 1))]
    with pytest.raises(InputError, match="Too many tokens"):
        session.read_blocks(blocks)
    assert [session.slot_length(slot) for slot in (0, 1)] == [0, 0]


def test_layers_that_are_no_chain_cannot_share_a_pass(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = streamed(model, slots=2)
    layers = session._streamed.model.base_model.layers
    layers[2].register_forward_hook(lambda module, given, found: found * 1.5)
    session.prefill(0, np.array(PROMPT))
    session.decode([0, 1], [3, 4])  # in one call of the model
    with pytest.raises(InputError, match="cannot share a pass"):
        session.read_blocks([Block(slot, np.arange(17)) for slot in (0, 1)])


def alone_rows(folder: Path, ids: list[int]) -> np.ndarray:
    logits: np.ndarray = streamed(folder).forward(np.array([ids]))[0]
    return logits


# --- memory and disk ---


def test_a_call_reads_what_is_not_kept_and_the_kernel_counts_as_much(model: Path) -> None:
    session = streamed(model)
    session.forward(np.array([PROMPT]))
    before, counted = session.traffic, disk_read_bytes()
    assert counted is not None
    for _ in range(20):
        session.forward(np.array([[1]]))
    after = session.traffic
    assert after.passes - before.passes == 20
    # The ring is ahead by its two buffers at most, before as well as after.
    ahead = 2 * max(layer_bytes(model))
    assert abs(after.read_bytes - before.read_bytes - 20 * after.pass_bytes) <= ahead
    if after.direct:
        read = disk_read_bytes()
        assert read is not None
        assert read - counted >= 20 * after.pass_bytes - ahead


def test_nothing_is_read_where_all_fits_and_a_budget_that_is_too_small_names_one_that_is_not(
    model: Path,
) -> None:
    session = streamed(model, MUCH)
    before = session.traffic.read_bytes
    session.forward(np.array([PROMPT]))
    assert session.traffic.read_bytes == before
    with pytest.raises(UsageError, match="too small") as caught:
        StreamedSession(model, 1000, PLACES)
    least = int(caught.value.details["expected"].split()[2])
    StreamedSession(model, least * 1_000_000, PLACES)


def test_the_thread_and_the_files_go_with_the_session(model: Path) -> None:
    gc.collect()
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    session = streamed(model)
    session.forward(np.array([PROMPT]))
    session.close()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before
    session = streamed(model)
    del session
    gc.collect()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


# --- what goes wrong ---


def test_a_call_that_breaks_off_leaves_the_next_as_it_would_be(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, plain = streamed(model), streamed(model)
    for each in (session, plain):
        each.prefill(0, np.array(PROMPT))
    real, calls = os.preadv, iter(range(99))

    def preadv(*rest: Any) -> int:
        if next(calls) == 4:
            raise OSError(errno.EIO, "I/O error")
        return real(*rest)

    def read_on() -> None:
        for _ in range(9):
            session.read_block(0, np.array([9, 8]))
            session.rewind_slot(0, len(PROMPT))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        with pytest.raises(InputError, match="could not be read"):
            read_on()
    with monkeypatch.context() as patch:
        patch.setattr(session._streamed, "_finish_pass", interrupted)
        with pytest.raises(KeyboardInterrupt):
            read_on()
    session.rewind_slot(0, len(PROMPT))
    rows = session.read_block(0, np.array([9, 8]))
    assert rows.tobytes() == plain.read_block(0, np.array([9, 8])).tobytes()


def interrupted() -> None:
    raise KeyboardInterrupt


def changed(model: Path, folder: Path, name: str, number: float) -> Path:
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name][1, 2] = number
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_weights_that_are_no_numbers_are_named(model: Path, tmp_path: Path) -> None:
    folder = changed(model, tmp_path / "table", "model.embed_tokens.weight", np.nan)
    with pytest.raises(InputError, match="not finite") as caught:
        StreamedSession(folder, MUCH, PLACES)
    assert "row 1" in caught.value.details["observed"]
    name = f"model.layers.{LAYERS - 1}.mlp.up_proj.weight"
    folder = changed(model, tmp_path / "layer", name, np.inf)
    session = StreamedSession(folder, little(model, 1), PLACES)
    with pytest.raises(InputError, match="not finite") as caught:
        session.forward(np.array([PROMPT]))
    assert name in caught.value.details["observed"]


def test_logits_that_are_no_numbers_are_refused(model: Path, tmp_path: Path) -> None:
    name = f"model.layers.{LAYERS - 1}.self_attn.q_proj.weight"
    session = StreamedSession(changed(model, tmp_path / "large", name, 3e38), MUCH, PLACES)
    with pytest.raises(InputError, match="no numbers"):
        session.forward(np.array([PROMPT]))
    assert session.length == 0


def test_a_file_that_changes_is_refused(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "copy")
    session = streamed(folder)
    session.forward(np.array([PROMPT]))
    os.utime(folder / "model.safetensors")
    with pytest.raises(InputError, match="was changed"):  # what is read already still counts
        list(generate(session, PROMPT, Decoding(9)))


def test_a_model_whose_bits_depend_on_their_place_is_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ModelCall.run

    def uneven(call: ModelCall, model: PreTrainedModel) -> torch.Tensor:
        return own(call, model) + len(np.unique(call.cache.positions))

    monkeypatch.setattr(ModelCall, "run", uneven)
    with pytest.raises(InputError, match="would change answers"):
        streamed(model)


def test_a_model_of_a_kind_that_cannot_be_read_by_layers_is_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    folder = save_family(tmp_path / "dynamic", "llama", rope_parameters=rope)
    with pytest.raises(InputError, match="cannot be offloaded") as caught:
        StreamedSession(folder, MUCH, PLACES)
    assert "dynamic" in caught.value.details["observed"]
    with pytest.raises(UsageError, match="opened once"):
        streamed(save_family(tmp_path / "plain", "llama", layers=LAYERS)).sibling()
