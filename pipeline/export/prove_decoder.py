"""A decoder's twin call by call: a prompt, token by token, several at once behind a cache."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.checkpoint.modeling_cache import own_cache
from pipeline.errors import InputError
from pipeline.export.contract import (
    ATTENTION_MASK,
    CACHE_PREFIX,
    INPUT_IDS,
    LOGITS,
    POSITION_IDS,
    present_name,
)
from pipeline.export.prove import Call
from pipeline.export.rotary import bounded_length, refuse_unknown_rotary
from pipeline.export.rounded_cache import empty_cache, rounding_of
from pipeline.export.twin import ORIGINAL_CONTEXT, WINDOW, model_class
from pipeline.quantize.cache_rounding import CacheRounding

_TYPES = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8,
}  # fmt: skip


class _DecoderProver:
    """Two ways through one length, past the window and the original context.

    A short prompt grows past both token by token, then by several at once; and two rows have a
    prompt that is past both.
    """

    longest = ORIGINAL_CONTEXT + WINDOW

    def require(self, config: PreTrainedConfig) -> None:
        """Raise InputError unless attention is the interface's, and angles are of known kinds."""
        refuse_unknown_rotary(config)
        _require_interface(config)

    def rounding_of(self, model: PreTrainedModel, length: int) -> CacheRounding:
        length, _ = bounded_length(model.config, length)
        ids = np.concatenate([_ids(model, rows, length) for rows, _ in _ways(length)])
        return rounding_of(model, torch.from_numpy(ids), length)

    def calls_of_model(
        self, model: PreTrainedModel, length: int, rounding: CacheRounding | None = None
    ) -> list[Call]:
        calls = []
        for rows, cuts in _ways(length):
            ids = _ids(model, rows, length)
            cache = own_cache(model) if rounding is None else empty_cache(model.config, rounding)
            for start, end in pairwise(cuts):
                with torch.no_grad():
                    part = torch.from_numpy(ids[:, start:end])
                    output = model(input_ids=part, past_key_values=cache, use_cache=True)
                calls.append(Call(_words(start, end), output.logits.float().numpy(), start))
        return calls

    def calls_of_graph(self, session: Any, model: PreTrainedModel, length: int) -> list[Call]:
        from onnxruntime import OrtValue

        calls = []
        for rows, cuts in _ways(length):
            ids, buffers = _ids(model, rows, length), _empty_cache(session, rows, length)
            # The values do not keep the memory that they are over.
            cache = {name: OrtValue.ortvalue_from_numpy(b) for name, b in buffers.items()}
            for start, end in pairwise(cuts):
                logits = _run(session, ids[:, start:end], start, cache)
                calls.append(Call(_words(start, end), logits.astype(np.float32), start))
        return calls


DECODER = _DecoderProver()


def _ways(length: int) -> list[tuple[int, list[int]]]:
    """Rows, and where the calls end; the first prompt is shorter than a window."""
    several = [cut for cut in (length - 9, length - 5, length) if cut > WINDOW // 2]
    last = several[0] if several else length
    slow = [0, *range(min(WINDOW // 2, last), last), *several]
    prompt = max(1, length - 6)
    return [(1, slow), (2, [0, *range(prompt, length + 1)])]


def _words(start: int, end: int) -> str:
    if not start:
        return f"a prompt of {end} tokens"
    many = "1 token" if end - start == 1 else f"{end - start} tokens at once"
    return f"{many} behind {start} in the cache"


def _ids(model: PreTrainedModel, rows: int, length: int) -> np.ndarray:
    """Tokens, none of them the padding's, which some models give no embedding of its own."""
    text = model.config.get_text_config()
    generator = np.random.default_rng(rows)
    special = {text.pad_token_id, text.bos_token_id}
    plain = [number for number in range(text.vocab_size) if number not in special]
    return generator.choice(np.array(plain, np.int64), size=(rows, length))


def _empty_cache(session: Any, rows: int, length: int) -> dict[str, np.ndarray]:
    """What the graph reads as past: zeros of the whole length, or of none where it grows."""
    cache = {}
    for node in session.get_inputs():
        if node.name.startswith(CACHE_PREFIX):
            _, heads, slots, width = node.shape
            full = isinstance(slots, int) or slots == "cache_length"
            shape = (rows, heads, length if full else 0, width)
            cache[node.name] = np.zeros(shape, _TYPES[node.type])
    return cache


def _run(session: Any, ids: np.ndarray, past: int, cache: dict[str, Any]) -> np.ndarray:
    """One call behind `past` tokens; the cache is written in place, or replaced by a longer one."""
    rows, total = len(ids), past + ids.shape[1]
    feeds = {
        INPUT_IDS: np.ascontiguousarray(ids),
        ATTENTION_MASK: np.ones((rows, total), np.int64),
        POSITION_IDS: np.tile(np.arange(past, total), (rows, 1)),
    }
    binding = session.io_binding()
    for name in {node.name for node in session.get_inputs()} & feeds.keys():
        binding.bind_cpu_input(name, feeds[name])
    binding.bind_output(LOGITS)
    for name, value in cache.items():
        binding.bind_ortvalue_input(name, value)
        if value.shape()[2] >= total:
            binding.bind_ortvalue_output(present_name(name), value)
        else:
            binding.bind_output(present_name(name))
    session.run_with_iobinding(binding)
    logits, *present = binding.get_outputs()
    cache.update(zip(cache, present, strict=True))
    result: np.ndarray = logits.numpy()
    return result


def _require_interface(config: PreTrainedConfig) -> None:
    """Raise InputError for a class whose attention cannot be given another form from outside."""
    chosen = model_class(config)
    if chosen._can_set_attn_implementation():
        return
    raise InputError(
        "The model's attention does not go through transformers' attention interface, by which it "
        "is exported.",
        where=chosen.__name__,
        observed="attention of the class's own",
        expected="a class that calls ALL_ATTENTION_FUNCTIONS",
    )
