"""Latents in the cache of a graph, in the place of keys and values, and the attention to them.

    past latents ++ (y - mean) down^T  ->  present latents
    query, present latents             ->  LatentAttention  ->  (mean + up z of the values)

Keys that are turned by their position are rebuilt from their latents inside the op; where they are
not turned, or were before they were mapped, the query is mapped instead, and what is constant over
the keys drops out of the softmax. Such latents, as numbers and of every head, are narrower keys and
values to any other attention. Where keys are rebuilt, a token's position is its slot: a row that is
padded on the left would be turned by other angles.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.checkpoint.modeling_cache import CacheMap, cache_maps, latent_of, rotation_of
from pipeline.errors import InputError
from pipeline.export.contract import NIBBLES, POSITION_IDS, PROFILES, Profile, form_of
from pipeline.export.latent_attention import HeldSide, KeyTables, attend_to_latents
from pipeline.export.passes.fold_values import map_values

_Rotate = Callable[..., torch.Tensor]
# Positions at which an order of a key's numbers is held against the model's own rotation.
_PROBED = (0, 1, 2, 3, 5, 8, 13, 21)
_BEYOND = 31  # as many positions on, what two rotations make together is looked at
_SAME = 1e-4


@dataclass(frozen=True)
class _Rotation:
    """A model's rotation as that of halves: number i of a key with number i + width / 2.

    Attributes:
        order: int64 [width], the key's numbers so that it is.
        cos, sin: float32 [positions, width / 2].
    """

    order: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


class GraphLatents(nn.Module):
    """The maps of a model while it is traced.

    Args:
        model: with maps in place.
        length: most tokens that the cache will hold.

    Raises:
        InputError: keys turned in a way that is not known.
    """

    def __init__(self, model: PreTrainedModel, length: int) -> None:
        super().__init__()
        maps = cache_maps(model)
        self._maps: dict[tuple[int, str], CacheMap] = {}
        self._rotate: _Rotate | None = None
        for name, made in maps.items():
            holder, _, side = name.rpartition(".")
            attention = model.get_submodule(holder)
            self._maps[attention.layer_idx, side] = made
            if made.is_rotated:
                self._rotate = rotation_of(attention)
        # Not a child of this module: the model has it already.
        self._rotary = [getattr(model.base_model, "rotary_emb", None)]
        turned = [made for made in maps.values() if made.is_rotated]
        self._rotation: _Rotation | None = None
        if turned:
            self._require_rotation(model)
            self._rotation = self._as_halves(turned[0].width, length)
        self._note_tables()

    def _require_rotation(self, model: PreTrainedModel) -> None:
        rotary = self._rotary[0]
        takes = [] if rotary is None else list(inspect.signature(rotary.forward).parameters)
        if self._rotate is None or takes != ["x", POSITION_IDS]:
            raise InputError(
                "Keys of this model cannot be rebuilt from latents inside a graph.",
                where=type(model).__name__,
                observed=f"angles from {', '.join(takes) or 'no module of its own'}",
                expected="one set of angles for all layers, of positions alone",
                change="compress it without a smaller cache for keys",
            )

    def _as_halves(self, width: int, length: int) -> _Rotation | None:
        """The rotation of keys of a width up to a length; None where it is none of halves."""
        assert self._rotary[0] is not None, "looked at before"
        assert self._rotate is not None, "likewise"
        with torch.no_grad():
            tables = self._rotary[0](torch.zeros(1, 1, width), torch.arange(length)[None])
        places = torch.tensor([place for place in _PROBED if place < length])
        cos, sin = (table[:, places] for table in tables)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            keys = torch.randn(1, 1, len(places), width)
        wanted = self._rotate(keys, cos, sin)
        for order, strided in _orders(width, cos.shape[-1]):
            found = _Rotation(order, *(_halved(t[0], width, strided) for t in tables))
            turned = _turned(keys[..., order], found.cos[places], found.sin[places])
            same = torch.allclose(turned, wanted[..., order], atol=_SAME, rtol=0)
            if same and _are_proportional(found.cos, found.sin):
                return found
        return None

    def _note_tables(self) -> None:
        """Give what the op reads a name each in the graph."""
        if self._rotation is not None:
            self.register_buffer("cos", self._rotation.cos)
            self.register_buffer("sin", self._rotation.sin)
        for (layer, side), made in self._maps.items():
            up, mean = _by_head(made)
            if made.is_rotated and self._rotation is not None:
                up, mean = (table[..., self._rotation.order] for table in (up, mean))
            self.register_buffer(f"{side}_up_{layer}", up.contiguous())
            self.register_buffer(f"{side}_mean_{layer}", mean.contiguous())

    def __contains__(self, layer: int) -> bool:
        """Whether a layer caches latents."""
        return any(made is not None for made in self._of_layer(layer))

    def forms_of(self, layer: int) -> list[str]:
        """How keys and values of a layer are held."""
        return [form_of(None if made is None else made.bits) for made in self._of_layer(layer)]

    def of_new(self, layer: int, states: tuple[torch.Tensor, torch.Tensor]) -> list[HeldSide]:
        """What is cached of new keys and values: latents [B, groups, S, rank] where a map is."""
        return [
            HeldSide(state)
            if made is None
            else HeldSide.of(latent_of(made, state, exact=True), made)
            for made, state in zip(self._of_layer(layer), states, strict=True)
        ]

    def are_heads(self, layer: int) -> bool:
        """Whether what is cached of a layer is keys and values of fewer numbers, of every head."""
        maps = [made for made in self._of_layer(layer) if made is not None]
        return all(made.groups == made.heads and _is_read_as_it_is(made) for made in maps)

    def query_of(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """Query [B, H, S, width] whose products with what is cached are those with the keys."""
        made, _ = self._of_layer(layer)
        return query if made is None else self._mapped(layer, query)

    def values_of(self, layer: int, mixed: torch.Tensor) -> torch.Tensor:
        """Mixed values [B, H, S, D] of mixed latents [B, H, S, rank]."""
        _, made = self._of_layer(layer)
        if made is None:
            return mixed
        names = (f"value_map_up_{layer}", f"value_map_mean_{layer}")
        up, mean = (self.get_buffer(name).flatten(0, 1) for name in names)
        return map_values(mixed, up, mean)

    def rebuilt(
        self, layer: int, keys: HeldSide, values: HeldSide
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, heads, K, width] of all that is cached."""
        _, made = self._of_layer(layer)
        rebuilt = self._rebuilt_keys(layer, keys)
        if made is None:
            return rebuilt, values.held
        return rebuilt, made.heads_of(values.numbers(made.rank, rebuilt.dtype))

    def attend(
        self, layer: int, query: torch.Tensor, mask: torch.Tensor, keys: HeldSide, values: HeldSide
    ) -> torch.Tensor:
        """softmax(Q K^T + mask) V over all that is cached of a layer: [B, H, S, value width].

        Args:
            layer: number of the layer.
            query: scaled, [B, H, S, D].
            mask: added to the scores, [B, 1, S, K].
            keys: as cached.
            values: as cached.
        """
        for_keys, _ = self._of_layer(layer)
        tables = None
        if for_keys is not None and not for_keys.is_rotated:
            query = self._mapped(layer, query)
        elif for_keys is not None and self._rotation is not None:
            query = query[..., self._rotation.order]
            own = (f"key_map_up_{layer}", f"key_map_mean_{layer}", "cos", "sin")
            tables = KeyTables(*map(self.get_buffer, own))
        elif for_keys is not None:
            keys = HeldSide(self._rebuilt_keys(layer, keys))
        return self.values_of(layer, attend_to_latents(query, mask, keys, values, tables))

    def _of_layer(self, layer: int) -> tuple[CacheMap | None, CacheMap | None]:
        return self._maps.get((layer, "key_map")), self._maps.get((layer, "value_map"))

    def _rebuilt_keys(self, layer: int, held: HeldSide) -> torch.Tensor:
        """Keys [B, heads, K, width] of all that is cached, turned by the model's own function."""
        made, _ = self._of_layer(layer)
        if made is None:
            return held.held
        keys = made.heads_of(held.numbers(made.rank, made.up.dtype))
        if not made.is_rotated:
            return keys
        assert self._rotary[0] is not None, "looked at in __init__"
        assert self._rotate is not None, "likewise"
        cos, sin = self._rotary[0](keys, torch.arange(keys.shape[2])[None])
        return self._rotate(keys, cos, sin)

    def _mapped(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """Query [B, H, S, rank] whose products with latents are those of `query` with the keys."""
        up = self.get_buffer(f"key_map_up_{layer}").flatten(0, 1)
        kv_heads, rank, width = up.shape
        batch, heads, length, _ = query.shape
        rows = query.reshape(batch, kv_heads, -1, width) @ up.transpose(1, 2)
        return rows.reshape(batch, heads, length, rank)


def _by_head(made: CacheMap) -> tuple[torch.Tensor, torch.Tensor]:
    """Map and mean of every head: [groups, heads of a group, rank, D], [groups, ..., 1, D]."""
    per_group = made.heads // made.groups
    up = made.up.detach().unflatten(1, (per_group, made.width)).transpose(2, 3)
    # The number that fills up a byte of two counts for nothing.
    up = nn.functional.pad(up, (0, 0, 0, made.rank % 2)) if form_of(made.bits) == NIBBLES else up
    return up, made.mean.detach().unflatten(1, (per_group, 1, made.width))


def _orders(width: int, turned: int) -> list[tuple[torch.Tensor, bool]]:
    """Orders of a key's numbers in which pairs that turn together may lie half a width apart.

    Args:
        width: of a key.
        turned: numbers of it, the first ones, that are turned at all.

    Returns:
        Each with whether its angles lie at every second place of the table instead of in the first
        half.
    """
    numbers = torch.arange(turned)
    passing = torch.arange(turned, width)
    pairs = (numbers.chunk(2), (numbers[::2], numbers[1::2]))
    if turned % 2 or width % 2:
        return []
    rest = passing.chunk(2) if len(passing) else (passing, passing)
    return [
        (torch.cat([first, rest[0], second, rest[1]]), strided)
        for first, second in pairs
        for strided in (False, True)
    ]


def _halved(table: torch.Tensor, width: int, strided: bool) -> torch.Tensor:
    """The angles of a table [positions, turned], one for each pair of a key: [.., width / 2]."""
    angles = table[:, ::2] if strided else table[:, : table.shape[1] // 2]
    still = width // 2 - angles.shape[1]
    is_cos = bool((table[0] != 0).all())
    return nn.functional.pad(angles, (0, still), value=1.0 if is_cos else 0.0).contiguous()


def _are_proportional(cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether angles [positions, pairs] are proportional to the position, as the kernels take them.

    Those turn a key by the first position of its 16 or 32, and then by what it is beyond that.
    """
    rows = torch.complex(cos.double(), sin.double())
    length, beyond = rows.shape[0], min(_BEYOND, rows.shape[0] - 1)
    first = torch.arange(0, length - beyond, max(1, (length - beyond) // 64))
    composed = rows[first] * rows[beyond] / rows[0]
    # Angles of float32 are off by 2^-24 of themselves.
    return bool((composed - rows[first + beyond]).abs().max() <= _SAME + 2**-22 * length)


def _turned(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = keys.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _is_read_as_it_is(made: CacheMap) -> bool:
    """Whether what a map gives is attended to as it is cached."""
    return made.bits is None and not made.is_rotated


def refuse_latents_in(profile: Profile, model: PreTrainedModel, *, rounds: bool = False) -> None:
    """Refuse what the profile's attention, which writes the cache itself, cannot read.

    Args:
        profile: of the export.
        model: with maps in place, or none.
        rounds: the export rounds the cache.

    Raises:
        InputError: latents that have to be rebuilt, are codes, or would be rounded.
    """
    maps = cache_maps(model).values()
    readable = all(_is_read_as_it_is(made) and made.groups == made.heads for made in maps)
    if not profile.contrib or not maps or (readable and not rounds):
        return
    others = " or ".join(f"--profile {n}" for n, row in PROFILES.items() if not row.contrib)
    raise InputError(
        "This profile's attention cannot read the latents that the checkpoint caches.",
        where=f"--profile {profile.name}",
        observed="a cache in few bits besides" if readable else "keys to rebuild, or codes",
        expected="--cache float" if readable else f"{others}; or --cache-form stock of compress",
        change="export with another profile",
    )
