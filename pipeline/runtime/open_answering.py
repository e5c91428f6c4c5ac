"""Open whatever answers: a folder alone, with a draft, or under a budget of bytes."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import UsageError
from pipeline.runtime.draft_model import DraftModel, open_drafted
from pipeline.runtime.drafting import DraftSource
from pipeline.runtime.sessions.session import SlotSession
from pipeline.runtime.sessions.slots import open_slots
from pipeline.runtime.sessions.slotted_session import SlottedSession


def open_answering(
    folder: Path,
    draft: Path | None,
    backend: str = "auto",
    threads: int | None = None,
    slots: int = 1,
    lookup: bool = False,
    memory: str | None = None,
    vram: str | None = None,
) -> tuple[SlotSession, DraftSource | None]:
    """A model with slots, and what drafts for its answers: nothing without a draft.

    Args:
        folder: of the model.
        draft: a smaller export of it, or None.
        backend: as for `open_slots`; with a draft or a budget, as for `open_helped`.
        threads: of ONNX Runtime.
        slots: at least so many.
        lookup: as for `open_helped`.
        memory: likewise.
        vram: likewise.

    Raises:
        InputError, UsageError: as `open_slots` and `open_helped`.
    """
    if draft is None and memory is None and vram is None:
        return open_slots(folder, backend, threads, slots), None
    return open_helped(folder, draft, backend, threads, slots, lookup, memory, vram=vram)


def open_helped(
    folder: Path,
    draft: Path | None,
    backend: str = "auto",
    threads: int | None = None,
    slots: int = 1,
    lookup: bool = False,
    memory: str | None = None,
    length: int | None = None,
    vram: str | None = None,
    width: int | None = None,
) -> tuple[SlottedSession, DraftModel | None]:
    """A model with a draft over its cache, or under a budget of bytes, or both.

    Args:
        folder: an export, or, with a budget, a checkpoint.
        draft: an export of the same model in fewer bytes; needed without a budget.
        backend: as for `open_drafted`, or `open_offloaded`.
        threads: of ONNX Runtime.
        slots: rows of the cache.
        lookup: ask prompt lookup before the draft.
        memory: bytes for weights and cache, such as "1GB"; None for all that there are.
        length: tokens of every draft, 0 for none; None takes as many as pay.
        vram: bytes of the GPU, on which a checkpoint is then computed; None for the CPU.
        width: most guesses at one place, 1 for chains; None takes what the model can check.

    Raises:
        InputError, UsageError: as `open_drafted` and `open_offloaded`.
    """
    if memory is None and vram is None:
        assert draft is not None
        return open_drafted(folder, draft, backend, threads, slots, lookup, length, width)
    from pipeline.runtime.offload.open_offloaded import open_offloaded

    return open_offloaded(
        folder, memory, draft, backend, threads, slots, lookup, length, vram, width
    )


def require_device(device: str, vram: str | None) -> None:
    """Raise UsageError for a budget of a GPU's memory where no GPU is asked for."""
    if vram is not None and device != "cuda":
        raise UsageError(
            "--vram is a budget of the GPU's memory.",
            observed=f"--vram {vram}, --device {device}",
            change="pass --device cuda too, or --memory instead",
        )
