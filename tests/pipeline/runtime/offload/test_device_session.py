"""A model whose layers are copied to a device says what it says there, and no wait is missing."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoint.folder import load_checkpoint
from pipeline.cli.main import main
from pipeline.errors import InputError, ResourceError, UsageError
from pipeline.runtime.generate import stream_batch
from pipeline.runtime.offload import open_offloaded as opening
from pipeline.runtime.offload.device_ring import DeviceRing
from pipeline.runtime.offload.open_offloaded import open_offloaded
from pipeline.runtime.offload.residency import RING_BUFFERS
from pipeline.runtime.offload.streamed_session import StreamedSession
from pipeline.runtime.sampling import GREEDY, Sampling
from pipeline.runtime.sequence import Decoding
from pipeline.runtime.sessions.session import Block
from pipeline.runtime.sessions.torch_session import TorchSession
from tests.support.families import FAMILIES, save_family
from tests.support.layered_model import DEPTH, PLACES, draft_of
from tests.support.lazy_device import LazyDevice, forget, release_first
from tests.support.scripted_drafts import DRAFTS, PROMPT, WARM, Scripted, said

MUCH = 50_000_000
IDS = np.random.default_rng(0).integers(0, 250, (1, 60))


@functools.cache
def little(folder: Path, slots: int = 1) -> int:
    """A budget for all that is always held, and for a single layer that stays."""
    session = StreamedSession(folder, MUCH, PLACES, slots, device=LazyDevice())
    sizes = [slab.size for slab in session._streamed._weights._slabs]  # type: ignore[attr-defined]
    return session.traffic.held_bytes - sum(sizes) + (RING_BUFFERS + 1) * max(sizes)


def streamed(
    folder: Path, seed: int = 0, slots: int = 1, copies_first: float = 0.5
) -> tuple[StreamedSession, LazyDevice]:
    """Of five layers one stays."""
    device, wanted = LazyDevice(seed, copies_first), little(folder, slots)
    session = StreamedSession(folder, wanted, PLACES, slots, device=device)
    assert session.traffic.held_bytes <= wanted
    assert session.traffic.resident == 1
    return session, device


def resident(folder: Path, slots: int = 1) -> StreamedSession:
    session = StreamedSession(folder, MUCH, PLACES, slots, device=LazyDevice())
    assert session.traffic.resident == DEPTH
    return session


def folder_of(model: Path, dtype: str) -> Path:
    return model if dtype == "float32" else model.parent / dtype


# --- what it says ---


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_every_family_are_those_of_the_model_in_memory(
    family: str, tmp_path: Path
) -> None:
    folder = save_family(tmp_path / family, family, layers=DEPTH)
    session, device = streamed(folder)
    whole = TorchSession(load_checkpoint(folder, dtype=torch.float32))
    for part in np.split(IDS, [3, 25, 26, 32], axis=1):
        # Rounding of float32 alone: attention is summed in another order.
        np.testing.assert_allclose(session.forward(part), whole.forward(part), atol=5e-5)
    assert device.races == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("copies_first", [0.0, 0.5, 1.0])
def test_ids_logits_and_cache_are_those_of_the_resident_model(
    model: Path, dtype: str, copies_first: float
) -> None:
    folder = folder_of(model, dtype)
    whole = resident(folder)
    expected = said(whole, GREEDY, None, tokens=12)
    for seed in range(3):
        session, device = streamed(folder, seed, copies_first=copies_first)
        assert said(session, GREEDY, None, tokens=12) == expected
        assert device.races == []
        for own, other in zip(session.cache.tensors(), whole.cache.tensors(), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))
    assert session.name == f"torch cpu {dtype}, {DEPTH - 1} of {DEPTH} layers copied"


@pytest.mark.parametrize(
    ("dtype", "how"),
    [("float32", GREEDY), ("bfloat16", GREEDY), ("float32", WARM)],
    ids=["float32", "bfloat16", "sampled"],
)
def test_ids_and_logits_are_those_without_drafts(model: Path, dtype: str, how: Sampling) -> None:
    session, device = streamed(folder_of(model, dtype))
    plain = said(session, how, None, tokens=20)
    for name, choose in DRAFTS.items():
        for length in (0, 1, 3, 7, 16) if name == "right" else (1, 7):
            drafter = Scripted(plain[0], length, choose)
            assert said(session, how, drafter, tokens=20) == plain
            assert (drafter.drafted > 0) == (length > 0)
    assert device.races == []


def test_many_slots_share_a_pass_and_each_block_has_the_bits_it_has_alone(model: Path) -> None:
    together, device = streamed(model, slots=4)
    apart, _ = streamed(model, slots=4, seed=1)
    random = np.random.default_rng(4)
    for lengths in ((90, 3, 0, 30), (1, 1, 1, 1), (5, 17, 9, 0)):
        ids = [random.integers(0, 250, length) for length in lengths]
        blocks = [Block(n, own, n == 3) for n, own in enumerate(ids) if len(own)]
        before = together.traffic
        found = together.read_blocks(blocks)
        assert together.traffic.passes == before.passes + 1
        assert together.traffic.copied_bytes - before.copied_bytes == before.pass_bytes
        for block, rows in zip(blocks, found, strict=True):
            assert rows.tobytes() == apart.read_blocks([block])[0].tobytes()
    assert device.races == []


def test_more_rows_keep_what_the_cache_holds(model: Path) -> None:
    prompts = [[5, 6, 7, 8], [9], [1, 2, 3, 4, 5, 6, 7]]
    session, _ = streamed(model)
    alone = [session.forward(np.array([ids]))[0][-1:] for ids in ([[3, 4]])]
    session.reset()
    both = session.forward(np.array([[3, 4], [4, 3]]))
    np.testing.assert_array_equal(both[0][-1:], alone[0])
    together = stream_batch(resident(model, 2), prompts, Decoding(9, WARM), seeds=[3] * 3)
    again = stream_batch(streamed(model, slots=2)[0], prompts, Decoding(9, WARM), seeds=[3] * 3)
    assert [running.ids for running in together] == [running.ids for running in again]


def test_a_draft_reads_a_copy_of_the_cache_and_changes_no_bit(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "CudaDevice", LazyDevice)
    small, vram, answers = draft_of(model), str(little(model)), []
    for length in (0, 3, 7):
        session, drafts = open_offloaded(
            model, None, small, threads=1, length=length, lookup=False, vram=vram
        )
        assert 0 < session.traffic.resident < DEPTH
        assert drafts is not None
        drafter = drafts.begin(0)
        answers.append(said(session, GREEDY, drafter, tokens=20))
        # Its weights are the model's in 4 bits: with the right cache most of what is near is right.
        assert drafter.taken > 0.3 * drafter.drafted or length != 3
        assert (drafter.taken > 0) == (length > 0)
        flat = [tensor for pair in session.cache.tensors() for tensor in pair]
        for copy, own in zip(session.values.buffers.values(), flat, strict=True):
            np.testing.assert_array_equal(copy[0, :, : session.length], own[0, :, : session.length])
    assert answers == [answers[0]] * len(answers)


# --- what goes wrong ---


def test_a_call_that_breaks_off_leaves_the_next_as_it_would_be(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (session, device), plain = streamed(model), resident(model)
    for each in (session, plain):
        each.prefill(0, np.array(PROMPT))
    layers = session._streamed.model.get_submodule(session._streamed._path)
    for place, broken in enumerate(layers.children()):
        with monkeypatch.context() as patch:
            patch.setattr(broken, "forward", lambda *rest, place=place, **named: _raise(place))
            expected: Any = (ResourceError, KeyboardInterrupt)[place % 2]
            with pytest.raises(expected):
                session.read_block(0, np.array([9, 8]))
        rows = session.read_block(0, np.array([9, 8]))
        assert rows.tobytes() == plain.read_block(0, np.array([9, 8])).tobytes()
        for each in (session, plain):
            each.rewind_slot(0, len(PROMPT))
    assert device.races == []


def _raise(place: int) -> None:
    raise (torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt())[place % 2]


def _never_release(patch: pytest.MonkeyPatch) -> None:
    """A ring that fills the other buffer instead of the one that is released."""
    fill = DeviceRing._fill

    def other(self: DeviceRing, buffer: torch.Tensor) -> None:
        fill(self, self._buffers[0])

    patch.setattr(DeviceRing, "_fill", other)


@pytest.mark.parametrize(
    "fault",
    [forget("hold_compute"), forget("hold_copies"), release_first, _never_release],
    ids=["filled", "released", "released first", "one buffer"],
)
def test_a_wait_that_is_missing_is_found(
    fault: Callable[[pytest.MonkeyPatch], None], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = said(resident(model), GREEDY, None, tokens=4), little(model)
    fault(monkeypatch)
    for seed in range(4):
        try:
            session, device = streamed(model, seed, copies_first=seed / 3)
            found = said(session, GREEDY, None, tokens=4)
        except InputError:  # NaN, or bits that change: what the product itself finds
            return
        if found != expected or device.races:
            return
    pytest.fail("no order of the streams shows it")


def test_a_budget_that_is_too_small_names_one_that_is_not(model: Path) -> None:
    with pytest.raises(UsageError, match="too small") as caught:
        StreamedSession(model, 1000, PLACES, device=LazyDevice())
    assert caught.value.details["where"] == "--vram"
    least = int(caught.value.details["expected"].split()[2])
    device = LazyDevice()
    session = StreamedSession(model, least * 1_000_000, PLACES, device=device)
    assert session.traffic.device_peak_bytes <= session.traffic.held_bytes <= least * 1_000_000


def test_layers_that_memory_does_not_hold_are_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = little(model)
    free = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    with pytest.raises(ResourceError, match="does not hold the layers") as caught:
        StreamedSession(model, wanted, PLACES, device=LazyDevice())
    assert "--vram" in caught.value.details["change"]
    assert resident(model).traffic.pinned_bytes == 0


def test_a_gpu_that_is_smaller_than_its_budget_is_said(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: LazyDevice, size_bytes: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nand more")

    monkeypatch.setattr(opening, "CudaDevice", LazyDevice)
    monkeypatch.setattr(LazyDevice, "buffer", full)
    with pytest.raises(ResourceError, match="that the budget promises") as caught:
        open_offloaded(model, None, vram="1GB")
    assert caught.value.details["observed"].endswith("2.00 GiB")
    assert "--vram" in caught.value.details["change"]


def test_weights_that_are_no_numbers_are_named_when_the_model_is_opened(
    model: Path, tmp_path: Path
) -> None:
    tied, inner = "model.embed_tokens.weight", "model.layers.3.mlp.up_proj.weight"
    for name, told in ((tied, "lm_head.weight"), (inner, inner)):
        folder = save_family(tmp_path / name, "llama", layers=DEPTH, tie_word_embeddings=True)
        tensors = load_file(folder / "model.safetensors")
        tensors[name][1, 2] = torch.inf
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match="not finite") as caught:
            StreamedSession(folder, little(model), PLACES, device=LazyDevice())
        assert f"row 1 (1 rows in all) of {told}" in caught.value.details["observed"]


# --- from the command line ---


def test_the_command_answers_and_says_what_was_copied(
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(opening, "CudaDevice", LazyDevice)
    monkeypatch.setattr(opening, "DEFAULT_MAX_LENGTH", PLACES)
    given = ["run", str(model), "--device", "cuda", "--vram", str(little(model))]
    how = ["-p", "Hello", "--max-new-tokens", "6", "--threads", "1"]
    assert main([*given, *how, "--json"]) == 0
    out, err = capfd.readouterr()
    answer = json.loads(out)
    traffic = answer["traffic"]
    assert traffic["copied_bytes"] > traffic["pass_bytes"] == traffic["pinned_bytes"] > 0
    assert 0 < traffic["device_peak_bytes"] <= traffic["held_bytes"] <= little(model)
    assert f"1 of {DEPTH} layers stay on the GPU" in err
    assert main([*given, *how, "--draft", str(draft_of(model))]) == 0
    assert "copied to the GPU" in capfd.readouterr().err
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Hello\nwhat else\n")
    assert main([*given, "--prompts", str(prompts), "--batch-size", "1", *how[2:], "--json"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert json.loads(lines[0])["text"] == answer["text"]


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--device", "cuda", "--vram", "9KB"], 2, "at least"),
        (["--device", "cuda", "--vram", "some"], 2, "no number of bytes"),
        (["--vram", "1GB"], 2, "--vram is a budget of the GPU's memory"),
        (["--device", "cuda", "--vram", "1GB", "--memory", "1GB"], 2, "exclude each other"),
        (["--device", "cuda", "--vram", "1GB", "--backend", "onnx"], 2, "are for a checkpoint"),
        (["--device", "cuda", "--draft", "DRAFT"], 2, "runs on the CPU, unless"),
        (["--device", "cuda", "--prompts", "PROMPTS"], 2, "without --vram"),
        (["--vram", "1GB", "--prompts", "PROMPTS"], 2, "--vram is a budget of the GPU's memory"),
    ],
)
def test_what_cannot_be_is_refused(
    flags: list[str],
    status: int,
    message: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(opening, "CudaDevice", LazyDevice)
    (tmp_path / "prompts.txt").write_text("Hello\n")
    places = {"DRAFT": str(draft_of(model)), "PROMPTS": str(tmp_path / "prompts.txt")}
    given = [places.get(flag, flag) for flag in flags]
    given += [] if "--prompts" in flags else ["-p", "Hello"]
    assert main(["run", str(model), *given]) == status
    assert message in " ".join(capsys.readouterr().err.split())
