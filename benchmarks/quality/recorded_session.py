"""A session whose logits are written down the first time, and read back every time after."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from pipeline.runtime.sessions.session import Session


class RecordedSession:
    """A session that is asked the same calls again and again.

    Logits are kept as float16, which moves a KL of 0.1 nats by less than 1e-4; the answer to a call
    that is made for the first time is rounded too, so that the second gives the same.

    Args:
        session: what answers a call that was not made before.
        folder: where the answers are kept; of this model alone.
    """

    def __init__(self, session: Session, folder: Path) -> None:
        self.session, self.folder, self.name = session, folder, session.name
        self.vocab_size, self.max_length = session.vocab_size, session.max_length
        self.row_cost: float | None = None
        self.max_rows: int | None = 1
        folder.mkdir(parents=True, exist_ok=True)
        self.reset()

    def reset(self) -> None:
        """Forget the sequence."""
        self.session.reset()
        self.length = 0
        self._digest = hashlib.sha256()
        self._unread: list[np.ndarray] = []

    def rewind(self, length: int) -> None:
        """Forget all: the record goes by whole sequences."""
        if length < self.length:
            self.reset()

    def sibling(self) -> RecordedSession:
        """A session over the same model and the same record."""
        return RecordedSession(self.session.sibling(), self.folder)

    def forward(self, input_ids: np.ndarray, last_only: bool = False) -> np.ndarray:
        """Logits of the next tokens of the one sequence; as `Session.forward`."""
        self.length += input_ids.shape[1]
        self._digest.update(input_ids.astype("<i8").tobytes())
        path = self.folder / f"{self._digest.hexdigest()}.npy"
        self._unread.append(input_ids)
        if not path.exists():
            # What was answered from the record is still unknown to the session.
            answers = [self.session.forward(ids) for ids in self._unread]
            self._unread = []
            np.save(path, answers[-1].astype(np.float16))
        logits = np.load(path).astype(np.float32)
        return logits[:, -1:] if last_only else logits
