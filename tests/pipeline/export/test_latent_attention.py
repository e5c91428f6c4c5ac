"""The bodies of latent attention are the specification, and ONNX Runtime runs them as such."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from pipeline.export.block_skip import PLUGIN_ATTRIBUTES
from pipeline.export.contract import (
    BYTES,
    DOMAIN,
    LATENT_OPS,
    NIBBLES,
    NUMBERS,
    latent_attention_op,
)
from pipeline.export.latent_attention import function_bodies
from trt_plugins.latent_attention.reference import Held, Rebuilt, latent_attention

FORMS = (NUMBERS, BYTES, NIBBLES)
# Batch, query heads, queries, slots; then of the keys: groups, heads of a group, rank, width.
SIZES = [(1, 4, 1, 7, 2, 1, 6, 8), (2, 6, 3, 5, 1, 3, 10, 4), (2, 3, 2, 4, 1, 1, 2, 6)]


def held_side(random: np.random.Generator, form: str, shape: tuple[int, ...]) -> Held:
    """Numbers, or codes and steps, of latents [B, groups, L, rank]."""
    if form == NUMBERS:
        return Held(random.normal(size=shape).astype(np.float32))
    width = shape[-1] // 2 if form == NIBBLES else shape[-1]
    codes = random.integers(-128, 128, size=(*shape[:-1], width)).astype(np.int8)
    largest = 15 if form == NIBBLES else 255
    low = random.normal(-1, 0.1, size=(*shape[:-1], 1))
    step = random.uniform(1, 2, size=low.shape) / largest
    return Held(codes, np.concatenate([step, low], -1).astype(np.float16), form == NIBBLES)


def problem(
    random: np.random.Generator, sizes: tuple[int, ...], rebuilt: bool, keys: str, values: str
) -> tuple[np.ndarray, np.ndarray, Held, Held, Rebuilt | None]:
    """Inputs of the op; values have another width than keys, and a group of their own."""
    batch, heads, length, slots, groups, per_group, rank, width = sizes
    query = random.normal(size=(batch, heads, length, width if rebuilt else rank))
    mask = np.where(random.random((batch, 1, length, slots)) < 0.3, -1e4, 0.0)
    mask[..., 0] = 0
    tables = None
    if rebuilt:
        angles = random.uniform(0, 6, size=(slots + 3, width // 2))
        up = random.normal(size=(groups, per_group, rank, width))
        mean = random.normal(size=(groups, per_group, 1, width))
        arrays = (a.astype(np.float32) for a in (up, mean, np.cos(angles), np.sin(angles)))
        tables = Rebuilt(*arrays)
    return (
        query.astype(np.float32),
        mask.astype(np.float32),
        held_side(random, keys, (batch, groups, slots, rank)),
        held_side(random, values, (batch, 1, slots, rank + 2)),
        tables,
    )


def feeds_of(
    query: np.ndarray, mask: np.ndarray, keys: Held, values: Held, tables: Rebuilt | None
) -> dict[str, np.ndarray]:
    """The op's inputs by name, in its order."""
    feed = {"query": query, "mask": mask}
    for side, held in (("keys", keys), ("values", values)):
        feed |= {side: held.held}
        feed |= {} if held.steps is None else {f"{side}_steps": held.steps}
    if tables is not None:
        feed |= {"key_up": tables.up, "key_mean": tables.mean}
        feed |= {"cos": tables.cos, "sin": tables.sin}
    return feed


def one_node_model(op_type: str, feed: dict[str, np.ndarray], opset: int) -> onnx.ModelProto:
    """A single node with its body in the model, whose inputs are the graph's."""
    kind, value = onnx.helper.np_dtype_to_tensor_dtype, onnx.helper.make_tensor_value_info
    inputs = [value(name, kind(array.dtype), array.shape) for name, array in feed.items()]
    node = onnx.helper.make_node(op_type, list(feed), ["y"], domain=DOMAIN, **PLUGIN_ATTRIBUTES)
    outputs = [value("y", kind(feed["query"].dtype), list("bhsr"))]
    return onnx.helper.make_model(
        onnx.helper.make_graph([node], "one", inputs, outputs),
        functions=[ir.serde.serialize_function(function_bodies(opset, {op_type})[op_type])],
        opset_imports=[onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )


@pytest.mark.parametrize("rebuilt", [False, True])
@pytest.mark.parametrize("keys", FORMS)
def test_body_equals_the_reference(rebuilt: bool, keys: str) -> None:
    random = np.random.default_rng(0)
    for values, sizes in zip(FORMS, SIZES, strict=True):
        op_type, opset = latent_attention_op(rebuilt, keys, values), 24 if values else 18
        given = problem(random, sizes, rebuilt, keys, values)
        feed = feeds_of(*given)
        model = one_node_model(op_type, feed, opset)
        onnx.checker.check_model(model, full_check=True)
        session = onnxruntime.InferenceSession(model.SerializeToString())
        (actual,) = session.run(None, feed)
        np.testing.assert_allclose(actual, latent_attention(*given), rtol=2e-5, atol=2e-5)


def test_every_name_has_a_body_which_is_the_same_in_both_opsets() -> None:
    old, new = (function_bodies(opset, LATENT_OPS) for opset in (18, 24))
    assert set(old) == set(new) == set(LATENT_OPS)
    for name, body in new.items():
        protos = [ir.serde.serialize_function(one) for one in (old[name], body)]
        assert [[node.op_type for node in proto.node] for proto in protos[:1]] == [
            [node.op_type for node in protos[1].node]
        ]
    assert latent_attention_op(True, BYTES, NUMBERS) == "LatentAttentionRebuiltKeys8"


def test_queries_that_do_not_fit_are_refused_by_the_reference() -> None:
    random = np.random.default_rng(1)
    query, mask, keys, values, tables = problem(random, SIZES[0], True, NUMBERS, NUMBERS)
    with pytest.raises(ValueError, match="do not fit"):
        latent_attention(query[:, :3], mask, keys, values, tables)
