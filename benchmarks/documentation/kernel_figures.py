"""Figures of the kernels for the CPU."""

from __future__ import annotations

from typing import Any

from benchmarks.documentation.markdown import Figure, bold, megabytes, only_row, table
from benchmarks.documentation.speed_figures import (
    DECODE,
    KEPT,
    MEMORY_FOLDERS,
    MEMORY_TARGET,
    OFFSET,
    PREFILL,
)

_Json = dict[str, Any]


def _kept(two: _Json, one: _Json) -> list[str]:
    """The compressed model against the model, both in 8 bits, by one thread and by two."""
    rows = []
    for engine, label in {"ours cpu-int8": "as it is", KEPT: "0.8 kept"}.items():
        of = [only_row(found["rows"], engine=engine) for found in (one, two)]
        speeds = [f"{row[key]:,.0f}" for row in of for key in (DECODE, PREFILL)]
        rows.append([f"int8, {label}", *speeds])
    kinds = [f"{what}, {n}" for n in ("1 thread", "2 threads") for what in ("decode", "prefill")]
    return table(("tokens/s", *kinds), rows)


def _memory(before: _Json, found: _Json) -> list[str]:
    """Peak of every model, with ONNX Runtime's products and with ours."""
    rows = []
    for row in found["rows"]:
        old = only_row(before["rows"], folder=row["folder"])
        held = f"{megabytes(row['weight_bytes'])} + {megabytes(row['cache_bytes'])}"
        ratio = bold(f"{row['ratio']:.2f}", row["ratio"] <= MEMORY_TARGET)
        label = MEMORY_FOLDERS[row["folder"]]
        rows.append([label, held, f"{old['ratio']:.2f}", megabytes(row["peak_bytes"]), ratio])
    headings = ("", "weights + cache, MB", "before", "peak, MB", "/ (weights + cache)")
    return table(headings, rows)


def _narrow(found: _Json) -> list[str]:
    """The kernels without wide instructions."""
    row = only_row(found["rows"], engine=OFFSET)
    return [f"{row[DECODE]:.0f} and {row[PREFILL]:.0f}"]


def _before(two: _Json, one: _Json) -> list[str]:
    """By ONNX Runtime's products: int4-offset, and as a multiple of llama.cpp."""
    ours, theirs = (
        [only_row(found["rows"], engine=name) for found in (two, one)]
        for name in (OFFSET, "llama.cpp")
    )
    decode, prefill = (" and ".join(f"{row[key]:.0f}" for row in ours) for key in (DECODE, PREFILL))
    ratios = [f"{row[DECODE] / rival[DECODE]:.2f}" for row, rival in zip(ours, theirs, strict=True)]
    times = " and ".join(ratios)
    return [f"decode {decode} tokens/s, prefill {prefill}, decode {times} times llama.cpp's"]


def _products(found: _Json) -> list[str]:
    """Our kernels against ONNX Runtime's, by shape, by one thread and by two."""
    rows = []
    for one, two in zip(found["rows"][::2], found["rows"][1::2], strict=True):
        form = one["operator"].removeprefix("MatMulBlocks") or "middle"
        label = f"{one['bits']}, {one['block']}, {form.lower()}"
        rows.append(
            [
                label,
                f"{one['rows']:,} x {one['columns']:,}",
                *(
                    f"{row['us'][n]['kernel']:,.1f}, **{row['times_as_fast'][n]:.1f} x**"
                    for row in (one, two)
                    for n in ("1", "4", "128")
                ),
            ]
        )
    headings = ("bits, block, counted from", "N x K", "1 thread: 1 row", "4 rows", "128 rows")
    return table((*headings, "2 threads: 1 row", "4 rows", "128 rows"), rows, left=2)


KERNEL_FIGURES = {
    "products": Figure(("products",), _products),
    "kept": Figure(("generation_avx512", "generation_avx512_one"), _kept),
    "kernels/before": Figure(("generation_avx512_bodies", "generation_avx512_bodies_one"), _before),
    "kernels/memory": Figure(("cpu_memory", "cpu_memory_kernels"), _memory),
    "kernels/narrow": Figure(("generation_narrow",), _narrow),
}
