"""The custom op of attention over cached latents: how it is traced, and the body that specifies it.

    LatentAttention(query, mask, keys, values)                              keys as they are cached
    LatentAttentionRebuilt(..., key_up, key_mean, cos, sin)                 rebuilt and turned
    ...Keys8Values4(query, mask, keys, key_steps, values, value_steps, ...) codes in the cache

query [B, H, S, D], scaled; mask [B or 1, 1, S, L], added; keys and values [B, groups, L, rank],
mixed [B, H, S, rank of the values]. Keys are rebuilt with key_up [groups, heads of a group, rank,
D] and key_mean [groups, heads of a group, 1, D], and turned by cos and sin [at least L, D / 2],
number i with number i + D / 2: any rotation is, once a key's numbers are in the right order.

Of codes, `8` has one to a byte and `4` two, those of number i and of number i + bytes, all as int8
and less 128, for TensorRT joins no other bytes. Steps [B, groups, L, 2] are step and low of each.

The mapping back of values is outside, behind the node (`passes/fold_values.py`), and so is writing
the cache. Names instead of optional inputs, as those of block skip.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx.parser
import onnx_ir as ir
import torch

from pipeline.checkpoint.modeling_cache import CacheMap
from pipeline.export.block_skip import PLUGIN_ATTRIBUTES
from pipeline.export.contract import (
    BYTES,
    CODE_TYPE,
    DOMAIN,
    NIBBLES,
    NUMBERS,
    OP_VERSION,
    STEP_TYPE,
    form_of,
    held_width,
    latent_attention_op,
)

_PLUGIN_KEY_WIDTHS = range(16, 257, 16)  # of rebuilt keys, that the kernels take
_MIDDLE = 128  # what codes are held less
# As export.json says it.
HELD_AS = {BYTES: "codes, one to a byte", NIBBLES: "codes, two to a byte"}
# Types of codes and of their steps in the cache.
CODES, STEPS = getattr(torch, CODE_TYPE), getattr(torch, STEP_TYPE)


@dataclass(frozen=True)
class HeldSide:
    """Keys or values of one layer in the cache of a graph.

    Attributes:
        held: [B, groups, L, rank], or int8 codes [B, groups, L, bytes].
        steps: of codes, [B, groups, L, 2].
        form: `NUMBERS`, `BYTES` or `NIBBLES`.
    """

    held: torch.Tensor
    steps: torch.Tensor | None = None
    form: str = NUMBERS

    @classmethod
    def of(cls, latent: torch.Tensor, made: CacheMap) -> HeldSide:
        """What is cached of new latents [B, groups, S, rank] of a map."""
        bits = made.bits
        if bits is None:
            return cls(latent)
        form = form_of(bits)
        codes, step, low = made.codes_of(latent, bits)
        if form == NIBBLES:
            width = held_width(latent.shape[-1], bits)
            lower, upper = codes[..., :width], codes[..., width:]
            codes = lower + 16 * torch.nn.functional.pad(upper, (0, 2 * width - codes.shape[-1]))
        steps = torch.cat([step, low], dim=-1).to(STEPS)
        return cls((codes - _MIDDLE).to(CODES), steps, form)

    def numbers(self, rank: int, dtype: torch.dtype) -> torch.Tensor:
        """What it stands for, [B, groups, L, rank]: as the op's body has it."""
        if self.steps is None:
            return self.held
        codes = self.held.to(dtype) + _MIDDLE
        if self.form == NIBBLES:
            upper = torch.floor(codes / 16)
            codes = torch.cat([codes - 16 * upper, upper], dim=-1)[..., :rank]
        step, low = self.steps.to(dtype).chunk(2, dim=-1)
        return codes * step + low

    @property
    def rank(self) -> int:
        """Numbers of a latent, with one that fills up the last byte where they are odd."""
        return self.held.shape[-1] * (2 if self.form == NIBBLES else 1)

    @property
    def _inputs(self) -> tuple[torch.Tensor, ...]:
        return (self.held,) if self.steps is None else (self.held, self.steps)


@dataclass(frozen=True)
class KeyTables:
    """What keys are rebuilt and turned by; see above."""

    up: torch.Tensor
    mean: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


def attend_to_latents(
    query: torch.Tensor,
    mask: torch.Tensor,
    keys: HeldSide,
    values: HeldSide,
    tables: KeyTables | None,
) -> torch.Tensor:
    """One node: [B, H, S, rank of the values].

    Args:
        query: scaled, [B, H, S, D].
        mask: [B or 1, 1, S, L].
        keys: as cached.
        values: as cached.
        tables: by which keys are rebuilt; None takes them as they are.
    """
    behind = () if tables is None else (tables.up, tables.mean, tables.cos, tables.sin)
    # Without the attributes TensorRT takes the body, whatever plugin it is given.
    taken = tables is None or query.shape[3] in _PLUGIN_KEY_WIDTHS
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{latent_attention_op(tables is not None, keys.form, values.form)}",
        (query, mask, *keys._inputs, *values._inputs, *behind),
        dict(PLUGIN_ATTRIBUTES) if taken else {},
        dtype=query.dtype,
        shape=(*query.shape[:3], values.rank),
        version=OP_VERSION,
    )


_CODES = """
    {side}_signed = CastLike ({side}, query)
    {side}_bytes = Add ({side}_signed, middle)
    {side}_like = CastLike ({side}_steps, query)
    {side}_step, {side}_low = Split <axis = -1, num_outputs = 2> ({side}_like)
"""
_PAIRS = """
    {side}_sixteenths = Div ({side}_bytes, sixteen)
    {side}_upper = Floor ({side}_sixteenths)
    {side}_above = Mul ({side}_upper, sixteen)
    {side}_lower = Sub ({side}_bytes, {side}_above)
    {side}_codes = Concat <axis = -1> ({side}_lower, {side}_upper)
"""
_NUMBERS = """
    {side}_scaled = Mul ({codes}, {side}_step)
    {side}_numbers = Add ({side}_scaled, {side}_low)
"""
_CONSTANTS = """
    copied = Constant <value_ints = [0]> ()
    rest = Constant <value_ints = [-1]> ()
    slots = Shape <start = 2, end = 3> (keys)
"""
_OF_CODES = """
    exact_middle = Constant <value_float = 128.0> ()
    middle = CastLike (exact_middle, query)
    exact_sixteen = Constant <value_float = 16.0> ()
    sixteen = CastLike (exact_sixteen, query)
"""
# One product of all heads: [B, groups, 1, L, rank] by [groups, heads of a group, rank, D].
_REBUILT = """
    among_heads = Constant <value_ints = [2]> ()
    parted = Unsqueeze ({keys}, among_heads)
    mapped = MatMul (parted, key_up)
    whole = Add (mapped, key_mean)
    key_width = Shape <start = 3, end = 4> (key_up)
    by_kv_head = Concat <axis = 0> (copied, rest, slots, key_width)
    plain = Reshape (whole, by_kv_head)
    first, second = Split <axis = -1, num_outputs = 2> (plain)
    all_cos = CastLike (cos, query)
    all_sin = CastLike (sin, query)
    c = Slice (all_cos, copied, slots, copied)
    s = Slice (all_sin, copied, slots, copied)
    first_c = Mul (first, c)
    second_s = Mul (second, s)
    second_c = Mul (second, c)
    first_s = Mul (first, s)
    turned_first = Sub (first_c, second_s)
    turned_second = Add (second_c, first_s)
    turned = Concat <axis = -1> (turned_first, turned_second)
"""
# Queries that share a head of keys, or a group of values, are rows of one product.
_ATTENTION = """
    across = Transpose <perm = [0, 1, 3, 2]> ({keys})
    heads = Shape <start = 1, end = 2> (query)
    width = Shape <start = 3, end = 4> (query)
    key_heads = Shape <start = 1, end = 2> ({keys})
    by_key_head = Concat <axis = 0> (copied, key_heads, rest, width)
    rows = Reshape (query, by_key_head)
    products = MatMul (rows, across)
    by_head = Concat <axis = 0> (copied, heads, rest, slots)
    scores = Reshape (products, by_head)
    masked = Add (scores, mask)
    wide = Cast <to = 1> (masked)
    shares = Softmax <axis = -1> (wide)
    weights = CastLike (shares, query)
    value_groups = Shape <start = 1, end = 2> ({values})
    by_group = Concat <axis = 0> (copied, value_groups, rest, slots)
    grouped = Reshape (weights, by_group)
    summed = MatMul (grouped, {values})
    rank = Shape <start = 3, end = 4> ({values})
    back = Concat <axis = 0> (copied, heads, rest, rank)
    mixed = Reshape (summed, back)
"""


def function_bodies(opset: int, wanted: Collection[str]) -> dict[str, ir.Function]:
    """Those of the ops that are wanted, as ONNX functions over an opset, by op type."""
    forms = (NUMBERS, BYTES, NIBBLES)
    protos = [
        onnx.parser.parse_function(_body(opset, rebuilt, keys, values))
        for rebuilt in (False, True)
        for keys in forms
        for values in forms
        if latent_attention_op(rebuilt, keys, values) in wanted
    ]
    return {proto.name: ir.serde.deserialize_function(proto) for proto in protos}


def _body(opset: int, rebuilt: bool, keys: str, values: str) -> str:
    inputs = ["query", "mask"]
    lines = [_CONSTANTS, _OF_CODES if keys or values else ""]
    named = {}
    for side, form in (("keys", keys), ("values", values)):
        inputs += [side, f"{side}_steps"] if form else [side]
        named[side] = f"{side}_numbers" if form else side
        if form:
            codes = f"{side}_codes" if form == NIBBLES else f"{side}_bytes"
            text = _CODES + (_PAIRS if form == NIBBLES else "") + _NUMBERS
            lines.append(text.format(side=side, codes=codes))
    if rebuilt:
        inputs += ["key_up", "key_mean", "cos", "sin"]
        lines.append(_REBUILT.format(**named))
        named["keys"] = "turned"
    lines.append(_ATTENTION.format(**named))
    name = latent_attention_op(rebuilt, keys, values)
    head = f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n{name} ({", ".join(inputs)})'
    return f"{head} => (mixed)\n{{{''.join(lines)}}}\n"
