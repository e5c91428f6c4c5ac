"""Predictions held against published figures: those that constants were fitted to, and others."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from pipeline.bench.fits import (
    Case,
    DecodeFit,
    Estimate,
    MemoryFit,
    PrefillFit,
    joules_per_token,
)
from pipeline.bench.published import EDGE_LLM, LLAMA_CPP, Kind

_KINDS: tuple[Kind, ...] = ("decode", "prefill", "memory", "energy")
_SHORT_PROMPT = 512
_Row = dict[str, Any]


def judged_figures() -> dict[str, Any]:
    """The constants, and what they make of every published figure, for the record."""
    fits = {engine: asdict(DecodeFit.of(engine)) for engine in (EDGE_LLM, LLAMA_CPP)}
    rows = [_judged(case) for kind in _KINDS for case in Case.published(kind)]
    return {"fits": fits, "prefill_fit": asdict(PrefillFit.of_edge_llm()), "published": rows}


def _judged(case: Case) -> _Row:
    """A figure beside what was predicted of it."""
    figure, estimate = case.figure, _estimate(case)
    return asdict(figure) | {
        "bytes_per_token": case.read_bytes,
        "bound_tokens_per_s": case.device.gb_per_s * 1e9 / case.read_bytes,
        "expected": estimate.expected,
        "low": estimate.low,
        "high": estimate.high,
        "error": estimate.expected / figure.value - 1,
        "is_inside": estimate.low <= figure.value <= estimate.high,
    }


def _estimate(case: Case) -> Estimate:
    """What is predicted of a figure; MLC is taken to be as quick as Edge-LLM."""
    if case.figure.kind == "prefill":
        return PrefillFit.of_edge_llm().prompt_ms(case.traffic, case.figure.tokens, case.device)
    if case.figure.kind == "memory":
        return MemoryFit.of_edge_llm().run_bytes(case.traffic, case.figure.tokens)
    fit = DecodeFit.of(LLAMA_CPP if case.figure.engine == LLAMA_CPP else EDGE_LLM)
    seconds = fit.seconds(case.read_bytes, case.traffic.kernels, case.device)
    speed = Estimate.around(1 / seconds, fit.spread)
    return speed if case.figure.kind == "decode" else joules_per_token(speed, case.device)


def _is(kind: Kind, engine: str) -> Callable[[_Row], bool]:
    return lambda row: (row["kind"], row["engine"]) == (kind, engine)


def _is_in_mode(mode: str) -> Callable[[_Row], bool]:
    return lambda row: row["kind"] == "decode" and row["device"].endswith(f"@{mode}")


# What was asked for: largest error on figures that nothing was fitted to; None for nothing.
_GROUPS: dict[str, tuple[float | None, Callable[[_Row], bool]]] = {
    "Edge-LLM 0.10 decode": (
        0.15,
        lambda row: _is("decode", EDGE_LLM)(row) and "0.9.0" not in row["source"],
    ),
    "Edge-LLM 0.9 decode": (
        None,
        lambda row: _is("decode", EDGE_LLM)(row) and "0.9.0" in row["source"],
    ),
    "llama.cpp decode": (0.25, _is("decode", LLAMA_CPP)),
    "llama.cpp at 7 W": (0.25, _is_in_mode("7w")),
    "llama.cpp at 25 W": (0.25, _is_in_mode("25w")),
    "prefill, 2,048 tokens": (
        0.25,
        lambda row: row["kind"] == "prefill" and row["tokens"] > _SHORT_PROMPT,
    ),
    "prefill, 61 tokens": (
        None,
        lambda row: row["kind"] == "prefill" and row["tokens"] <= _SHORT_PROMPT,
    ),
    "GPU memory": (0.15, lambda row: row["kind"] == "memory"),
    "joules for a token": (None, lambda row: row["kind"] == "energy"),
    "MLC decode, by Edge-LLM's constants": (None, _is("decode", "MLC")),
}


def verdicts(published: Sequence[_Row]) -> list[_Row]:
    """Errors of each group of figures that nothing was fitted to, and what their intervals hold."""
    found = []
    for name, (asked, belongs) in _GROUPS.items():
        rows = [row for row in published if belongs(row) and not row["fitted"]]
        errors = [abs(row["error"]) for row in rows]
        found.append(
            {
                "group": name,
                "figures": len(rows),
                "asked": asked,
                "met": None if asked is None else max(errors) <= asked,
                "worst_error": max(errors),
                "median_error": statistics.median(errors),
                "inside_share": sum(row["is_inside"] for row in rows) / len(rows),
            }
        )
    return found
