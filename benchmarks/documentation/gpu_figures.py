"""Figures of GPUs: layers, whole models, and what held of all claims."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from benchmarks.documentation.markdown import Figure, bold, table

_Json = dict[str, Any]
_WIDTHS = ("16", "8", "4")
_DENSE = "dense cuBLAS"
_GATHER = "gather, product, add, product"
_TWO = "two cuBLAS products"


def _steps(found: _Json) -> _Json:
    """The steps of the one card of a file."""
    (steps,) = found["cards"].values()
    of_card: _Json = steps
    return of_card


def _rows(found: _Json, step: str) -> dict[str, _Json]:
    """The rows of a step, by name."""
    rows: dict[str, _Json] = _steps(found).get(step, {}).get("rows", {})
    return rows


def _quickest_us(row: _Json, start: str) -> float:
    """Of the ways whose name starts so."""
    return min(way["us"] for way in row["ways"] if way["way"].startswith(start))


def _observed(row: _Json, claim: str) -> float:
    """What a claim of a row is."""
    number: float = next(item["observed"] for item in row["verdicts"] if item["claim"] == claim)
    return number


def _layers(found: _Json) -> list[str]:
    """One row of x through each layer: microseconds, and the ratios that are asked for."""

    def cells() -> Iterator[list[str]]:
        for name, row in _rows(found, "decode layers").items():
            ours = [f"{_quickest_us(row, f'{bits} bits'):.1f}" for bits in _WIDTHS]
            ratio = row["dense_bytes"] / row["kept_bytes"]
            over = _quickest_us(row, _DENSE) / _quickest_us(row, "16 bits")
            share = _observed(row, "share of the copy bandwidth")
            yield [
                name, f"{row['kept_bytes'] / 1e6:.0f}", f"{_quickest_us(row, _DENSE):.1f}",
                f"{_quickest_us(row, _GATHER):.1f}", *ours,
                f"{share:.2f}", f"{over:.2f} of {ratio:.2f}",
            ]  # fmt: skip

    headings = ["layer, 0.6 kept", "MB", "dense cuBLAS, us", "unfused, us", "ours fp16, us"]
    headings += ["int8, us", "int4, us", "fp16: of the copy bandwidth", "over dense, of the bytes"]
    return table(headings, cells())


def _before(first: _Json, found: _Json) -> list[str]:
    """The same layers in the first run on a GPU, with the kernels as they were then, and now."""

    def cells() -> Iterator[list[str]]:
        earlier = _rows(first, "decode layers")
        for name, row in _rows(found, "decode layers").items():
            pairs = [
                f"{_quickest_us(earlier[name], f'{bits} bits'):.1f}, "
                + bold(f"{_quickest_us(row, f'{bits} bits'):.1f}")
                for bits in _WIDTHS
            ]
            yield [name, *pairs]

    return table(["layer", "fp16, us", "int8, us", "int4, us"], cells())


def _prefill(first: _Json, found: _Json) -> list[str]:
    """2,048 rows through each layer."""

    def cells() -> Iterator[list[str]]:
        earlier = _rows(first, "prefill layers")
        for name, row in _rows(found, "prefill layers").items():
            was = [_quickest_us(earlier[name], f"{bits} bits") for bits in ("16", "4")]
            now = [_quickest_us(row, f"{bits} bits") for bits in ("16", "4")]
            pairs = [f"{a:.0f}, " + bold(f"{b:.0f}") for a, b in zip(was, now, strict=True)]
            yield [name, f"{_quickest_us(row, _TWO):.0f}", *pairs]

    return table(["layer", "two cuBLAS products, us", "ours fp16, us", "ours int4, us"], cells())


def _models(found: _Json) -> list[str]:
    """A token of the 8B shape by every way."""

    def cells() -> Iterator[list[str]]:
        rows = _rows(found, "decode 8B")
        dense = min(row["ms"] for name, row in rows.items() if name.startswith("dense"))
        for name, row in rows.items():
            yield [
                name, f"{row['read_bytes'] / 1e9:.2f}", f"{row['ms']:.2f}",
                f"{row['gb_per_s']:,.0f}", f"{row['share']:.2f}", f"{dense / row['ms']:.2f}",
            ]  # fmt: skip

    headings = ["way", "GB a token", "ms a token", "GB/s", "of the copy bandwidth", "over dense"]
    return table(headings, cells())


def _latent(found: _Json) -> list[str]:
    """Attention to a cache of 32k places by every form."""

    def cells() -> Iterator[list[str]]:
        for name, row in _rows(found, "latent attention").items():
            if not name.startswith("batch"):
                us = row["ways"]["ours"]["us"]
                over = row["ways"]["ours, dense"]["us"] / us
                share = _observed(row, "share of the copy bandwidth")
                yield [name, f"{us:.1f}", f"{share:.2f}", f"{over:.2f}"]

    return table(["form", "us", "of the copy bandwidth", "over our dense form"], cells())


def _claims(found: _Json) -> list[str]:
    """How each step ended, and how many of its claims hold."""

    def cells() -> Iterator[list[str]]:
        for name, told in _steps(found).items():
            verdicts = [
                item["verdict"] for row in told["rows"].values() for item in row.get("verdicts", [])
            ]
            counts = Counter(verdicts)
            shown = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
            yield [name, told["status"], f"{told['seconds']:.0f}", shown]

    return table(["step", "", "s", "claims"], cells(), left=2)


def _card(found: _Json) -> list[str]:
    """The card, and its own rates in the run."""
    rows = _rows(found, "card")
    bandwidth = rows["memory"]["bytes_per_s"] / 1e9
    name, rate = rows["machine"]["gpu"], rows["products"]["tflops"]
    return [f"{name}, copies of {bandwidth:,.0f} GB/s, products of {rate:.0f} TFLOP/s"]


_NOW, _BOTH = ("gpu",), ("gpu_first", "gpu")
GPU_FIGURES = {
    "gpu/card": Figure(_NOW, _card),
    "gpu/layers": Figure(_NOW, _layers),
    "gpu/before": Figure(_BOTH, _before),
    "gpu/prefill": Figure(_BOTH, _prefill),
    "gpu/models": Figure(_NOW, _models),
    "gpu/latent": Figure(_NOW, _latent),
    "gpu/claims": Figure(_NOW, _claims),
    "gpu/first-claims": Figure(("gpu_first",), _claims),
}
