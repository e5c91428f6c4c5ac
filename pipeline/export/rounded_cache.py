"""The scales of a cache of 8 bits, found by running the model, and such a cache in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from pipeline.calibrate.cache_ranges import cache_ranges
from pipeline.calibrate.divergence import divergence, log_chances
from pipeline.calibrate.text import TokenBatch, load_tokens
from pipeline.checkpoint.folder import load_checkpoint
from pipeline.errors import InputError
from pipeline.export.contract import GRAPH_FILE, GROUPED_ATTENTION, cache_names
from pipeline.export.onnx_folder import load_graph
from pipeline.export.request import ExportRequest
from pipeline.export.rotary import bounded_length
from pipeline.model.loading import explaining
from pipeline.model.tokenizer_file import following_tokenizer
from pipeline.progress import track
from pipeline.quantize.cache_rounding import CacheRounding, Sides

_SELF, _SEED = "self", 0
# A third of the windows is held out, to choose by.
_WINDOWS, _WINDOW_LENGTH = 12, 512
# Of the largest number seen: some room for larger ones, none, or a little cut off for finer steps.
_SHARES = (1.2, 1.0, 0.85)
# Inputs of the attention node: past keys, and the scales of both sides.
_PAST_KEY, _SCALES = 3, (12, 13)
_STEP = 4  # of the tokens of a window whose logits are kept


def empty_cache(config: PreTrainedConfig, rounding: CacheRounding | None) -> DynamicCache:
    """The cache of a decoder, rounded so, or as it is."""
    return DynamicCache(config=config) if rounding is None else _RoundedCache(config, rounding)


class _RoundedCache(DynamicCache):
    """A cache that rounds whatever it is given, so that no call sees more than is kept."""

    def __init__(self, config: PreTrainedConfig, rounding: CacheRounding) -> None:
        super().__init__(config=config)
        self._rounding = rounding

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any,
        **kwargs: Any,
    ) -> Sides:  # fmt: skip
        """Keep what codes hold of new keys and values; return all that is kept."""
        rounded = self._rounding.rounded(layer_idx, key_states, value_states)
        return super().update(*rounded, layer_idx, *args, **kwargs)


def calibrated_cache(folder: Path, request: ExportRequest) -> tuple[CacheRounding, dict[str, Any]]:
    """Load a checkpoint and find the scales of its cache.

    Ranges are those of a text, times a share for all keys and one for all values, which are chosen
    by the KL to the model as it is, on windows that the ranges were not taken from.

    Args:
        folder: of a decoder.
        request: asks for a cache of 8 bits.

    Returns:
        The rounding, and what export.json says of it.

    Raises:
        InputError: a broken checkpoint or text, or a model whose keys cannot be bounded.
    """
    code = request.trust_remote_code
    model = load_checkpoint(folder, dtype=torch.float32, trust_remote_code=code)
    length, _ = bounded_length(model.config, request.max_length)
    text = _text(folder, model, request, min(length, _WINDOW_LENGTH))
    held_out = torch.arange(len(text.tokens)) % 3 == 1  # so that both have all of a mixture
    ranges = cache_ranges(model, text.tokens[~held_out], length)
    rounding, found = _chosen(model, text.tokens[held_out], ranges)
    record = {"calibration": text.describe(), **found, "scales_sha256": rounding.sha256()}
    return rounding, record


def rounding_of(model: PreTrainedModel, tokens: torch.Tensor, length: int) -> CacheRounding:
    """One that cuts off nothing of what is cached of these tokens, int64 [N, L].

    Raises:
        InputError: as `cache_ranges`.
    """
    return CacheRounding.reaching(cache_ranges(model, tokens, length))


def read_rounding(folder: Path) -> CacheRounding:
    """The scales that an exported graph rounds its cache by.

    Raises:
        InputError: not a graph, weights missing, or no cache of codes.
    """
    graph = load_graph(folder / GRAPH_FILE).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    nodes = {n.input[_PAST_KEY]: n for n in graph.node if n.op_type == GROUPED_ATTENTION}
    scales = []
    for past in cache_names(len(nodes))[::2]:
        if past not in nodes or len(nodes[past].input) <= _SCALES[1]:
            raise InputError("The graph's cache is not one of codes.", where=folder, observed=past)
        heads = onnx.helper.get_node_attr_value(nodes[past], "kv_num_heads")
        keys, values = (tensors[nodes[past].input[place]] for place in _SCALES)
        scales.append((_numbers(keys, folder, heads), _numbers(values, folder, heads)))
    return CacheRounding(tuple(scales))


def _numbers(tensor: onnx.TensorProto, folder: Path, heads: int) -> torch.Tensor:
    """Scales [kv heads, width]; read from the weights' file where they lie there."""
    if onnx.external_data_helper.uses_external_data(tensor):
        onnx.external_data_helper.load_external_data_for_tensor(tensor, str(folder))
    return torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()).reshape(heads, -1)


def _text(folder: Path, model: PreTrainedModel, request: ExportRequest, length: int) -> TokenBatch:
    with explaining("The checkpoint's tokenizer could not be loaded.", folder):
        tokenizer = following_tokenizer(folder, folder, trust_remote_code=request.trust_remote_code)
    source = request.calibration or _SELF
    return load_tokens(source, tokenizer, model, count=_WINDOWS, length=length, seed=_SEED)


@torch.no_grad()
def _chosen(
    model: PreTrainedModel, tokens: torch.Tensor, ranges: list[Sides]
) -> tuple[CacheRounding, dict[str, Any]]:
    """The shares of least KL: of the keys, and then of the values."""
    original = [log_chances(_logits(model, window, None)) for window in tokens]

    def kl(shares: tuple[float, float]) -> float:
        rounding = CacheRounding.reaching(ranges, *shares)
        found = [
            divergence(before, _logits(model, window, rounding))
            for window, before in zip(tokens, original, strict=True)
        ]
        return sum(found) / len(found)

    measured = {(share, 1.0): kl((share, 1.0)) for share in track(_SHARES, "scales of keys")}
    keys = min(measured, key=lambda shares: measured[shares])[0]
    others = [(keys, share) for share in _SHARES if (keys, share) not in measured]
    measured |= {shares: kl(shares) for shares in track(others, "scales of values")}
    best = min(measured, key=lambda shares: measured[shares])
    found = {"keys_share": best[0], "values_share": best[1], "kl": measured[best]}
    return CacheRounding.reaching(ranges, *best), found


def _logits(
    model: PreTrainedModel, window: torch.Tensor, rounding: CacheRounding | None
) -> torch.Tensor:
    """Logits [L, V] behind a window's tokens, of every step'th of them."""
    cache = empty_cache(model.config, rounding)
    logits = model(input_ids=window[None], past_key_values=cache, use_cache=True).logits
    every: torch.Tensor = logits[0, ::_STEP]
    return every
