"""What an architecture reads for a token, from its sizes alone: no torch, no weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.bench.shapes import Shape
from pipeline.bench.traffic import CacheTensor, StoredTensor, Traffic

# Columns of the blocks that llama.cpp's K formats have; rows of other widths get other formats.
_K_BLOCK = 256
# Half of the layers hold these in more bits, in a file of the mixed kind "M".
_MORE_BITS = ("self_attn.v_proj", "mlp.down_proj")
# Vectors of a layer by family: norms over the stream, norms over a head, biases of q, k and v.
_VECTORS = {"llama": (2, 0, 0), "qwen2": (2, 0, 1), "qwen3": (2, 2, 0), "gemma3_text": (4, 2, 0)}


@dataclass(frozen=True)
class _Precision:
    """Bits of an element: in the decoder's matrices, and in embedding and head.

    Attributes:
        matrix: of a decoder's matrix.
        head: of embedding and head.
        odd_matrix: of a matrix whose rows are no multiple of `_K_BLOCK`; None for the same.
        odd_head: likewise, of embedding and head.
        more: of `_MORE_BITS` where the layer holds them in more; None for the same.
        odd_more: likewise, with such rows.
    """

    matrix: float
    head: float
    odd_matrix: float | None = None
    odd_head: float | None = None
    more: float | None = None
    odd_more: float | None = None

    @property
    def wide(self) -> float:
        """Bits of vectors and of the cache."""
        return max(16.0, self.head)

    def of_matrix(self, member: str, columns: int) -> float:
        """Bits of an element of a decoder's matrix, on the mean over its layers."""
        odd = columns % _K_BLOCK != 0
        bits = self.odd_matrix if odd and self.odd_matrix is not None else self.matrix
        more = self.odd_more if odd else self.more
        return bits if more is None or member not in _MORE_BITS else (bits + more) / 2

    def of_head(self, columns: int) -> float:
        """Bits of an element of embedding and head."""
        is_other = columns % _K_BLOCK != 0 and self.odd_head is not None
        return self.odd_head if is_other and self.odd_head is not None else self.head


# Rounded weights: a code of 4 or 8 bits, and a float16 scale for every 128 (q4f16: for every 32);
# NVFP4 has a scale of 8 bits for every 16. llama.cpp's: Q4_K 4.5, Q5_0 5.5, Q6_K 6.5625, Q8_0 8.5.
_PRECISIONS = {
    "bfloat16": _Precision(16, 16),
    "float16": _Precision(16, 16),
    "float32": _Precision(32, 32),
    "int8": _Precision(8 + 16 / 128, 16),
    "int4": _Precision(4 + 16 / 128, 16),
    "nvfp4": _Precision(4 + 8 / 16, 16),
    "q4f16": _Precision(4 + 16 / 32, 4 + 16 / 32),
    "q4_k_m": _Precision(4.5, 6.5625, 5.5, 8.5, 6.5625, 8.5),
    "q8_0": _Precision(8.5, 8.5),
}


def traffic_of_shape(shape: Shape, dtype: str, kept: float = 1.0) -> Traffic:
    """Count an architecture; no weights are made.

    Args:
        shape: its sizes.
        dtype: a name in `_PRECISIONS`.
        kept: fraction of the decoder's linear parameters to keep; below 1 the ranks are those of
            the uniform plan, which needs torch.

    Raises:
        pipeline.errors.UsageError: `kept` outside (0, 1].
    """
    precision = _PRECISIONS[dtype]
    linears = _dense_linears(shape) if kept == 1 else _factored_linears(shape, kept)
    tensors = [
        *_tables(shape, precision),
        *(
            StoredTensor(
                f"{name}.{member}",
                sizes,
                precision.of_matrix(member, sizes[1]),
                product=True,
            )
            if len(sizes) > 1
            else StoredTensor(f"{name}.{member}", sizes, 32, floating=False)
            for name, member, sizes in linears
        ),
        *_vectors(shape, precision.wide),
    ]
    cache, queries = _cache(shape, precision.wide), shape.heads * shape.head_dim
    return Traffic(tensors, cache, shape.positions, "the sizes", query_width=queries)


def _tables(shape: Shape, precision: _Precision) -> Iterator[StoredTensor]:
    """The embedding, and the head if it is another matrix."""
    sizes, bits = (shape.vocab, shape.hidden), precision.of_head(shape.hidden)
    yield StoredTensor("embed_tokens", sizes, bits, looked_up=not shape.tied, product=shape.tied)
    if not shape.tied:
        yield StoredTensor("lm_head", sizes, bits, product=True)


def _dense_linears(shape: Shape) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Layer, name and [out, in] of every linear of the decoder."""
    for index in range(shape.layers):
        for members, columns, heights in shape.linears():
            for member, height in zip(members, heights, strict=True):
                yield str(index), member, (height, columns)


def _factored_linears(shape: Shape, kept: float) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """As above, each group in block-skip form: one A' and permutation, and a B' of each."""
    heights = {
        member: height
        for members, _, tall in shape.linears()
        for member, height in zip(members, tall, strict=True)
    }
    for layer, groups in shape.plan(kept).layers.items():
        for group in groups:
            rank, owner = group.rank, group.members[0].removeprefix(f"{layer}.")
            yield layer, owner, (rank, group.columns - rank)
            yield layer, f"{owner}.permutation", (group.columns,)
            for member in group.members:
                own = member.removeprefix(f"{layer}.")
                yield layer, own, (heights[own], rank)


def _vectors(shape: Shape, bits: float) -> Iterator[StoredTensor]:
    """Norms and biases."""
    norms, head_norms, biases = _VECTORS[shape.model_type]
    attention = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    for index in range(shape.layers):
        for number in range(norms):
            yield StoredTensor(f"{index}.norm{number}", (shape.hidden,), bits)
        for number in range(head_norms):
            yield StoredTensor(f"{index}.head_norm{number}", (shape.head_dim,), bits)
        if biases:
            yield StoredTensor(f"{index}.biases", (attention,), bits)
    yield StoredTensor("norm", (shape.hidden,), bits)


def _cache(shape: Shape, bits: float) -> Sequence[CacheTensor]:
    """Keys and values of every layer, in their window where it has one."""
    width = shape.kv_heads * shape.head_dim
    return [
        CacheTensor(width, bits, shape.window_of(index))
        for index in range(shape.layers)
        for _ in ("keys", "values")
    ]
