"""What a model under a budget moves for its calls, and what it holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """What a model has read from disk or copied to a GPU, and what it holds.

    Attributes:
        layers: of the model.
        resident: how many of them stay where it computes.
        pass_bytes: read or copied for a call, with what fills blocks up.
        read_bytes: read since the model was opened, by what the system handed over.
        passes: calls so far.
        waited_s: that calls have waited for layers.
        direct: whether reads went past the page cache (O_DIRECT).
        held_bytes: of weights, buffers and cache: what is kept of the budget.
        copied_bytes: copied to a GPU for calls since the model was opened; 0 without one.
        pinned_bytes: of page-locked memory, from which that is copied.
        device_peak_bytes: most that was held of a GPU's memory, as PyTorch counts it.
    """

    layers: int
    resident: int
    pass_bytes: int
    read_bytes: int
    passes: int
    waited_s: float
    direct: bool
    held_bytes: int
    copied_bytes: int = 0
    pinned_bytes: int = 0
    device_peak_bytes: int = 0
