"""What the model says with one layer changed, on windows whose hidden states before it are known.

Here, or by workers: these are given the model without its numbers, the original's, which all trials
share, and those of the changed layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from pipeline.calibrate.carried_module import ModuleCode, numbers_of
from pipeline.calibrate.divergence import divergence, log_chances
from pipeline.calibrate.layer_stream import LayerStream
from pipeline.calibrate.precision import fast_products_of, quick_float32
from pipeline.workers.workers import Result, Workers

# What all workers are given of a model; a larger one is tried by this process.
SHARED_BYTES = 16 << 30
# Logits, their logarithms of chances before and after, and what is made of them.
_FLOATS_A_LOGIT = 6
_SMALL_BYTES = 1 << 29


class LayerTrials:
    """Windows on their way through the original, and what that says of each of them.

    Args:
        stream: a window at a time, at the input of the layer that is looked at.
        workers: who tries the layers.
    """

    def __init__(self, stream: LayerStream, workers: Workers) -> None:
        self.stream, self.workers = stream, workers
        model = stream.model
        with torch.no_grad(), _products(model):
            logits = (model(input_ids=one, use_cache=False).logits for one in stream.batches)
            self.original = [log_chances(one).half() for one in logits]
        self._shared: tuple[Result[Any], list[Result[torch.Tensor]]] | None = None
        size = sum(tensor.nbytes for tensor in numbers_of(model).values())
        if workers.at_once and size <= SHARED_BYTES and ModuleCode.of(model) is not None:
            before = [workers.share(one) for one in self.original]
            self._shared = workers.share(numbers_of(model)), before

    def advance(self, index: int) -> None:
        """Go through layer `index`, which is the original's."""
        with _products(self.stream.model):
            self.stream.advance(index, measure=False)

    def divergence(self, index: int) -> float:
        """KL of the model as it is now, nats a token; it differs in layer `index`."""
        stream = self.stream
        code = None if self._shared is None else ModuleCode.of(stream.model)
        windows = zip(stream.batches, stream.hidden, strict=True)
        skipped = tuple(layer.name for layer in stream.layers[:index])
        if self._shared is None or code is None:
            model = stream.model
            found = [
                _divergence(model, model, skipped, stream.as_output(hidden), ids, before)
                for (ids, hidden), before in zip(windows, self.original, strict=True)
            ]
            return sum(found) / len(found)
        layer = stream.layers[index].name
        changed = numbers_of(stream.model.get_submodule(layer))
        numbers, originals = self._shared
        given = [self.workers.share(one) for one in (code, _within(layer, changed))]
        size = self._needed_bytes()
        submitted = [
            self.workers.submit(
                f"price of {layer}, window {place + 1}",
                try_window,
                given[0],
                numbers,
                given[1],
                skipped,
                stream.as_output(hidden),
                ids,
                originals[place],
                needed_bytes=size,
            )
            for place, (ids, hidden) in enumerate(windows)
        ]
        return sum(one.get() for one in submitted) / len(submitted)

    def _needed_bytes(self) -> int:
        config = self.stream.model.config.get_text_config()
        tokens = max(batch.numel() for batch in self.stream.batches)
        widest = max(g.in_features for layer in self.stream.layers for g in layer.groups)
        scores = config.num_attention_heads * tokens
        a_token = _FLOATS_A_LOGIT * config.vocab_size + 16 * widest + 2 * scores
        return 4 * tokens * a_token + _SMALL_BYTES


def _within(name: str, numbers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{name}.{part}": tensor for part, tensor in numbers.items()}


@torch.no_grad()
def try_window(
    code: ModuleCode,
    numbers: dict[str, torch.Tensor],
    changed: dict[str, torch.Tensor],
    skipped: Sequence[str],
    given: Any,
    ids: torch.Tensor,
    before: torch.Tensor,
) -> float:
    """KL of what a changed model says of a window to what the original said, nats a token.

    Args:
        code: of the model.
        numbers: parameters and buffers of the original.
        changed: of the layer that is another.
        skipped: layers that are taken out.
        given: what the last of them returns.
        ids: int64 [1, T].
        before: logarithms of the original's chances, float16 [1, T, V].
    """
    model, both = code.model(), numbers | changed
    own = {name: both[name] for name in numbers_of(model)}
    return _divergence(model, partial(code.call, own), skipped, given, ids, before)


@torch.no_grad()
def _divergence(
    model: nn.Module,
    call: Callable[..., Any],
    skipped: Sequence[str],
    given: Any,
    ids: torch.Tensor,
    before: torch.Tensor,
) -> float:
    with contextlib.ExitStack() as patches:
        for name in skipped:
            layer = model.get_submodule(name)
            patches.enter_context(patch.object(layer, "forward", lambda *_, **__: given))
        with _products(model):
            logits = call(input_ids=ids, use_cache=False).logits
    return divergence(before, logits)


def _products(model: nn.Module) -> AbstractContextManager[None]:
    """Products of a float32 model are not rounded: what is measured may be smaller than that."""
    dtype = next(model.parameters()).dtype
    return quick_float32() if dtype == torch.float32 else fast_products_of(dtype)
