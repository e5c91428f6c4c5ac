"""One graph for prefill and decode, through torch's own exporter."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.checkpoint.skeleton import FewBitMatrix, Skeleton
from pipeline.errors import InputError
from pipeline.export.attention import NAME, active_cache
from pipeline.export.contract import Profile
from pipeline.export.passes.weights import StoredCodes, note_codes
from pipeline.export.traced_cache import GraphCache
from pipeline.export.tracing import traced_as_nodes

# Sizes to trace with; all different, so that no two dimensions are taken for the same one.
TRACE_BATCH, TRACE_LENGTH, TRACE_PAST = 2, 3, 5
# Vectors and tables of positions may be computed while tracing; matrices may not.
LARGEST_COMPUTED_BYTES = 1 << 16


@dataclass(frozen=True)
class CacheShape:
    """Width of one layer's cache: [B, kv_heads, length, key or value width]."""

    kv_heads: int
    key_width: int
    value_width: int


class DecoderStep(nn.Module):
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
        active_cache.set(cache)
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


def cache_names(layers: int, prefix: str) -> list[str]:
    """`prefix.{i}.key`, `prefix.{i}.value` for every layer."""
    return [f"{prefix}.{i}.{part}" for i in range(layers) for part in ("key", "value")]


def cache_shapes(model: PreTrainedModel) -> list[CacheShape]:
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


def trace(
    skeleton: Skeleton, profile: Profile, max_length: int
) -> tuple[ir.Model, list[CacheShape]]:
    """Export one decoder step with dynamic batch and sequence length.

    Args:
        skeleton: the model without its matrices; its dtype becomes that of the graph.
        profile: which operators and which cache.
        max_length: slots of a static cache; unused for a growing one.

    Returns:
        The model as ONNX IR, whose matrices are read when it is saved, and its caches' shapes.

    Raises:
        InputError: the exporter cannot handle the model.
    """
    model = skeleton.model
    shapes = cache_shapes(model)
    slots = max_length if profile.static_cache else TRACE_PAST
    past = [
        torch.zeros(TRACE_BATCH, shape.kv_heads, slots, width, dtype=model.dtype)
        for shape in shapes
        for width in (shape.key_width, shape.value_width)
    ]
    ids = torch.zeros(TRACE_BATCH, TRACE_LENGTH, dtype=torch.int64)
    total = TRACE_PAST + TRACE_LENGTH
    mask = torch.ones(TRACE_BATCH, total, dtype=torch.int64)
    positions = torch.arange(TRACE_PAST, total).expand(TRACE_BATCH, -1).contiguous()
    try:
        with traced_with(model, NAME), quiet_exporter(), traced_as_nodes(), torch.no_grad():
            step, inputs = DecoderStep(model, profile).eval(), (ids, mask, positions, past)
            if profile.contrib:
                step(*inputs)  # where masks have values, they are looked at
            program = torch.onnx.export(
                step,
                inputs,
                dynamo=True,
                opset_version=profile.opset,
                dynamic_shapes=_dynamic_shapes(profile, len(past)),
                input_names=_input_names(len(shapes)),
                output_names=["logits", *cache_names(len(shapes), "present")],
                optimize=True,
                verify=False,
            )
    except Exception as error:
        raise InputError(
            "The model cannot be exported to ONNX.",
            where=type(model).__name__,
            observed=(str(error).strip().splitlines() or [type(error).__name__])[0],
            change="run again with -v to see the exporter's own traceback",
        ) from error
    model_ir: ir.Model = program.model  # type: ignore[union-attr]  # None without dynamo only
    name_as_in_checkpoint(model_ir.graph)
    _attach_matrices(model_ir.graph, skeleton)
    return model_ir, shapes


def name_as_in_checkpoint(graph: ir.Graph) -> None:
    """Drop the level that the traced wrapper adds to every weight's name."""
    weights = list(graph.initializers.values())
    graph.initializers.clear()
    for weight in weights:
        weight.name = weight.name.removeprefix("model.")
        graph.initializers[weight.name] = weight


def _attach_matrices(graph: ir.Graph, skeleton: Skeleton) -> None:
    """Replace every stand-in by the stored matrix, and make sure that none was computed with."""
    for name, weight in graph.initializers.items():
        if name in skeleton.matrices:
            matrix = skeleton.matrices[name]
            weight.const_value = matrix.lazy_tensor(name)
            if isinstance(matrix, FewBitMatrix):
                note_codes(weight, StoredCodes(matrix.style, matrix.codes))
        elif weight.const_value.nbytes > LARGEST_COMPUTED_BYTES:
            raise RuntimeError(f"the exporter computed {name} from weights that it does not have")


def _input_names(layers: int) -> list[str]:
    return ["input_ids", "attention_mask", "position_ids", *cache_names(layers, "past_key_values")]


def _dynamic_shapes(profile: Profile, caches: int) -> dict[str, object]:
    cache = {0: "batch_size"}
    if profile.contrib:
        cache[2] = "cache_length"
    elif not profile.static_cache:
        cache[2] = "past_sequence_length"
    return {
        "input_ids": {0: "batch_size", 1: "sequence_length"},
        "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
        "position_ids": {0: "batch_size", 1: "sequence_length"},
        "past": [cache] * caches,
    }


@contextlib.contextmanager
def traced_with(model: PreTrainedModel, attention: str) -> Iterator[None]:
    """Trace with an attention of ours, and give the model its own back."""
    own = model.config._attn_implementation
    model.set_attn_implementation(attention)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Keep the exporter's progress prints and warnings off the user's screen."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
