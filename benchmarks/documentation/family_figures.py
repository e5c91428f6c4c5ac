"""Figures of coverage: what becomes of every decoder family, stage by stage."""

from __future__ import annotations

from typing import Any

from benchmarks.documentation.markdown import Figure, table

_Json = dict[str, Any]
_PROFILES = ("cpu", "opset24", "compat")
_STAGES = ("compress", *_PROFILES)


def _name(row: _Json) -> str:
    return f"`{row['model_type']}`" + (f", {row['features']}" if row["features"] else "")


def _families(found: _Json) -> list[str]:
    """Families that at least one profile takes, with the largest error of each."""
    taken = [row for row in found["rows"] if any("error" in row[p] for p in _PROFILES)]
    rows = [[_name(row), *(_cell(row[s], found["tokens"]) for s in _STAGES)] for row in taken]
    return table(("family", "compress", *(f"`{profile}`" for profile in _PROFILES)), rows)


def _cell(end: _Json, tokens: int) -> str:
    if "refused" in end:
        return "refused"
    if "error" not in end:
        return "yes"
    read = end.get("tokens", tokens)
    return f"{end['error']:.0e}" + (f", to {read} tokens" if read < tokens else "")


def _refusals(found: _Json) -> list[str]:
    """Of every refused stage its reason, in the words that are printed."""
    rows = []
    for row in found["rows"]:
        reasons: dict[str, list[str]] = {}
        for stage in _STAGES:
            if "refused" in row[stage]:
                reasons.setdefault(row[stage]["refused"], []).append(stage)
        rows += [[_name(row), ", ".join(where), why] for why, where in reasons.items()]
    return table(("family", "refused by", "because"), rows, left=3)


def _count(found: _Json) -> list[str]:
    """How many configurations were tried."""
    return [str(len(found["rows"]))]


def _tokens(found: _Json) -> list[str]:
    """How many tokens were read."""
    return [str(found["tokens"])]


FAMILY_FIGURES = {
    "families": Figure(("families",), _families),
    "refused-families": Figure(("families",), _refusals),
    "family-count": Figure(("families",), _count),
    "family-tokens": Figure(("families",), _tokens),
}
