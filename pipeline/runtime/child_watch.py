"""A child process that no limits of its system hold: the parent looks, and ends what takes more."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

_INTERVAL_S = 0.05
# Of the processor, for Python itself and what the child imports, before its first answer.
_STARTING_S = 10.0


class ChildWatch:
    """Looks after a process until it ends.

    Windows has neither timers that end a process nor a limit of its memory.

    Args:
        pid: of a child of this process.
        processor_s: most seconds of the processor for a request.
        wall_s: likewise, by the clock.
        memory_bytes: most resident memory.

    Attributes:
        why: it was ended, to be read after "it takes more than"; empty so far.
    """

    def __init__(self, pid: int, processor_s: float, wall_s: float, memory_bytes: int) -> None:
        self.why = ""
        self._processor_s, self._wall_s, self._memory_bytes = processor_s, wall_s, memory_bytes
        self._most_processor_s = processor_s + _STARTING_S
        self._used_s, self._deadline_s, self._answered = 0.0, float("inf"), False
        threading.Thread(target=self._look, args=(pid,), name="child watch", daemon=True).start()

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Inside is a request, for which time counts anew; waiting for one takes what it takes."""
        if self._answered:
            self._most_processor_s = self._used_s + self._processor_s
        self._deadline_s = time.monotonic() + self._wall_s
        try:
            yield
        finally:
            self._answered, self._deadline_s = True, float("inf")

    def _look(self, pid: int) -> None:
        """Look at what the process has taken, again and again, until it is gone."""
        import psutil

        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            while not self.why and process.status() != psutil.STATUS_ZOMBIE:
                times = process.cpu_times()
                self._used_s = times.user + times.system
                self.why = self._excess(process.memory_info().rss)
                if self.why:
                    process.kill()
                time.sleep(_INTERVAL_S)

    def _excess(self, resident_bytes: int) -> str:
        """What a process takes too much of; nothing while it does not."""
        if resident_bytes > self._memory_bytes:
            return f"{self._memory_bytes >> 20} MiB of memory"
        if self._used_s > self._most_processor_s:
            return f"{self._processor_s:g} s of the processor"
        return f"{self._wall_s:g} s" if time.monotonic() > self._deadline_s else ""
