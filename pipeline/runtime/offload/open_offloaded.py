"""Open a checkpoint under a budget of bytes, here or on a GPU, alone or with a draft model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from pipeline.checkpoint.folder import read_architecture
from pipeline.errors import UsageError
from pipeline.export.contract import DEFAULT_MAX_LENGTH, FLOAT, WEIGHTS_FILE
from pipeline.export.record import read_export_record
from pipeline.memory import parse_bytes
from pipeline.model.task import require_decoder
from pipeline.progress import note
from pipeline.runtime.draft_model import (
    DraftModel,
    DraftSession,
    require_pair,
    require_same,
    rotation_in,
)
from pipeline.runtime.offload.cuda_device import CudaDevice
from pipeline.runtime.offload.device_draft import DeviceDraft
from pipeline.runtime.offload.device_ring import StreamDevice
from pipeline.runtime.offload.held_cache import DeviceCache
from pipeline.runtime.offload.stored_model import StoredModel
from pipeline.runtime.offload.streamed_model import out_of_gpu_memory
from pipeline.runtime.offload.streamed_session import StreamedSession
from pipeline.runtime.sessions.onnx_cpu_session import CpuSession
from pipeline.runtime.sessions.open_session import folder_kind

# What a checkpoint and its draft have to have in common, as their configs name it.
_SHARED = (
    "vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings",
)  # fmt: skip


def open_offloaded(
    folder: Path,
    memory: str | None,
    draft: Path | None = None,
    backend: str = "auto",
    threads: int | None = None,
    slots: int = 1,
    lookup: bool = False,
    length: int | None = None,
    vram: str | None = None,
    width: int | None = None,
) -> tuple[StreamedSession, DraftModel | None]:
    """Open a checkpoint of which as much stays in memory, or on the GPU, as a budget allows.

    The cache has as many places as the draft's, or, without one, as an export usually has.

    Args:
        folder: a checkpoint with plain matrices.
        memory: bytes for weights, cache and draft, such as "1GB"; or None, with `vram`.
        draft: an export of the same model, of the profile `cpu`, in fewer bytes; with `vram` it
            may be a checkpoint, which drafts on the GPU; or None.
        backend: `auto` or `torch`.
        threads: of PyTorch, and of ONNX Runtime for the draft; None leaves the choice to them.
        slots: rows of the cache.
        lookup: ask prompt lookup before the draft.
        length: tokens of every draft, 0 for none; None takes as many as pay.
        vram: bytes of the GPU for weights, cache, what a call takes and a draft that is a
            checkpoint, such as "8GB". The GPU computes then, and memory holds the layers that do
            not stay there.
        width: most guesses at one place, 1 for chains; None takes the usual trees.

    Returns:
        The session, and what drafts for it, if a draft is given.

    Raises:
        InputError: a folder does not load, cannot be offloaded, or the two do not fit each other.
        ResourceError: memory does not hold the layers that do not stay on the GPU.
        UsageError: a folder or `backend` is of another kind, or the budget is too small.
    """
    if not hasattr(os, "preadv"):
        raise UsageError(
            "Weights are read from disk layer by layer on Linux and macOS alone.",
            where="--memory, --vram",
            observed=f"a system '{os.name}', whose files are not read at a place",
            change="run the model without them, or under WSL",
        )
    budget_bytes = _budget_bytes(memory, vram)
    if threads is not None:
        torch.set_num_threads(threads)
    config = _require_checkpoint(folder, backend)
    device = None if vram is None else CudaDevice()
    wanted = _Wanted(folder, config, budget_bytes, slots, device)
    if draft is None:
        return wanted.open(wanted.places), None
    session, small = wanted.open_with(draft, threads)
    return session, DraftModel(session, small, lookup, length, width)


@dataclass(frozen=True)
class _Wanted:
    """A checkpoint that is to be opened under a budget.

    Attributes:
        folder: of the checkpoint.
        config: of its decoder.
        budget_bytes: of memory, or of a device's.
        slots: rows of the cache.
        device: that computes, or None.
    """

    folder: Path
    config: PreTrainedConfig
    budget_bytes: int
    slots: int
    device: StreamDevice | None

    @property
    def places(self) -> int:
        """Of a cache that no draft asks for."""
        return min(DEFAULT_MAX_LENGTH, self._most)

    @property
    def _most(self) -> int:
        return getattr(self.config, "max_position_embeddings", None) or DEFAULT_MAX_LENGTH

    def open(self, places: int, other_bytes: int = 0, **more: Any) -> StreamedSession:
        """The session, which is told of; raise as `open_offloaded`."""
        budget = self.budget_bytes, places, self.slots, other_bytes
        try:
            session = StreamedSession(self.folder, *budget, device=self.device, **more)
        except torch.OutOfMemoryError as error:
            raise out_of_gpu_memory(error) from error
        _say_what_is_moved(session)
        return session

    def open_with(self, draft: Path, threads: int | None) -> tuple[StreamedSession, DraftSession]:
        """The session and its draft's; raise as `open_offloaded`."""
        if self.device is not None and folder_kind(draft) == "torch":
            return self._open_with_checkpoint(draft, self.device)
        places = read_export_record(draft).max_length if folder_kind(draft) == "onnx" else 0
        own: dict[str, object] = {
            "vocab_size": self.config.vocab_size,
            "num_layers": self.config.num_hidden_layers,
            "max_length": min(places, self._most),
            "cache_format": FLOAT,
        }
        require_pair(self.folder, draft, own, rotation_in(self.config.to_dict()))
        if self.device is None:
            session = self.open(places, (draft / WEIGHTS_FILE).stat().st_size)
        else:
            session = self.open(places, is_shared=True)
        return session, CpuSession(draft, threads, values=session.values)

    def _open_with_checkpoint(
        self, draft: Path, device: StreamDevice
    ) -> tuple[StreamedSession, DraftSession]:
        """Both on the device, under one budget."""
        facts = [
            ({name: getattr(c, name, None) for name in _SHARED}, rotation_in(c.to_dict()))
            for c in (self.config, _require_checkpoint(draft, "auto"))
        ]
        require_same(self.folder, draft, facts[0], facts[1])
        stored = StoredModel(self.folder)
        model = DeviceDraft.load(draft, stored.dtype)
        spent = DeviceDraft.bytes_of(model) + device.library_bytes
        session = self.open(self.places, spent, stored=stored)
        assert isinstance(session.cache, DeviceCache)
        try:
            return session, DeviceDraft(model, session.cache, self.places)
        except torch.OutOfMemoryError as error:
            raise out_of_gpu_memory(error) from error


def open_plain(
    folder: Path, memory: str, draft: Path, threads: int | None = None
) -> StreamedSession:
    """What a drafted model is measured against: the quickest without a draft, a row for a token.

    It has the bytes of the draft for layers, and a cache of the same length.

    Args:
        folder: a checkpoint with plain matrices.
        memory: as of `open_offloaded`.
        draft: an export of the same model, of the profile `cpu`.
        threads: of PyTorch; None leaves the choice to it.

    Raises:
        InputError, UsageError: as `open_offloaded`.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    _require_checkpoint(folder, "auto")
    places = read_export_record(draft).max_length
    return StreamedSession(folder, parse_bytes(memory, "--memory"), places, steady=False)


def _require_checkpoint(folder: Path, backend: str) -> PreTrainedConfig:
    """The config of a checkpoint's decoder; raise UsageError for another kind of folder."""
    kind = folder_kind(folder)
    require_decoder(folder)
    if kind != "torch" or backend not in ("auto", kind):
        raise UsageError(
            "--memory and --vram are for a checkpoint, which PyTorch runs.",
            where=folder,
            observed=f"a folder for the backend '{kind}', --backend {backend}",
            change="give the checkpoint that it was made from, or leave them out",
        )
    return read_architecture(folder)[0].get_text_config()


def _budget_bytes(memory: str | None, vram: str | None) -> int:
    """The one budget that is given; raise UsageError for two of them."""
    if vram is None:
        assert memory is not None
        return parse_bytes(memory, "--memory")
    if memory is not None:
        raise UsageError(
            "--memory and --vram exclude each other: what does not stay on the GPU stays in "
            "memory, whatever it takes.",
            observed=f"--memory {memory}, --vram {vram}",
            change="leave --memory out; or, for a model that memory does not hold, --vram and "
            "--device, which reads layers from disk and computes on the CPU",
        )
    return parse_bytes(vram, "--vram")


def _say_what_is_moved(session: StreamedSession) -> None:
    found = session.traffic
    place, moved = ("on the GPU", "copied") if found.device_peak_bytes else ("in memory", "read")
    if found.resident == found.layers:
        note(f"all {found.layers} layers stay {place}: {found.held_bytes / 1e6:.0f} MB")
        return
    note(
        f"{found.resident} of {found.layers} layers stay {place} "
        f"({found.held_bytes / 1e6:.0f} MB); {found.pass_bytes / 1e6:.0f} MB are {moved} for a call"
    )
