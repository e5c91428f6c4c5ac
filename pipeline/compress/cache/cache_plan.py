"""The plan of the cache: for keys and values of every layer, a rank and a number of bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline.compress.cache.cache_forms import LATENT_BITS
from pipeline.compress.cache.latent_basis import kept_bytes
from pipeline.compress.cache.latent_rounding import clip_of
from pipeline.errors import InputError
from pipeline.json_file import json_field
from pipeline.model.cache_structure import CachedSide, Side

_SideForm = Literal["full", "latent", "narrow"]


@dataclass(frozen=True)
class SidePlan:
    """What becomes of the keys or the values of one layer.

    Attributes:
        layer: name of the decoder layer.
        side: `key` or `value`.
        source: module whose output they are.
        heads: key/value heads.
        width: of each.
        form: `full`, as they are; `latent`, mapped to fewer numbers before they are rotated, and
            back when they are read; or `narrow`, keys that are mapped, head by head, after they
            were rotated, so that the query is mapped in their place and none is rebuilt.
        groups: heads in each group share a latent; 1 for all of them together.
        rank: numbers of a group's latent.
        bits: of each number, with a scale and an offset a token and group; None for float16.
        expected_kl: what it is expected to cost, nats a token; None when it was not estimated.
        is_rotated: whether it is turned by its position after it was mapped.
        error_feedback: rounding errors of the first half of the numbers are taken from the others,
            and codes reach less than a token's range where that errs less.
    """

    layer: str
    side: Side
    source: str
    heads: int
    width: int
    form: _SideForm
    groups: int
    rank: int
    bits: int | None = None
    expected_kl: float | None = None
    is_rotated: bool = False
    error_feedback: bool = False

    @classmethod
    def full(cls, side: CachedSide) -> SidePlan:
        """Cached as it is."""
        return cls(**_place(side), form="full", groups=side.heads, rank=side.width, expected_kl=0.0)

    @classmethod
    def latent(
        cls,
        side: CachedSide,
        groups: int,
        rank: int,
        bits: int | None,
        expected_kl: float | None = None,
        *,
        narrow: bool = False,
        error_feedback: bool = False,
    ) -> SidePlan:
        """Cached as so many latents of a rank; `narrow` is of keys mapped after their rotation."""
        return cls(
            **_place(side),
            form="narrow" if narrow else "latent",
            groups=groups,
            rank=rank,
            bits=bits,
            expected_kl=expected_kl,
            error_feedback=error_feedback and bits is not None and rank > 1,
        )

    @property
    def token_bytes(self) -> int:
        """Bytes that a token takes."""
        return kept_bytes(self.rank, self.bits, self.groups)

    @property
    def dense_bytes(self) -> int:
        """Bytes that it takes in float16."""
        return 2 * self.heads * self.width

    @property
    def numbers(self) -> int:
        """Numbers of a group before they are mapped."""
        return self.heads // self.groups * self.width

    @property
    def is_narrow(self) -> bool:
        """Whether it is mapped after its rotation."""
        return self.form == "narrow"

    def entry(self) -> dict[str, Any]:
        """The entry of `quantization_config.caches` that makes its map."""
        names = ("side", "heads", "width", "groups", "rank", "bits", "is_rotated")
        found = {name: getattr(self, name) for name in names}
        # Keys of their own only where they are needed: older code reads the others.
        if self.is_narrow:
            found |= {"is_rotated": False, "after_rotation": True}
        if self.error_feedback and self.bits is not None:
            found |= {"clip": clip_of(self.rank, self.bits), "error_feedback": True}
        return found

    def to_json(self) -> dict[str, Any]:
        """The fields, with the bytes before and after."""
        return asdict(self) | {"dense_bytes": self.dense_bytes, "token_bytes": self.token_bytes}


def _place(side: CachedSide) -> dict[str, Any]:
    """The fields that a plan takes over from the structure."""
    names = ("layer", "side", "source", "heads", "width", "is_rotated")
    return {name: getattr(side, name) for name in names}


@dataclass(frozen=True)
class CachePlan:
    """What becomes of the cache, or of a part of it, layer by layer, keys before values."""

    sides: tuple[SidePlan, ...]

    @property
    def token_bytes(self) -> int:
        """Bytes that a token takes in all layers, scales and offsets included."""
        return sum(side.token_bytes for side in self.sides)

    @property
    def dense_bytes(self) -> int:
        """Bytes that it takes in float16."""
        return sum(side.dense_bytes for side in self.sides)

    @property
    def kept_fraction(self) -> float:
        """Bytes kept, as a fraction of those in float16."""
        return self.token_bytes / self.dense_bytes

    @property
    def expected_kl(self) -> float:
        """What it is expected to cost, nats a token, where that was estimated."""
        return sum(side.expected_kl or 0.0 for side in self.sides)

    @property
    def is_unchanged(self) -> bool:
        """Whether everything is cached as it is."""
        return all(side.form == "full" for side in self.sides)

    def entries(self) -> dict[str, dict[str, Any]]:
        """`quantization_config.caches`: the entry of every map by its source."""
        return {side.source: side.entry() for side in self.sides if side.form != "full"}

    def to_json(self) -> dict[str, Any]:
        """The section `caches` of plan.json."""
        return {
            "kept_fraction": self.kept_fraction,
            "token_bytes": self.token_bytes,
            "sides": [side.to_json() for side in self.sides],
        }

    @classmethod
    def from_json(
        cls, raw: dict[str, Any], structure: Sequence[CachedSide], where: object
    ) -> CachePlan:
        """Read the section, perhaps edited by hand, and check it against a model.

        Raises:
            InputError: not a plan, or not one for this model; names the side and the field.
        """
        entries = json_field(raw, "sides", list, f"{where}, caches")
        if len(entries) != len(structure):
            raise InputError(
                "The plan of the cache is not one for this model.",
                where=where,
                observed=f"{len(entries)} sides",
                expected=f"{len(structure)}: keys and values of every layer",
            )
        return cls(
            tuple(
                _side_from(entry, side, f"{where}, caches, {side.side}s of {side.layer}")
                for entry, side in zip(entries, structure, strict=True)
            )
        )


def _side_from(entry: Any, side: CachedSide, where: str) -> SidePlan:
    if not isinstance(entry, dict):
        raise InputError("An entry of the plan is no object.", where=where, observed=entry)
    for name in ("layer", "side", "source"):
        value = json_field(entry, name, str, where)
        if value != getattr(side, name):
            raise _wrong(where, name, value, getattr(side, name))
    form = json_field(entry, "form", str, where)
    may_be_narrow = side.side == "key" and side.is_rotated
    known = ("full", "latent", *(["narrow"] if may_be_narrow else []))
    if form not in known:
        raise _wrong(where, "form", form, " or ".join(known))
    if form == "full":
        return SidePlan.full(side)
    groups, rank = (json_field(entry, name, int, where) for name in ("groups", "rank"))
    if groups < 1 or side.heads % groups:
        raise _wrong(where, "groups", groups, f"a number that divides {side.heads} heads")
    if form == "narrow" and groups != side.heads:
        raise _wrong(where, "groups", groups, f"{side.heads}: narrow keys are mapped by head")
    most = side.numbers // groups
    if not 1 <= rank <= most:
        raise _wrong(where, "rank", rank, f"1 to {most}")
    bits = json_field(entry, "bits", int, where, default=None)
    if bits is not None and bits not in LATENT_BITS:
        raise _wrong(where, "bits", bits, f"one of {', '.join(map(str, LATENT_BITS))}, or null")
    fed = bool(json_field(entry, "error_feedback", bool, where, default=None))
    kl = json_field(entry, "expected_kl", float, where, default=None)
    narrow = form == "narrow"
    return SidePlan.latent(side, groups, rank, bits, kl, narrow=narrow, error_feedback=fed)


def _wrong(where: str, name: str, observed: object, expected: object) -> InputError:
    return InputError(
        f"The field '{name}' of the plan is wrong.",
        where=where,
        observed=observed,
        expected=expected,
    )
