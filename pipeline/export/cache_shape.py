"""Shapes of the cache of a graph: what keys and values of each layer are held as."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from pipeline.checkpoint.modeling_cache import CacheMap, LatentCache, cache_maps
from pipeline.errors import InputError
from pipeline.export.cache import padded_width
from pipeline.export.contract import Profile, form_of, held_width
from pipeline.export.latent_attention import HELD_AS
from pipeline.model.cache_structure import SIDES


@dataclass(frozen=True)
class CacheShape:
    """Width of one layer's cache: [B, kv_heads, length, key or value width].

    Attributes:
        kv_heads: of keys; of latents, the groups of heads that have one.
        key_width: of each.
        value_width: of values.
        value_heads: of values, where they are not as many.
        key_bits: of each number, where the cache holds codes; None of numbers as they are.
        value_bits: likewise.
    """

    kv_heads: int
    key_width: int
    value_width: int
    value_heads: int | None = None
    key_bits: int | None = None
    value_bits: int | None = None

    @classmethod
    def of(
        cls, keys: torch.Tensor, values: torch.Tensor, maps: tuple[CacheMap | None, ...]
    ) -> CacheShape:
        """Of what a layer caches, and the maps that made latents of it."""
        bits = [None if made is None else made.bits for made in maps]
        heads = None if values.shape[1] == keys.shape[1] else values.shape[1]
        return cls(keys.shape[1], keys.shape[3], values.shape[3], heads, *bits)

    @property
    def sides(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Heads and width of keys, and of values."""
        return (
            (self.kv_heads, self.key_width),
            (self.value_heads or self.kv_heads, self.value_width),
        )

    @property
    def bits(self) -> tuple[int | None, int | None]:
        """Of a number of keys, and of values."""
        return self.key_bits, self.value_bits

    @property
    def held(self) -> list[tuple[int, int]]:
        """Heads, and numbers or bytes of each, of keys, and of values."""
        pairs = zip(self.sides, self.bits, strict=True)
        return [(heads, held_width(width, bits)) for (heads, width), bits in pairs]

    def to_json(self) -> dict[str, int | str]:
        """The entry of export.json: what codes are held in is said beside the sizes."""
        sizes = {name: value for name, value in vars(self).items() if value is not None}
        coded = zip(SIDES, self.bits, strict=True)
        return sizes | {f"{side}_form": HELD_AS[form_of(bits)] for side, bits in coded if bits}


def cache_shapes(model: PreTrainedModel, profile: Profile) -> list[CacheShape]:
    """Widths of every layer's cache, read off a real one after a short forward pass.

    ONNX Runtime's own attention has keys and values of one width.

    Raises:
        InputError: the model keeps something else than keys and values.
    """
    ids = torch.zeros(1, 2, dtype=torch.int64)
    with torch.no_grad():
        # State-space models name theirs otherwise, or have none.
        given = {"past_key_values": LatentCache(model)} if cache_maps(model) else {}
        cache = getattr(model(input_ids=ids, use_cache=True, **given), "past_key_values", None)
    try:
        layers = getattr(cache, "layers", [])
        shapes = [
            CacheShape.of(layer.keys, layer.values, getattr(layer, "maps", (None, None)))
            for layer in layers
        ]
    except (AttributeError, IndexError) as error:
        raise _not_keys_and_values(cache) from error
    if not shapes:
        raise _not_keys_and_values(cache)
    if not profile.contrib:
        return shapes
    widths = [padded_width(shape.key_width, shape.value_width) for shape in shapes]
    return [CacheShape(s.kv_heads, w, w) for s, w in zip(shapes, widths, strict=True)]


def _not_keys_and_values(cache: object) -> InputError:
    layers = [type(layer).__name__ for layer in getattr(cache, "layers", [])]
    return InputError(
        "The model's cache does not consist of keys and values.",
        observed=", ".join(dict.fromkeys(layers)) or "none, or one of the model's own",
        expected="attention in every layer",
    )


def coded_sides(shapes: list[CacheShape]) -> list[tuple[int, int]]:
    """Layer and side, 0 of keys, wherever the cache holds codes."""
    return [
        (layer, number)
        for layer, shape in enumerate(shapes)
        for number, bits in enumerate(shape.bits)
        if bits is not None
    ]
