"""A twin that caches latents as its model does: maps of the same kinds, with random numbers.

What decides the form of the graph is which sides have maps, whether all heads share a latent, and
how the latent is held. Layers of the twin take these in turn, so that each is there.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.checkpoint.modeling_cache import SmallCacheConfig, attach_cache_maps, cache_maps
from pipeline.model.cache_structure import SIDES, cache_structure
from pipeline.model.structure import decoder_structure

# Side, whether all heads share a latent, bits.
LatentKind = tuple[str, bool, int | None]
_KEPT = 0.7  # of a side's numbers, as rank; odd where that is, so that bytes are filled up
_SPREAD = 0.3


def latent_kinds(config: PreTrainedConfig) -> list[LatentKind]:
    """The kinds of maps that a checkpoint has, the most frequent first; none of another."""
    quantization = getattr(config, "quantization_config", None)
    fields = (
        quantization if isinstance(quantization, dict) else getattr(quantization, "__dict__", {})
    )
    entries: dict[str, dict[str, Any]] = fields.get("caches") or {}
    found = Counter(
        (entry["side"], entry["groups"] == 1, entry["bits"]) for entry in entries.values()
    )
    return [kind for kind, _ in sorted(found.items(), key=lambda item: (-item[1], str(item[0])))]


def map_twin(model: PreTrainedModel, kinds: list[LatentKind], dtype: torch.dtype) -> None:
    """Give a twin maps of these kinds, in place, and its config their entries.

    Args:
        model: in float32.
        kinds: as above, at least one.
        dtype: whose numbers the maps' are.
    """
    entries: dict[str, dict[str, Any]] = {}
    for number, side in enumerate(cache_structure(model, decoder_structure(model))):
        own = [kind for kind in kinds if kind[0] == side.side]
        if own:
            _, shared, bits = own[number // len(SIDES) % len(own)]
            groups = 1 if shared else side.heads
            rank = max(1, round(_KEPT * side.numbers / groups)) | 1
            entries[side.source] = {
                "side": side.side, "heads": side.heads, "width": side.width, "groups": groups,
                "rank": min(rank, side.numbers // groups), "bits": bits,
                "is_rotated": side.is_rotated,
            }  # fmt: skip
    attach_cache_maps(model, entries)
    model.config.quantization_config = SmallCacheConfig({}, caches=entries)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for made in cache_maps(model).values():
            turned = torch.linalg.qr(torch.randn_like(made.up)).Q
            made.up.copy_(turned.to(dtype))
            made.down.copy_(turned.transpose(1, 2).to(dtype))
            made.mean.copy_((_SPREAD * torch.randn_like(made.mean)).to(dtype))
