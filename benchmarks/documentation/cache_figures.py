"""Figures of smaller KV caches: what each costs, and whether the plan knew."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.documentation.markdown import Figure, bold, only_row, table

_Json = dict[str, Any]


def _change(row: _Json, found: _Json) -> str:
    """Perplexity against that of the dense cache."""
    return f"{row['perplexity'] / found['dense']['perplexity'] - 1:+.1%}"


def _caches(found: _Json, second: _Json) -> list[str]:
    """Every cache on both texts, fewest bits first; ours in bold."""
    others = {row["cache"]: row for row in second["rows"]}

    def cells() -> Iterator[list[str]]:
        for row in sorted(found["rows"], key=lambda row: (row["bits"], row["kl"])):
            other = others.get(row["cache"])
            yield [
                bold(row["cache"], row["family"].startswith("ours")),
                "yes" if row["rebuilds"] else "",
                f"{row['bits']:.2f}",
                f"{row['perplexity']:.2f}",
                _change(row, found),
                f"{row['kl']:.4f}",
                "" if other is None else _change(other, second),
            ]

    headings = ["cache", "rebuilt", "bits", "perplexity", "of dense", "KL", "second text"]
    return table(headings, cells())


def _dense(found: _Json) -> list[str]:
    return [f"{found['dense']['perplexity']:.2f}"]


def _cost_of(cache: str) -> Figure:
    """What one cache does to perplexity."""
    return Figure(("cache",), lambda found: [_change(only_row(found["rows"], cache=cache), found)])


def _agreement(found: _Json) -> list[str]:
    """How well costs of single sides were known."""

    def cells() -> Iterator[list[str]]:
        for bits, own in found["agreement"].items():
            shown = ("rank_correlation", "median_ratio", "tenth_ratio", "ninetieth_ratio")
            yield [bits, str(own["sides"]), *(f"{own[name]:.2f}" for name in shown)]

    ratios = "measured / expected, median"
    headings = ["bits", "sides", "rank correlation", ratios, "a tenth below", "a tenth above"]
    return table(headings, cells())


def _budget(found: _Json) -> list[str]:
    """One budget for weights and cache, in bold, and splits of it by hand."""
    together = found["rows"][0]
    headings = ["split", "cached a token", "perplexity", "KL"]
    return table(
        headings,
        [
            [
                bold(row["name"], row is together),
                f"{row['cache_bytes_a_token']:,} B",
                f"{row['perplexity']:.2f}",
                f"{row['kl']:.4f}",
            ]
            for row in found["rows"]
        ],
    )


CACHE_FIGURES = {
    "cache/budget": Figure(("cache_budget",), _budget),
    "cache/caches": Figure(("cache", "cache_second"), _caches),
    "cache/dense": Figure(("cache",), _dense),
    "cache/ours": _cost_of("ranks and bits, 4.25"),
    "cache/rival": _cost_of("q4_0, Hadamard"),
    "cache/agreement": Figure(("planned_cache",), _agreement),
}
