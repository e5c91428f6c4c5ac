"""Bytes that a runtime's file spends on the weights of a model: the one place that counts them."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from pipeline.compress.cache.cache_plan import SidePlan
from pipeline.compress.plan.plan import GroupPlan
from pipeline.export.contract import DEFAULT_MAX_LENGTH
from pipeline.quantize.formats import Format, Runtime

_INDEX_BYTES = 4
# A safetensors header names every tensor with its type, shape and place.
_NAME_BYTES = 140


def matrix_bytes(rows: int, columns: int, format: Format | None, runtime: Runtime) -> int:
    """Bytes of one matrix, quantised or not, with its names."""
    if format is None:
        return rows * columns * runtime.float_bytes + _NAME_BYTES
    names = _NAME_BYTES * (2 if format.symmetric else 3)
    return format.stored_bytes(rows, columns, runtime.scale_bytes) + names


def group_bytes(group: GroupPlan, runtime: Runtime) -> int:
    """Bytes of all that a group stores: factors or matrices, and the permutation."""
    down_format, up_format = group.formats
    others = _NAME_BYTES * 3 * (len(group.members) - 1)
    if group.form == "dense":
        return matrix_bytes(group.rows, group.columns, up_format, runtime) + others
    width, index = group.columns, 0
    if group.form == "skip":
        width, index = group.columns - group.rank, group.columns * _INDEX_BYTES + _NAME_BYTES
    down = matrix_bytes(group.rank, width, down_format, runtime)
    return down + matrix_bytes(group.rows, group.rank, up_format, runtime) + index + others


def embedding_bytes(
    owner: nn.Module, *, shared: bool, format: Format | None, runtime: Runtime
) -> int:
    """Bytes of an embedding, an LM head, or both where they share one matrix.

    Where a runtime looks rows up by an operator of its own, both operators read the same codes, but
    want scales in two shapes, and looking up takes a byte for a zero point.

    Args:
        owner: the module that holds the matrix.
        shared: whether it is embedding and LM head.
        format: None for numbers.
        runtime: whose file.
    """
    rows, columns = owner.weight.shape  # type: ignore[misc, union-attr]
    product = matrix_bytes(rows, columns, format, runtime)
    if format is None or not runtime.looks_up_apart or not isinstance(owner, nn.Embedding):
        return product
    blocks = format.blocks(columns)
    scales = blocks * runtime.scale_bytes
    zeros = {"sym": 0, "asym": blocks, "offset": scales}[format.zero]
    if shared:
        return product + rows * (scales + zeros)
    return product + rows * (zeros - format.zero_bytes(columns, runtime.scale_bytes))


def cache_map_bytes(side: SidePlan, runtime: Runtime) -> int:
    """Bytes of the maps between keys or values and what is cached of them; 0 where nothing is."""
    if side.form == "full":
        return 0
    numbers, parts = side.groups * side.numbers * (2 * side.rank + 1), 3
    if side.error_feedback:
        half = side.rank // 2
        numbers, parts = numbers + side.groups * half * (side.rank - half), parts + 1
    return numbers * runtime.float_bytes + parts * _NAME_BYTES


def fixed_bytes(
    model: PreTrainedModel, chosen: set[str], rotary_width: int, runtime: Runtime
) -> int:
    """Bytes of what nothing is chosen for, in a runtime's file, names included.

    Args:
        model: whose weights.
        chosen: modules whose matrices are counted elsewhere.
        rotary_width: numbers a position of the cosines and sines; 0 for none.
        runtime: whose file.
    """
    total = 0
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        if not (kind == "weight" and module in chosen):
            total += parameter.numel() * runtime.float_bytes + _NAME_BYTES
    if runtime.holds_angles and rotary_width:
        config = model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None) or DEFAULT_MAX_LENGTH
        total += min(DEFAULT_MAX_LENGTH, limit) * rotary_width * runtime.float_bytes
    return total
