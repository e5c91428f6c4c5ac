"""Figures of quality: perplexity, KL and accuracy against parameters and bytes."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.documentation.markdown import Figure, bold, megabytes, only_row, percent, table

_Json = dict[str, Any]
_OURS = "skipcat-kl"
_KEPT = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
_METHODS = {
    "svd-llm": "SVD-LLM",
    "svd-llm-v2": "SVD-LLM v2",
    "cat": "Cat",
    "skip": "Skip",
    "skipcat": "SkipCat",
    "mpifa": "PIFA with M",
    _OURS: "**ours**",
}
_EFFORTS = {
    "fast": "64 x 512 tokens, 16 windows for the gradients; each layer fitted once",
    "default": "128 x 512, 64 for the gradients; layers priced by running them, and fitted to what "
    "the compressed model feeds them; AVX2 alone, tests beside it",
    "max": "384 x 512, 128 for the gradients; AVX2 alone, other programs beside some of it",
}
# The bits of a plain quantiser, and the budget of ours that takes no more bytes.
_SAME_BYTES = {8: 0.5534, 6: 0.391, 5: 0.3555, 4: 0.2704, 3: 0.207}
_BITS = {5: "4 bits with offsets, which the model came in"}
_LOW_RANK = {
    **{f"{_OURS}:{kept:g}": f"ours, ranks alone, {kept:g} kept" for kept in (0.95, 0.9, 0.8, 0.6)},
    "skipcat:0.9": "SkipCat, 0.9 kept",
    "svd-llm:0.8": "whitened SVD, 0.8 kept",
}
_PLAIN = {"rtn": "RTN", "gptq": "GPTQ"}
_DIGITS_METHODS = {_OURS: "ours", "skipcat": "SkipCat", "svd-llm": "whitened SVD"}
_DIGITS_KEPT = (0.4, 0.2, 0.1)


def _quality(found: _Json) -> list[str]:
    """Dense, the two rivals and ours at both budgets, by the effort `default`."""
    rows = [_quality_row(found, "dense", 1.0, None, "dense")]
    for keep in (0.8, 0.7):
        rows += [
            _quality_row(found, "svd-llm", keep, "default", "whitened SVD (SVD-LLM)"),
            _quality_row(found, "skipcat", keep, "default", "Cat + Skip (SkipCat)"),
            _quality_row(found, _OURS, keep, "default", "**ours, `--effort default`**"),
        ]
    limit = found["settings"]["limit"]
    headings = ("method", "kept", "perplexity", "KL to dense", "top-1", f"ARC-Easy, first {limit}")
    return table(headings, rows)


def _quality_row(
    found: _Json, method: str, keep: float, effort: str | None, label: str
) -> list[str]:
    row = only_row(found["rows"], method=method, keep=keep, effort=effort)
    perplexity = bold(f"{row['perplexity']:.2f}", method == _OURS)
    kl = row["kl_to_dense"]
    questions = row["questions"]
    return [
        label,
        percent(row["kept_fraction"]) if method != "dense" else "100%",
        f"{perplexity} ± {row['perplexity_standard_error']:.2f}",
        f"{kl:.3f}" if kl else "0",
        percent(row["top1_to_dense"]),
        " ± ".join(map(percent, questions["acc"])) if questions else "",
    ]


def _methods(found: _Json) -> list[str]:
    """Perplexity of every method at every budget, by the effort `fast`."""
    rows = []
    for keep in _KEPT:
        cells = [f"{keep:g}"]
        for method in _METHODS:
            row = [r for r in found["rows"] if (r["method"], r["keep"]) == (method, keep)]
            row = [r for r in row if r["effort"] == "fast"]
            cells.append(bold(f"{row[0]['perplexity']:.2f}", method == _OURS) if row else "")
        rows.append(cells)
    return table(("kept", *_METHODS.values()), rows)


def _efforts(found: _Json) -> list[str]:
    """What each effort of ours gives and takes."""
    rows = []
    for effort, reads in _EFFORTS.items():
        at = [only_row(found["rows"], method=_OURS, keep=k, effort=effort) for k in (0.8, 0.7)]
        minutes = at[0]["compress_seconds"] / 60
        time = f"{minutes:.1f} min" if minutes < 10 else f"{minutes:.0f} min"
        rows.append([effort, reads, *(f"{row['perplexity']:.2f}" for row in at), time])
    headings = ("`--effort`", "reads", "perplexity at 0.8", "at 0.7", "time at 0.8, two cores")
    return table(headings, rows, left=2)


def _bytes(found: _Json) -> list[str]:
    """Plain quantisers, and ours in no more bytes."""
    rows = []
    for bits, budget in _SAME_BYTES.items():
        names = (f"rtn:{bits}", f"gptq:{bits}", f"ours:{budget}")
        rtn, gptq, ours = (only_row(found["rows"], name=name) for name in names)
        # Where perplexity cannot tell them apart, KL does.
        notes = [f" (KL {row['kl_to_dense']:.4f})" if bits == 8 else "" for row in (gptq, ours)]
        in_ours = bold(f"{ours['perplexity']:.2f}", ours["kl_to_dense"] < gptq["kl_to_dense"])
        rows.append(
            [
                _BITS.get(bits, f"{bits} bits"),
                megabytes(rtn["stored_bytes"], 1),
                f"{rtn['perplexity']:.2f}",
                f"{gptq['perplexity']:.2f}{notes[0]}",
                in_ours + notes[1],
            ]
        )
    return table(("plain quantiser", "MB", "RTN", "GPTQ", "**ours, in no more bytes**"), rows)


def _bits(found: _Json) -> list[str]:
    """Every row of the search, of the plain quantisers, and some low-rank methods, by bytes."""
    chosen = [row for row in found["low_rank"] if row["name"] in _LOW_RANK]
    rows = sorted([*found["rows"], *chosen], key=lambda row: -row["stored_bytes"])
    dense = only_row(found["rows"], name="dense")["stored_bytes"]
    headings = ("", "MB", "of float16", "perplexity", "KL to dense", "top-1")
    return table(headings, [_bits_row(row, dense) for row in rows])


def _bits_row(row: _Json, dense_bytes: int) -> list[str]:
    ours = row.get("method") == "ours"
    kl, top1 = row.get("kl_to_dense"), row.get("top1_to_dense")
    return [
        _bits_label(row["name"]),
        megabytes(row["stored_bytes"], 1),
        percent(row["stored_bytes"] / dense_bytes, 0),
        bold(f"{row['perplexity']:.2f}", ours),
        "" if kl is None else f"{kl:.4f}",
        "" if top1 is None else f"{top1:.1%}",
    ]


def _bits_label(name: str) -> str:
    method, _, size = name.partition(":")
    if name in _LOW_RANK:
        return f"{_LOW_RANK[name]}, float16"
    if method == "ours":
        return f"**ours, `--keep-bytes {size}`**"
    if method in _PLAIN:
        return f"{_PLAIN[method]}, " + ("`int4-b32-offset`" if size == "5" else f"{size} bits")
    if method == "dense":
        return "dense, float16"
    return f"SkipCat {size}, factors in {'int8' if method == 'factors-int8' else 'float16'}"


def _ablation(found: _Json) -> list[str]:
    """One idea after the other."""
    best = min(row["kl_to_dense"] for row in found["rows"])
    rows = [
        [
            row["variant"],
            *(
                bold(text, row["kl_to_dense"] == best)
                for text in (
                    f"{row['kl_to_dense']:.3f}",
                    f"{row['perplexity']:.1f}",
                    percent(row["top1_to_dense"]),
                )
            ),
        ]
        for row in found["rows"]
    ]
    dense = found["rows"][0]["dense_perplexity"]
    return table(("", "KL to dense, nats", f"perplexity (dense {dense:.2f})", "top-1"), rows)


def _rivals(found: _Json, ours: _Json) -> list[str]:
    """Perplexity of each rival's own code beside ours, at the same form and ranks."""
    rows = []
    for rival in ("svd-llm", "pifa", "swift-svd"):
        settings, measured = (found["rivals"][rival][key] for key in ("settings", "rows"))
        calibrated, tested = (
            f"{settings[f'{kind}windows']} x {settings[f'{kind}window_length']}"
            for kind in ("", "test_")
        )
        for place, row in enumerate(measured):
            if row["by"] != rival:
                continue
            # Of the same windows as the table of methods, so that its row is not measured again.
            same = (
                only_row(ours["rows"], method="svd-llm", keep=settings["keep"], effort="fast")
                if rival == "svd-llm"
                else measured[place + 1]
            )
            numbers = (f"{each['perplexity']:.2f}" for each in (row, same))
            rows.append([row["method"], calibrated, tested, *numbers])
    return table(("their code", "calibrated on", "tested on", "theirs", "ours"), rows)


def _vision(found: _Json) -> list[str]:
    """The digits: quantisers, ranks, and both, by bytes."""
    rows = [row for row in found["rows"] if "accuracy" in row and _digits_label(row)]
    rows.sort(key=lambda row: -row["stored_bytes"])
    cells = [
        [
            _digits_label(row),
            f"{row['stored_bytes'] / 1e3:.1f}",
            percent(row["stored_bytes"] / row["float16_bytes"], 0),
            percent(row["accuracy"]["value"]),
            f"{row['kl_nats_per_image']:.1e}",
            f"{row['top1_agreement']:.1%}",
        ]
        for row in rows
    ]
    headings = ("", "kB", "of float16", "accuracy", "KL to the original, nats an image")
    return table((*headings, "same answer"), cells)


def _digits_label(row: _Json) -> str:
    """What a row of the digits is called; empty for those that the page leaves out."""
    if "keep_bytes" in row:
        return f"**ours, ranks and bits**, `--keep-bytes {row['keep_bytes']:g}`"
    if "weights" in row:
        return f"{_PLAIN[row['method']]}, {row['weights']}"
    if row["keep_params"] not in _DIGITS_KEPT:
        return ""
    return f"{_DIGITS_METHODS[row['method']]}, {row['keep_params']:g} of the numbers kept"


def _times_dense(found: _Json) -> list[str]:
    row = only_row(found["rows"], method=_OURS, keep=0.8, effort="default")
    times = math.exp(row["log_perplexity_change"])
    error = times * row["log_perplexity_change_standard_error"]
    return [f"{times:.3f} times the perplexity, ± {error:.3f}"]


def _own_code(found: _Json, ours: _Json) -> list[str]:
    theirs = found["rivals"]["svd-llm"]["rows"][-1]["perplexity"]
    same = only_row(ours["rows"], method="svd-llm", keep=0.8, effort="fast")["perplexity"]
    return [f"SVD-LLM's own code gives {theirs:.2f} where ours gives {same:.2f}"]


def _factors(found: _Json) -> list[str]:
    names = ("factors-int8:0.8", "factors:0.8")
    int8, float16 = (only_row(found["rows"], name=name)["perplexity"] for name in names)
    return [f"perplexity {int8:.2f} against {float16:.2f}: {int8 / float16 - 1:+.2%}"]


def _budgets_met(found: _Json) -> list[str]:
    rows = [row for row in found["rows"] if row.get("budget_bytes")]
    shares = [row["stored_bytes"] / row["budget_bytes"] for row in rows]
    return [f"{min(shares):.2%} to {max(shares):.2%}"]


def _size_of(name: str) -> Figure:
    def lines(found: _Json) -> list[str]:
        row = only_row(found["rows"], name=name)
        return [f"{row['perplexity']:.2f} in {megabytes(row['stored_bytes'], 1)} MB"]

    return Figure(("pareto",), lines)


def _planned_groups(found: _Json) -> list[str]:
    groups = found["correlation"]["groups"]
    return [f"{groups['rank_correlation']:.3f} over {groups['count']} groups"]


def _planned_layers(found: _Json) -> list[str]:
    return [f"{found['correlation']['layers']['rank_correlation']:.2f}"]


def _planned_ratio(found: _Json) -> list[str]:
    return [f"{found['correlation']['groups']['median_measured_over_expected']:.1f}"]


QUALITY_FIGURES = {
    "quality": Figure(("quality",), _quality),
    "methods": Figure(("quality",), _methods),
    "efforts": Figure(("quality",), _efforts),
    "quality/times-dense": Figure(("quality",), _times_dense),
    "bytes": Figure(("pareto",), _bytes),
    "bytes/dense": _size_of("dense"),
    "bytes/skipcat": _size_of("factors:0.8"),
    "bits": Figure(("pareto",), _bits),
    "bits/factors": Figure(("pareto",), _factors),
    "bits/budgets": Figure(("pareto",), _budgets_met),
    "planned-cost/groups": Figure(("planned_cost",), _planned_groups),
    "planned-cost/layers": Figure(("planned_cost",), _planned_layers),
    "planned-cost/ratio": Figure(("planned_cost",), _planned_ratio),
    "ablation": Figure(("ablation",), _ablation),
    "rivals": Figure(("rival_code", "quality"), _rivals),
    "rivals/svd-llm": Figure(("rival_code", "quality"), _own_code),
    "vision": Figure(("vision",), _vision),
}
