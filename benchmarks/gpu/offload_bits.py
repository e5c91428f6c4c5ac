"""A small model on a device, streamed and drafted for, beside itself without either: bits."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.layer_steps import TINY
from benchmarks.gpu.steps import Row, Setting, outcome, verdict
from pipeline.bench.shapes import Shape
from pipeline.errors import PipelineError
from pipeline.runtime.draft_model import DraftModel
from pipeline.runtime.generate import generate
from pipeline.runtime.offload.device_draft import DeviceDraft
from pipeline.runtime.offload.device_ring import StreamDevice
from pipeline.runtime.offload.held_cache import DeviceCache
from pipeline.runtime.offload.stored_model import StoredModel
from pipeline.runtime.offload.streamed_session import StreamedSession
from pipeline.runtime.sequence import Decoding
from pipeline.runtime.sessions.onnx_cpu_session import STEADY_TOKENS

_DTYPE = torch.float16
_MUCH_BYTES = 4 << 30
_PROMPT, _PLACES, _NEW, _DRAFTED = 40, 256, 64, 4
# Two ways of attention in half precision may differ at a near-tie.
_LEAST_RIGHT = 0.8


def bits_rows(setting: Setting, device: type[StreamDevice]) -> Iterator[Row]:
    """A row of logits in blocks, and one of answers that a second checkpoint drafts for."""
    from transformers import AutoModelForCausalLM

    small = Shape("llama", 1024, 4096, 8, 8, 4, 128, 2048, False, 2048)
    shape = small if setting.on_gpu else replace(TINY, layers=4, tied=False)
    torch.manual_seed(setting.seed)
    with tempfile.TemporaryDirectory() as root:
        folder, copy = Path(root) / "model", Path(root) / "copy"
        with torch.device(setting.device):
            model = AutoModelForCausalLM.from_config(shape.config(), dtype=_DTYPE)
        model.save_pretrained(folder)
        del model
        shutil.copytree(folder, copy)
        for name, row in (("bits", _logits_row), ("drafted", _drafted_row)):
            try:
                yield name, row(folder, copy, setting, device)
            except PipelineError as error:
                yield name, {"verdicts": [outcome("it runs", False, why=str(error))]}


def _opened(folder: Path, device: type[StreamDevice]) -> tuple[StreamedSession, StreamedSession]:
    """The model resident, and with some layers to be copied."""
    whole = StreamedSession(folder, _MUCH_BYTES, _PLACES, device=device())
    least = whole.traffic.held_bytes - 1
    return whole, StreamedSession(folder, least, _PLACES, device=device())


def _logits_row(
    folder: Path, copy: Path, setting: Setting, device: type[StreamDevice]
) -> dict[str, Any]:
    """Blocks of the streamed session, with draft tokens that are wrong, against single tokens."""
    whole, part = _opened(folder, device)
    random = np.random.default_rng(setting.seed)
    ids = random.integers(0, whole.vocab_size, _PLACES)
    first = ids[:_PROMPT]
    same = part.prefill(0, first).tobytes() == whole.prefill(0, first).tobytes()
    for place in range(_PROMPT, _PROMPT + (_NEW if setting.on_gpu else 6)):
        wrong = random.integers(0, whole.vocab_size, place % STEADY_TOKENS)
        rows = part.read_block(0, np.concatenate([ids[place : place + 1], wrong]))[:1]
        part.rewind_slot(0, place + 1)
        same &= rows.tobytes() == whole.decode([0], [int(ids[place])]).tobytes()
    found = part.traffic
    whole.close()
    part.close()
    claim = "streamed and drafted logits are, bit for bit, resident and undrafted ones"
    says = f"{found.resident} of {found.layers} layers resident, {found.passes} passes"
    return {"says": says, "verdicts": [outcome(claim, same)]}


def _drafted_row(
    folder: Path, copy: Path, setting: Setting, device: type[StreamDevice]
) -> dict[str, Any]:
    """An answer that the same numbers draft for, on the device and over the same cache."""
    tokens = _NEW if setting.on_gpu else 33
    _, part = _opened(folder, device)
    prompt = np.random.default_rng(setting.seed).integers(0, part.vocab_size, _PROMPT).tolist()
    began = time.perf_counter()
    plain = list(generate(part, prompt, Decoding(tokens)))
    plain_s = time.perf_counter() - began
    held = part.traffic.held_bytes
    part.close()
    session, drafts = _with_draft(folder, copy, held, device())
    drafter = drafts.begin(0)
    began = time.perf_counter()
    found = list(generate(session, prompt, Decoding(tokens), drafter))
    drafted_s = time.perf_counter() - began
    session.close()
    right = drafter.taken / max(1, drafter.drafted)
    return {
        "drafted": drafter.drafted,
        "taken": drafter.taken,
        "plain_s": plain_s,
        "drafted_s": drafted_s,
        "says": f"{drafter.taken} of {drafter.drafted} draft tokens right",
        "verdicts": [
            outcome("an answer that is drafted for is the one that is not", found == plain),
            verdict("draft tokens of the same numbers that are right", right, _LEAST_RIGHT),
        ],
    }


def _with_draft(
    folder: Path, copy: Path, held_bytes: int, device: StreamDevice
) -> tuple[StreamedSession, DraftModel]:
    """What `skipcat run --vram --draft` opens, with as many bytes for the model as without."""
    stored = StoredModel(folder)
    model = DeviceDraft.load(copy, stored.dtype)
    spent = DeviceDraft.bytes_of(model) + device.library_bytes
    session = StreamedSession(
        folder, held_bytes + spent, _PLACES, 1, spent, device=device, stored=stored
    )
    assert isinstance(session.cache, DeviceCache)
    return session, DraftModel(
        session, DeviceDraft(model, session.cache, _PLACES), False, _DRAFTED, 1
    )
