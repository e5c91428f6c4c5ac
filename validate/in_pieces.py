"""PyTorch, given a text in pieces: in however many calls it is read, the numbers are the same."""

from __future__ import annotations

import numpy as np

from pipeline.runtime.sessions.torch_session import TorchSession

# Calls of no more tokens are read token by token, longer ones by so many.
_PIECE = 128


class SessionInPieces(TorchSession):
    """As `TorchSession`; a call becomes several, each behind what the cache has of those before."""

    def forward(self, input_ids: np.ndarray, last_only: bool = False) -> np.ndarray:
        length = input_ids.shape[1]
        size = 1 if length <= _PIECE else _PIECE
        parts = [
            super(SessionInPieces, self).forward(input_ids[:, start : start + size], last_only)
            for start in range(0, length, size)
        ]
        return parts[-1] if last_only else np.concatenate(parts, axis=1)
