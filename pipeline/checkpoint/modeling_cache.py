"""A smaller KV cache: maps of keys and values to latents, and a cache that holds those.

This file travels with every checkpoint whose cache is smaller and depends on torch and transformers
alone. With an ordinary cache the numbers are the same and only memory is not saved: the maps change
what keys and values are, the cache what is kept of them.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)

# Relative, so that it is found in the package and in the folder of a checkpoint.
from .modeling_latent_codes import codes_of
from .modeling_skipcat import FORMAT_VERSION, QUANT_METHOD, SkipCatConfig, SkipCatQuantizer

# Of maps before the rotation; of those after it; of codes that older code would not have chosen.
_CACHE_FORMAT_VERSION, _NARROW_FORMAT_VERSION, _FED_FORMAT_VERSION = 3, 4, 5
# Of an entry in `quantization_config.caches`.
_OPTIONAL = ("after_rotation", "clip", "error_feedback")


class CacheMap(nn.Module):
    """What becomes of the keys or the values of one layer.

    z = down (y - mean), perhaps rounded, is cached; y = mean + up z is what attention is given.
    Keys are mapped before they are turned by their position, and turned when they are read; or
    after it, so that a query may be mapped in their place, and none is ever rebuilt.

    Args:
        heads: key/value heads.
        width: of each.
        groups: groups of heads, each with a latent of its own.
        rank: numbers of each latent.
        bits: of each number, with a scale and an offset a token and group; None rounds nothing.
        is_rotated: whether the keys are turned by their position afterwards.
        after_rotation: whether they are mapped after that.
        clip: share of a token's range that its codes reach.
        error_feedback: whether errors of the first numbers are taken from the others.
        source: name of the module whose output is mapped.
        device: where the parameters are made.
        dtype: their type.

    Attributes:
        down: [groups, rank, n], n numbers of the heads of a group.
        up: [groups, n, rank].
        mean: [groups, n].
        feedback: [groups, rank - rank // 2, rank // 2], or None; see `codes_of`.
        latent, exact: what the last call gave, [B, groups, S, rank], and before it was rounded.
        angles: of keys, cos and sin that the attention turns the same tokens by.
    """

    def __init__(
        self,
        heads: int,
        width: int,
        groups: int,
        rank: int,
        bits: int | None = None,
        *,
        is_rotated: bool = False,
        after_rotation: bool = False,
        clip: float = 1.0,
        error_feedback: bool = False,
        source: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.width, self.groups, self.rank, self.bits = heads, width, groups, rank, bits
        numbers = heads // groups * width
        half = rank // 2
        shapes = ((rank, numbers), (numbers, rank), (numbers,), (rank - half, half))
        self.down, self.up, self.mean, fed = (
            nn.Parameter(
                torch.empty(groups, *shape, device=device, dtype=dtype), requires_grad=False
            )
            for shape in shapes
        )
        self.clip, self.feedback = clip, fed if error_feedback else None
        self.is_rotated, self.after_rotation = is_rotated, after_rotation
        self.source, self.is_active = source, True
        self.latent: torch.Tensor | None = None
        self.exact: torch.Tensor | None = None
        self.angles: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Latents [B, groups, S, rank] of keys or values [B, S, heads * width]."""
        return self._rounded(self._mapped(states))

    def _mapped(self, states: torch.Tensor) -> torch.Tensor:
        parts = states.unflatten(-1, (self.groups, -1)).transpose(1, 2)
        return (parts - self.mean[:, None]) @ self.down.transpose(1, 2)

    def _rounded(self, latent: torch.Tensor) -> torch.Tensor:
        if self.bits is None:
            return latent
        codes, step, low = self.codes_of(latent, self.bits)
        return codes * step + low

    def codes_of(
        self, latent: torch.Tensor, bits: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes of latents [B, groups, S, rank], their step and low."""
        return codes_of(latent, bits, self.clip, self.feedback)

    def of_heads(self, states: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
        """Latents [B, groups, S, rank] of keys or values [B, heads, S, width]."""
        flat = states.transpose(1, 2).flatten(2)
        return self._mapped(flat) if exact else self(flat)

    def rebuilt(self, latent: torch.Tensor) -> torch.Tensor:
        """Keys or values [B, S, heads * width] of latents [B, groups, S, rank]."""
        parts = latent @ self.up.transpose(1, 2) + self.mean[:, None]
        return parts.transpose(1, 2).flatten(2)

    def heads_of(self, latent: torch.Tensor) -> torch.Tensor:
        """Keys or values [B, heads, S, width] of latents, not turned."""
        return self.rebuilt(latent).unflatten(-1, (self.heads, self.width)).transpose(1, 2)

    def after_source(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        """Forward hook of the module that gives the keys or values: its output, mapped."""
        if not self.is_active:
            return output
        last_axis = output.dim() == 3
        heads_first = not last_axis and output.shape[2] != self.heads
        flat = (
            output if last_axis else (output.transpose(1, 2) if heads_first else output).flatten(2)
        )
        self.exact = self._mapped(flat)
        self.latent = self._rounded(self.exact)
        mapped = self.rebuilt(self.latent)
        if last_axis:
            return mapped
        mapped = mapped.unflatten(-1, (self.heads, self.width))
        return mapped.transpose(1, 2) if heads_first else mapped

    def before_attention(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Forward pre-hook of the attention: notes its angles; maps what it gives to its cache."""
        self.angles = kwargs.get("position_embeddings")
        cache = kwargs.get("past_key_values")
        if not (self.after_rotation and self.is_active) or getattr(cache, "maps_keys", False):
            return None
        return args, kwargs | {"past_key_values": _MappedKeys(cache, self)}

    def extra_repr(self) -> str:
        """What print(model) shows."""
        kind = "" if self.bits is None else f", {self.bits} bits"
        return f"{self.heads} heads of {self.width}, {self.groups} x {self.rank}{kind}"


class _MappedKeys:
    """A cache that knows no maps, or none at all, given keys as they are after theirs.

    Args:
        cache: of the model; None where nothing is kept.
        made: the map of the layer's keys.
    """

    def __init__(self, cache: Any, made: CacheMap) -> None:
        self._cache, self._made = cache, made

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values so far, the new keys mapped."""
        keys = self._made.heads_of(self._made.of_heads(key_states))
        if self._cache is None:
            return keys, value_states
        found: tuple[torch.Tensor, torch.Tensor] = self._cache.update(
            keys, value_states, *args, **kwargs
        )
        return found


def attach_cache_maps(model: nn.Module, entries: dict[str, dict[str, Any]]) -> None:
    """Put empty maps into a model, beside the modules whose outputs they map.

    Args:
        model: changed in place.
        entries: `quantization_config.caches`: source -> side, heads, width, groups, rank, bits,
            is_rotated; after_rotation, clip and error_feedback where they are not as usual.

    Raises:
        ValueError: an entry that fits no module.
    """
    for source, entry in entries.items():
        parent, _, _ = source.rpartition(".")
        holder = model.get_submodule(parent)
        weight = next(model.parameters())
        sizes = (entry[name] for name in ("heads", "width", "groups", "rank", "bits"))
        made = CacheMap(
            *sizes,
            is_rotated=entry["is_rotated"],
            **{name: entry[name] for name in _OPTIONAL if name in entry},
            source=source,
            device=_device_of(holder, weight),
            dtype=weight.dtype,
        )
        setattr(holder, f"{entry['side']}_map", made)
    hook_cache_maps(model)


def _device_of(holder: nn.Module, other: torch.Tensor) -> torch.device:
    own = next(holder.parameters(), other)
    return own.device


def hook_cache_maps(model: nn.Module) -> None:
    """Let the maps see what their sources return; again where a source was replaced."""
    for name, own in cache_maps(model).items():
        holder, source = (
            model.get_submodule(name.rpartition(".")[0]),
            model.get_submodule(own.source),
        )
        if not own.after_rotation and not _is_hooked(source._forward_hooks, own):
            source.register_forward_hook(own.after_source)
        turns = own.is_rotated or own.after_rotation
        if turns and not _is_hooked(holder._forward_pre_hooks, own):
            holder.register_forward_pre_hook(own.before_attention, with_kwargs=True)


def remove_cache_maps(model: nn.Module) -> None:
    """Take all maps out again."""
    for name, own in cache_maps(model).items():
        path, _, attribute = name.rpartition(".")
        holder, source = model.get_submodule(path), model.get_submodule(own.source)
        for hooks in (source._forward_hooks, holder._forward_pre_hooks):
            for key in [k for k, hook in hooks.items() if getattr(hook, "__self__", None) is own]:
                del hooks[key]
        delattr(holder, attribute)


def _is_hooked(hooks: Mapping[int, Any], own: CacheMap) -> bool:
    return any(getattr(hook, "__self__", None) is own for hook in hooks.values())


def cache_maps(model: nn.Module) -> dict[str, CacheMap]:
    """The maps of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, CacheMap)}


class _LatentLayer(DynamicLayer):
    """One layer: latents are kept, keys and values are rebuilt whenever they are read.

    Args:
        attention: the module that holds the maps.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.maps: tuple[CacheMap | None, CacheMap | None] = (
            getattr(attention, "key_map", None),
            getattr(attention, "value_map", None),
        )
        self._rotate = rotation_of(attention)
        self._angles: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the latents of new keys and values; return all of them, rebuilt."""
        past = self.get_seq_length()
        for_keys, for_values = self.maps
        keys, values = super().update(
            latent_of(for_keys, key_states), latent_of(for_values, value_states)
        )
        if for_keys is not None:
            keys = for_keys.heads_of(keys)
            if for_keys.is_rotated:
                keys = self._rotated(keys, for_keys.angles, past)
        return keys, values if for_values is None else for_values.heads_of(values)

    def _rotated(
        self, keys: torch.Tensor, new: tuple[torch.Tensor, torch.Tensor] | None, past: int
    ) -> torch.Tensor:
        """Keys [B, heads, S, width] turned by the angles of all tokens so far."""
        if new is None or self._rotate is None:
            raise ValueError("the attention was not given the angles of its keys as usual")
        earlier = self._angles if past and self._angles is not None else new
        cos, sin = (
            torch.cat([old[:, :past].expand(len(now), -1, -1), now], dim=1)
            for old, now in zip(earlier, new, strict=True)
        )
        self._angles = cos, sin
        return self._rotate(keys, cos, sin)


def latent_of(made: CacheMap | None, states: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
    """What is kept of new keys or values [B, heads, S, width] that a layer gives to its cache.

    With `exact` before it is rounded: what is rounded already would not give the same codes.
    """
    if made is None:
        return states
    if made.after_rotation:
        return made.of_heads(states, exact=exact)
    latent = made.exact if exact else made.latent
    return states if latent is None else latent


def rotation_of(attention: nn.Module) -> Callable[..., torch.Tensor] | None:
    """What turns keys by cos and sin in the attention's own file: (keys, cos, sin) -> keys.

    None if it has no function of the usual form.
    """
    found = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if found is None or list(inspect.signature(found).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return None
    return lambda keys, cos, sin: found(keys, keys, cos, sin)[1]


def own_cache(model: nn.Module) -> DynamicCache:
    """An empty cache of what a model caches: of latents where it has maps."""
    return LatentCache(model) if cache_maps(model) else DynamicCache(config=model.config)


class LatentCache(DynamicCache):
    """A cache that holds the latents of a model's maps.

    Args:
        model: with maps in place.
    """

    maps_keys = True  # by itself: see `CacheMap.before_attention`

    def __init__(self, model: nn.Module) -> None:
        super().__init__(config=model.config)
        for name in {name.rpartition(".")[0] for name in cache_maps(model)}:
            attention: Any = model.get_submodule(name)
            place: int = attention.layer_idx
            while len(self.layers) <= place:
                self.layers.append(DynamicLayer())
            self.layers[place] = _LatentLayer(attention)


def _version_of(entry: dict[str, Any]) -> int:
    """The first format that has maps of this kind."""
    if entry.get("clip", 1) != 1 or entry.get("error_feedback"):
        return _FED_FORMAT_VERSION
    return _NARROW_FORMAT_VERSION if entry.get("after_rotation") else _CACHE_FORMAT_VERSION


class SmallCacheConfig(SkipCatConfig):
    """`quantization_config` of a checkpoint that may have a smaller cache.

    Args:
        modules: as of `SkipCatConfig`.
        version: of the format; 3 where there are maps, 4 where some are of keys that were turned,
            5 where codes are chosen otherwise than to the nearest, so that older code refuses them.
        caches: source -> what `attach_cache_maps` reads; None for a cache as it is.
    """

    newest = _FED_FORMAT_VERSION

    def __init__(
        self,
        modules: dict[str, dict[str, Any]],
        version: int | None = None,
        caches: dict[str, dict[str, Any]] | None = None,
        **unused: Any,
    ) -> None:
        own = max(map(_version_of, (caches or {}).values()), default=FORMAT_VERSION)
        super().__init__(modules, own if version is None else version)
        if caches:
            self.caches = caches


class SmallCacheQuantizer(SkipCatQuantizer):
    """Puts the maps of a smaller cache into the empty model, too."""

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        model = super()._process_model_before_weight_loading(model, **kwargs)
        attach_cache_maps(model, getattr(self.quantization_config, "caches", {}))
        return model


AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = SmallCacheConfig
AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = SmallCacheQuantizer
