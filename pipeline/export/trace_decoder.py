"""One graph for prefill and decode, through torch's own exporter."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.artefact import copy_tokenizer, write_json
from pipeline.checkpoint.skeleton import Skeleton
from pipeline.errors import InputError
from pipeline.export.attention import active
from pipeline.export.contract import (
    ATTENTION_MASK,
    FIRST_LOGIT,
    GENAI_FILE,
    INPUT_IDS,
    LOGITS,
    POSITION_IDS,
    PRESENT,
    TOKEN_INPUTS,
    Profile,
    cache_names,
)
from pipeline.export.genai import CacheShape, genai_config
from pipeline.export.passes.fuse import fuse_operators
from pipeline.export.passes.group_query_attention import simplify_attention
from pipeline.export.passes.last_logits import choose_first_logit
from pipeline.export.passes.skip_norm import SKIP_NORM, fuse_residual_norms
from pipeline.export.request import ExportRequest
from pipeline.export.traced_cache import GraphCache
from pipeline.export.tracing import Fusions, Traced, traced_graph

# Sizes to trace with; all different, so that no two dimensions are taken for the same one.
_TRACE_BATCH, _TRACE_LENGTH, _TRACE_PAST = 2, 3, 5


class _DecoderStep(nn.Module):
    """ids, mask, positions and past in; logits and present out."""

    def __init__(self, model: PreTrainedModel, profile: Profile) -> None:
        super().__init__()
        self.model, self.profile = model, profile

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run S new tokens behind those in `past`.

        Args:
            input_ids: int64 [B, S].
            attention_mask: int64 [B, T].
            position_ids: int64 [B, S].
            past: key, value of every layer in turn.

        Returns:
            Logits [B, S, V], and the cache in the order of `past`.
        """
        cache = self._cache(input_ids, attention_mask, past)
        active.set((self.profile, cache))
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits, cache.present

    def _cache(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: list[torch.Tensor]
    ) -> GraphCache:
        length = input_ids.shape[1]
        if self.profile.contrib:
            rows = attention_mask.sum(dim=1).to(torch.int32) - 1
            longest = torch.zeros((), dtype=torch.int32) + attention_mask.shape[1]
            return GraphCache(self.profile, past, input_ids, (rows, longest))
        if self.profile.static_cache:
            places = torch.arange(attention_mask.shape[1])
            last = (attention_mask * places).amax(dim=(0, 1))
            slots = last + 1 - length + torch.arange(length)
        else:
            slots = past[0].shape[2] + torch.arange(length)
        slots = slots[None, :] + torch.zeros_like(input_ids)
        return GraphCache(self.profile, past, slots)


def trace_decoder(skeleton: Skeleton, request: ExportRequest) -> Traced:
    """Export one decoder step with dynamic batch and sequence length.

    Args:
        skeleton: the model without its matrices; its dtype becomes that of the graph.
        request: which operators, which cache, and how long it is; never beyond the positions that
            the model was made for.

    Raises:
        InputError: the exporter cannot handle the model.
    """
    profile, config = request.traits, skeleton.model.config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    max_length = min(request.max_length, limit or request.max_length)
    shapes = _cache_shapes(skeleton.model)
    graph = _trace(skeleton, profile, shapes, max_length)

    def write_files(folder: Path) -> None:
        copy_tokenizer(skeleton.folder, folder)
        write_json(folder / GENAI_FILE, genai_config(config, profile, shapes, max_length))

    record: dict[str, Any] = {
        "max_length": max_length,
        "vocab_size": int(graph.graph.outputs[0].shape[-1]),
        "num_layers": len(shapes),
        "cache": [asdict(shape) for shape in shapes],
    }
    return Traced(graph, record, write_files, _fusions(profile, max_length))


def _fusions(profile: Profile, max_length: int) -> Fusions:
    """The passes that the profile's operators ask for."""
    folded = (
        partial(simplify_attention, max_length=max_length),
        lambda graph: {SKIP_NORM: fuse_residual_norms(graph)},
        lambda graph: {FIRST_LOGIT: choose_first_logit(graph)},
    )
    return Fusions(
        (fuse_operators,) if profile.native_attention else (), folded if profile.contrib else ()
    )


def _cache_shapes(model: PreTrainedModel) -> list[CacheShape]:
    """Widths of every layer's cache, read off a real one after a short forward pass.

    Raises:
        InputError: the model keeps something else than keys and values.
    """
    with torch.no_grad():
        cache = model(
            input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=True
        ).past_key_values
    try:
        pairs = [(layer.keys, layer.values) for layer in cache.layers]
        return [CacheShape(k.shape[1], k.shape[3], v.shape[3]) for k, v in pairs]
    except (AttributeError, IndexError) as error:
        raise InputError(
            "The model's cache does not consist of keys and values.",
            observed=type(cache).__name__,
        ) from error


def _trace(
    skeleton: Skeleton, profile: Profile, shapes: list[CacheShape], max_length: int
) -> ir.Model:
    """The graph; `max_length` is that of a static cache."""
    model = skeleton.model
    slots = max_length if profile.static_cache else _TRACE_PAST
    past = [
        torch.zeros(_TRACE_BATCH, shape.kv_heads, slots, width, dtype=model.dtype)
        for shape in shapes
        for width in (shape.key_width, shape.value_width)
    ]
    ids = torch.zeros(_TRACE_BATCH, _TRACE_LENGTH, dtype=torch.int64)
    total = _TRACE_PAST + _TRACE_LENGTH
    mask = torch.ones(_TRACE_BATCH, total, dtype=torch.int64)
    positions = torch.arange(_TRACE_PAST, total).expand(_TRACE_BATCH, -1).contiguous()
    return traced_graph(
        skeleton,
        _DecoderStep(model, profile),
        (ids, mask, positions, past),
        rehearse=profile.contrib,  # where masks have values, they are looked at
        opset_version=profile.opset,
        dynamic_shapes=_dynamic_shapes(profile, len(past)),
        input_names=[*TOKEN_INPUTS, *cache_names(len(shapes))],
        output_names=[LOGITS, *cache_names(len(shapes), PRESENT)],
    )


def _dynamic_shapes(profile: Profile, caches: int) -> dict[str, object]:
    cache = {0: "batch_size"}
    if profile.contrib:
        cache[2] = "cache_length"
    elif not profile.static_cache:
        cache[2] = "past_sequence_length"
    return {
        INPUT_IDS: {0: "batch_size", 1: "sequence_length"},
        ATTENTION_MASK: {0: "batch_size", 1: "total_sequence_length"},
        POSITION_IDS: {0: "batch_size", 1: "sequence_length"},
        "past": [cache] * caches,
    }
