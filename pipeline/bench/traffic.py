"""Bytes that one decode step reads: every weight once, one row of a table, and the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Besides norms: rotation of queries and keys with the writing of the cache, attention, activation.
_OTHER_KERNELS_OF_A_LAYER = 3


@dataclass(frozen=True)
class StoredTensor:
    """A weight, as a file holds it.

    Attributes:
        name: in that file.
        shape: its dimensions, as they are stored.
        bits: of one element.
        looked_up: only one row is read for a token, as of an embedding or of a table of positions.
        product: it is a matrix that the token is multiplied with.
        floating: it holds floating-point numbers, which a session may keep in another type.
        uses: nodes that read it: gains that are equal are stored once.
    """

    name: str
    shape: tuple[int, ...]
    bits: float
    looked_up: bool = False
    product: bool = False
    floating: bool = True
    uses: int = 1

    @property
    def elements(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def elements_per_token(self) -> int:
        """Numbers read for one token."""
        if self.looked_up and self.shape:
            return self.elements // max(1, self.shape[0])
        return self.elements

    def bits_held(self, float_bytes: int | None) -> float:
        """Bits of an element in memory, where floating-point numbers take `float_bytes`."""
        return 8 * float_bytes if self.floating and float_bytes else self.bits


@dataclass(frozen=True)
class CacheTensor:
    """Keys or values of one layer.

    Attributes:
        width: numbers for one token: heads times head width.
        bits: of one number.
        window: most tokens that it keeps; None for all.
        static_length: slots that are read however many are filled; None if only the filled are.
    """

    width: int
    bits: float
    window: int | None = None
    static_length: int | None = None

    def tokens_read(self, context: float) -> float:
        """Slots that one step reads with `context` tokens in the cache."""
        if self.static_length is not None:
            return self.static_length
        return context if self.window is None else min(context, self.window)


@dataclass(frozen=True)
class RebuiltKeys:
    """Keys of one layer that are rebuilt from latents at every step, by 2 rank n FLOP a token.

    Attributes:
        flop: for each cached token.
        latent_bytes: that are read of it.
        dense_bytes: that would be read of it, were keys cached as they are.
        static_length: slots that are rebuilt however many are filled; None if only the filled are.
    """

    flop: int
    latent_bytes: float
    dense_bytes: float
    static_length: int | None = None

    @classmethod
    def of(
        cls,
        up_shape: tuple[int, ...],
        latent_bytes: float,
        number_bytes: float,
        static_length: int | None = None,
    ) -> RebuiltKeys:
        """By a map [groups, heads of a group, rank, D]; `number_bytes` is of keys as they are."""
        groups, heads, rank, width = up_shape
        numbers = groups * heads * width
        return cls(2 * rank * numbers, latent_bytes, number_bytes * numbers, static_length)


@dataclass(frozen=True)
class Traffic:
    """What a model reads for a token.

    Attributes:
        tensors: its weights.
        cache: keys and values of all layers.
        max_length: most tokens that it can hold; None when that is not known.
        counted_from: the file or files that were counted.
        rebuilt: keys that are no keys in the cache.
        query_width: numbers of the queries of a layer; None where that was not counted.
        cache_passes: how often TensorRT moves the cache in a step: to read it, and where it grows
            by Concat also to read and write it for that.
    """

    tensors: Sequence[StoredTensor]
    cache: Sequence[CacheTensor]
    max_length: int | None
    counted_from: str
    rebuilt: Sequence[RebuiltKeys] = ()
    query_width: int | None = None
    cache_passes: int = 1

    @property
    def rebuild_flop_per_byte(self) -> float | None:
        """FLOP of rebuilding keys for each byte that is therefore not read; None for none.

        A device that has fewer for a byte would decode faster with keys as they are.
        """
        if not self.rebuilt:
            return None
        saved = sum(keys.dense_bytes - keys.latent_bytes for keys in self.rebuilt)
        return sum(keys.flop for keys in self.rebuilt) / saved if saved > 0 else math.inf

    @property
    def stored_bytes(self) -> int:
        """All weights, as they are stored."""
        return round(sum(tensor.elements * tensor.bits for tensor in self.tensors) / 8)

    @property
    def products(self) -> int:
        """Matrices that a token is multiplied with."""
        return sum(tensor.product for tensor in self.tensors)

    @property
    def norms(self) -> int:
        """Norms that a token passes: each has a gain, which is named so."""
        gains = (t for t in self.tensors if "norm" in t.name and len(t.shape) == 1)
        return sum(gain.uses for gain in gains)

    @property
    def attention_width(self) -> int:
        """Numbers of a layer's queries; where they were not counted, as many as of its keys."""
        keys = max((cache.width for cache in self.cache), default=0)
        return keys if self.query_width is None else self.query_width

    @property
    def layers(self) -> int:
        """Decoder layers: each has keys and values."""
        return len(self.cache) // 2

    @property
    def kernels(self) -> int:
        """Kernels of one step: every product, every norm, and the others of each layer."""
        return self.products + self.norms + _OTHER_KERNELS_OF_A_LAYER * self.layers

    def held_bytes(self, float_bytes: int | None = None) -> int:
        """All weights in memory, with floating-point numbers of `float_bytes`, or as stored."""
        bits = (tensor.elements * tensor.bits_held(float_bytes) for tensor in self.tensors)
        return round(sum(bits) / 8)

    def weight_bytes(self, float_bytes: int | None = None) -> int:
        """Weights that one step reads, with floating-point numbers of `float_bytes`."""
        bits = (t.elements_per_token * t.bits_held(float_bytes) for t in self.tensors)
        return round(sum(bits) / 8)

    def cache_bytes(self, context: float, float_bytes: int | None = None) -> int:
        """Cache that one step reads with `context` tokens in it."""
        return round(
            sum(
                tensor.tokens_read(context) * tensor.width * (float_bytes or tensor.bits / 8)
                for tensor in self.cache
            )
        )

    def rebuild_flop(self, context: float) -> float:
        """FLOP that rebuild keys in one step with `context` tokens in the cache."""
        return sum(keys.flop * (keys.static_length or context) for keys in self.rebuilt)

    def prefill_flop(self, tokens: int) -> float:
        """Operations of a prompt: products of all tokens, the head's of the last, and attention."""
        products = [tensor.elements for tensor in self.tensors if tensor.product]
        head = max(products, default=0)
        attention = sum(
            2 * self.attention_width * tokens * min(tokens, cache.window or tokens)
            for cache in self.cache[::2]
        )
        return 2.0 * (sum(products) - head) * tokens + 2.0 * head + attention
