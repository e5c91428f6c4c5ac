"""A tiny exported folder: one attention layer with a cache and two block-skip nodes.

Not `tests.support.tiny_decoder`: building engines needs heads of 64, float16 and block-skip nodes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from pipeline.export import cache_write
from pipeline.export.block_skip import function_bodies
from pipeline.export.contract import BLOCK_SKIP, CACHE_WRITE, PROFILES

MAX_LENGTH = 16
VOCAB_SIZE = 32
BLOCK_SKIP_NODES = 2

GRAPH = """
<ir_version: 10, opset_import: ["" : {opset}, "skipcat" : 1]>
tiny (int64[batch_size,sequence_length] input_ids,
      int64[batch_size,total_sequence_length] attention_mask,
      int64[batch_size,sequence_length] position_ids,
      {dtype}[batch_size,2,{cache},64] past_key, {dtype}[batch_size,2,{cache},64] past_value)
   => ({dtype}[batch_size,sequence_length,32] logits,
       {dtype}[batch_size,2,{present},64] present_key,
       {dtype}[batch_size,2,{present},64] present_value)
{{
    split = Constant <value = int64[4] {{0, 0, -1, 64}}> ()
    join = Constant <value = int64[3] {{0, 0, 256}}> ()
    ones = Constant <value = int64[1] {{1}}> ()
    twos = Constant <value = int64[1] {{2}}> ()
    start = Constant <value = int64 {{0}}> ()
    step = Constant <value = int64 {{1}}> ()
    embedding = Gather (embed, input_ids)
    q_flat = {linear} (embedding, qa, qb)
    k_flat = MatMul (embedding, wk)
    v_flat = MatMul (embedding, wv)
    q_split = Reshape (q_flat, split)
    k_split = Reshape (k_flat, split)
    v_split = Reshape (v_flat, split)
    q = Transpose <perm = [0, 2, 1, 3]> (q_split)
    k = Transpose <perm = [0, 2, 1, 3]> (k_split)
    v = Transpose <perm = [0, 2, 1, 3]> (v_split)
    {update}
    shape = Shape (present_key)
    index = Constant <value = int64 {{2}}> ()
    length = Gather (shape, index)
    slots = Range (start, length, step)
    rows = Unsqueeze (position_ids, twos)
    seen = LessOrEqual (slots, rows)
    seen_heads = Unsqueeze (seen, ones)
    zero = Constant <value = float {{0.0}}> ()
    low = Constant <value = float {{-60000.0}}> ()
    mask_float = Where (seen_heads, zero, low)
    mask = Cast <to = {onnx_dtype}> (mask_float)
    {attention}
    mixed = Transpose <perm = [0, 2, 1, 3]> (heads)
    flat = Reshape (mixed, join)
    out = {linear} (flat, oa, ob)
    logits = MatMul (out, head)
}}
"""
STATIC_UPDATE = """
    count = Shape <start = 1, end = 2> (input_ids)
    total = ReduceSum <keepdims = 0> (attention_mask, ones)
    write = Sub (total, count)
    present_key = TensorScatter <axis = -2> (past_key, k, write)
    present_value = TensorScatter <axis = -2> (past_value, v, write)
"""
PLUGIN_UPDATE = """
    count = Shape <start = 1, end = 2> (input_ids)
    total = ReduceSum <keepdims = 0> (attention_mask, ones)
    slot = Sub (total, count)
    write = Cast <to = 6> (slot)
    present_key = skipcat.CacheWrite (past_key, k, write)
    present_value = skipcat.CacheWrite (past_value, v, write)
"""
GROWING_UPDATE = """
    unused = ReduceSum (attention_mask, ones)
    present_key = Concat <axis = 2> (past_key, k)
    present_value = Concat <axis = 2> (past_value, v)
"""
FUSED_ATTENTION = "heads = Attention <scale = 0.125> (q, present_key, present_value, mask)"
# Query heads 0 and 1 share key head 0, as in Attention's grouped form.
PLAIN_ATTENTION = """
    kt = Transpose <perm = [0, 1, 3, 2]> (present_key)
    grouped = Constant <value = int64[5] {0, 2, 2, -1, 64}> ()
    ungrouped = Constant <value = int64[4] {0, 4, -1, 64}> ()
    q_groups = Reshape (q, grouped)
    kt_groups = Unsqueeze (kt, twos)
    raw_groups = MatMul (q_groups, kt_groups)
    raw_shape = Shape <start = 3> (raw_groups)
    scores_head = Constant <value = int64[2] {0, 4}> ()
    scores_shape = Concat <axis = 0> (scores_head, raw_shape)
    raw = Reshape (raw_groups, scores_shape)
    eighth = Constant <value = float {0.125}> ()
    scale = CastLike (eighth, raw)
    scaled = Mul (raw, scale)
    scores = Add (scaled, mask)
    weights = Softmax <axis = -1> (scores)
    weight_head = Constant <value = int64[3] {0, 2, 2}> ()
    weight_shape = Concat <axis = 0> (weight_head, raw_shape)
    weight_groups = Reshape (weights, weight_shape)
    value_groups = Unsqueeze (present_value, twos)
    head_groups = MatMul (weight_groups, value_groups)
    heads = Reshape (head_groups, ungrouped)
"""
# Hidden size 256, four query heads of 64 on two key heads: TensorRT has no fused attention for
# heads of 8, and none for one static query row of fewer than four heads.
WEIGHTS = {
    "embed": (VOCAB_SIZE, 256), "qa": (64, 192), "qb": (192, 256), "wk": (256, 128),
    "wv": (256, 128), "oa": (64, 192), "ob": (192, 256), "head": (256, VOCAB_SIZE),
}  # fmt: skip
RENAMED = {
    f"{kind}_{part}": f"{prefix}.0.{part}"
    for kind, prefix in (("past", "past_key_values"), ("present", "present"))
    for part in ("key", "value")
}


def make_graph(profile: str, dtype: str, linear: str) -> onnx.ModelProto:
    """The tiny model in an export profile, its block-skip nodes named `linear`."""
    static, newest = PROFILES[profile].static_cache, profile == "opset24"
    opset = PROFILES[profile].opset
    update = PLUGIN_UPDATE if static else GROWING_UPDATE
    text = GRAPH.format(
        opset=opset,
        dtype=dtype if dtype == "float16" else "float",
        onnx_dtype=10 if dtype == "float16" else 1,
        cache=MAX_LENGTH if static else "past_sequence_length",
        present=MAX_LENGTH if static else "total_length",
        linear=linear,
        update=STATIC_UPDATE if newest else update,
        attention=FUSED_ATTENTION if newest else PLAIN_ATTENTION,
    )
    model = onnx.parser.parse_model(text)
    bodies = function_bodies(opset, {BLOCK_SKIP})
    if "CacheWrite" in update and not newest:
        bodies |= cache_write.function_bodies(opset, {CACHE_WRITE})
    model.functions.extend(map(ir.serde.serialize_function, bodies.values()))
    random = np.random.default_rng(0)
    for name, shape in WEIGHTS.items():
        values = (random.standard_normal(shape) * 0.1).astype(dtype)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    mark_plugin(model)
    rename(model)
    return model


def mark_plugin(model: onnx.ModelProto) -> None:
    """Name the plugin on every block-skip node, as the exporter does."""
    for node in model.graph.node:
        if node.domain == "skipcat":
            for key, value in (("plugin_namespace", "skipcat"), ("plugin_version", "1")):
                node.attribute.append(onnx.helper.make_attribute(key, value))


def rename(model: onnx.ModelProto) -> None:
    """Give the cache tensors their dotted names, which the text form cannot spell."""
    for node in model.graph.node:
        node.input[:] = [RENAMED.get(name, name) for name in node.input]
        node.output[:] = [RENAMED.get(name, name) for name in node.output]
    for value in (*model.graph.input, *model.graph.output):
        value.name = RENAMED.get(value.name, value.name)


def write_export(
    folder: Path,
    profile: str = "opset24",
    dtype: str = "float16",
    linear: str = "skipcat.BlockSkipLinear",
    **changes: Any,
) -> Path:
    """Write the tiny model as an exported folder; `changes` overwrite fields of export.json."""
    folder.mkdir(parents=True)
    path = folder / "model.onnx"
    onnx.save(
        make_graph(profile, dtype, linear),
        str(path),
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=0,
    )
    record = {
        "schema": 1,
        "profile": profile,
        "dtype": dtype,
        "max_length": MAX_LENGTH,
        "vocab_size": VOCAB_SIZE,
        "num_layers": 1,
        "block_skip_nodes": BLOCK_SKIP_NODES,
        "onnx_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "checkpoint": "tiny",
        **changes,
    }
    (folder / "export.json").write_text(json.dumps(record))
    return folder


def cache_write_nodes(path: Path) -> list[str]:
    """Its nodes that write the cache as the plugin's harness reads them: 5 tokens in 3 rows."""
    graph = onnx.load(path, load_external_data=False).graph
    past, new = (f"half 4 3 2 {tokens} 64" for tokens in (MAX_LENGTH, 5))
    lines = []
    for node in (node for node in graph.node if node.op_type == CACHE_WRITE):
        assert [item.name for item in node.attribute] == ["plugin_namespace", "plugin_version"]
        lines.append(f"{node.output[0]} {CACHE_WRITE} 0 4 {past} {new} int32 1 3 {past}")
    return lines


@pytest.fixture(scope="session")
def export_writer() -> Callable[..., Path]:
    """`write_export`, for tests that need a folder of their own."""
    return write_export


@pytest.fixture(scope="session")
def tiny_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An opset24 float16 folder that no test changes."""
    return write_export(tmp_path_factory.mktemp("exports") / "tiny")
