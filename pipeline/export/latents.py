"""Latents in the cache of a graph, in the place of keys and values; rebuilt when they are read.

    past latents ++ (y - mean) down^T  ->  present latents
    mean + latents up^T, and keys turned by their slots  ->  what attention is given

A token's position is its slot: a row that is padded on the left would be turned by other angles.
"""

from __future__ import annotations

import inspect

import torch
from transformers import PreTrainedModel

from pipeline.checkpoint.modeling_cache import CacheMap, cache_maps, latent_of, rotation_of
from pipeline.errors import InputError
from pipeline.export.contract import POSITION_IDS, PROFILES, Profile


class GraphLatents:
    """The maps of a model while it is traced.

    Args:
        model: with maps in place.

    Raises:
        InputError: latents that are rounded, or keys turned in a way that is not known.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        maps = cache_maps(model)
        _refuse_rounded(maps)
        self._maps: dict[tuple[int, str], CacheMap] = {}
        self._rotate = None
        for name, made in maps.items():
            holder, _, side = name.rpartition(".")
            attention = model.get_submodule(holder)
            self._maps[attention.layer_idx, side] = made
            if made.is_rotated:
                self._rotate = rotation_of(attention)
        self._rotary = getattr(model.base_model, "rotary_emb", None)
        if any(made.is_rotated for made in maps.values()):
            self._require_rotation(model)

    def _require_rotation(self, model: PreTrainedModel) -> None:
        takes = (
            [] if self._rotary is None else list(inspect.signature(self._rotary.forward).parameters)
        )
        if self._rotate is None or takes != ["x", POSITION_IDS]:
            raise InputError(
                "Keys of this model cannot be rebuilt from latents inside a graph.",
                where=type(model).__name__,
                observed=f"angles from {', '.join(takes) or 'no module of its own'}",
                expected="one set of angles for all layers, of positions alone",
                change="compress it without a smaller cache for keys",
            )

    def of_new(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is cached of new keys and values: latents [B, groups, S, rank] where a map is."""
        for_keys, for_values = self._of_layer(layer)
        return latent_of(for_keys, key), latent_of(for_values, value)

    def rebuilt(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, heads, K, width] of all that is cached."""
        for_keys, for_values = self._of_layer(layer)
        if for_keys is not None:
            keys = for_keys.heads_of(keys)
            if for_keys.is_rotated:
                keys = self._turned(keys)
        return keys, values if for_values is None else for_values.heads_of(values)

    def _of_layer(self, layer: int) -> tuple[CacheMap | None, CacheMap | None]:
        return self._maps.get((layer, "key_map")), self._maps.get((layer, "value_map"))

    def _turned(self, keys: torch.Tensor) -> torch.Tensor:
        assert self._rotary is not None, "looked at in __init__"
        assert self._rotate is not None, "likewise"
        cos, sin = self._rotary(keys, torch.arange(keys.shape[2])[None])
        return self._rotate(keys, cos, sin)


def _refuse_rounded(maps: dict[str, CacheMap]) -> None:
    rounded = sorted(name for name, made in maps.items() if made.bits is not None)
    if rounded:
        raise InputError(
            "A cache of rounded latents cannot be exported yet.",
            where=rounded[0],
            observed=f"{maps[rounded[0]].bits} bits, in {len(rounded)} maps",
            expected="latents in the type of the graph",
            change="compress with --cache-bits float, or run the checkpoint in PyTorch",
        )


def refuse_latents_in(profile: Profile, model: PreTrainedModel) -> None:
    """Raise InputError where the attention itself writes the cache, and knows no latents."""
    if profile.contrib and cache_maps(model):
        raise InputError(
            "This profile's attention cannot read the latents that the checkpoint caches.",
            where=model.config.name_or_path,
            observed=f"--profile {profile.name}",
            expected=" or ".join(name for name, row in PROFILES.items() if not row.contrib),
            change="export with another profile",
        )
