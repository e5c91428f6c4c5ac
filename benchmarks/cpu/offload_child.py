"""accelerate's `disk_offload` in a process of its own, for offload.py: answers in lines of JSON.

The first line names the model, the folder that its weights are unpacked to, and threads. Each
further one has `ids` and `new_tokens`. Behind every call the system drops what it holds of the
weights, as it would have to where they are larger than memory.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.child_process import answers_on_stdout
from pipeline.memory import disk_read_bytes


class _Accelerated:
    """A model whose every matrix is read from disk when it is multiplied with."""

    def __init__(self, folder: str, scratch: str, threads: int) -> None:
        import torch
        from accelerate import disk_offload
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        self._model = disk_offload(model, scratch, execution_device=torch.device("cpu"))
        self._files = [path for path in Path(scratch).iterdir() if path.suffix == ".dat"]

    def answer(self, ids: list[int], new_tokens: int) -> dict[str, Any]:
        """A greedy answer: its tokens, the seconds of each, and what was read from disk for it."""
        import torch
        from transformers import DynamicCache

        cache, given = DynamicCache(config=self._model.config), torch.tensor([ids])
        tokens: list[int] = []
        seconds: list[float] = []
        self._drop_pages()
        before = disk_read_bytes()
        for _ in range(new_tokens):
            started = time.perf_counter()
            with torch.inference_mode():
                logits = self._model(given, past_key_values=cache, logits_to_keep=1).logits
            given = logits[:, -1:].argmax(-1)
            tokens.append(int(given))
            seconds.append(time.perf_counter() - started)
            self._drop_pages()
        after = disk_read_bytes()
        assert before is not None
        assert after is not None
        return {"tokens": tokens, "token_s": seconds, "read_bytes": after - before}

    def _drop_pages(self) -> None:
        for path in self._files:
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)  # what was never written out cannot be dropped
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def main() -> None:
    """Answer on what was stdout; whatever libraries print goes to stderr."""
    tell = answers_on_stdout()
    model = _Accelerated(**json.loads(sys.stdin.readline()))
    tell({"ready": True})
    for line in sys.stdin:
        tell(model.answer(**json.loads(line)))


if __name__ == "__main__":
    main()
