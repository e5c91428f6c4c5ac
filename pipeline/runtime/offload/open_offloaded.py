"""Open a checkpoint under a budget of bytes, here or on a GPU, alone or with a draft model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedConfig

from pipeline.checkpoint.folder import read_architecture
from pipeline.errors import UsageError
from pipeline.export.contract import DEFAULT_MAX_LENGTH, FLOAT, WEIGHTS_FILE
from pipeline.export.record import read_export_record
from pipeline.memory import parse_bytes
from pipeline.model.task import require_decoder
from pipeline.progress import note
from pipeline.runtime.draft_model import DraftModel, require_pair, require_same, rotation_in
from pipeline.runtime.offload.cuda_device import CudaDevice
from pipeline.runtime.offload.device_draft import DeviceDraft, bytes_of, load_device_draft
from pipeline.runtime.offload.device_ring import StreamDevice
from pipeline.runtime.offload.held_cache import DeviceCache
from pipeline.runtime.offload.stored_model import StoredModel
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

    Returns:
        The session, and what drafts for it, if a draft is given.

    Raises:
        InputError: a folder does not load, cannot be offloaded, or the two do not fit each other.
        ResourceError: memory does not hold the layers that do not stay on the GPU.
        UsageError: a folder or `backend` is of another kind, or the budget is too small.
    """
    budget_bytes = _budget_bytes(memory, vram)
    if threads is not None:
        torch.set_num_threads(threads)
    config = _require_checkpoint(folder, backend)
    most = getattr(config, "max_position_embeddings", None) or DEFAULT_MAX_LENGTH
    device = None if vram is None else CudaDevice()
    if draft is None:
        places = min(DEFAULT_MAX_LENGTH, most)
        session = StreamedSession(folder, budget_bytes, places, slots, device=device)
        _say_what_is_moved(session)
        return session, None
    if device is not None and folder_kind(draft) == "torch":
        places = min(DEFAULT_MAX_LENGTH, most)
        budget = budget_bytes, places, slots
        session, own_draft = _open_on_device(folder, draft, config, *budget, device)
        return session, DraftModel(session, own_draft, lookup, length)
    places = read_export_record(draft).max_length if folder_kind(draft) == "onnx" else 0
    own: dict[str, object] = {
        "vocab_size": config.vocab_size,
        "num_layers": config.num_hidden_layers,
        "max_length": min(places, most),
        "cache_format": FLOAT,
    }
    require_pair(folder, draft, own, rotation_in(config.to_dict()))
    if device is None:
        draft_bytes = (draft / WEIGHTS_FILE).stat().st_size
        session = StreamedSession(folder, budget_bytes, places, slots, draft_bytes)
    else:
        session = StreamedSession(
            folder, budget_bytes, places, slots, device=device, is_shared=True
        )
    _say_what_is_moved(session)
    small = CpuSession(draft, threads, values=session.values)
    return session, DraftModel(session, small, lookup, length)


def _open_on_device(
    folder: Path,
    draft: Path,
    config: PreTrainedConfig,
    vram_bytes: int,
    places: int,
    slots: int,
    device: StreamDevice,
) -> tuple[StreamedSession, DeviceDraft]:
    """A model and a draft on the same device, under one budget; raise as `open_offloaded`."""
    other = _require_checkpoint(draft, "auto")
    facts = [
        ({name: getattr(c, name, None) for name in _SHARED}, rotation_in(c.to_dict()))
        for c in (config, other)
    ]
    require_same(folder, draft, facts[0], facts[1])
    stored = StoredModel(folder)
    model = load_device_draft(draft, stored.dtype)
    spent = bytes_of(model) + device.library_bytes
    session = StreamedSession(
        folder, vram_bytes, places, slots, spent, device=device, stored=stored
    )
    _say_what_is_moved(session)
    assert isinstance(session.cache, DeviceCache)
    return session, DeviceDraft(model, session.cache, places)


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
