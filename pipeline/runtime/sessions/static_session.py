"""A transformers model over a cache of fixed size, one CUDA graph for each decode step.

On a GPU a step of a small model is bound by launching its kernels; a graph launches them all at
once. Prompts, whose length varies, are read without one. A step makes no tensor: its token and its
logits have places of their own, on the device and, page-locked, in the CPU's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from pipeline.errors import InputError
from pipeline.runtime.sessions.checks import CheckedSession

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WARM_UP_STEPS = 2


class StaticSession(CheckedSession):
    """PyTorch over a static cache; on a GPU the decode step is a captured graph.

    Args:
        model: a causal language model, on its device and in its dtype; it is put into eval mode.
        name: what the ledger calls this backend.
        max_length: most tokens of prompt and answer: the size of the cache.
        held: keys and values of each layer, [1, heads, max_length, width], that belong to somebody
            else; None makes some.

    Raises:
        InputError: a layer's cache cannot be of fixed size (a sliding window).
    """

    max_rows: int | None = 1

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        max_length: int,
        held: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> None:
        self.name = name
        self.model = model.eval()
        text_config = model.config.get_text_config()
        self.vocab_size: int = text_config.vocab_size
        self.max_length = min(max_length, text_config.max_position_embeddings)
        self._cache = StaticCache(config=model.config, max_cache_len=self.max_length)
        _require_static_layers(self._cache)
        if held is not None:
            _bind(self._cache, held)
        self._token = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
        self._answer = torch.zeros((1, 1, self.vocab_size), device=model.device)
        on_gpu = model.device.type == "cuda"
        # What crosses to the device and back; of page-locked memory the copy is one transfer.
        self._given = torch.zeros((1, 1), dtype=torch.int64, pin_memory=on_gpu)
        self._told = torch.zeros((1, 1, self.vocab_size), pin_memory=on_gpu)
        self._launch: Callable[[], None] | None = None if on_gpu else self._run_step
        self._logits: torch.Tensor | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the cache, and keep its memory: the graph writes there."""
        self._set_length(0)
        self._rows = 1

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens; what lies behind them is masked out."""
        self._set_length(min(length, self._length))

    def take_up(self, length: int) -> None:
        """Go on behind the first `length` tokens, whoever has written their keys and values."""
        self._set_length(length)

    def sibling(self) -> StaticSession:
        """A session over the same model, with a static cache and a graph of its own."""
        return StaticSession(self.model, self.name, self.max_length)

    def forward(self, input_ids: np.ndarray, last_only: bool = False) -> np.ndarray:
        _, count = self._check_call(input_ids)
        if count > 1:
            return self.logits(torch.from_numpy(input_ids), last_only).float().cpu().numpy()
        self._given.numpy()[:] = input_ids
        with torch.inference_mode():
            self._step(self._given)
            self._told.copy_(self._answer)  # waits for the step
        self._length += 1
        return self._told.numpy().copy()

    def logits(self, input_ids: torch.Tensor, last_only: bool = False) -> torch.Tensor:
        """`forward` on the model's device: nothing is checked, copied away or waited for.

        Args:
            input_ids: int64 [1, S].
            last_only: only the last token's logits are wanted.

        Returns:
            [1, S, V], or [1, 1, V], in the model's dtype; the next step writes over it.
        """
        count = input_ids.shape[1]
        with torch.inference_mode():
            logits = self._step(input_ids) if count == 1 else self._run(input_ids, last_only)
        self._length += count
        return logits

    def _run(self, ids: torch.Tensor, last_only: bool) -> torch.Tensor:
        return self.model(
            input_ids=ids.to(self.model.device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1 if last_only else 0,
        ).logits

    def _step(self, ids: torch.Tensor) -> torch.Tensor:
        """One token: replay the graph, or run what it would be captured from."""
        self._token.copy_(ids)
        if self._launch is None:
            self._launch = self._captured()
        self._launch()
        assert self._logits is not None
        return self._logits

    def _run_step(self) -> None:
        """The logits of the token, as they are and in float32."""
        self._logits = self._run(self._token, last_only=False)
        self._answer.copy_(self._logits)

    def _captured(self) -> Callable[[], None]:
        """Record one decode step; warming up before compiles kernels and makes their buffers."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        length = self._length
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_STEPS):
                self._run_step()
                self._set_length(length)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                self._run_step()
        torch.cuda.current_stream().wait_stream(stream)
        self._set_length(length)
        return graph.replay

    def _set_length(self, length: int) -> None:
        """Make every layer's counter say `length`, in place: the graph reads it from there.

        The cache moves its counters to the GPU in its first step, so they are inference tensors,
        which only inference mode may change.
        """
        with torch.inference_mode():
            for layer in self._cache.layers:
                layer.cumulative_length.fill_(length)
        self._length = length


def _bind(cache: StaticCache, held: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Let a cache's layers be in memory that is there."""
    for layer, (keys, values) in zip(cache.layers, held, strict=True):
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values


def _require_static_layers(cache: StaticCache) -> None:
    """Raise InputError when a layer keeps anything but keys and values of fixed size."""
    others = {type(layer).__name__ for layer in cache.layers if type(layer) is not StaticLayer}
    if others:
        raise InputError(
            "The decode step of this model cannot be captured in a CUDA graph.",
            observed=f"cache layers of the kinds {', '.join(sorted(others))}",
            expected="full attention in every layer",
            change="run it on --device cpu, or build an engine",
        )
