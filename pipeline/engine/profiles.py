"""Optimisation profiles: which shapes the engine must run (min, max) and is tuned for (opt).

Two profiles, decode first. Every rule is by tensor name and axis, so a cache of any width fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline.errors import InputError, UsageError
from pipeline.export.contract import (
    ATTENTION_MASK,
    CACHE_PREFIX,
    INPUT_IDS,
    PIXEL_VALUES,
    POSITION_IDS,
    cache_names,
)

DecodeForm = Literal["shared", "separate"]
_Shape = tuple[int, ...]
_OPT_PREFILL = 128
_CACHE_LENGTH_AXIS = 2


@dataclass(frozen=True)
class _ShapeRange:
    """Smallest, tuned-for and largest shape of one input."""

    min: _Shape
    opt: _Shape
    max: _Shape


@dataclass(frozen=True)
class ShapeProfile:
    """One optimisation profile: a range for every input, by name."""

    name: str
    shapes: dict[str, _ShapeRange]

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists, for the manifest and the worker."""
        shapes = {
            name: {end: list(shape) for end, shape in asdict(ends).items()}
            for name, ends in self.shapes.items()
        }
        return {"name": self.name, "shapes": shapes}

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> ShapeProfile:
        """The inverse of `to_json` after a trip through JSON."""
        shapes = {
            name: _ShapeRange(*(tuple(ends[end]) for end in ("min", "opt", "max")))
            for name, ends in fields["shapes"].items()
        }
        return ShapeProfile(fields["name"], shapes)


@dataclass(frozen=True)
class Limits:
    """What the engine must be able to run.

    Attributes:
        max_batch: most sequences at once.
        max_prefill: most tokens of one call.
        max_length: most tokens the cache holds.
        decode: `shared` lets the decode profile take 1 or 2 tokens, so that both profiles store
            the weights once; `separate` fixes it at 1, and stores them twice when `max_batch` is
            1. See docs/engine-size.md.
    """

    max_batch: int
    max_prefill: int
    max_length: int
    decode: DecodeForm = "shared"

    def profiles_of(self, inputs: Mapping[str, tuple[int | None, ...]]) -> list[ShapeProfile]:
        """The decode profile, then the prefill profile unless every call is one token.

        A graph that takes images has one profile.

        Args:
            inputs: shape of every graph input, None where the axis is dynamic.

        Raises:
            InputError: an input that is none of the pipeline's, or a static axis out of the limits.
        """
        if set(inputs) == {PIXEL_VALUES}:
            return [_image_profile(inputs[PIXEL_VALUES], self.max_batch)]
        static_cache = _has_static_cache(inputs)
        decode = (
            _Sizes(1, 1, 0, 1),
            _decode_opt(self),
            _decode_max(self, static_cache),
        )
        profiles = [_profile("decode", inputs, decode)]
        if self.max_prefill > 1:
            profiles.append(_profile("prefill", inputs, _prefill_sizes(self, static_cache)))
        return profiles


@dataclass(frozen=True)
class _Sizes:
    """The named dimensions at one end of a profile."""

    batch: int
    sequence: int
    past: int
    total: int


def decoder_limits(
    max_batch: int,
    max_prefill: int,
    max_length: int,
    decode: DecodeForm | None = None,
    usual: DecodeForm = "shared",
) -> tuple[Limits, tuple[str, ...]]:
    """What an engine of a decoder must run, and what the user should know of it.

    Args:
        max_batch: most sequences at once.
        max_prefill: most tokens of one call; capped by the cache, which cannot take more.
        max_length: most tokens the cache holds.
        decode: the form that was asked for.
        usual: the form to take if none was.

    Raises:
        UsageError: a limit below 1.
    """
    _require_positive("--max-batch", max_batch)
    _require_positive("--max-prefill", max_prefill)
    longest = min(max_prefill, max_length)
    lowered = f"--max-prefill lowered from {max_prefill} to {longest}, the cache length"
    notes = () if longest == max_prefill else (lowered,)
    return Limits(max_batch, longest, max_length, decode or usual), notes


def image_limits(
    max_batch: int,
    max_prefill: int,
    max_length: int,
    decode: DecodeForm | None = None,
    usual: DecodeForm = "shared",
) -> tuple[Limits, tuple[str, ...]]:
    """What an engine of a graph that takes images must run; arguments as for `decoder_limits`.

    Only the batch counts: there are no tokens and no cache.

    Raises:
        UsageError: a batch below 1, or a decode profile was asked for.
    """
    del max_prefill, max_length, usual
    if decode is not None:
        raise UsageError("An engine that takes images has no decode profile.", where="--decode")
    _require_positive("--max-batch", max_batch)
    return Limits(max_batch, 0, 0), ()


def _require_positive(flag: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"{flag} must be at least 1.", observed=value)


def _image_profile(shape: tuple[int | None, ...], max_batch: int) -> ShapeProfile:
    """1 to `max_batch` images, tuned for the most.

    Raises:
        InputError: an axis other than the batch is dynamic.
    """
    if len(shape) != 4 or shape[0] is not None or None in shape[1:]:
        raise _unknown_input(PIXEL_VALUES, shape)
    sizes = tuple(size for size in shape[1:] if size is not None)
    ends = ((1, *sizes), (max_batch, *sizes), (max_batch, *sizes))
    return ShapeProfile("images", {PIXEL_VALUES: _ShapeRange(*ends)})


def _decode_opt(limits: Limits) -> _Sizes:
    """One token, the cache half full."""
    past = max(limits.max_length // 2 - 1, 0)
    return _Sizes(limits.max_batch, 1, past, past + 1)


def _decode_max(limits: Limits, static_cache: bool) -> _Sizes:
    """One token, or two in the shared form, with the cache full afterwards."""
    longest = min(2, limits.max_prefill) if limits.decode == "shared" else 1
    total = limits.max_length
    past = total - longest
    if not static_cache and longest > 1:
        # One token may follow max_length - 1 others, so past and sequence reach their ends in
        # different calls; total covers their sum to keep the largest shapes consistent.
        past, total = limits.max_length - 1, limits.max_length - 1 + longest
    return _Sizes(limits.max_batch, longest, past, total)


def _prefill_sizes(limits: Limits, static_cache: bool) -> tuple[_Sizes, _Sizes, _Sizes]:
    """1 to max_prefill tokens, tuned for some into an empty cache."""
    tuned = min(_OPT_PREFILL, limits.max_prefill)
    total = limits.max_length
    past = limits.max_length - 1
    if not static_cache:
        # A chunk may follow any past. A total beyond max_length never occurs, but TensorRT checks
        # that the largest shapes fit each other: total = past + sequence.
        total = past + limits.max_prefill
    return (
        _Sizes(1, 1, 0, 1),
        _Sizes(limits.max_batch, tuned, 0, tuned),
        _Sizes(limits.max_batch, limits.max_prefill, past, total),
    )


def _has_static_cache(inputs: Mapping[str, tuple[int | None, ...]]) -> bool:
    """Whether the cache has a fixed length (`opset24`) rather than a growing one (`compat`)."""
    lengths = [
        shape[_CACHE_LENGTH_AXIS] for name, shape in inputs.items() if name.startswith(CACHE_PREFIX)
    ]
    if not lengths:
        raise InputError(
            "The graph has no cache inputs.",
            observed=", ".join(inputs),
            expected=f"{cache_names(1)[0]} and so on",
            change="give a folder that `skipcat export` wrote",
        )
    return lengths[0] is not None


def _profile(
    name: str, inputs: Mapping[str, tuple[int | None, ...]], ends: tuple[_Sizes, _Sizes, _Sizes]
) -> ShapeProfile:
    """The profile that has `ends` as its min, opt and max."""
    shapes = {
        tensor: _ShapeRange(*(_input_shape(tensor, shape, sizes) for sizes in ends))
        for tensor, shape in inputs.items()
    }
    return ShapeProfile(name, shapes)


def _input_shape(name: str, shape: tuple[int | None, ...], sizes: _Sizes) -> _Shape:
    """Shape of one input when the named dimensions have these sizes; static axes stay.

    Raises:
        InputError: an unknown input, or a dynamic axis that has no rule.
    """
    rule: tuple[int | None, ...]
    if name in (INPUT_IDS, POSITION_IDS):
        rule = (sizes.batch, sizes.sequence)
    elif name == ATTENTION_MASK:
        rule = (sizes.batch, sizes.total)
    elif name.startswith(CACHE_PREFIX):
        rule = (sizes.batch, None, sizes.past, None)
    else:
        raise _unknown_input(name, shape)
    if len(rule) != len(shape):
        raise _unknown_input(name, shape)
    dims = tuple(wanted if dim is None else dim for dim, wanted in zip(shape, rule, strict=True))
    if any(dim is None for dim in dims):
        raise _unknown_input(name, shape)
    return tuple(dim for dim in dims if dim is not None)


def _unknown_input(name: str, shape: tuple[int | None, ...]) -> InputError:
    """The error for an input whose shapes cannot be planned."""
    return InputError(
        f"The graph input '{name}' has no rule for its shapes.",
        observed=f"shape {shape}",
        expected=f"{INPUT_IDS}, {POSITION_IDS}, {ATTENTION_MASK} [batch, n]; "
        f"{CACHE_PREFIX}* [batch, heads, length, width] with heads and width fixed; or "
        f"{PIXEL_VALUES} alone, [batch, channels, height, width] with only the batch free",
        change="give a folder that `skipcat export` wrote",
    )
