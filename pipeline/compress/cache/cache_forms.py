"""Forms of a smaller cache by name, and the numbers of bits there are; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, replace

# What --cache-bits names: bits of a latent's numbers to choose from, None for float16.
LATENT_BITS = (2, 3, 4, 5, 6, 8)
CACHE_BITS: dict[str, tuple[int | None, ...]] = {
    "any": (None, *LATENT_BITS),
    "float": (None,),
    **{str(bits): (bits,) for bits in LATENT_BITS},
}


@dataclass(frozen=True)
class CacheForm:
    """What latents of keys and values are like, and who can read them.

    Attributes:
        summary: for the help.
        by_head: each head has latents of its own, and keys are mapped after they were turned: a
            query is mapped in their place, and nothing is rebuilt.
        even: keys and values of a layer are of one width, a multiple of this; 0 for any widths.
        least: heads that are wider stay at least as wide.
        rounds: their numbers may be of few bits.
    """

    summary: str
    by_head: bool = False
    even: int = 0
    least: int = 0
    rounds: bool = True

    @property
    def of_any_widths(self) -> CacheForm:
        """The same with widths as they come, which no runtime need take."""
        return replace(self, even=0, least=0)


DEFAULT_CACHE_FORM = "rebuilt"
CACHE_FORMS = {
    DEFAULT_CACHE_FORM: CacheForm("loses least; keys are rebuilt whenever they are read"),
    "narrow": CacheForm("narrower heads, of which nothing is rebuilt", by_head=True),
    "stock": CacheForm(
        "the same in float, keys and values of a layer of one width: what attention of any "
        "runtime reads, that of the profile cpu, too",
        by_head=True,
        even=8,
        least=24,  # TensorRT for RTX has kernels for 24, 32, 40, 48 and 64, and none for 8
        rounds=False,
    ),
}
# Positions that narrow keys are made for, unless more are asked for.
DEFAULT_CACHE_LENGTH = 2048
