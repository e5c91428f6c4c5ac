"""Rotary angles that change with the length of the text: bounded, or refused."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from pipeline.errors import InputError
from pipeline.export.twin import rotary_settings

# Angles by the position alone.
_BY_POSITION = ("default", "linear", "llama3", "yarn", "proportional")
_LONG = "longrope"


def refuse_unknown_rotary(config: PreTrainedConfig) -> None:
    """Refuse angles that change in ways no graph of ours follows.

    Raises:
        InputError: names the kind.
    """
    for kind in map(_kind, rotary_settings(config.get_text_config().to_dict())):
        if kind in (*_BY_POSITION, _LONG):
            continue
        dynamic = kind == "dynamic"
        raise InputError(
            "The model's rotary angles change with the length of the text, and what is cached "
            "already would keep the old ones: dynamic NTK scaling is not exported."
            if dynamic
            else "The model's rotary angles are of a kind that is not known here.",
            where="rope_parameters of the config",
            observed=f"rope_type {kind}",
            expected=", ".join((*_BY_POSITION, _LONG)),
        )


def bounded_length(config: PreTrainedConfig, wanted: int) -> tuple[int, str | None]:
    """The length of the cache, and what made it shorter than was wanted."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or wanted
    constant = _constant_angles_length(config) or wanted
    if constant < min(wanted, limit):
        reason = "long-rope turns all tokens otherwise beyond the original context of"
        return constant, f"{reason} {constant}"
    if limit < wanted:
        return limit, f"the model was made for {limit} positions, fewer than --max-length {wanted}"
    return wanted, None


def _constant_angles_length(config: PreTrainedConfig) -> int | None:
    """Most tokens for which a token's angles stay what they were; None for any number.

    With long-rope, the factors of all tokens change once the text is longer than the original
    context, and keys that lie in a cache were turned by the others.
    """
    lengths = [
        int(rotary.get("original_max_position_embeddings") or 0)
        for rotary in rotary_settings(config.get_text_config().to_dict())
        if _kind(rotary) == _LONG
    ]
    return min(lengths, default=None)


def _kind(rotary: dict[str, Any]) -> str:
    return str(rotary.get("rope_type") or rotary.get("type") or "default")
