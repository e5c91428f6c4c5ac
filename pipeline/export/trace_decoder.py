"""One graph for prefill and decode, through torch's own exporter, and the files beside it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.artefact import write_json
from pipeline.checkpoint.modeling_cache import cache_maps
from pipeline.checkpoint.skeleton import Skeleton
from pipeline.export.attention import active
from pipeline.export.cache import GraphCache
from pipeline.export.cache_shape import CacheShape, cache_shapes, coded_sides
from pipeline.export.contract import (
    ATTENTION_MASK,
    CACHE_PREFIX,
    FIRST_LOGIT,
    GENAI_FILE,
    INPUT_IDS,
    LOGITS,
    PAST,
    POSITION_IDS,
    PRESENT,
    TOKEN_INPUTS,
    Profile,
    cache_names,
    steps_name,
)
from pipeline.export.genai_config import genai_config
from pipeline.export.latent_attention import CODES, STEPS
from pipeline.export.latents import GraphLatents, refuse_latents_in
from pipeline.export.passes.fold_values import VALUES_FOLDED, fold_values
from pipeline.export.passes.fuse import fuse_operators
from pipeline.export.passes.group_query_attention import simplify_attention
from pipeline.export.passes.last_logits import choose_first_logit
from pipeline.export.passes.skip_norm import SKIP_NORM, fuse_residual_norms
from pipeline.export.request import ExportRequest
from pipeline.export.rotary import bounded_length
from pipeline.export.tracing import Fusions, Traced, traced_graph
from pipeline.memory import require_free_memory
from pipeline.model.cache_structure import SIDES
from pipeline.quantize.cache_rounding import Sides
from pipeline.tokenizer_files import copy_tokenizer

# Sizes to trace with; all different, so that no two dimensions are taken for the same one.
_TRACE_BATCH, _TRACE_LENGTH, _TRACE_PAST = 2, 3, 5
_NAME, _RIGHT_PADDED = "skipcat.name", "attention_mask_must_be_padded_on_the_right"


class _DecoderStep(nn.Module):
    """ids, mask, positions and past in; logits and present out."""

    def __init__(
        self,
        model: PreTrainedModel,
        profile: Profile,
        scales: list[Sides],
        shapes: list[CacheShape],
        length: int,
    ) -> None:
        super().__init__()
        self._sides, self._coded = 2 * len(shapes), coded_sides(shapes)
        self.model, self.profile, self._rounded_layers = model, profile, len(scales)
        for layer, sides in enumerate(scales):
            for side, values in zip(SIDES, sides, strict=True):
                self.register_buffer(_scale_name(layer, side), values)
        self.latents = GraphLatents(model, length) if cache_maps(model) else None
        self._windows: list[int] = []

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
            past: key, value of every layer in turn, then the steps of those that are codes.

        Returns:
            Logits [B, S, V], and the cache in the order of `past`.
        """
        past, steps = past[: self._sides], past[self._sides :]
        cache = self._cache(input_ids, attention_mask, past, steps)
        active.set((self.profile, cache))
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        cache.require_attention()
        return output.logits, cache.present

    def _cache(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        past: list[torch.Tensor],
        steps: list[torch.Tensor],
    ) -> GraphCache:
        length = input_ids.shape[1]
        if self.profile.contrib:
            rows = attention_mask.sum(dim=1).to(torch.int32) - 1
            rows = rows + _zero_or_refused(attention_mask)
            longest = torch.zeros((), dtype=torch.int32) + attention_mask.shape[1]
            return GraphCache(
                self.profile,
                past,
                input_ids,
                (rows, longest),
                self._windows,
                latents=self.latents,
                scales=self._scales(),
            )
        if self.profile.static_cache:
            places = torch.arange(attention_mask.shape[1])
            last = (attention_mask * places).amax(dim=(0, 1))
            slots = last + 1 - length + torch.arange(length)
        else:
            slots = past[0].shape[2] + torch.arange(length)
        slots = slots[None, :] + torch.zeros_like(input_ids)
        held = dict(zip(self._coded, steps, strict=True))
        return GraphCache(self.profile, past, slots, latents=self.latents, steps=held)

    def _scales(self) -> list[Sides] | None:
        """Those of a cache of codes, as constants of the graph."""
        keys, values = (
            [self.get_buffer(_scale_name(layer, side)) for layer in range(self._rounded_layers)]
            for side in SIDES
        )
        return list(zip(keys, values, strict=True)) or None


def _scale_name(layer: int, side: str) -> str:
    return f"cache_{layer}_{side}_scales"


def _zero_or_refused(attention_mask: torch.Tensor) -> torch.Tensor:
    """int32 [B] of zeros, from a node that fails where a row's mask has zeros before its ones.

    ONNX Runtime's own attention counts a row's tokens from its first slot on, and would answer such
    a row wrongly without a word. An index out of bounds is the one way a graph has to refuse.
    """
    places = torch.arange(attention_mask.shape[1]) + 1
    before = (attention_mask * places).amax(dim=1) - attention_mask.sum(dim=1)
    return torch.onnx.ops.symbolic(
        "Gather",
        (torch.zeros(1, dtype=torch.int32), before),
        dtype=torch.int32,
        shape=before.shape,
        version=13,
        metadata_props={_NAME: _RIGHT_PADDED},
    )


def _name_nodes(graph: ir.Model) -> None:
    """Give nodes the names that they were traced with, by which runtimes call them in errors."""
    for node in graph.graph:
        node.name = node.metadata_props.pop(_NAME, node.name)


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
    refuse_latents_in(profile, skeleton.model)
    max_length, bound = bounded_length(config, request.max_length)
    shapes = cache_shapes(skeleton.model, profile)
    graph = _trace(skeleton, request, shapes, max_length)
    _name_nodes(graph)
    if profile.plugin_writes:
        _fix_length(graph, max_length)

    def write_files(folder: Path) -> None:
        copy_tokenizer(skeleton.folder, folder)
        # All that its file can say.
        alike = len(set(shapes)) == 1 and len(set(shapes[0].sides)) == 1
        if alike and not coded_sides(shapes):
            sizes = shapes[0].key_width, shapes[0].kv_heads, len(shapes)
            write_json(folder / GENAI_FILE, genai_config(config, profile, *sizes, max_length))

    record: dict[str, Any] = {
        "max_length": max_length,
        **({"max_length_bound": bound} if bound else {}),
        "vocab_size": int(graph.graph.outputs[0].shape[-1]),
        "num_layers": len(shapes),
        "cache": [shape.to_json() for shape in shapes],
        "cache_format": request.cache,
    }
    return Traced(graph, record, write_files, _fusions(profile, skeleton.model, max_length))


def _fix_length(graph: ir.Model, length: int) -> None:
    """Give the cache its length. Nodes go on reading it from the cache, so that it may grow."""
    cached = (CACHE_PREFIX, f"{PRESENT}.")
    for value in (*graph.graph.inputs, *graph.graph.outputs):
        if value.name.startswith(cached):
            rows, heads, _, width = value.shape
            value.shape = ir.Shape([rows, heads, length, width])


def _fusions(profile: Profile, model: PreTrainedModel, max_length: int) -> Fusions:
    """The passes that the profile's operators, and a smaller cache, ask for."""
    own = (
        partial(simplify_attention, max_length=max_length),
        lambda graph: {SKIP_NORM: fuse_residual_norms(graph)},
        lambda graph: {FIRST_LOGIT: choose_first_logit(graph)},
    )
    folded = own if profile.contrib else ()
    if cache_maps(model):
        folded = (*folded, lambda graph: {VALUES_FOLDED: fold_values(graph)})
    return Fusions((fuse_operators,) if profile.native_attention else (), folded)


def _trace(
    skeleton: Skeleton, request: ExportRequest, shapes: list[CacheShape], max_length: int
) -> ir.Model:
    """The graph; `max_length` is that of a static cache."""
    model, profile, rounding = skeleton.model, request.traits, request.rounding
    widths = enumerate(shape.key_width for shape in shapes)
    scales = [] if rounding is None else [rounding.widened(layer, width) for layer, width in widths]
    _require_memory(shapes, profile, max_length)
    slots = max_length if profile.static_cache else _TRACE_PAST
    dtype = model.dtype if rounding is None else CODES
    past = [
        torch.zeros(_TRACE_BATCH, heads, slots, width, dtype=dtype if bits is None else CODES)
        for shape in shapes
        for (heads, width), bits in zip(shape.held, shape.bits, strict=True)
    ]
    coded = coded_sides(shapes)
    for layer, number in coded:
        heads, _ = shapes[layer].sides[number]
        past.append(torch.zeros(_TRACE_BATCH, heads, slots, 2, dtype=STEPS))
    names, present = (_tensor_names(shapes, prefix) for prefix in (PAST, PRESENT))
    ids = torch.zeros(_TRACE_BATCH, _TRACE_LENGTH, dtype=torch.int64)
    total = _TRACE_PAST + _TRACE_LENGTH
    mask = torch.ones(_TRACE_BATCH, total, dtype=torch.int64)
    positions = torch.arange(_TRACE_PAST, total).expand(_TRACE_BATCH, -1).contiguous()
    return traced_graph(
        skeleton,
        _DecoderStep(model, profile, scales, shapes, max_length),
        (ids, mask, positions, past),
        rehearse=True,  # where masks have values, they are looked at; and errors are plain
        opset_version=profile.opset,
        dynamic_shapes=_dynamic_shapes(profile, len(past)),
        input_names=[*TOKEN_INPUTS, *names],
        output_names=[LOGITS, *present],
    )


def _tensor_names(shapes: list[CacheShape], prefix: str) -> list[str]:
    """Of the cache's tensors: keys and values of all layers, then the steps of codes."""
    names = cache_names(len(shapes), prefix)
    return names + [steps_name(names[2 * layer + side]) for layer, side in coded_sides(shapes)]


def _require_memory(shapes: list[CacheShape], profile: Profile, max_length: int) -> None:
    """Refuse a cache to trace with, or tables of angles, that memory cannot hold."""
    numbers = 2 * max(shape.key_width for shape in shapes)
    if profile.static_cache:
        widths = (heads * width for shape in shapes for heads, width in shape.held)
        numbers += _TRACE_BATCH * sum(widths)
    require_free_memory(
        4 * numbers * max_length,
        "A cache of this length does not fit into memory.",
        where="--max-length",
        of=f"{max_length} tokens, about ",
        change="pass a smaller --max-length",
    )


def _dynamic_shapes(profile: Profile, caches: int) -> dict[str, object]:
    cache = {0: "batch_size"}
    if profile.contrib or profile.plugin_writes:
        cache[2] = "cache_length"
    elif not profile.static_cache:
        cache[2] = "past_sequence_length"
    return {
        INPUT_IDS: {0: "batch_size", 1: "sequence_length"},
        ATTENTION_MASK: {0: "batch_size", 1: "total_sequence_length"},
        POSITION_IDS: {0: "batch_size", 1: "sequence_length"},
        "past": [cache] * caches,
    }
