"""Bytes that a runtime's file spends on a group of matrices, form by form."""

from __future__ import annotations

from pipeline.compress.plan.plan import GroupPlan
from pipeline.quantize.formats import Format, Runtime, parse_format

INDEX_BYTES = 4
# A safetensors header names every tensor with its type, shape and place.
NAME_BYTES = 140


def matrix_bytes(rows: int, columns: int, style: Format | None, runtime: Runtime) -> int:
    """Bytes of one matrix, in few bits or not, with its names."""
    if style is None:
        return rows * columns * runtime.float_bytes + NAME_BYTES
    names = NAME_BYTES * (2 if style.symmetric else 3)
    return style.stored_bytes(rows, columns, runtime.scale_bytes) + names


def group_bytes(group: GroupPlan, runtime: Runtime) -> int:
    """Bytes of all that a group stores: factors or matrices, and the permutation."""
    down_style, up_style = (
        None if name is None else parse_format(name) for name in (group.down_style, group.up_style)
    )
    others = NAME_BYTES * 3 * (len(group.members) - 1)
    if group.form == "dense":
        return matrix_bytes(group.rows, group.columns, up_style, runtime) + others
    width, index = group.columns, 0
    if group.form == "skip":
        width, index = group.columns - group.rank, group.columns * INDEX_BYTES + NAME_BYTES
    down = matrix_bytes(group.rank, width, down_style, runtime)
    return down + matrix_bytes(group.rows, group.rank, up_style, runtime) + index + others
