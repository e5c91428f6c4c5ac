"""A ring of buffers that a thread fills with layer after layer, one ahead of whoever computes."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np

from pipeline.runtime.offload.residency import RING_BUFFERS
from pipeline.runtime.offload.weight_reader import Layout, WeightReader, aligned_buffer

# Between two looks at what else a thread might be told, such as Ctrl-C.
_LOOK_S = 0.1


class LayerRing:
    """Layers in their order, again and again, each read before it is asked for.

    Args:
        reader: reads them; nobody else may meanwhile.
        layouts: of each layer, at least one.

    Attributes:
        waited_s: seconds that `take` has waited for the disk.
    """

    def __init__(self, reader: WeightReader, layouts: Sequence[Layout]) -> None:
        self.waited_s = 0.0
        size = max(layout.size for layout in layouts)
        self._state = _State([aligned_buffer(size) for _ in range(RING_BUFFERS)])
        self._thread = threading.Thread(
            target=_fill, args=(self._state, reader, list(layouts)), name="layers", daemon=True
        )
        self._thread.start()
        # Also where nobody closes it; the thread knows the state alone.
        self._end = weakref.finalize(self, _end, self._state, self._thread)

    def take(self) -> np.ndarray:
        """The buffer with the next layer, until `release`.

        Raises:
            InputError: as `WeightReader.read`; `restart` tries again.
        """
        started = time.perf_counter()
        state = self._state
        with state.changed:
            while not state.filled and state.error is None and not state.is_over:
                state.changed.wait(_LOOK_S)
            self.waited_s += time.perf_counter() - started
            if state.error is not None:
                raise state.error
            if state.is_over:
                raise RuntimeError("the ring is closed")
            state.taken = state.filled.popleft()
            return state.taken

    def release(self) -> None:
        """Give back the buffer that was taken, to be filled again."""
        state = self._state
        with state.changed:
            if state.taken is not None:
                state.free.append(state.taken)
                state.taken = None
            state.changed.notify_all()

    def restart(self) -> None:
        """Begin with the first layer again, whatever was read or went wrong."""
        state = self._state
        with state.changed:
            state.round += 1
            state.error = None
            state.free.extend(state.filled)
            state.filled.clear()
        self.release()

    def close(self) -> None:
        """End the thread."""
        self._end()


class _State:
    """What the thread and whoever computes both know; under `changed`."""

    def __init__(self, buffers: list[np.ndarray]) -> None:
        self.changed = threading.Condition()
        self.free: deque[np.ndarray] = deque(buffers)
        self.filled: deque[np.ndarray] = deque()
        self.taken: np.ndarray | None = None
        self.error: BaseException | None = None
        self.round = 0
        self.is_over = False


def _fill(state: _State, reader: WeightReader, layouts: list[Layout]) -> None:
    """Fill free buffers with layer after layer, until it is over."""
    turn = round_ = 0
    while True:
        with state.changed:
            while not state.is_over and (not state.free or state.error is not None):
                state.changed.wait()
            if state.is_over:
                return
            if round_ != state.round:
                turn, round_ = 0, state.round
            buffer = state.free.popleft()

        def stopped(mine: int = round_) -> bool:
            return state.is_over or state.round != mine

        error: BaseException | None = None
        try:
            reader.read(layouts[turn], buffer, stopped)
        except BaseException as found:  # to be raised where the layer is asked for
            error = found
        with state.changed:
            if stopped() or error is not None:
                state.free.append(buffer)
                state.error = None if stopped() else error
            else:
                state.filled.append(buffer)
                turn = (turn + 1) % len(layouts)
            state.changed.notify_all()


def _end(state: _State, thread: threading.Thread) -> None:
    with state.changed:
        state.is_over = True
        state.changed.notify_all()
    if thread is not threading.current_thread():
        thread.join()
