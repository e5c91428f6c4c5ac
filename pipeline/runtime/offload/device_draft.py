"""A draft on an offloaded model's device: over its keys and values, a graph for each slot."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.checkpoint.modeling_cache import cache_maps
from pipeline.errors import InputError
from pipeline.kernels.op import prepare
from pipeline.runtime.offload.held_cache import DeviceCache
from pipeline.runtime.offload.steady_attention import Held
from pipeline.runtime.sessions.call_times import CallTimes
from pipeline.runtime.sessions.open_session import load_narrow
from pipeline.runtime.sessions.static_session import StaticSession

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class DeviceDraft:
    """A `DraftSession` on a device; a slot's first step captures the graph of its others.

    Args:
        model: in the type of the cache.
        cache: of the model that it drafts for.
        length: places of the cache.

    Attributes:
        call_times: of steps.

    Raises:
        InputError: a layer's cache cannot be of fixed size, or the kernels refuse the model.
    """

    def __init__(self, model: PreTrainedModel, cache: DeviceCache, length: int) -> None:
        self.call_times = CallTimes()
        self._model, self._cache, self._length = model.to(cache.place), cache, length
        self._bound: list[Held] = []
        self._sessions: dict[int, StaticSession] = {}
        self.take_up(0, 0)
        self._sessions[0].forward(np.zeros((1, 1), np.int64))  # what fails, fails now

    @staticmethod
    def load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
        """A checkpoint that is to draft on a device, still in memory.

        Args:
            folder: of few bits, factors or plain numbers.
            dtype: of the model whose keys and values it shares.

        Raises:
            InputError: it does not load, or its cache cannot be shared.
        """
        model, replaced = load_narrow(folder, dtype)
        odd = "a cache of latents" if cache_maps(model) else ""
        if replaced and dtype == torch.float32:
            odd = "block-skip kernels, which compute in half precision, for a model in float32"
        if odd:
            raise InputError(
                "This draft cannot share the keys and values of the model on the GPU.",
                where=folder,
                observed=odd,
                change="give an export of it, which drafts on the CPU, or another draft",
            )
        if replaced and torch.cuda.is_available():
            prepare(torch.cuda.current_device())
        return model

    @staticmethod
    def bytes_of(model: PreTrainedModel) -> int:
        """Of all that a model holds, each tensor once."""
        held = {id(t): t for t in [*model.parameters(), *model.buffers()]}
        return sum(tensor.numel() * tensor.element_size() for tensor in held.values())

    def take_up(self, slot: int, length: int) -> None:
        """As of a `DraftSession`."""
        held = self._cache.tensors()
        if held is not self._bound:  # there are more rows now, somewhere else
            self._bound = held
            self._sessions.clear()
        if slot not in self._sessions:
            row = slice(slot, slot + 1)
            own = [(keys[row], values[row]) for keys, values in held]
            self._sessions[slot] = StaticSession(self._model, "draft", self._length, own)
        self._sessions[slot].take_up(length)

    def prefill(self, slot: int, input_ids: np.ndarray) -> np.ndarray:
        """As of a `DraftSession`; a token is a step, as there is a graph of no more."""
        for token in input_ids:
            began = time.perf_counter()
            logits = self._sessions[slot].forward(np.array([[token]]), last_only=True)[0, 0]
            self.call_times.add(1, time.perf_counter() - began)
        return logits

    def sibling(self) -> StaticSession:
        """As of a `DraftSession`."""
        return StaticSession(self._model, "torch draft", self._length)
