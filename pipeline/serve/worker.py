"""A thread that does one thing after another for coroutines, and that nobody ever waits for."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

_Result = TypeVar("_Result")


class Worker:
    """One thread and what waits for it; what nobody awaits any more is passed over.

    Unlike the threads of an executor it is a daemon: work that does not end, such as a template
    that loops, holds up neither `close` nor the end of the process.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = (
            queue.SimpleQueue()
        )
        threading.Thread(target=self._work, name=name, daemon=True).start()

    async def run(self, work: Callable[[], _Result]) -> _Result:
        """Wait for one piece of work; whoever stops waiting takes it out of the queue.

        Raises:
            BaseException: what the work raised.
        """
        future: Future[_Result] = Future()
        self._queue.put((future, work))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Let the thread end after what it does now."""
        self._queue.put(None)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            future, work = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:  # a panic of a library in Rust is no Exception
                future.set_exception(error)
            del item, future, work  # what it held is not kept until the next comes
